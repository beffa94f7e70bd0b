"""Rotary embeddings that change with the longest sequence of a batch: none is, or all are rotated as if they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from asyncengine import ConfigError, EngineConfig, UnsupportedModelError
from asyncengine.model import findings, rope_limits
from asyncengine.model.loader import TransformersLoader
from asyncengine.model.rope_limits import RopeLimit, length_for
from tests.model.checkpoints import config
from tests.model.decoder.test_program import batch_of, error, load, logits
from tests.model.gguf.files import write as write_gguf
from tests.model.test_findings import recalled

Checkpoint = Callable[..., Path]
ORIGINAL, LONGEST = 24, 512
LONG: dict[str, Any] = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0 + i / 8 for i in range(8)],
    "long_factor": [2.0 + i for i in range(8)], "original_max_position_embeddings": ORIGINAL,
}  # fmt: skip
PHI: dict[str, Any] = {
    "rope_parameters": LONG, "num_hidden_layers": 2, "original_max_position_embeddings": ORIGINAL,
}  # fmt: skip


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(findings, "cache_directory", lambda: tmp_path / "kept")


def tokens_of(length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(1, 199, length)


def expected(path: Path, tokens: np.ndarray, **rope: Any) -> torch.Tensor:
    """What transformers makes of a sequence; with other parameters of its rotation, if there are some."""
    own = AutoConfig.from_pretrained(path)
    own.rope_parameters = own.rope_parameters | rope
    model = AutoModelForCausalLM.from_pretrained(path, config=own, dtype=torch.float32)
    with torch.inference_mode():
        return model(torch.from_numpy(tokens)[None]).logits[0]


def test_a_model_that_would_change_is_served_as_far_as_it_does_not(checkpoint: Checkpoint) -> None:
    """The second load, which needs no model of transformers', agrees."""
    path, tokens = checkpoint("phi3", **PHI), tokens_of(ORIGINAL)
    for again in (False, True):
        loaded = load(path, dtype="float32")
        assert recalled(loaded) == again
        assert loaded.limits.max_single_sequence_length == ORIGINAL
        assert loaded.config.max_single_sequence_length == ORIGINAL
        [note] = loaded.notes
        assert note.startswith("positions: a sequence has at most 24 tokens") and "up to 512" in note
        assert error(logits(loaded, batch_of([(tokens, 0)])), expected(path, tokens)) < 1e-5
        loaded.model.close()


@pytest.mark.parametrize("backend", ["compiled", "transformers"])
def test_all_sequences_are_rotated_as_long_ones_where_some_may_be_long(backend: str, checkpoint: Checkpoint) -> None:
    path, (short, long) = checkpoint("phi3", **PHI), (tokens_of(ORIGINAL - 4), tokens_of(2 * ORIGINAL))
    for again in (False, backend == "compiled"):
        loaded = load(path, dtype="float32", decoder_backend=backend, max_single_sequence_length=128)
        assert recalled(loaded) == again
        assert loaded.limits.max_single_sequence_length == 128
        assert any("all sequences are rotated as those of more than 24 tokens" in note for note in loaded.notes)
        alone = logits(loaded, batch_of([(short, 0)]))
        beside = logits(loaded, batch_of([(short, 0), (long, 0)]))
        assert error(beside[len(short) :], expected(path, long)) < 1e-5
        assert error(beside[: len(short)], alone) < 1e-5
        assert error(alone, expected(path, short, short_factor=LONG["long_factor"])) < 1e-5
        assert error(alone, expected(path, short)) > 1e-2
        loaded.model.close()


def test_whoever_asks_for_no_more_than_does_not_change_is_told_nothing(checkpoint: Checkpoint) -> None:
    path, tokens = checkpoint("phi3", **PHI), tokens_of(9)
    loaded = load(path, dtype="float32", max_single_sequence_length=ORIGINAL)
    assert loaded.notes == ()
    assert error(logits(loaded, batch_of([(tokens, 0)])), expected(path, tokens)) < 1e-5
    loaded.model.close()
    with pytest.raises(ConfigError, match=r"max_single_sequence_length is 513; .* allows 1\.\.512"):
        TransformersLoader().check(EngineConfig(str(path), max_single_sequence_length=513), None)


def test_frequencies_that_do_not_change_are_no_limit(checkpoint: Checkpoint) -> None:
    """Those of dynamic NTK change behind what the configuration says is the longest sequence, and not before."""
    dynamic = {
        "rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": ORIGINAL,
    }  # fmt: skip
    path, tokens = checkpoint("llama", rope_parameters=dynamic, num_hidden_layers=2), tokens_of(60)
    loaded = load(path, dtype="float32")
    assert (loaded.limits.max_single_sequence_length, loaded.notes) == (LONGEST, ())
    assert error(logits(loaded, batch_of([(tokens, 0)])), expected(path, tokens)) < 1e-5
    loaded.model.close()
    alike = config("phi3", **PHI | {"rope_parameters": LONG | {"short_factor": LONG["long_factor"]}})
    assert rope_limits.limit_of(alike, LONGEST) is None
    assert rope_limits.limit_of(config("phi3", **PHI), LONGEST) == RopeLimit("longrope", ORIGINAL, True)
    alike.rope_parameters |= {"short_mscale": 1.0, "long_mscale": 1.25}
    assert rope_limits.limit_of(alike, LONGEST) == RopeLimit("longrope", ORIGINAL, False)
    odd = config("phi3", **PHI)
    odd.rope_parameters = {name: value for name, value in LONG.items() if name != "long_factor"}
    assert rope_limits.limit_of(odd, LONGEST) == RopeLimit("longrope", ORIGINAL, False)


def test_a_module_that_scales_long_texts_by_itself_is_refused_them(checkpoint: Checkpoint) -> None:
    """Phi-3.5-MoE's multiplies by another number for them."""
    path = checkpoint("phi3", **PHI | {"rope_parameters": LONG | {"short_mscale": 1.0, "long_mscale": 1.25}})
    loader = TransformersLoader()
    plan = loader.check(EngineConfig(str(path)), None)
    assert plan.details.max_length == ORIGINAL and "longer ones cannot be served" in plan.details.rope_note
    with pytest.raises(UnsupportedModelError, match=r"Phi3ForCausalLM has .* 'longrope'.* to at most 24"):
        loader.check(EngineConfig(str(path), max_single_sequence_length=ORIGINAL + 1), None)


def test_the_least_of_several_models_limits_all() -> None:
    lasting, other = RopeLimit("longrope", 100, True), RopeLimit("dynamic", 200, False)
    assert length_for(None, 500, [None, None]) == (500, "")
    assert length_for(None, 500, [None, lasting])[0] == 100
    assert "up to 500" in length_for(None, 500, [None, lasting])[1]
    assert length_for(None, 500, [lasting, other])[0] == 100
    assert "cannot be served" in length_for(None, 500, [lasting, other])[1]
    assert length_for(None, 90, [lasting]) == (90, "")
    assert length_for(501, 500, [None])[0] == 501  # which is refused


def test_a_gguf_file_has_the_limits_of_what_it_was_made_of(checkpoint: Checkpoint, tmp_path: Path) -> None:
    def factors(metadata: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        metadata["rope.scaling.original_context_length"] = ORIGINAL
        for length in ("short", "long"):
            tensors[f"rope_factors_{length}.weight"] = torch.tensor(LONG[f"{length}_factor"])

    file = write_gguf(tmp_path / "model.gguf", checkpoint("phi3", **PHI), "phi3", edit=factors)
    loaded = load(file, dtype="float32")
    assert loaded.limits.max_single_sequence_length == ORIGINAL
    assert any(note.startswith("positions: a sequence has at most 24 tokens") for note in loaded.notes)
    loaded.model.close()
