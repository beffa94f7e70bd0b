"""Which negative token id stands for which image in the prefix cache. Owned by the step thread."""

from __future__ import annotations

from asyncengine.images import PromptImages
from asyncengine.step.batch import Int32

_REMEMBERED = 1 << 14
_IDS = (1 << 31) - 1


class StandIns:
    """Gives images their ids: the same one to those that are the same to the model.

    An image that was not seen for long gets another id when it comes again: nothing is known of it then.

    Args:
        remembered: How many images are remembered.
    """

    def __init__(self, remembered: int = _REMEMBERED) -> None:
        self._remembered = remembered
        self._ids: dict[bytes, int] = {}  # least recently seen first
        self._given = 0

    def put(self, prompt: Int32, images: PromptImages) -> Int32:
        """A copy of the prompt with the ids of its images."""
        prompt = prompt.copy()
        for image in images.images:
            token_id = self._ids.pop(image.digest, 0)
            if not token_id:
                token_id = -1 - self._given % _IDS
                self._given += 1
            self._ids[image.digest] = token_id
            prompt[image.places] = token_id
        while len(self._ids) > self._remembered:
            del self._ids[next(iter(self._ids))]
        return prompt
