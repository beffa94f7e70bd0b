"""A last look before a model serves: does it, over the paged cache, compute what transformers computes?

Every assumption about an architecture that recording its attention cannot see (a bias added elsewhere, a state kept
elsewhere) shows here as wrong logits, and the model is refused instead of served wrongly.
"""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import numpy as np
import torch

from asyncengine.errors import UnsupportedModelError
from asyncengine.model.architecture import RecordedLayer, text_config
from asyncengine.model.attention.protocol import AttentionBackend
from asyncengine.model.decoder.program import CompiledDecoder
from asyncengine.model.widened import WidenedLinears, is_faster
from asyncengine.step.batch import StepBatch
from asyncengine.step.scheduler import Limits

_PAGE = 4
_TOKENS = 12
_CUTS = (0, 6, 10, 11, 12)
"""Two sequences of 12 tokens are computed in these pieces: prefills of 6 and 4 tokens, then single decodes."""

_TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}
"""Relative error of the median row. The median, because in low precision a router may send single tokens elsewhere."""


_COMPILED_TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 1.2e-1}
"""The same for the compiled step, which keeps more digits between its products than the model does."""
_INT8_TOLERANCE = 0.3
_FP8_TOLERANCE = 0.4
"""Of a KV cache or weights in fp8. Larger: the model's numbers do not fit into it."""


class Trial:
    """Two short random sequences, and what transformers makes of them.

    Attributes:
        layers: The attention layers of what is tried next.

    Args:
        model: With its weights.
        layers: Its attention layers.
        device: Where it is.
    """

    def __init__(self, model: Any, layers: list[RecordedLayer], device: torch.device) -> None:
        text = text_config(model.config)
        length = min(_TOKENS, getattr(text, "max_position_embeddings", None) or _TOKENS)
        self._ids = np.random.default_rng(0).integers(0, text.vocab_size, size=(2, length), dtype=np.int32)
        self.layers = layers
        self._device = device
        self._name = type(model).__name__
        self._dtype = next(model.parameters()).dtype
        self._expected = _plain(model, self._ids, device)

    def run(
        self,
        model: Any,
        backend: AttentionBackend,
        program: CompiledDecoder | None = None,
        kv_dtype: torch.dtype | None = None,
        fp8_weights: bool = False,
    ) -> float:
        """Compares paged with plain logits.

        Args:
            model: As it was given before; without its weights, if they are in `program`.
            backend: How it attends.
            program: Runs in the model's place.
            kv_dtype: Of keys and values, if it is not the model's.
            fp8_weights: Whether the model was quantised since.

        Returns:
            Relative error of the median row.

        Raises:
            UnsupportedModelError: They differ by more than rounding.
        """
        from asyncengine.model.runner import PagedLayers, TorchModel

        length = self._ids.shape[1]
        limits = Limits(2, length, 2 * length, _PAGE, 2 * -(-length // _PAGE))
        paged = PagedLayers(self.layers, backend, limits, kv_dtype or self._dtype, self._device)
        paged.allocate()
        try:
            runner = TorchModel(model, paged, None, self._device, program)  # type: ignore[arg-type]
            cuts = sorted({min(cut, length) for cut in _CUTS})
            with torch.inference_mode():
                pieces = [
                    runner.logits(_piece(self._ids, start, end)).reshape(2, end - start, -1)
                    for start, end in itertools.pairwise(cuts)
                ]
            found = torch.cat(pieces, dim=1).float()
        finally:
            paged.free()
        expected = self._expected
        error = ((found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-6)).flatten().median().item()
        if fp8_weights or kv_dtype not in (None, self._dtype):
            tolerance = _FP8_TOLERANCE
        elif program is None:
            tolerance = _TOLERANCE[self._dtype]
        else:
            tolerance = _INT8_TOLERANCE if program.int8 else _COMPILED_TOLERANCE[self._dtype]
        if not error <= tolerance:  # NaN is no less a failure
            raise UnsupportedModelError(
                f"{self._name} does not compute over a paged KV cache what it computes without one: relative "
                f"error {error:.2g}, allowed {tolerance:g} in {'fp8' if fp8_weights else kv_dtype or self._dtype}"
            )
        return float(error)


def _plain(model: Any, ids: Any, device: torch.device) -> torch.Tensor:
    """Logits by transformers alone; (2, tokens, vocabulary)."""
    ours = model.config._attn_implementation
    model.set_attn_implementation("eager")
    faster = WidenedLinears() if is_faster(device) else contextlib.nullcontext()
    try:
        with torch.inference_mode(), faster:
            logits: torch.Tensor = model(
                input_ids=torch.from_numpy(ids.astype(np.int64)).to(device), use_cache=False
            ).logits.float()
        return logits
    finally:
        model.set_attn_implementation(ours)


def _piece(ids: Any, start: int, end: int) -> StepBatch:
    """Tokens start:end of both sequences as one step; every token's logits are wanted."""
    count, blocks = end - start, -(-ids.shape[1] // _PAGE)
    tables = np.arange(2 * blocks, dtype=np.int32).reshape(2, blocks)
    positions = np.tile(np.arange(start, end), 2)
    rows = np.repeat([0, 1], count)
    return StepBatch(
        token_ids=ids[:, start:end].reshape(-1).copy(),
        positions=positions.astype(np.int32),
        query_start=np.array([0, count, 2 * count], dtype=np.int32),
        context_lens=np.full(2, start, dtype=np.int32),
        block_tables=tables,
        slot_mapping=tables[rows, positions // _PAGE].astype(np.int64) * _PAGE + positions % _PAGE,
        sample_index=np.arange(2 * count, dtype=np.int64),
        sample_slots=np.zeros(2 * count, dtype=np.int64),
        sample_positions=np.zeros(2 * count, dtype=np.int64),
        copies=np.empty((0, 2), dtype=np.int64),
        num_decodes=2 if count == 1 else 0,
    )
