"""The last look before a model serves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from asyncengine.errors import UnsupportedModelError
from asyncengine.model import architecture, built_model, findings, load_check
from asyncengine.model.attention.reference import TorchAttention
from asyncengine.model.decoder.parts import Blueprint, LayerParts, NormPart, Projection
from asyncengine.model.in_float32 import InFloat32
from asyncengine.model.runner import TorchModel
from asyncengine.model.trial_bound import Bound
from asyncengine.model.verification import Trial
from tests.model.decoder.test_program import load
from tests.model.stored import coded_checkpoints


def test_a_model_that_keeps_nothing_does_not_pass_by_its_first_piece(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint("llama"), dtype=torch.float32, attn_implementation=architecture.ATTENTION
    ).eval()
    trial = Trial.of(model, architecture.layers_of(model, None), torch.device("cpu"))
    assert trial.run(model, TorchAttention()) < 1e-3
    logits = TorchModel.logits

    def forgetful(runner: TorchModel, batch: Any) -> torch.Tensor:
        found = logits(runner, batch)
        return found if not batch.context_lens.any() else torch.zeros_like(found)

    monkeypatch.setattr(TorchModel, "logits", forgetful)
    with pytest.raises(UnsupportedModelError, match="does not compute over a paged KV cache"):
        trial.run(model, TorchAttention())


def _rotated(part: LayerParts, turn: Callable[[torch.Tensor], torch.Tensor]) -> LayerParts:
    assert part.rotation is not None
    cosines, sines = part.rotation
    angles = torch.arange(len(cosines))[:, None] * turn(torch.atan2(sines[1], cosines[1]))
    return replace(part, rotation=(angles.cos(), angles.sin()))


def _without_bias(part: Projection) -> Projection:
    linear = copy.copy(part.linear)
    linear._parameters = {**linear._parameters, "bias": None}
    return replace(part, linear=linear)


def _in_layers(change: Callable[[LayerParts], LayerParts], of: slice = slice(None)) -> Callable[[Blueprint], Blueprint]:
    def changed(parts: Blueprint) -> Blueprint:
        layers = list(parts.layers)
        layers[of] = map(change, layers[of])
        return replace(parts, layers=tuple(layers))

    return changed


def _norm(part: NormPart | None, **changes: Any) -> NormPart:
    assert part is not None
    return replace(part, **changes)


MISTAKES: dict[str, Callable[[Blueprint], Blueprint]] = {
    "branches times 1.02": lambda parts: replace(parts, residual_scale=1.02),
    "embeddings times 1.02": lambda parts: replace(parts, embedding_scale=1.02),
    "logits times 1.02": lambda parts: replace(parts, logit_scale=1.02),
    "a norm's epsilon": _in_layers(lambda part: replace(part, before_mlp=_norm(part.before_mlp, epsilon=2e-2))),
    "weights of norms 0.02 larger": _in_layers(
        lambda part: replace(part, before_mlp=_norm(part.before_mlp, offset=0.02))
    ),
    "a norm that takes the mean off": _in_layers(
        lambda part: replace(part, before_attention=_norm(part.before_attention, centred=True)), slice(1, 2)
    ),
    "no bias of one layer's values": _in_layers(
        lambda part: replace(part, qkv=(*part.qkv[:2], _without_bias(part.qkv[2]))), slice(1, 2)
    ),
    "frequencies 3 % higher": _in_layers(lambda part: _rotated(part, lambda angles: angles * 1.03)),
    "a quarter of the dimensions rotates": _in_layers(
        lambda part: _rotated(part, lambda angles: angles * (torch.arange(len(angles)) < len(angles) // 4))
    ),
    "queries times 1.05": _in_layers(lambda part: replace(part, query_scale=1.05)),
    "gelu for silu": lambda parts: replace(parts, activation=2),
}
"""In the parts of a model; none of them moves the logits by more than a fifth."""


NUMBERS = [("none", "float32"), ("none", "bfloat16"), ("none", "float16"), ("int8", "bfloat16"), ("int4", "bfloat16")]
SMALLEST = "branches times 1.02", "a norm's epsilon", "queries times 1.05"


def _in_short(mistake: str, quantization: str, dtype: str) -> bool:
    """All are made in the numbers that allow for least and for most, and the smallest in others that are common."""
    return (quantization, dtype) in (NUMBERS[0], NUMBERS[-1]) or (dtype == "bfloat16" and mistake in SMALLEST)


@pytest.mark.parametrize(
    ("mistake", "quantization", "dtype"),
    [
        pytest.param(mistake, *numbers, marks=() if _in_short(mistake, *numbers) else pytest.mark.long)
        for mistake in MISTAKES
        for numbers in NUMBERS
    ],
)
def test_a_small_mistake_in_a_models_parts_is_seen_in_any_numbers(
    mistake: str, quantization: str, dtype: str, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, settings = checkpoint("qwen2"), {"quantization": quantization, "dtype": dtype}
    _refused_with(mistake, monkeypatch, path, settings)


@pytest.mark.parametrize("method", ["gptq", pytest.param("awq", marks=pytest.mark.long)])
@pytest.mark.parametrize("mistake", ["branches times 1.02", "no bias of one layer's values", "queries times 1.05"])
def test_so_it_is_in_codes(
    mistake: str, method: str, checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = coded_checkpoints.write(tmp_path, checkpoint("qwen2"), method)
    _refused_with(mistake, monkeypatch, path, {"quantization": "int4", "dtype": "bfloat16"})


@pytest.mark.parametrize(
    "quantization", [*(pytest.param(name, marks=pytest.mark.long) for name in ("none", "int8")), "int4"]
)
@pytest.mark.parametrize("mistake", ["branches times 1.02", "queries times 1.05", "weights of norms 0.02 larger"])
def test_so_it_is_beside_experts(
    mistake: str, quantization: str, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _refused_with(mistake, monkeypatch, checkpoint("qwen3_moe"), {"quantization": quantization, "dtype": "bfloat16"})


_compiled = set[tuple[str, ...]]()
"""What was seen to run as a compiled step."""


def _refused_with(mistake: str, monkeypatch: pytest.MonkeyPatch, path: Path, settings: dict[str, str]) -> None:
    """Whether a model runs as a compiled step, but for a mistake in its parts."""
    if (model := (str(path), *settings.values())) not in _compiled:
        load(path, **settings).model.close()
        _compiled.add(model)
    found = built_model._Building._blueprint
    monkeypatch.setattr(findings, "recall", lambda place: None)
    monkeypatch.setattr(load_check, "recall", lambda place: None)
    monkeypatch.setattr(built_model._Building, "_blueprint", lambda self: MISTAKES[mistake](found(self)))
    with pytest.raises(UnsupportedModelError, match="cannot run as a compiled step"):
        load(path, **settings)


def test_one_token_that_a_router_sends_elsewhere_is_no_mistake() -> None:
    """Whatever comes behind it in its sequence is off as well, and so may be most tokens of both."""
    torch.manual_seed(0)
    expected = torch.randn(2, 12, 50)
    found = expected * 1.001
    found[0, 3:], found[1, 2:] = found[0, 3:] * 1.2, found[1, 2:] * 1.3
    assert Bound(0.01, sparse=True).error(found, expected, 6) < 0.002
    assert Bound(0.01).error(found, expected, 6) > 0.1
    found[:, 1:] = expected[:, 1:] * 1.05
    assert Bound(0.01, sparse=True).error(found, expected, 6) > 0.04
    assert Bound(0.01, sparse=True).error(found[:, :1], expected[:, :1], 1) < 0.002


def test_what_cannot_be_computed_in_float32_is_compared_as_the_model_computes_it(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*arguments: Any) -> Any:
        raise RuntimeError("expected scalar type BFloat16 but found Float")

    monkeypatch.setattr(InFloat32, "_linear", refuses)
    monkeypatch.setattr(findings, "recall", lambda place: None)
    monkeypatch.setattr(load_check, "recall", lambda place: None)
    loaded = load(checkpoint("qwen2"), quantization="int4", dtype="bfloat16")
    assert loaded.config.decoder_backend == "compiled"
    [note] = loaded.notes
    assert note.startswith("quantization: int4, rounded: logits of a trial are ")
    loaded.model.close()
