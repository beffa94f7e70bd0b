"""Where the tokens of a prompt with images are rotated to."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from asyncengine.errors import InvalidRequestError
from asyncengine.step.batch import Int32, Int64


class Axes:
    """Where the tokens of a prompt with images are rotated to, as a model's own code says.

    Args:
        model_class: The class of its body, which has ``get_rope_index``.
        config: Its configuration.
    """

    def __init__(self, model_class: Any, config: Any) -> None:
        # The method needs the configuration alone, and must not keep the model's weights.
        self._bare = model_class.__new__(model_class)
        object.__setattr__(self._bare, "config", config)
        self._wanted = inspect.signature(model_class.get_rope_index).parameters

    def of(self, ids: Sequence[int], places: Int64, inputs: Sequence[Mapping[str, Any]]) -> Int32:
        """(axes, tokens) positions of a prompt.

        Args:
            ids: It.
            places: Of the tokens that stand for images.
            inputs: What the encoder takes of each image.
        """
        kinds = torch.zeros(1, len(ids), dtype=torch.int32)
        kinds[0, torch.from_numpy(places)] = 1
        given = {"input_ids": torch.tensor([list(ids)]), "mm_token_type_ids": kinds}
        for name in self._wanted:
            if isinstance(inputs[0].get(name), torch.Tensor):
                given[name] = torch.cat([each[name] for each in inputs])
        try:
            found, _ = self._bare.get_rope_index(**given)
        except Exception as error:
            raise InvalidRequestError(
                f"the model finds no positions for the prompt's images, which may stand beside each other: {error}"
            ) from error
        axes: Int32 = found[:, 0].numpy().astype(np.int32)
        return axes
