"""Which negative token id stands for which image, audio or video in the prefix cache. Owned by the step thread."""

from __future__ import annotations

from asyncengine.media import PromptMedia
from asyncengine.step.batch import Int32

_REMEMBERED = 1 << 14
_IDS = (1 << 31) - 1


class StandIns:
    """Gives images, audio and videos their ids: the same one to those that are the same to the model.

    One that was not seen for long gets another id when it comes again: nothing is known of it then.

    Args:
        remembered: How many are remembered.
    """

    def __init__(self, remembered: int = _REMEMBERED) -> None:
        self._remembered = remembered
        self._ids: dict[bytes, int] = {}  # least recently seen first
        self._given = 0

    def put(self, prompt: Int32, media: PromptMedia) -> Int32:
        """A copy of the prompt with the ids of what is in it."""
        prompt = prompt.copy()
        for item in media.items:
            token_id = self._ids.pop(item.digest, 0)
            if not token_id:
                token_id = -1 - self._given % _IDS
                self._given += 1
            self._ids[item.digest] = token_id
            prompt[item.places] = token_id
        while len(self._ids) > self._remembered:
            del self._ids[next(iter(self._ids))]
        return prompt
