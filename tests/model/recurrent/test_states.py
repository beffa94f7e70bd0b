"""Recurrent layers over many sequences at once, against transformers over each whole sequence."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Cache

from asyncengine.model import architecture
from asyncengine.model.recurrent.compiled_functions import compiled
from asyncengine.model.recurrent.functions import Functions
from asyncengine.model.recurrent.placed_functions import placed
from asyncengine.model.recurrent.places import Places
from asyncengine.model.recurrent.recorded import RecurrentLayer
from asyncengine.model.recurrent.row_states import RowStates
from asyncengine.model.recurrent.scans import Scans
from asyncengine.model.recurrent.states import States, bytes_per_place
from asyncengine.model.recurrent.step_kernels import StepKernels
from asyncengine.model.recurrent.step_rows import StepRows
from asyncengine.step.batch import StepBatch
from asyncengine.step.limits import Limits
from tests.model.attention.triton_device import DEVICE, require_triton
from tests.model.checkpoints import RECURRENT, config

if not hasattr(Cache, "get_conv_state"):
    pytest.skip("layers keep their states so from transformers 5.22 on", allow_module_level=True)

CPU = torch.device("cpu")
SLOTS, KEPT = 4, 3
NAMES = ("qwen3_5", "lfm2", "granitemoehybrid", "mamba", "falcon_h1", "kimi_linear", "zaya")


class Case:
    """The first recurrent layer of a model, over states of several sequences, and transformers' own beside it."""

    def __init__(self, name: str, functions: Functions | None = None, in_place: bool = False) -> None:
        torch.manual_seed(0)
        self.model = AutoModelForCausalLM.from_config(config(name), attn_implementation=architecture.ATTENTION).eval()
        self.model.requires_grad_(False)
        layer = architecture.record(self.model).recurrent[0]
        trying = in_place or name in ("mamba",)  # as a trial finds out
        self.layer = RecurrentLayer(layer.name, layer.module, layer.spec, functions, in_place)
        limits = Limits(SLOTS, 64, 64, 16, 8, kept_states=KEPT, drafted_states=6)
        self.states = States([self.layer], limits, torch.float32, CPU, trying=trying)
        self.hidden = 64
        self.histories: dict[int, torch.Tensor] = {}  # by place: (tokens, hidden) that its state has seen
        self.states.allocate()

    def plain(self, seen: torch.Tensor) -> torch.Tensor:
        """What the layer makes of a whole sequence, by transformers alone: (tokens, outputs)."""
        forward = self.layer.module.__dict__.pop("forward")
        try:
            output = self.layer.module(seen[None], **{self.layer.spec.cache.name: None})
        finally:
            self.layer.module.forward = forward
        return _wide(output)

    def step(
        self,
        rows: Sequence[tuple[int, int]],
        decodes: int = 0,
        copies: Sequence[tuple[int, int]] = (),
        saves: Sequence[tuple[int, int, int]] = (),
        fresh: Sequence[int] = (),
        taken: Sequence[int] | None = None,
    ) -> None:
        """A step of (slot, tokens) rows, each output compared with that of the sequence's whole history.

        With `taken`, so many tokens of each row that decodes count; the others were drafted wrongly.
        """
        for source, to in copies:
            self.histories[to] = self.histories[source]
        for slot in fresh:
            self.histories[slot] = torch.zeros(0, self.hidden)
        given = [torch.randn(count, self.hidden) for _, count in rows]
        context = [len(self.histories[slot]) for slot, _ in rows]
        counts = np.array([count for _, count in rows])
        positions = np.concatenate([np.arange(c, c + n) for c, n in zip(context, counts, strict=True)])
        none = np.zeros(0, np.int64)
        self.states.begin(
            StepBatch(
                token_ids=np.zeros(counts.sum(), np.int32),
                positions=positions.astype(np.int32),
                query_start=np.cumsum([0, *counts]).astype(np.int32),
                context_lens=np.array(context, np.int32),
                block_tables=np.zeros((len(rows), 1), np.int32),
                slot_mapping=positions,
                sample_index=none,
                sample_slots=none,
                sample_positions=none,
                copies=none.reshape(0, 2),
                num_decodes=decodes,
                draft_lengths=None if taken is None else counts[:decodes] - 1,
                slots=np.array([slot for slot, _ in rows]),
                state_copies=np.array(copies, np.int64).reshape(-1, 2),
                state_saves=np.array(saves, np.int64).reshape(-1, 3),
            )
        )
        self.states.places = torch.tensor([slot for slot, _ in rows[:decodes]], dtype=torch.int64)
        found = _wide(self.layer.module(torch.cat(given)[None])).split(counts.tolist())
        self.states.end()
        if taken is not None:
            self.states.take(np.array(taken))
        for row, ((slot, count), piece) in enumerate(zip(rows, given, strict=True)):
            before = self.histories[slot]
            seen = torch.cat([before, piece])
            torch.testing.assert_close(found[row], self.plain(seen)[-count:], rtol=2e-4, atol=2e-5)
            counting = count if taken is None or row >= decodes else taken[row]
            for of, behind, place in saves:
                if of == row and behind <= counting:
                    self.histories[place] = torch.cat([before, piece[:behind]])
            self.histories[slot] = seen[: len(before) + counting]


def _wide(output: Any) -> torch.Tensor:
    """(tokens, ...) of (1, tokens, ...), or of several such, flat and side by side."""
    parts = output if isinstance(output, tuple) else (output,)
    return torch.cat([part[0].flatten(1) for part in parts], dim=-1)


HOW = [(name, how) for name in NAMES for how in ("compiled", "kernels")]
HOW += [(name, "plain") for name in ("qwen3_5", "lfm2", "mamba", "kimi_linear")]


AS_MAMBA2 = ("falcon_h1", "kernels")
"""Whose kernels are those of granitemoehybrid."""


@pytest.fixture(
    params=[pytest.param(how, marks=pytest.mark.long if how == AS_MAMBA2 else (), id="-".join(how)) for how in HOW]
)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    name, how = request.param
    functions = compiled(request.getfixturevalue("compiled_scans")) if how == "compiled" else None
    if how == "kernels":
        _require_interpreter()
        functions = placed(StepKernels())
    with torch.inference_mode():
        yield (case := Case(name, functions, how == "kernels"))
    assert set(case.states.apart) == ({case.layer.name} if (how, name) == ("kernels", "zaya") else set())


def _require_interpreter() -> None:
    require_triton()
    if DEVICE.type != "cpu":
        pytest.skip("kernels on a device are tested by themselves")


def test_prompts_in_pieces_beside_decodes(case: Case) -> None:
    case.step([(0, 5), (2, 1)], fresh=[0, 2])
    case.step([(2, 1), (0, 7), (1, 9)], decodes=1, fresh=[1])
    case.step([(2, 1), (0, 1), (1, 2)], decodes=2)  # places that do not follow one another
    case.step([(0, 1), (1, 1), (2, 1)], decodes=3)  # and that do
    case.step([(1, 1)], decodes=1)


def test_a_slot_begins_anew_whatever_it_had(case: Case) -> None:
    case.step([(1, 6)], fresh=[1])
    case.step([(1, 4)], fresh=[1])
    case.step([(1, 1)], fresh=[1])
    case.step([(1, 1)], decodes=1)


def test_states_are_kept_in_the_middle_of_a_piece_and_go_on_in_other_slots(case: Case) -> None:
    kept = [SLOTS, SLOTS + 1, SLOTS + 2]
    case.step([(0, 9)], fresh=[0], saves=[(0, 2, kept[0]), (0, 6, kept[1]), (0, 9, 3)])
    case.step([(3, 1), (0, 1)], decodes=2, saves=[(1, 1, kept[2])])  # a branch has begun at slot 3
    case.step([(1, 3), (2, 1)], copies=[(kept[0], 1), (kept[2], 2)])
    case.step([(1, 2), (3, 2)], copies=[(kept[1], 3), (3, 1)])  # in their order
    case.step([(0, 1), (1, 1), (2, 1), (3, 1)], decodes=4)


@pytest.mark.in_short("compiled", "qwen3_5-plain", "kimi_linear-kernels", "mamba-kernels")
def test_states_are_those_behind_the_drafts_that_count(case: Case) -> None:
    kept = [SLOTS, SLOTS + 1, SLOTS + 2]
    case.step([(0, 5), (2, 2), (1, 1), (3, 3)], fresh=[0, 1, 2, 3])
    # Rows of unlike lengths beside a prompt; two ends of blocks in one, of which the second one does not count.
    saves = [(0, 1, kept[0]), (0, 3, kept[0]), (1, 2, kept[1]), (2, 1, kept[2])]
    case.step([(0, 4), (1, 2), (2, 1), (3, 4)], decodes=3, saves=saves, taken=[2, 2, 1])
    case.step([(1, 3), (3, 3), (0, 3)], decodes=3, taken=[1, 3, 2])  # of like lengths, at places in no order
    case.step([(0, 3), (1, 3), (2, 3)], decodes=3, taken=[1, 2, 3])  # and side by side
    case.step([(0, 1), (1, 1), (2, 1), (3, 1)], decodes=4)
    case.step([(0, 1), (1, 1), (2, 1)], copies=list(zip(kept, (0, 1, 2), strict=True)))


def test_every_place_has_room_for_all_states() -> None:
    with torch.inference_mode():
        case = Case("qwen3_5")
    assert bytes_per_place([case.layer], torch.float32) == 4 * (128 * 4 + 4 * 16 * 16)
    assert sum(tensor[0].nbytes for tensor in case.states._tensors[0].values()) == 4 * (128 * 4 + 4 * 16 * 16)
    assert case.states.nowhere == SLOTS + KEPT + 6
    module = case.layer.module
    assert "forward" in module.__dict__
    case.states.free()
    assert "forward" not in module.__dict__ and not case.states._tensors


def test_a_layer_that_forgets_between_pieces_is_found_out() -> None:
    """transformers' first Mamba begins anew with each call of more than one token."""
    for name, continues in (("mamba", False), ("mamba2", True), ("lfm2", True), ("qwen3_5", True)):
        with torch.inference_mode():
            case = Case(name)
            case.states._trying = True
            case.states.free()
            case.states.allocate()
            case.step([(0, 5)], fresh=[0])
            assert not case.states.alone
            case.step([(0, 4)])
        assert bool(case.states.alone) is not continues


def test_no_layer_forgets_when_it_is_told_its_state(compiled_scans: Scans) -> None:
    with torch.inference_mode():
        case = Case("mamba", compiled(compiled_scans))
        case.step([(0, 5)], fresh=[0])
        case.step([(0, 4)])
        case.step([(0, 2), (1, 3)], fresh=[1])
    assert not case.states.alone


def test_linear_layers_are_back_when_a_layer_fails() -> None:
    with torch.inference_mode():
        case = Case("lfm2")
        linears = dict(case.layer.module.named_children())

        def fails(*_: Any, **__: Any) -> None:
            raise RuntimeError("no")

        case.layer.module.conv.register_forward_pre_hook(fails)
        case.states.free()
        case.layer.module.forward = fails  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match="no"):
            case.step([(0, 3)], fresh=[0])
        assert dict(case.layer.module.named_children()) == linears


@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.in_short("zamba2", "granitemoehybrid", "kimi_linear", "qwen3_next", "jamba", "mamba", "lfm2_moe", "zaya")
def test_layers_decode_in_place_where_there_are_kernels_for_all_that_they_keep(name: str) -> None:
    """Zaya's computes with its states itself."""
    _require_interpreter()
    model = AutoModelForCausalLM.from_config(config(name), attn_implementation=architecture.ATTENTION).eval()
    model.requires_grad_(False)
    layers = architecture.record(model).calling(placed(StepKernels()), in_place=True).recurrent
    states = States(layers, Limits(1, 64, 64, 16, 8), torch.float32, CPU, trying=True)
    states.allocate()
    states.rows, states.places = StepRows(1), torch.tensor([0])
    with torch.inference_mode():
        for layer in layers:
            layer.module(torch.randn(1, 1, 64))
    assert not states.apart
    assert {layer.in_place for layer in layers} == {name != "zaya"}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("raises", "ValueError: no such tile"),
        ("output", "relative error 0.[0-9]+ of outputs"),
        ("not a number", "relative error nan of outputs"),
        ("state", "relative error 1 of recurrent states"),
        ("others", "recurrent states of others are changed"),
    ],
)
def test_kernels_that_compute_something_else_are_found_out(
    wrong: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their layer goes on as transformers has it, from the states that it has."""
    _require_interpreter()
    rule = StepKernels.delta_rule

    def delta_rule(*args: Any, normalise: bool) -> torch.Tensor:
        if wrong == "raises":
            raise ValueError("no such tile\nand more")
        state, places = args[6], args[7]
        before = state.clone()
        output = rule(*args, normalise=normalise)
        if wrong == "output":
            output *= 1.2
        elif wrong == "not a number":
            output[0] = torch.nan
        elif wrong == "state":
            state[places.targets] = 2 * state[places.targets]
        else:
            state[1] = before[0]
        return output

    monkeypatch.setattr(StepKernels, "delta_rule", delta_rule)
    with torch.inference_mode():
        case = Case("qwen3_5", placed(StepKernels()), in_place=True)
        case.step([(0, 5), (2, 1)], fresh=[0, 2])
        case.step([(2, 1), (0, 1)], decodes=2)
        ((name, reason),) = case.states.apart.items()
    assert name == case.layer.name and re.fullmatch(said, reason)


def test_a_layer_that_computes_with_its_states_itself_is_found_out() -> None:
    """Though it calls functions that there are kernels for: here one state is doubled beside them."""
    _require_interpreter()
    with torch.inference_mode():
        case = Case("qwen3_5", placed(StepKernels()), in_place=True)
        forward = type(case.layer.module).forward
        module, update = case.layer.module, RowStates.update_recurrent_state

        def doubled(self: RowStates, states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            return update(self, states * 2, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RowStates, "update_recurrent_state", doubled)
            case.states.begin(_one_token())
            case.states.places = torch.tensor([0])
            module(torch.randn(1, 1, 64))
    assert type(module).forward is forward
    assert list(case.states.apart) == [case.layer.name]


def test_states_that_are_replaced_go_to_the_places_of_their_rows() -> None:
    """Of a layer that reads or replaces them by the cache's own methods, also where it gets those of all."""
    generator = torch.Generator().manual_seed(0)
    conv, recurrent = (torch.randn(5, 3, 4, generator=generator) for _ in range(2))
    places = Places(torch.tensor([3, 0]), torch.tensor([1, 0]), 4)
    rows = RowStates({("conv", 0, 0): conv, ("recurrent", 0, 0): recurrent}, False, places)
    before, new, token = conv.clone(), torch.randn(2, 3, 4), torch.randn(2, 3, 1)
    seen = rows.update_conv_state(token, 0, conv_kernel_size=4)
    expected = torch.cat([before[[3, 0]], token], dim=-1)
    assert torch.equal(seen, expected) and torch.equal(conv[[1, 0]], expected[..., 1:])
    assert torch.equal(conv[2:], before[2:])
    kept = recurrent.clone()
    assert rows.update_recurrent_state(recurrent, 0) is recurrent and torch.equal(recurrent, kept)
    rows.update_recurrent_state(new, 0)
    assert torch.equal(recurrent[[1, 0]], new) and torch.equal(recurrent[2:], kept[2:])
    assert rows.places_of(recurrent) is places and rows.places_of(recurrent[:1]) is None


def _one_token() -> StepBatch:
    """Of one row that decodes."""
    none, one = np.zeros(0, np.int64), np.zeros(1, np.int32)
    return StepBatch(
        token_ids=one, positions=one, query_start=np.array([0, 1], np.int32), context_lens=one,
        block_tables=np.zeros((1, 1), np.int32), slot_mapping=one.astype(np.int64), sample_index=none,
        sample_slots=none, sample_positions=none, copies=none.reshape(0, 2), num_decodes=1, slots=np.array([0]),
    )  # fmt: skip
