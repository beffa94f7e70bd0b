"""Bytes of weights as they are kept, reckoned before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from asyncengine.cli.estimate import read
from asyncengine.model.checkpoint import Checkpoint
from tests.model.decoder.test_program import LATENTS, load


@pytest.mark.parametrize("decoder_backend", ["compiled", "transformers"])
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_the_matrix_behind_latents_is_reckoned_as_it_is_kept(
    quantization: str, decoder_backend: str, checkpoint: Callable[..., Path]
) -> None:
    """It is multiplied with queries from its other side, with scales of its own, and is never in four bits."""
    # No size leaves room in a vector of eight numbers or more, or in what its codes of four bits are aligned to.
    sizes = {key: 128 for key in ("hidden_size", "q_lora_rank", "kv_lora_rank", "intermediate_size")}
    sizes["qk_nope_head_dim"] = 32
    path = checkpoint("minicpm3", vocab_size=208, **LATENTS["minicpm3"] | sizes)
    settings = {"quantization": quantization, "decoder_backend": decoder_backend}
    loaded = load(path, **settings)
    model: Any = loaded.model
    held = [built.nbytes for built in [model._program] if built is not None] or model.debug_call("weight_bytes", ())
    norms = [shape for shape in Checkpoint(path).shapes.values() if len(shape) == 1]
    # What is kept of a compiled step are matrices; buffers of modules are a few numbers.
    reckoned = read(loaded.config).weight_bytes - (decoder_backend == "compiled") * sum(size for (size,) in norms) * 2
    assert 0 <= held[0] - reckoned < 100
    loaded.model.close()
