"""Whole models through the fused kernels against transformers, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from asyncengine.errors import UnsupportedModelError
from asyncengine.model import architecture, verification
from asyncengine.model.attention.reference import TorchAttention
from asyncengine.model.attention_modules import hooked
from asyncengine.model.decoder.blueprint import recognise
from asyncengine.model.decoder.parts import NotRecognised
from asyncengine.model.fused.decoder import FusedDecoder
from asyncengine.model.fused.launches import load_kernels
from asyncengine.model.fused.tiles import MOST_TOKENS, SOME_TOKENS
from asyncengine.model.paged_layers import PagedLayers
from asyncengine.model.quantised.four_bit_experts import use_kernels
from asyncengine.model.quantised.four_bit_linear import round_layers
from asyncengine.model.quantised.four_bits import FourBits
from asyncengine.model.runner import TorchModel
from asyncengine.model.verification import Trial, piece
from asyncengine.step.limits import Limits
from tests.model.fused.interpreted import DEVICE, large_tiles, require_triton
from tests.model.live_bytes import LiveBytes

require_triton()

Checkpoint = Callable[..., Path]


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    large_tiles(monkeypatch)


class Case:
    """A model of transformers, its fused kernels, and a runner with a KV cache."""

    def __init__(self, path: Path, dtype: torch.dtype = torch.float32, four_bits: bool = False) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation=architecture.ATTENTION
        )
        self.model = self.model.to(DEVICE).eval().requires_grad_(False)
        if four_bits:
            round_layers(self.model)
        recorded = architecture.record(self.model)
        self.layers = recorded.attention
        self.trial = Trial.of(self.model, recorded, DEVICE)
        self.fused = FusedDecoder(recognise(self.model, self.layers, 64, whole_experts=True))
        self.backend = TorchAttention()
        self.paged = PagedLayers(self.layers, self.backend, Limits(2, 12, 24, 4, 6), dtype, DEVICE)
        self.paged.allocate()
        self.runner = TorchModel(self.model, self.paged, None, DEVICE)  # type: ignore[arg-type]
        self.runner.use_fused(self.fused)

    @torch.inference_mode()
    def error(self) -> float:
        """The largest of 9 tokens: a step of 8, and one of a single token."""
        ids, expected = self.trial._ids[:, :5], self.trial._expected[:, :5]
        together = self.runner.logits(piece(ids, 0, 4)).reshape(2, 4, -1)
        alone = self.runner.logits(piece(ids[:1], 4, 5))
        found, wanted = (
            torch.cat((together.flatten(0, 1), alone)),
            torch.cat((expected[:, :4].flatten(0, 1), expected[0, 4:])),
        )
        return float(((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())

    @torch.inference_mode()
    def error_of_many(self) -> float:
        """The largest of the 24 tokens of a step."""
        found, wanted = self.runner.logits(piece(self.trial._ids, 0, 12)), self.trial._expected.flatten(0, 1)
        return float(((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())


@pytest.mark.parametrize(
    "name",
    [
        "llama", "gemma3_text", "olmo2", "cohere", "glm4", "phi3", "opt", "gpt2", "mixtral", "gpt_oss", "smollm3",
    ],
)  # fmt: skip
@pytest.mark.in_short("llama", "gemma3_text", "gpt_oss", "mixtral", "gpt2")
def test_logits_are_those_of_transformers(name: str, checkpoint: Checkpoint) -> None:
    count = 1 + (name in ("llama", "gemma3_text", "gpt_oss", "smollm3"))
    changes: dict[str, Any] = {"n_layer" if name == "gpt2" else "num_hidden_layers": count}
    case = Case(checkpoint(name, **changes, **({"no_rope_layers": [1, 0]} if name == "smollm3" else {})))
    forwards: list[int] = []
    case.model.get_decoder().register_forward_hook(lambda *_: forwards.append(1))
    assert case.error() < 1e-5
    assert case.error_of_many() < 1e-5
    assert forwards == []  # nothing of it is by transformers' modules, but for experts


@pytest.mark.parametrize("name", ["llama", "phi3", "opt"])
@pytest.mark.in_short("llama")
def test_layers_of_four_bits_are_multiplied_by_their_own_kernels(
    name: str, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of phi3 a part of a layer at a time; with biases in opt."""
    case = Case(checkpoint(name, num_hidden_layers=1), four_bits=True)
    forwards: list[int] = []
    case.model.get_decoder().register_forward_hook(lambda *_: forwards.append(1))
    monkeypatch.setattr(FourBits, "weight", None)  # of no codes numbers are made
    assert case.error() < 1e-5
    assert case.error_of_many() < 1e-5
    assert forwards == []


def test_without_a_kernel_for_four_bits_there_are_no_fused_ones(checkpoint: Checkpoint) -> None:
    case = Case(checkpoint("llama", num_hidden_layers=1), four_bits=True)
    use_kernels(case.model, False)
    with pytest.raises(NotRecognised, match="four bits"):
        FusedDecoder(recognise(case.model, case.layers, 64))


def test_bfloat16_is_as_near_as_transformers_in_bfloat16(checkpoint: Checkpoint) -> None:
    case = Case(checkpoint("llama", num_hidden_layers=1), torch.bfloat16)
    assert 1e-4 < case.error() < 0.1
    assert 1e-4 < case.error_of_many() < 0.1


def test_token_counts_that_are_not_for_it_are_left_to_transformers(checkpoint: Checkpoint) -> None:
    fused = Case(checkpoint("llama", num_hidden_layers=1)).fused
    counts = (0, 1, 3, MOST_TOKENS, MOST_TOKENS + 1)
    assert [fused.serves(tokens) for tokens in counts] == [False, True, True, True, True]
    fused.rest()
    assert not any(fused.serves(tokens) for tokens in counts)
    fused.use({1, 2})
    assert [fused.serves(tokens) for tokens in counts] == [False, True, False, False, False]
    fused.use({16})  # and any more, as long as it is not said how those are run
    assert [fused.serves(tokens) for tokens in (2, 8, 9, SOME_TOKENS, 513)] == [True, False, True, True, True]
    fused.use({SOME_TOKENS + 1}, False)
    fused.use({1}, False)
    assert [fused.serves(tokens) for tokens in (1, 2, 9, SOME_TOKENS, 9999)] == [False, True, True, True, False]


def test_no_samples_make_no_logits(checkpoint: Checkpoint) -> None:
    case = Case(checkpoint("llama", num_hidden_layers=1))
    batch = piece(case.trial._ids[:1], 0, 1)
    ids, positions = (torch.tensor([[0]], device=DEVICE) for _ in range(2))
    with torch.inference_mode():
        case.runner.begin(batch)
        logits = case.runner.forward(ids, positions, torch.empty(0, dtype=torch.long, device=DEVICE))
    assert logits.shape == (0, 199)


def test_layers_that_rotate_alike_share_a_table_wherever_it_is(checkpoint: Checkpoint) -> None:
    fused = Case(checkpoint("gemma3_text", num_hidden_layers=3)).fused
    assert len(fused._tables) == 2  # of full attention, and of sliding attention
    fused.move(torch.device("meta"))
    assert {tensor.device.type for table in fused._tables.values() for tensor in table} == {"meta"}
    assert len({id(layer._positioned._table) for layer in fused._layers}) == 2


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "phi3", "gpt2"])
def test_many_tokens_take_no_more_memory_than_the_modules_do(
    name: str, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A load measures what the modules take, and leaves the rest to the KV cache."""
    case = Case(checkpoint(name))

    class Launched:  # the interpreter would copy what it is given
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *_, **__: None

    for kernel in ("norm_rows", "rotate", "activate"):
        monkeypatch.setattr(load_kernels(), kernel, Launched())
    ids, index = torch.zeros(1, 64, dtype=torch.long, device=DEVICE), torch.arange(55, 64, device=DEVICE)
    positions = torch.arange(64, device=DEVICE)[None]

    def nothing(module: Any, query: Any, key: Any, value: Any, kwargs: Any) -> Any:
        return query.new_zeros(query.shape[0], query.shape[1], value.shape[-1])

    peaks = []
    with hooked({layer.module: nothing for layer in case.layers}), torch.inference_mode():
        for forward in (case.runner._forward, case.fused.forward):
            forward(ids, positions, index)
            with LiveBytes() as live:
                forward(ids, positions, index)
            peaks.append(live.peak)
    assert 0 < peaks[1] <= peaks[0]


def test_weights_in_another_order_are_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(NotRecognised, match="alternate in one layer"):
        Case(checkpoint("gpt_neox", num_hidden_layers=1))


def test_a_trial_judges_a_single_token_several_and_many_apart(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "_FUSED_TOKENS", 4)
    case = Case(checkpoint("llama", num_hidden_layers=1))
    right = case.fused.forward
    for tokens in (1, MOST_TOKENS, 24):

        def wrong(ids: torch.Tensor, *others: torch.Tensor, tokens: int = tokens) -> torch.Tensor:
            return right(ids, *others) * (1.01 if ids.shape[1] == tokens else 1.0)

        monkeypatch.setattr(case.fused, "forward", wrong)
        with pytest.raises(UnsupportedModelError, match=r"not compute over a paged KV cache .* relative error 0\.01"):
            case.trial.run_fused(case.model, case.backend, case.fused)


@pytest.mark.parametrize(("error", "modules", "allowed"), [(0.2, 0.07, None), (0.2, 0.06, 0.18), (0.5, 0.3, 0.4)])
def test_weights_in_fp8_are_judged_by_how_far_off_the_modules_are(
    error: float, modules: float, allowed: float | None, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp8 a number that is rounded otherwise gets another code in each layer, so the more layers, the farther."""
    case = Case(checkpoint("llama", num_hidden_layers=1))
    errors = {True: error, False: modules}
    monkeypatch.setattr(case.trial, "_error", lambda *_, fused=None: errors[fused is not None])
    if allowed is None:
        assert case.trial.run_fused(case.model, case.backend, case.fused, fp8_weights=True) == error
    else:
        with pytest.raises(UnsupportedModelError, match=f"relative error {error:g}, allowed {allowed:g} in fp8"):
            case.trial.run_fused(case.model, case.backend, case.fused, fp8_weights=True)
