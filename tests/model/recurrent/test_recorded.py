import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from asyncengine.errors import UnsupportedModelError
from asyncengine.model import architecture
from asyncengine.model.recurrent.recorded import CacheArgument, recording
from tests.model.checkpoints import RECURRENT, config


def model(name: str, device: str = "meta", dtype: torch.dtype = torch.bfloat16) -> Any:
    with torch.device(device):
        return AutoModelForCausalLM.from_config(
            config(name), dtype=dtype, attn_implementation=architecture.ATTENTION
        ).eval()


@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.in_short(
    "kimi_linear", "zamba2", "zaya", "granitemoehybrid", "falcon_h1", "qwen3_next", "jamba", "lfm2", "mamba2", "mamba"
)
def test_layers_are_recorded_without_weights_as_with_them(name: str) -> None:
    without = architecture.record(model(name)).watched
    assert without.recurrent
    with_weights = architecture.record(model(name, "cpu")).watched
    assert with_weights == without
    kinds = {state.key[0] for spec in without.recurrent.values() for state in spec.states}
    assert "conv" in kinds  # none here goes without


def test_what_a_layer_keeps_and_which_products_look_at_no_neighbour() -> None:
    recorded = architecture.record(model("qwen3_5"))
    assert [layer.name for layer in recorded.attention] == ["model.layers.3.self_attn"]
    first = recorded.recurrent[0]
    assert first.name == "model.layers.0.linear_attn"
    assert [(state.key, state.shape, state.dtype) for state in first.spec.states] == [
        (("conv", 0, 0), (128, 4), None),
        (("recurrent", 0, 0), (4, 16, 16), torch.float32),
    ]
    assert sum(state.nbytes(torch.bfloat16) for state in first.spec.states) == 128 * 4 * 2 + 4 * 16 * 16 * 4
    assert set(first.spec.entries) == {"in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"}
    assert first.spec.last == "out_proj"


def test_an_input_that_is_changed_first_is_no_entry() -> None:
    """Falcon-H1 multiplies its input by a number before its first product."""
    recorded = architecture.record(model("falcon_h1"))
    assert len(recorded.attention) == len(recorded.recurrent) == 3
    assert recorded.recurrent[0].spec.entries == ()


def test_a_product_that_also_takes_something_else_is_no_entry() -> None:
    """ZAYA's delayed values are also made of zeros, for the token before the first."""
    (first, *_) = architecture.record(model("zaya")).recurrent
    assert "v_proj_delayed" not in first.spec.entries and "q_proj" in first.spec.entries


def test_layers_that_look_at_no_other_token_are_not_missed() -> None:
    recorded = architecture.record(model("nemotron_h"))
    assert (len(recorded.attention), len(recorded.recurrent)) == (1, 2)


def test_watching_leaves_nothing_behind_and_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    watched = model("lfm2")
    architecture.record(watched)
    assert not [record for record in caplog.records if "falling back" in record.getMessage()]
    assert not logging.getLogger("transformers.integrations.hub_kernels").filters
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in watched.modules())


class _Positional(nn.Module):
    def forward(self, hidden_states: torch.Tensor, cache: Any, other: int = 0) -> torch.Tensor:
        return hidden_states


def test_a_cache_is_put_where_it_was_given() -> None:
    argument = CacheArgument.of(_Positional())
    assert argument is not None
    assert argument.put(("x", None, 3), {}, "cache") == (("x", "cache", 3), {})
    assert argument.put(("x",), {"cache": None}, "cache") == (("x",), {"cache": "cache"})
    assert argument.put(("x",), {}, "cache") == (("x",), {"cache": "cache"})
    assert CacheArgument.of(nn.Linear(1, 1)) is None


class _Strange(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, hidden_states: torch.Tensor, cache: Any = None) -> torch.Tensor:
        cache.reverse_state()
        return hidden_states


def test_a_layer_that_asks_for_something_else_is_refused_by_name() -> None:
    strange = _Strange()
    with (
        pytest.raises(UnsupportedModelError, match="this one: _Strange asks its cache for 'reverse_state'"),
        recording(strange, "this one"),
    ):
        strange(torch.ones(1, 4, 8))


class _Elsewhere(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, *, inputs: torch.Tensor, cache: Any = None) -> torch.Tensor:
        return cache.update_recurrent_state(inputs, 0)


def test_a_layer_whose_input_has_another_name_is_refused() -> None:
    elsewhere = _Elsewhere()
    with (
        pytest.raises(UnsupportedModelError, match="does not call its input hidden_states"),
        recording(elsewhere, "this one"),
    ):
        elsewhere(inputs=torch.ones(1, 4, 8))


def test_one_layer_twice_per_token_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    twice = model("lfm2")
    twice.model.layers[2].conv = twice.model.layers[0].conv
    with pytest.raises(UnsupportedModelError, match="a recurrent layer runs more than once per token"):
        architecture.record(twice)


def test_a_layer_that_keeps_nothing_is_refused(checkpoint: Callable[..., Path]) -> None:
    forgetful = model("lfm2")
    plain = forgetful.model.layers[0].conv
    plain.forward = lambda hidden_states, **_: hidden_states
    with pytest.raises(UnsupportedModelError, match="2 of 3 layers attend or keep a state"):
        architecture.record(forgetful)
