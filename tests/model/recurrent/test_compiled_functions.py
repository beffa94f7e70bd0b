"""Compiled functions against transformers' own, which take token after token or chunks of them, in plain torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import Cache
from transformers.models.jamba import modeling_jamba as jamba
from transformers.models.kimi_linear import modeling_kimi_linear as kimi
from transformers.models.mamba2 import modeling_mamba2 as mamba2
from transformers.models.qwen3_next import modeling_qwen3_next as qwen

from asyncengine.model.recurrent import functions
from asyncengine.model.recurrent.compiled_functions import compiled
from asyncengine.model.recurrent.functions import Present
from asyncengine.model.recurrent.row_states import RowStates
from asyncengine.model.recurrent.scans import Scans

if not hasattr(Cache, "get_conv_state"):
    pytest.skip("these are the functions of transformers 5.22 and later", allow_module_level=True)

Tensors = dict[str, torch.Tensor]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Relative error of a whole output. transformers rounds in between what is float32 here."""
TOKENS = (1, 2, 63, 64, 65, 200)
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class Compiled:
    """The compiled functions by their names; what they would not compute themselves is an error."""

    def __init__(self, scans: Scans) -> None:
        self.table, self.present = compiled(scans), Present()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return self.over(name, self._refused)

    def over(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        return self.table[name](original, self.present)

    @staticmethod
    def _refused(*_: Any, **__: Any) -> None:
        raise AssertionError("it was handed on")


@pytest.fixture
def fast(compiled_scans: Scans) -> Compiled:
    torch.manual_seed(0)
    return Compiled(compiled_scans)


def assert_near(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    found, expected = found.double(), expected.double()
    assert (found - expected).norm() <= tolerance * expected.norm() + 1e-12


def copied(state: torch.Tensor | None) -> torch.Tensor | None:
    return None if state is None else state.clone()


# ---- the delta rules


def delta_case(
    batch: int,
    tokens: int,
    heads: tuple[int, int] = (2, 4),
    dims: tuple[int, int] = (16, 16),
    dtype: torch.dtype = torch.float32,
    per_channel: bool = False,
) -> Tensors:
    (key_heads, value_heads), (key_dim, value_dim) = heads, dims
    query, key = torch.randn(2, batch, tokens, key_heads, key_dim).to(dtype)
    decay = (batch, tokens, value_heads, *((key_dim,) if per_channel else ()))
    return {
        "query": query,
        "key": key,
        "value": torch.randn(batch, tokens, value_heads, value_dim).to(dtype),
        "g": -torch.rand(decay),
        "beta": torch.rand(batch, tokens, value_heads).to(dtype),
    }


def delta_state(case: Tensors) -> torch.Tensor:
    return torch.randn(case["key"].shape[0], case["value"].shape[2], case["key"].shape[3], case["value"].shape[3])


DELTA = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
GATED = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")
KIMI = ("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention")


@pytest.mark.parametrize("name", [*GATED, *KIMI])
@pytest.mark.parametrize("dims", [(16, 16), (64, 64), (128, 128), (20, 20), (12, 40)])
def test_delta_rules(fast: Compiled, name: str, dims: tuple[int, int]) -> None:
    module, heads = (kimi, [(2, 2)]) if name in KIMI else (qwen, [(2, 2), (1, 4)])
    for each, (tokens, batch, begun) in itertools.product(
        heads, ((1, 1, False), (1, 5, True), (2, 1, True), (65, 2, True))
    ):
        case = delta_case(batch, tokens, each, dims, per_channel=name in KIMI)
        state = delta_state(case) if begun else None
        expected, behind = getattr(module, name)(**case, initial_state=state, **DELTA)
        found, moved = getattr(fast, name)(**case, initial_state=copied(state), **DELTA)
        assert_near(found, expected, 1e-5)
        assert_near(moved, behind, 1e-5)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("name", [GATED[0], KIMI[0]])
def test_delta_rules_over_chunks_and_what_is_left(fast: Compiled, name: str, tokens: int) -> None:
    module, heads = (kimi, (2, 2)) if name in KIMI else (qwen, (2, 4))
    case = delta_case(2, tokens, heads, per_channel=name in KIMI)
    state = delta_state(case)
    expected, behind = getattr(module, name)(**case, initial_state=state, **DELTA)
    found, moved = getattr(fast, name)(**case, initial_state=state, **DELTA)
    assert moved is state
    assert_near(found, expected, 1e-5)
    assert_near(moved, behind, 1e-5)


@DTYPES
@pytest.mark.parametrize("name", [*GATED, *KIMI])
def test_delta_rules_in_every_dtype(fast: Compiled, name: str, dtype: torch.dtype) -> None:
    module = kimi if name in KIMI else qwen
    case = delta_case(2, 7, (2, 2), (32, 32), dtype, name in KIMI)
    state = delta_state(case)
    expected, behind = getattr(module, name)(**case, initial_state=state.clone(), **DELTA)
    found, moved = getattr(fast, name)(**case, initial_state=state.to(dtype), **DELTA)
    assert found.dtype is dtype and moved.dtype is torch.float32
    assert_near(found, expected, TOLERANCE[dtype])
    assert_near(moved, behind, TOLERANCE[dtype])


def test_delta_rule_over_slices_of_one_product(fast: Compiled) -> None:
    """As layers have their inputs: no tensor of its own."""
    mixed = torch.randn(2, 3 * 32, 9)
    query, key, value = (part.reshape(2, 9, 2, 16) for part in mixed.transpose(1, 2).split(32, dim=-1))
    turned = mixed.view(2, 3, 2, 16, 9).permute(1, 0, 4, 2, 3)
    rest = {"g": -torch.rand(2, 9, 2), "beta": torch.rand(2, 9, 2)}
    expected, _ = qwen.torch_recurrent_gated_delta_rule(query, key, value, **rest, **DELTA)
    found, _ = fast.torch_recurrent_gated_delta_rule(*turned, **rest, **DELTA)
    assert_near(found, expected, 1e-5)


def test_a_delta_rule_that_is_not_to_return_a_state_leaves_it(fast: Compiled) -> None:
    case = delta_case(1, 3)
    state = delta_state(case)
    before = state.clone()
    expected, _ = qwen.torch_recurrent_gated_delta_rule(**case, initial_state=state)
    found, none = fast.torch_recurrent_gated_delta_rule(**case, initial_state=state)
    assert none is None and torch.equal(state, before)
    assert_near(found, expected, 1e-5)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("dims", [(16, 16), (128, 128), (20, 20), (30, 64)])
def test_delta_rules_give_a_token_the_same_bits_alone_and_among_others(
    fast: Compiled, dims: tuple[int, int], per_channel: bool
) -> None:
    case = delta_case(3, 37, (4, 8), dims, torch.bfloat16, per_channel)
    state = delta_state(case)
    whole, behind = fast.torch_chunk_gated_delta_rule(**case, initial_state=state.clone(), **DELTA)
    for row in range(3):
        own = state[row : row + 1].clone()
        for start, end in itertools.pairwise((0, 1, 2, 9, 36, 37)):
            piece = {name: tensor[row : row + 1, start:end] for name, tensor in case.items()}
            found, own = fast.torch_recurrent_gated_delta_rule(**piece, initial_state=own, **DELTA)
            assert torch.equal(found, whole[row : row + 1, start:end])
        assert torch.equal(own, behind[row : row + 1])


# ---- Mamba-2


def mamba2_case(
    batch: int,
    tokens: int,
    groups: int = 2,
    dims: tuple[int, int] = (16, 16),
    dtype: torch.dtype = torch.float32,
    heads: int = 4,
) -> Tensors:
    dim, state_dim = dims
    b, c = torch.randn(2, batch, tokens, groups, state_dim).to(dtype)
    return {
        "hidden_states": torch.randn(batch, tokens, heads, dim).to(dtype),
        "dt": torch.randn(batch, tokens, heads).to(dtype),
        "A": -4 * torch.rand(heads),
        "B": b,
        "C": c,
        "D": torch.randn(heads).to(dtype),
        "dt_bias": torch.randn(heads).to(dtype),
    }


def mamba2_state(case: Tensors) -> torch.Tensor:
    batch, _, heads, dim = case["hidden_states"].shape
    return torch.randn(batch, heads, dim, case["B"].shape[3])


def stepped(case: Tensors) -> Tensors:
    """The first tokens of a scan, as layers give them to the update of a state."""
    dim, state_dim = case["hidden_states"].shape[3], case["B"].shape[3]
    return {
        "hidden_states": case["hidden_states"][:, 0],
        "dt": case["dt"][:, :1].transpose(1, 2).expand(-1, -1, dim),
        "A": case["A"][:, None, None].expand(-1, dim, state_dim),
        "B": case["B"][:, 0],
        "C": case["C"][:, 0],
        **{name: case[name][:, None].expand(-1, dim) for name in ("D", "dt_bias") if name in case},
    }


SCAN = {"chunk_size": 16, "dt_softplus": True, "return_final_states": True}


@pytest.mark.parametrize("dims", [(16, 16), (64, 128), (20, 20), (5, 3)])
@pytest.mark.parametrize("tokens", TOKENS)
def test_the_scan_of_mamba2(fast: Compiled, dims: tuple[int, int], tokens: int) -> None:
    for batch, groups, begun in ((1, 2, False), (1, 1, True), (3, 2, True)):
        case = mamba2_case(batch, tokens, groups, dims)
        state = mamba2_state(case) if begun else None
        more = SCAN | {"dt_limit": (0.01, 3.0)}
        expected, behind = mamba2.mamba2_chunk_scan(**case, initial_states=state, **more)
        found, moved = fast.mamba2_chunk_scan(**case, initial_states=copied(state), **more)
        assert_near(found, expected, 1e-5)
        assert_near(moved, behind, 1e-5)


def test_the_scan_of_mamba2_without_what_it_can_do_without(fast: Compiled) -> None:
    case = mamba2_case(2, 9)
    del case["D"], case["dt_bias"]
    case["dt"] = case["dt"].abs()
    expected = mamba2.mamba2_chunk_scan(**case, chunk_size=4)
    assert_near(fast.mamba2_chunk_scan(**case, chunk_size=4), expected, 1e-5)


@DTYPES
def test_the_scan_of_mamba2_in_every_dtype(fast: Compiled, dtype: torch.dtype) -> None:
    case = mamba2_case(2, 9, dtype=dtype)
    state = mamba2_state(case)
    expected, behind = mamba2.mamba2_chunk_scan(**case, initial_states=state, **SCAN)
    found, moved = fast.mamba2_chunk_scan(**case, initial_states=state, **SCAN)
    assert found.dtype is expected.dtype is torch.float32
    assert_near(found, expected, TOLERANCE[dtype])
    assert_near(moved, behind, TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dims", [(16, 16), (64, 128), (20, 20)])
def test_the_update_of_mamba2(fast: Compiled, dims: tuple[int, int], gated: bool, dtype: torch.dtype) -> None:
    for batch in (1, 5):
        case = stepped(full := mamba2_case(batch, 1, dims=dims, dtype=dtype))
        z = torch.randn(batch, 4, dims[0]).to(dtype) if gated else None
        states = [mamba2_state(full)]
        states.append(states[0].clone())
        expected = mamba2.mamba2_selective_state_update(states[0], **case, dt_softplus=True, z=z)
        found = fast.mamba2_selective_state_update(states[1], **case, dt_softplus=True, z=z)
        assert_near(found, expected, TOLERANCE[dtype])
        assert_near(states[1], states[0], TOLERANCE[dtype])


@pytest.mark.parametrize("dims", [(16, 16), (64, 128), (20, 20), (7, 5)])
def test_mamba2_gives_a_token_the_same_bits_alone_and_among_others(fast: Compiled, dims: tuple[int, int]) -> None:
    case = mamba2_case(3, 19, dims=dims, dtype=torch.bfloat16)
    state = mamba2_state(case)
    whole, behind = fast.mamba2_chunk_scan(**case, initial_states=state.clone(), **SCAN)
    for token in range(19):
        given = {name: tensor[:, token:] if tensor.dim() > 1 else tensor for name, tensor in case.items()}
        found = fast.mamba2_selective_state_update(state, **stepped(given), dt_softplus=True)
        assert torch.equal(found, whole[:, token])
    assert torch.equal(state, behind)


# ---- Mamba


def mamba_case(
    batch: int, tokens: int, channels: int = 64, state_dim: int = 16, dtype: torch.dtype = torch.float32
) -> Tensors:
    b, c = torch.randn(2, batch, tokens, state_dim).to(dtype).transpose(2, 3)
    given, z = torch.randn(2, batch, tokens, channels).to(dtype).transpose(2, 3)
    return {
        "hidden_states": given,
        "dt": torch.randn(batch, channels, tokens).to(dtype),
        "A": -8 * torch.rand(channels, state_dim),
        "B": b,
        "C": c,
        "D": torch.randn(channels).to(dtype).float(),
        "z": z,
        "delta_bias": torch.randn(channels).to(dtype).float(),
    }


MAMBA = {"delta_softplus": True, "return_last_state": True}


def single(case: Tensors, token: int) -> Tensors:
    """A token of a scan, as layers give it to the update of a state."""
    dtype = case["hidden_states"].dtype
    given = {name: case[name][..., token] for name in ("hidden_states", "dt", "B", "C", "z")}
    return given | {"A": case["A"], "D": case["D"].to(dtype), "dt_bias": case["delta_bias"]}


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("channels", "state_dim"), [(64, 16), (100, 8), (7, 5)])
def test_the_scan_of_mamba(fast: Compiled, tokens: int, channels: int, state_dim: int) -> None:
    for batch in (1, 3):
        case = mamba_case(batch, tokens, channels, state_dim)
        expected, behind = jamba.mamba_selective_scan(**case, **MAMBA)
        found, moved = fast.mamba_selective_scan(**case, **MAMBA)
        assert_near(found, expected, 1e-5)
        assert_near(moved, behind, 1e-5)


def test_the_scan_of_mamba_without_what_it_can_do_without(fast: Compiled) -> None:
    case = mamba_case(2, 9)
    del case["D"], case["z"], case["delta_bias"]
    case["dt"] = case["dt"].abs()
    assert_near(fast.mamba_selective_scan(**case), jamba.mamba_selective_scan(**case), 1e-5)


@DTYPES
def test_mamba_in_every_dtype(fast: Compiled, dtype: torch.dtype) -> None:
    case = mamba_case(2, 9, dtype=dtype)
    expected, behind = jamba.mamba_selective_scan(**case, **MAMBA)
    found, moved = fast.mamba_selective_scan(**case, **MAMBA)
    assert found.dtype is expected.dtype
    assert_near(found, expected, TOLERANCE[dtype])
    assert_near(moved, behind, TOLERANCE[dtype])
    states = [moved.clone(), moved.clone()]
    expected = jamba.mamba_selective_state_update(states[0], **single(case, 3), dt_softplus=True)
    found = fast.mamba_selective_state_update(states[1], **single(case, 3), dt_softplus=True)
    assert found.dtype is expected.dtype
    assert_near(found, expected, TOLERANCE[dtype])
    assert_near(states[1], states[0], TOLERANCE[dtype])


@pytest.mark.parametrize("state_dim", [16, 8, 5])
def test_mamba_gives_a_token_the_same_bits_alone_and_among_others(fast: Compiled, state_dim: int) -> None:
    case = mamba_case(2, 19, 70, state_dim, torch.bfloat16)
    whole, behind = fast.mamba_selective_scan(**case, **MAMBA)
    state = torch.zeros(2, 70, state_dim)
    for token in range(19):
        found = fast.mamba_selective_state_update(state, **single(case, token), dt_softplus=True)
        assert torch.equal(found, whole[..., token].bfloat16())
    assert torch.equal(state, behind)


def test_the_scan_of_mamba_goes_on_from_the_state_that_the_layer_has(fast: Compiled) -> None:
    case = mamba_case(1, 19)
    whole, behind = fast.mamba_selective_scan(**case, **MAMBA)
    tensors = {("recurrent", 0, 0): torch.full((1, 64, 16), 7.0)}
    for start, end in itertools.pairwise((0, 5, 12, 19)):
        piece = {
            name: tensor[..., start:end] if name in ("hidden_states", "dt", "B", "C", "z") else tensor
            for name, tensor in case.items()
        }
        fast.present.rows = rows = RowStates(tensors, fresh=start == 0)  # type: ignore[arg-type]
        found, state = fast.mamba_selective_scan(**piece, **MAMBA)
        assert torch.equal(found, whole[..., start:end])
        rows.update_recurrent_state(state, 0)
    assert torch.equal(tensors["recurrent", 0, 0], behind)


# ---- convolutions


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("taps", [2, 3, 4, 5])
def test_convolutions(fast: Compiled, taps: int, activation: str | None) -> None:
    sizes = (
        (1, 1, 64, False),
        (2, 3, 7, True),
        (33, 1, 100, True),
        (33, 3, 64, True),
        (70, 3, 7, False),
        (70, 1, 100, False),
    )
    for tokens, batch, channels, biased in sizes:
        weight, bias = torch.randn(channels, taps), torch.randn(channels) if biased else None
        beside = torch.randn(batch, tokens, channels).transpose(1, 2)
        for given in (beside, beside.contiguous()):
            expected = qwen.causal_conv1d_fn(given, weight, bias, activation=activation)
            assert_near(fast.causal_conv1d_fn(given, weight, bias, activation=activation), expected, 1e-6)
        for kept in (taps - 1, taps, taps + 2):
            states = [torch.randn(batch, channels, kept)]
            states.append(states[0].clone())
            token = beside[..., :1]
            expected = qwen.causal_conv1d_update(token, states[0], weight, bias, activation)
            found = fast.causal_conv1d_update(token, states[1], weight, bias, activation)
            assert_near(found, expected, 1e-6)
            assert torch.equal(*states)


@DTYPES
def test_convolutions_in_every_dtype(fast: Compiled, dtype: torch.dtype) -> None:
    weight, bias = torch.randn(40, 4).to(dtype), torch.randn(40).to(dtype)
    given, state = torch.randn(2, 40, 9).to(dtype), torch.randn(2, 40, 4).to(dtype)
    expected = functions.causal_conv1d_fn(given, weight, bias, "silu")
    found = fast.causal_conv1d_fn(given, weight, bias, "silu")
    assert found.dtype is dtype
    assert_near(found, expected, TOLERANCE[dtype])
    states = [state, state.clone()]
    expected = functions.causal_conv1d_update(given[..., :1], states[0], weight, bias, "silu")
    found = fast.causal_conv1d_update(given[..., :1], states[1], weight, bias, "silu")
    assert_near(found, expected, TOLERANCE[dtype])
    assert torch.equal(*states)


def test_convolutions_give_a_token_the_same_bits_alone_and_among_others(fast: Compiled) -> None:
    weight, given = torch.randn(70, 4).bfloat16(), torch.randn(2, 70, 50).bfloat16()
    whole = fast.causal_conv1d_fn(given, weight, None, activation="silu")
    state = torch.zeros(2, 70, 4, dtype=torch.bfloat16)
    for token in range(50):
        found = fast.causal_conv1d_update(given[..., token : token + 1], state, weight, None, "silu")
        assert torch.equal(found[..., 0], whole[..., token])


def test_numbers_at_the_ends_of_what_there_is(fast: Compiled) -> None:
    given = torch.tensor([0.0, -1e4, 1e4, -90.0, 60.0, torch.inf, torch.nan, 1e-30])[None, :, None]
    found = fast.causal_conv1d_fn(given, torch.ones(8, 1), None, activation="silu")
    torch.testing.assert_close(found, torch.nn.functional.silu(given), equal_nan=True)
    case = mamba2_case(1, 2, heads=4)
    case["dt"] = torch.tensor([[[-100.0, 100.0, 20.5, -20.5], [0.0, 1e-3, 5.0, -5.0]]])
    expected, behind = mamba2.mamba2_chunk_scan(**case, **SCAN)
    found, moved = fast.mamba2_chunk_scan(**case, **SCAN)
    assert_near(found, expected, 1e-5)
    assert_near(moved, behind, 1e-5)


# ---- whatever is computed


@pytest.mark.parametrize("threads", [2, 3])
def test_any_number_of_threads_gives_the_same_bits(fast: Compiled, threads: int) -> None:
    delta, scan, plain = delta_case(2, 65, (4, 8), (64, 64)), mamba2_case(2, 65, dims=(64, 64)), mamba_case(2, 65, 500)
    given, weight = torch.randn(3, 300, 90), torch.randn(300, 4)

    def all_of_them() -> list[torch.Tensor]:
        torch.manual_seed(1)
        state = delta_state(delta)
        one = {name: tensor[:, :1] for name, tensor in delta.items()}
        return [
            *fast.torch_chunk_gated_delta_rule(**delta, initial_state=state.clone(), **DELTA),
            *fast.torch_recurrent_gated_delta_rule(**one, initial_state=state, **DELTA),
            *fast.mamba2_chunk_scan(**scan, **SCAN),
            *fast.mamba_selective_scan(**plain, **MAMBA),
            fast.causal_conv1d_fn(given, weight, None, activation="silu"),
        ]

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = all_of_them()
        torch.set_num_threads(threads)
        found = all_of_them()
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, found, expected))


def test_what_is_not_compiled_goes_to_the_function_that_was_there(fast: Compiled) -> None:
    handed: list[str] = []

    def over(name: str) -> Callable[..., Any]:
        return fast.over(name, lambda *_, **__: handed.append(name))

    delta, scan, plain = delta_case(1, 3), mamba2_case(1, 3), mamba_case(1, 3)
    doubled = {name: tensor.double() for name, tensor in delta.items()}
    over(GATED[0])(**doubled)
    over(GATED[1])(**delta, cu_seqlens=torch.tensor([0, 3]))
    over("mamba2_chunk_scan")(**(scan | {"D": torch.randn(4, 16)}), **SCAN)
    over("mamba2_chunk_scan")(**scan, **SCAN, seq_idx=torch.zeros(1, 3))
    state = mamba2_state(scan)
    over("mamba2_selective_state_update")(state, **(stepped(scan) | {"dt": torch.randn(1, 4, 16)}))
    over("mamba_selective_scan")(**{name: tensor.to("meta") for name, tensor in plain.items()})
    over("mamba_selective_state_update")(torch.zeros(1, 64, 16).double(), **single(plain, 0))
    with torch.enable_grad():
        over(KIMI[0])(**(delta | {"beta": delta["beta"].requires_grad_()}))
    assert handed == [
        GATED[0], GATED[1], "mamba2_chunk_scan", "mamba2_chunk_scan", "mamba2_selective_state_update",
        "mamba_selective_scan", "mamba_selective_state_update", KIMI[0],
    ]  # fmt: skip


def test_convolutions_that_are_not_compiled_are_shifted_products(fast: Compiled) -> None:
    given, weight = torch.randn(2, 8, 9), torch.randn(8, 4)
    expected = qwen.causal_conv1d_fn(given, weight, None, activation="gelu")
    assert_near(fast.causal_conv1d_fn(given, weight, None, activation="gelu"), expected, 1e-6)
    many = torch.randn(8, 20)
    expected = qwen.causal_conv1d_fn(given, many, None)
    assert_near(fast.causal_conv1d_fn(given, many, None), expected, 1e-6)
    states = [torch.randn(2, 8, 4)]
    states.append(states[0].clone())
    expected = qwen.causal_conv1d_update(given, states[0], weight)  # of several tokens
    assert_near(fast.causal_conv1d_update(given, states[1], weight), expected, 1e-6)
    assert torch.equal(*states)
