"""Prompts of any length one behind the other, in one row without padding; each attends to itself alone."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from asyncengine.model.attention_modules import ATTENTION, attach
from asyncengine.step.batch import Int32, Int64

_HARMLESS = {"attention_mask", "position_ids", "position_embeddings", "cu_seq_lens_q", "cu_seq_lens_k"}
"""Tensors that modules pass along to the attention although it has no use for them here."""


class UnpackableError(Exception):
    """A model cannot be run over prompts in one row."""


class Packing:
    """Runs a model over prompts in one row. Its attention is replaced for good, unless `undo` is called.

    Args:
        model: Of transformers, with its weights.
        device: Where it is.
        first_position: That of a prompt's first token. Some models begin behind the token of padding, which is one
            less, and do not count that token wherever it is.
        takes_types: Whether tokens of a second text are told apart.

    Raises:
        UnpackableError: The model cannot be run so, as far as that shows before it is.
    """

    def __init__(self, model: Any, device: torch.device, first_position: int, takes_types: bool) -> None:
        taken = inspect.signature(model.forward).parameters
        if "position_ids" not in taken or not model._can_set_attn_implementation():
            raise UnpackableError("it has positions or attention of its own")
        self._model, self._device = model, device
        self._first = first_position
        self._takes_types = takes_types
        self._bands: dict[tuple[int, int], torch.Tensor] = {}
        self._runs: list[tuple[int, int, int]] = []
        self._before = model.config._attn_implementation
        model.set_attn_implementation(ATTENTION)
        attach(dict.fromkeys(model.modules(), self._attend))

    def undo(self) -> None:
        """Lets the model attend as before."""
        self._model.set_attn_implementation(self._before)

    def run(self, prompts: Sequence[Int32], types: Sequence[Int32] | None) -> list[torch.Tensor]:
        """The hidden states of each prompt, (tokens, hidden).

        Args:
            prompts: Token ids.
            types: Which of two texts each token is of.
        """
        order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))  # those of one length are neighbours
        lengths = [len(prompts[row]) for row in order]
        self._runs, at = [], 0
        for length, alike in itertools.groupby(lengths):
            count = len(list(alike))
            self._runs.append((at, count, length))
            at += count * length
        given = {
            "input_ids": np.concatenate([prompts[row] for row in order]),
            "position_ids": np.concatenate([self._positions(prompts[row]) for row in order]),
        }
        if types is not None and self._takes_types:
            given["token_type_ids"] = np.concatenate([types[row] for row in order])
        try:
            output = self._model(**{name: self._sent(values) for name, values in given.items()})
        finally:
            self._bands.clear()
        found: list[torch.Tensor] = [torch.empty(0)] * len(prompts)
        for row, hidden in zip(order, output.last_hidden_state[0].split(lengths), strict=True):
            found[row] = hidden
        return found

    def _positions(self, prompt: Int32) -> Int64:
        if not self._first:
            return np.arange(len(prompt))
        counts = prompt != self._first - 1
        positions: Int64 = np.cumsum(counts) * counts + self._first - 1
        return positions

    def _band(self, length: int, window: int) -> torch.Tensor:
        """(length, length), True where a token is less than `window` from another; the same in all layers."""
        if (length, window) not in self._bands:
            self._bands[length, window] = band(length, window, self._device)
        return self._bands[length, window]

    def _sent(self, values: Int32 | Int64) -> torch.Tensor:
        return torch.from_numpy(values.astype(np.int64))[None].to(self._device)

    def _attend(
        self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kwargs: dict[str, Any]
    ) -> torch.Tensor:
        """(tokens, heads, dim) in and out."""
        tensors = (name for name, given in kwargs.items() if isinstance(given, (torch.Tensor, list, tuple)))
        strange = sorted({*tensors} - _HARMLESS) + ["softcap"] * bool(kwargs.get("softcap"))
        if strange:
            raise UnpackableError(f"its attention is told {', '.join(strange)}")
        window, grouped = kwargs.get("sliding_window"), query.shape[1] != key.shape[1]
        outputs = []
        for first, count, length in self._runs:
            q, k, v = (
                each[first : first + count * length].view(count, length, *each.shape[1:]).transpose(1, 2)
                for each in (query, key, value)
            )
            mask = None if window is None or length <= window else self._band(length, window)
            attended = nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, scale=kwargs.get("scaling"), enable_gqa=grouped
            )
            outputs.append(attended.transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs)


def band(length: int, window: int, device: torch.device) -> torch.Tensor:
    """(length, length), True where a token is less than `window` from another."""
    near = torch.ones(length, length, dtype=torch.bool, device=device)
    return near.triu_(1 - window).tril_(window - 1)
