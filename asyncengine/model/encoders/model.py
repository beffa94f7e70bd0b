"""`EncoderModel`: whole prompts through a model that reads in both directions. Owned by the step thread."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from asyncengine.generation import SamplingParams
from asyncengine.model import memory
from asyncengine.model.debug_functions import debug_function
from asyncengine.model.encoders.packing import Packing
from asyncengine.model.letting_go import take_apart
from asyncengine.model.lost_device import is_lost
from asyncengine.model.weight_writer import replace_weights
from asyncengine.step.batch import NO_TOKENS, Float32, Int32, StepBatch, StepTokens

_LEAST_FILLED = 0.75
"""A group's shortest prompt is at least so long, in parts of its longest: what is computed for padding is lost."""


class EncoderModel:
    """As `asyncengine.step.model.Model`, over a model of transformers that has no cache.

    Prompts are computed in one row, or those of similar length together, padded to the longest of them.

    Args:
        model: With its weights, on its device. Gives out `last_hidden_state`, or `logits` of a classification head.
        device: That.
        padding: The token that shorter prompts end with; None if the model cannot tell it from others: prompts of
            different length are not computed together then.
        packing: Computes them in one row; None if the model does not allow that.
        takes_types: Whether tokens of a second text are told apart.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        padding: int | None,
        packing: Packing | None = None,
        takes_types: bool = True,
    ) -> None:
        self._model: nn.Module | None = model
        self._device = device
        self._padding, self._packing = padding, packing
        self._takes_mask = "attention_mask" in inspect.signature(model.forward).parameters
        self._takes_types = takes_types

    def place(self, slot: int, params: SamplingParams, branch: int, prompt: Int32, output: Int32) -> None:
        """As the protocol says: nothing is drawn."""

    def execute(self, batch: StepBatch) -> StepTokens:
        """As the protocol says. Each row is a whole prompt, and each has one of `batch.pool_spans`."""
        starts = batch.query_start.astype(np.int64)
        types = batch.token_types
        outputs = self.outputs(
            np.split(batch.token_ids, starts[1:-1]), None if types is None else np.split(types, starts[1:-1])
        )
        pooled = []
        for first, end in batch.pool_spans.tolist():
            row = int(np.searchsorted(starts, first, side="right")) - 1
            output = outputs[row]
            if output.dim() == 1:  # of a head, which has pooled already
                pooled.append(output)
            else:
                pooled.append(output[first - starts[row] : end - starts[row]].sum(dim=0, dtype=torch.float32))
        sums: Float32 = torch.stack(pooled).float().cpu().numpy()
        return StepTokens(NO_TOKENS, pooled=sums)

    @torch.inference_mode()
    def outputs(self, prompts: Sequence[Int32], types: Sequence[Int32] | None = None) -> list[torch.Tensor]:
        """What the model gives out for each of some prompts: (tokens, hidden), or (labels,) of a head.

        Args:
            prompts: Token ids.
            types: Which of two texts each token is of.
        """
        if self._packing is not None:
            return self._packing.run(prompts, types)
        found: list[torch.Tensor] = [torch.empty(0)] * len(prompts)
        for group in self._groups([len(prompt) for prompt in prompts]):
            for row, output in zip(group, self.padded(group, prompts, types), strict=True):
                found[row] = output[: len(prompts[row])] if output.dim() == 2 else output
        return found

    def _groups(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Prompts that are computed together, by their place; the longest first."""
        least = 1.0 if self._padding is None else _LEAST_FILLED
        group: list[int] = []
        for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
            if group and lengths[row] < least * lengths[group[0]]:
                yield group
                group = []
            group.append(row)
        if group:
            yield group

    def padded(self, rows: Sequence[int], prompts: Sequence[Int32], types: Sequence[Int32] | None) -> torch.Tensor:
        """What it gives out for some of the prompts together: (rows, longest, hidden) or (rows, labels)."""
        assert self._model is not None
        lengths = np.array([len(prompts[row]) for row in rows])
        there = np.arange(lengths.max()) < lengths[:, None]
        given = {"input_ids": _filled(there, [prompts[row] for row in rows], self._padding or 0)}
        if self._takes_mask:
            given["attention_mask"] = there
        if types is not None and self._takes_types:
            given["token_type_ids"] = _filled(there, [types[row] for row in rows], 0)
        output = self._model(**{name: self._sent(values) for name, values in given.items()})
        logits: torch.Tensor | None = getattr(output, "logits", None)
        hidden: torch.Tensor = output.last_hidden_state if logits is None else logits
        return hidden

    def _sent(self, values: Any) -> torch.Tensor:
        return torch.from_numpy(values.astype(np.int64)).to(self._device)

    def device_lost(self, error: BaseException) -> bool:
        """As `asyncengine.model.lost_device.is_lost`."""
        return is_lost(self._device, error)

    def sleep(self) -> None:
        """There is no cache whose memory could be given back; on CUDA the weights wait in host memory."""
        assert self._model is not None
        if self._device.type == "cuda":
            self._model.to("cpu")
        memory.give_back()

    def wake(self) -> None:
        """Undoes `sleep`."""
        assert self._model is not None
        self._model.to(self._device)

    def update_weights(self, weights: Mapping[str, Any]) -> None:
        """As the protocol says."""
        assert self._model is not None
        replace_weights(self._model, weights, {}, {})

    def debug_call(self, name: str, args: tuple[Any, ...]) -> list[Any]:
        """Calls ``package.module:function`` with the model first, or one of `DEBUG_FUNCTIONS`."""
        assert self._model is not None
        return [debug_function(name)(self._model, *args)]

    def close(self) -> None:
        """Lets the weights go and returns their memory."""
        if self._model is not None:
            take_apart(self._model)
            self._model = self._packing = None
            memory.give_back()


def _filled(there: Any, rows: Sequence[Int32], otherwise: int) -> Any:
    """(rows, longest) of rows of different length."""
    values = np.full(there.shape, otherwise, dtype=np.int64)
    values[there] = np.concatenate(rows)
    return values
