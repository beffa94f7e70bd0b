"""Kernels of a step of one token for each sequence, over states of all, against transformers' functions in torch."""

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

from asyncengine.model.recurrent import functions, step_kernels
from asyncengine.model.recurrent.functions import Present
from asyncengine.model.recurrent.placed_functions import placed
from asyncengine.model.recurrent.places import Places
from asyncengine.model.recurrent.row_states import RowStates
from asyncengine.model.recurrent.step_kernels import StepKernels
from tests.model.attention.triton_device import DEVICE, require_triton

require_triton()
if not hasattr(Cache, "get_conv_state"):
    pytest.skip("these are the functions of transformers 5.22 and later", allow_module_level=True)

Tensors = dict[str, Any]
PLACES = 7
NOWHERE = PLACES - 1
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Relative error of a whole output, or of a state in that dtype."""
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


class Stepped:
    """Calls of one of transformers' functions, by itself over gathered states and with kernels over those of all.

    Args:
        name: Of the function.
        module: Has it.
        state: (places, ...) what there is in the beginning.
    """

    def __init__(self, name: str, module: Any, state: torch.Tensor) -> None:
        self._original = getattr(module, name)
        self._present = Present()
        self._by_kernels = placed(StepKernels())[name](self._refused, self._present)
        # As the engine keeps them: of each place, with states of other layers around.
        places, size = len(state), state[0].numel()
        around = torch.full((places, size + 128), torch.nan, dtype=state.dtype)
        around[:, 64 : 64 + size] = state.reshape(places, -1)
        self._around = around.to(DEVICE)
        self.state = self._around[:, 64 : 64 + size].view(state.shape)

    @staticmethod
    def _refused(*_: Any, **__: Any) -> None:
        raise AssertionError("it was handed on")

    def step(
        self,
        call: Callable[[Any, torch.Tensor], Any],
        sources: list[int],
        targets: list[int] | None = None,
        tolerance: float = 1e-5,
        of_state: float = 1e-5,
    ) -> torch.Tensor:
        """Compares outputs and states of one call, which is given a function and a state.

        Rows that are nowhere go on from a state of zeros, and leave nothing behind.
        """
        targets = sources if targets is None else targets
        before = self.state.clone()
        own = before.cpu()[sources].clone()
        own[[source == NOWHERE for source in sources]] = 0
        expected = call(self._original, own)
        behind = expected[1] if isinstance(expected, tuple) else own
        places = Places(torch.tensor(sources).to(DEVICE), torch.tensor(targets).to(DEVICE), NOWHERE)
        self._present.rows = RowStates({("recurrent", 0, 0): self.state}, False, places)
        found = call(self._by_kernels, self.state)
        if isinstance(expected, tuple):
            assert found[1] is self.state
            found, expected = found[0], expected[0]
        assert found.shape == expected.shape
        assert_near(found, expected, tolerance)
        there = {target: row for row, target in enumerate(targets) if target != NOWHERE}
        for place in range(len(self.state)):
            if place in there:
                assert_near(self.state[place], behind[there[place]], of_state)
            else:
                assert torch.equal(self.state[place], before[place])
        assert self._around[:, :64].isnan().all() and self._around[:, 64 + before[0].numel() :].isnan().all()
        return found  # type: ignore[no-any-return]


def assert_near(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    found, expected = found.double().cpu(), expected.double().cpu()
    assert (found - expected).norm() <= tolerance * expected.norm() + 1e-12


def there(given: Tensors, state: torch.Tensor) -> Tensors:
    """Arguments where the state is."""
    return {name: each.to(state.device) if isinstance(each, torch.Tensor) else each for name, each in given.items()}


# ---- the delta rules

GATED, KIMI = "torch_recurrent_gated_delta_rule", "recurrent_kimi_delta_attention"


def delta(rows: int, heads: tuple[int, int], dims: tuple[int, int], dtype: torch.dtype, by_channel: bool) -> Tensors:
    """Queries, keys and values are parts of one tensor, as those behind a convolution are."""
    (key_heads, heads_of_values), (key_dim, value_dim) = heads, dims
    widths = [key_heads * key_dim, key_heads * key_dim, heads_of_values * value_dim]
    query, key, value = torch.split(torch.randn(rows, 1, sum(widths)).to(dtype), widths, dim=-1)
    return {
        "query": query.view(rows, 1, key_heads, key_dim),
        "key": key.view(rows, 1, key_heads, key_dim),
        "value": value.view(rows, 1, heads_of_values, value_dim),
        "g": -torch.rand(rows, 1, heads_of_values, *((key_dim,) if by_channel else ())),
        "beta": torch.rand(rows, 1, heads_of_values).to(dtype),
        "output_final_state": True,
    }


def of_delta(given: Tensors, normalise: bool = True) -> Callable[[Any, torch.Tensor], Any]:
    more = {"use_qk_l2norm_in_kernel": normalise}
    return lambda function, state: function(**there(given, state), initial_state=state, **more)


@pytest.mark.parametrize("name", [GATED, KIMI])
@pytest.mark.parametrize(
    "dims",
    [(64, 64), (20, 12), (16, 300), *(pytest.param(dims, marks=pytest.mark.long) for dims in ((128, 128), (96, 192)))],
)
def test_delta_rules(name: str, dims: tuple[int, int]) -> None:
    module, heads = (kimi, [(2, 2)]) if name == KIMI else (qwen, [(2, 2), (1, 4)])
    for each in heads:
        case = Stepped(name, module, torch.randn(PLACES, each[1], *dims))
        for slots in ([3], [5, 0, 2], [1, 2, 3], [5, 0, 2]):
            case.step(of_delta(delta(len(slots), each, dims, torch.float32, name == KIMI)), slots)


@DTYPES
@pytest.mark.parametrize("short_state", [False, True])
def test_delta_rules_in_every_dtype(dtype: torch.dtype, short_state: bool) -> None:
    state = torch.randn(PLACES, 4, 64, 64).to(dtype if short_state else torch.float32)
    case = Stepped(GATED, qwen, state)
    for slots in ([4, 1], [1, 4]):
        given = delta(2, (2, 4), (64, 64), dtype, False)
        found = case.step(of_delta(given), slots, None, TOLERANCE[dtype], TOLERANCE[state.dtype])
        assert found.dtype is dtype


def test_a_delta_rule_that_does_not_normalise() -> None:
    case = Stepped(GATED, qwen, torch.randn(PLACES, 2, 16, 16))
    given = delta(2, (2, 2), (16, 16), torch.float32, False)
    case.step(of_delta(given | {"key": given["key"] / 4}, normalise=False), [2, 0])


# ---- scans


def mamba2_step(rows: int, groups: int, dims: tuple[int, int], dtype: torch.dtype, heads: int = 4) -> Tensors:
    """As layers give it: what there is one of for each head is repeated, and much is part of one tensor."""
    dim, state_dim = dims
    widths = [heads * dim, groups * state_dim, groups * state_dim]
    given, b, c = torch.split(torch.randn(rows, sum(widths)).to(dtype), widths, dim=-1)
    return {
        "hidden_states": given.view(rows, heads, dim),
        "dt": (4 * torch.randn(rows, heads, 1)).to(dtype).expand(-1, -1, dim),
        "A": (-4 * torch.rand(heads))[:, None, None].expand(-1, dim, state_dim),
        "B": b.view(rows, groups, state_dim),
        "C": c.view(rows, groups, state_dim),
        "D": torch.randn(heads).to(dtype)[:, None].expand(-1, dim),
        "dt_bias": torch.randn(heads).to(dtype)[:, None].expand(-1, dim),
        "dt_softplus": True,
    }


def of_scan(given: Tensors) -> Callable[[Any, torch.Tensor], Any]:
    return lambda function, state: function(state, **there(given, state))


MAMBA2, MAMBA = "mamba2_selective_state_update", "mamba_selective_state_update"


@pytest.mark.parametrize(
    "dims", [(64, 128), (16, 16), (20, 12), (5, 3), pytest.param((64, 256), marks=pytest.mark.long)]
)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.in_short("2")
def test_steps_of_mamba2(dims: tuple[int, int], groups: int) -> None:
    case = Stepped(MAMBA2, mamba2, torch.randn(PLACES, 4, *dims))
    for slots in ([3], [5, 0, 2], [1, 2, 3], [5, 0, 2]):
        case.step(of_scan(mamba2_step(len(slots), groups, dims, torch.float32)), slots)


@DTYPES
@pytest.mark.parametrize("short_state", [False, True])
def test_steps_of_mamba2_in_every_dtype(dtype: torch.dtype, short_state: bool) -> None:
    state = torch.randn(PLACES, 4, 64, 16).to(dtype if short_state else torch.float32)
    case = Stepped(MAMBA2, mamba2, state)
    for slots, gated in (([4, 1], False), ([1, 4], True)):
        given = mamba2_step(2, 2, (64, 16), dtype)
        z = torch.randn(2, 4, 64).to(dtype) if gated else None
        case.step(of_scan(given | {"z": z}), slots, None, TOLERANCE[dtype], TOLERANCE[dtype])


def test_a_step_of_mamba2_without_what_it_can_do_without() -> None:
    case = Stepped(MAMBA2, mamba2, torch.randn(PLACES, 4, 16, 16))
    given = mamba2_step(3, 2, (16, 16), torch.float32)
    time = (given["dt"][..., :1].abs() / 10).expand(-1, -1, 16)
    given |= {"dt": time, "dt_softplus": False, "D": None, "dt_bias": None}
    case.step(of_scan(given), [2, 0, 5])


def test_the_softplus_of_a_step_keeps_what_is_small_and_what_is_large() -> None:
    """Where exp(x) is lost beside 1, or infinite: each head has another time."""
    times = torch.tensor([-60.0, -20.0, -12.0, -3.0, 0.0, 3.0, 19.0, 21.0, 300.0])
    heads = len(times)
    case = Stepped(MAMBA2, mamba2, torch.zeros(PLACES, heads, 8, 4))
    given = mamba2_step(1, 1, (8, 4), torch.float32, heads)
    given |= {"dt": times[None, :, None].expand(-1, -1, 8), "dt_bias": None, "D": None}
    case.step(of_scan(given), [1])
    expected = torch.nn.functional.softplus(times.double())[:, None, None] * torch.outer(
        torch.ones(8), given["B"][0, 0]
    )
    expected = expected * given["hidden_states"][0, :, :, None]
    for found, wanted in zip(case.state[1], expected, strict=True):
        assert_near(found, wanted, 1e-5)


def mamba_step(rows: int, channels: int, state_dim: int, dtype: torch.dtype) -> Tensors:
    given, z = torch.randn(rows, 2 * channels).to(dtype).chunk(2, dim=1)
    return {
        "hidden_states": given,
        "dt": torch.randn(channels, rows).to(dtype).T,
        "A": -8 * torch.rand(channels, state_dim),
        "B": torch.randn(rows, state_dim).to(dtype),
        "C": torch.randn(rows, state_dim).to(dtype),
        "D": torch.randn(channels),
        "z": z,
        "dt_bias": torch.randn(channels),
        "dt_softplus": True,
    }


@pytest.mark.parametrize(("channels", "state_dim"), [(64, 16), (600, 16), (40, 5)])
def test_steps_of_mamba(channels: int, state_dim: int) -> None:
    case = Stepped(MAMBA, jamba, torch.randn(PLACES, channels, state_dim))
    for slots in ([3], [5, 0, 2], [1, 2, 3]):
        case.step(of_scan(mamba_step(len(slots), channels, state_dim, torch.float32)), slots)
    plain = mamba_step(2, channels, state_dim, torch.float32) | dict.fromkeys(("D", "z", "dt_bias"))
    case.step(of_scan(plain), [4, 1])


@DTYPES
def test_steps_of_mamba_in_every_dtype(dtype: torch.dtype) -> None:
    case = Stepped(MAMBA, jamba, torch.randn(PLACES, 64, 16))
    for slots in ([4, 1], [1, 4]):
        found = case.step(of_scan(mamba_step(2, 64, 16, dtype)), slots, None, TOLERANCE[dtype], TOLERANCE[dtype])
        assert found.dtype is dtype


# ---- convolutions

CONVOLUTION = "causal_conv1d_update"


def convolved(rows: int, channels: int, taps: int, dtype: torch.dtype, bias: bool = True) -> Tensors:
    """The token is part of a product."""
    return {
        "hidden_states": torch.randn(rows, 1, channels + 3)[..., 3:].to(dtype).transpose(1, 2),
        "weight": torch.randn(channels, taps).to(dtype),
        "bias": torch.randn(channels).to(dtype) if bias else None,
    }


def of_convolution(given: Tensors, activation: str | None) -> Callable[[Any, torch.Tensor], Any]:
    given = dict(given)
    token = given.pop("hidden_states")
    return lambda function, state: function(token.to(state.device), state, **there(given, state), activation=activation)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize(("taps", "kept"), [(4, 4), (4, 3), (3, 3), (3, 5), (2, 1), (16, 16)])
@pytest.mark.in_short("silu")
def test_convolutions(taps: int, kept: int, activation: str | None) -> None:
    channels = 200
    case = Stepped(CONVOLUTION, functions, torch.randn(PLACES, channels, kept))
    for slots, bias in (([3], True), ([5, 0, 2], False), ([1, 2, 3], True), ([5, 0, 2], True)):
        case.step(of_convolution(convolved(len(slots), channels, taps, torch.float32, bias), activation), slots)


@DTYPES
def test_convolutions_in_every_dtype(dtype: torch.dtype) -> None:
    """States are moved, not computed: they are exact."""
    case = Stepped(CONVOLUTION, functions, torch.randn(PLACES, 40, 4).to(dtype))
    for slots in ([4, 1], [1, 4]):
        given = convolved(2, 40, 4, dtype)
        case.step(of_convolution(given, "silu"), slots, None, TOLERANCE[dtype], 0.0)


def test_weights_of_a_convolution_may_have_another_dtype() -> None:
    case = Stepped(CONVOLUTION, functions, torch.randn(PLACES, 40, 4).bfloat16())
    given = convolved(2, 40, 4, torch.bfloat16)
    given["weight"] = torch.randn(40, 4)
    case.step(of_convolution(given, "silu"), [3, 0], None, TOLERANCE[torch.bfloat16], 0.0)


# ---- places

EVERY = {
    GATED: (qwen, (4, 16, 16), lambda rows: of_delta(delta(rows, (2, 4), (16, 16), torch.float32, False))),
    KIMI: (kimi, (2, 16, 16), lambda rows: of_delta(delta(rows, (2, 2), (16, 16), torch.float32, True))),
    MAMBA2: (mamba2, (4, 16, 16), lambda rows: of_scan(mamba2_step(rows, 2, (16, 16), torch.float32))),
    MAMBA: (jamba, (40, 16), lambda rows: of_scan(mamba_step(rows, 40, 16, torch.float32))),
    CONVOLUTION: (functions, (40, 4), lambda rows: of_convolution(convolved(rows, 40, 4, torch.float32), "silu")),
}
ALL = pytest.mark.parametrize("name", EVERY)


@ALL
def test_rows_that_are_nobody_write_nothing_but_their_output(name: str) -> None:
    module, shape, given = EVERY[name]
    case = Stepped(name, module, torch.randn(PLACES, *shape))
    case.state[NOWHERE] = torch.nan  # which would be seen
    before = case.state.clone()
    for slots in ([2, NOWHERE, 0, NOWHERE], [NOWHERE] * 3):
        case.state[NOWHERE] = 0
        case.step(given(len(slots)), slots)
        case.state[NOWHERE] = torch.nan
        found = case._by_kernels
        places = Places(torch.tensor([NOWHERE]).to(DEVICE), torch.tensor([NOWHERE]).to(DEVICE), NOWHERE)
        case._present.rows = RowStates({("recurrent", 0, 0): case.state}, False, places)
        output = given(1)(found, case.state)
        assert (output[0] if isinstance(output, tuple) else output).isfinite().all()
        assert case.state[NOWHERE].isnan().all()
    assert torch.equal(case.state[[1, 3, 4, 5]], before[[1, 3, 4, 5]])


@ALL
def test_states_may_go_elsewhere_than_they_come_from(name: str) -> None:
    """As those behind a guess, that are set aside: what they come from stays."""
    module, shape, given = EVERY[name]
    case = Stepped(name, module, torch.randn(PLACES, *shape))
    case.step(given(3), [0, 1, 2], [4, 1, 5])
    case.step(given(2), [4, 5], [3, 2])
    case.step(given(2), [3, 2])


@ALL
def test_a_row_gets_the_same_bits_alone_and_among_others(name: str) -> None:
    module, shape, given = EVERY[name]
    start = torch.randn(PLACES, *shape)
    whole, alone = (Stepped(name, module, start) for _ in range(2))
    slots = [3, 0, NOWHERE, 5, 2]
    torch.manual_seed(7)
    found = whole.step(given(5), slots)
    torch.manual_seed(7)
    call = given(5)
    places = Places(torch.tensor(slots[1:2]).to(DEVICE), torch.tensor(slots[1:2]).to(DEVICE), NOWHERE)
    alone._present.rows = RowStates({("recurrent", 0, 0): alone.state}, False, places)

    def second(*args: Any, **kwargs: Any) -> Any:
        args = tuple(each[1:2] if _of_rows(each) else each for each in args)
        kwargs = {name: each[1:2] if _of_rows(each) else each for name, each in kwargs.items()}
        return alone._by_kernels(*args, **kwargs)

    output = call(second, alone.state)
    assert torch.equal((output[0] if isinstance(output, tuple) else output)[0], found[1])
    assert torch.equal(alone.state[0], whole.state[0])


def _of_rows(value: Any) -> bool:
    """Whether it has something for each of five rows: there are five of nothing else."""
    return isinstance(value, torch.Tensor) and len(value) == 5


@ALL
def test_what_kernels_do_not_compute_is_gathered_for_the_function_that_was_there(name: str) -> None:
    """Here numbers of a dtype that is not known to them."""
    module, shape, given = EVERY[name]
    case = Stepped(name, module, torch.randn(PLACES, *shape, dtype=torch.float64))
    case._by_kernels = placed(StepKernels())[name](getattr(module, name), case._present)
    case.step(given(2), [4, 1])
    case.step(given(2), [1, 4], [2, 4])


def _by_channel(given: Tensors) -> Tensors:
    """A step of Mamba-2 whose times differ within a head."""
    return given | {"dt": given["dt"] + torch.linspace(0, 1, given["dt"].shape[-1])}


LARGE = {
    GATED: (qwen, (1, 600, 8), lambda: of_delta(delta(2, (1, 1), (600, 8), torch.float32, False))),
    MAMBA2: (mamba2, (4, 16, 16), lambda: of_scan(_by_channel(mamba2_step(2, 2, (16, 16), torch.float32)))),
    f"{MAMBA2}, large": (mamba2, (4, 8, 600), lambda: of_scan(mamba2_step(2, 2, (8, 600), torch.float32))),
    MAMBA: (jamba, (8, 600), lambda: of_scan(mamba_step(2, 8, 600, torch.float32))),
    CONVOLUTION: (functions, (8, 17), lambda: of_convolution(convolved(2, 8, 17, torch.float32), "silu")),
    f"{CONVOLUTION}, gelu": (functions, (8, 4), lambda: of_convolution(convolved(2, 8, 4, torch.float32), "gelu")),
}


@pytest.mark.parametrize("which", LARGE)
def test_what_no_program_holds_is_gathered_too(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor what a step does not have one of for each head, nor another activation."""
    for kernel in ("delta_rule", "selective_scan", "convolution"):
        monkeypatch.setattr(StepKernels, kernel, None)
    name = which.split(",")[0]
    module, shape, given = LARGE[which]
    case = Stepped(name, module, torch.randn(PLACES, *shape))
    case._by_kernels = placed(StepKernels())[name](getattr(module, name), case._present)
    case.step(given(), [4, 1])
    case.step(given(), [1, 4], [2, 4])


@ALL
def test_other_states_go_to_the_function_that_was_there(name: str) -> None:
    """As those of a piece of a prompt, which are not those of all sequences."""
    _, shape, given = EVERY[name]
    seen = list[Any]()
    present = Present()
    function = placed(StepKernels())[name](lambda *args, **kwargs: seen.append((args, kwargs)), present)
    own = torch.randn(1, *shape)
    for rows in (None, RowStates({("recurrent", 0, 0): own}, False)):
        present.rows = rows
        given(1)(function, own)
    assert len(seen) == 2
    for args, kwargs in seen:
        assert any(each is own for each in (*args, *kwargs.values()))


def test_a_delta_rule_that_is_not_to_return_a_state_leaves_it() -> None:
    given = delta(2, (2, 2), (16, 16), torch.float32, False) | {"output_final_state": False}
    state = torch.randn(PLACES, 2, 16, 16)
    present, before = Present(), state.clone()
    places = Places.same(torch.tensor([3, 1]), NOWHERE)
    present.rows = RowStates({("recurrent", 0, 0): state}, False, places)
    function = placed(StepKernels())[GATED](qwen.torch_recurrent_gated_delta_rule, present)
    output, behind = function(**given, initial_state=state, use_qk_l2norm_in_kernel=True)
    expected, _ = qwen.torch_recurrent_gated_delta_rule(
        **given, initial_state=state[[3, 1]], use_qk_l2norm_in_kernel=True
    )
    assert behind is None and torch.equal(output, expected) and torch.equal(state, before)


def test_tiles_are_of_what_a_thread_holds() -> None:
    """A row of what is read is 16 bytes at least, and no program has more than its threads hold."""
    for dim, other in itertools.product((1, 5, 16, 64, 96, 128, 256, 512), (1, 3, 16, 64, 128, 192, 512, 5120)):
        for each in (step_kernels.columns_of(dim, other), step_kernels.rows_of(other, dim)):
            numbers = each * step_kernels.power_of_two(dim)
            assert numbers <= 32 * 32 * step_kernels.options_of(numbers)["num_warps"]
            assert each >= 8 or each >= other
