"""Where the tokens of a prompt with images or videos are rotated to."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from asyncengine.errors import InvalidRequestError
from asyncengine.media import Kind, MediaItem
from asyncengine.step.batch import Int32

_TYPES: dict[Kind, int] = {"image": 1, "video": 2}
"""What transformers has for tokens that stand for them."""


class Axes:
    """Where the tokens of a prompt with images or videos are rotated to, as a model's own code says.

    Args:
        model_class: The class of its body, which has ``get_rope_index``.
        config: Its configuration.
    """

    def __init__(self, model_class: Any, config: Any) -> None:
        # The method needs the configuration alone, and must not keep the model's weights.
        self._bare = model_class.__new__(model_class)
        object.__setattr__(self._bare, "config", config)
        self._wanted = inspect.signature(model_class.get_rope_index).parameters

    def of(self, ids: Sequence[int], items: Sequence[MediaItem]) -> Int32 | None:
        """(axes, tokens) positions of a prompt; None if nothing in it is seen.

        Args:
            ids: It.
            items: Its images, audio and videos; those of one kind in their order.
        """
        seen = [item for item in items if item.kind in _TYPES]
        if not seen:
            return None
        kinds = torch.zeros(1, len(ids), dtype=torch.int32)
        for item in seen:
            kinds[0, torch.from_numpy(item.places)] = _TYPES[item.kind]
        given = {"input_ids": torch.tensor([list(ids)]), "mm_token_type_ids": kinds}
        for name in self._wanted:
            found = [torch.as_tensor(item.inputs[name]) for item in seen if item.inputs.get(name) is not None]
            if found:
                given[name] = torch.cat(found)
        try:
            found, _ = self._bare.get_rope_index(**given)
        except Exception as error:
            raise InvalidRequestError(
                "the model finds no positions for the prompt's images or videos, which may stand beside each other: "
                f"{error}"
            ) from error
        axes: Int32 = found[:, 0].numpy().astype(np.int32)
        return axes
