"""Recurrent layers over many sequences at once, against transformers over each whole sequence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Cache

from asyncengine.model import architecture
from asyncengine.model.recurrent.compiled_functions import compiled
from asyncengine.model.recurrent.functions import Functions
from asyncengine.model.recurrent.recorded import RecurrentLayer
from asyncengine.model.recurrent.scans import Scans
from asyncengine.model.recurrent.states import States, bytes_per_place
from asyncengine.step.batch import StepBatch
from asyncengine.step.limits import Limits
from tests.model.checkpoints import config

if not hasattr(Cache, "get_conv_state"):
    pytest.skip("layers keep their states so from transformers 5.22 on", allow_module_level=True)

CPU = torch.device("cpu")
SLOTS, KEPT = 4, 3
NAMES = ("qwen3_5", "lfm2", "granitemoehybrid", "mamba", "falcon_h1", "kimi_linear", "zaya")


class Case:
    """The first recurrent layer of a model, over states of several sequences, and transformers' own beside it."""

    def __init__(self, name: str, functions: Functions | None = None) -> None:
        torch.manual_seed(0)
        self.model = AutoModelForCausalLM.from_config(config(name), attn_implementation=architecture.ATTENTION).eval()
        self.model.requires_grad_(False)
        layer = architecture.record(self.model).recurrent[0]
        alone = name in ("mamba",)  # as a trial finds out
        self.layer = RecurrentLayer(layer.name, layer.module, layer.spec, functions)
        limits = Limits(SLOTS, 64, 64, 16, 8, kept_states=KEPT, drafted_states=6)
        self.states = States([self.layer], limits, torch.float32, CPU, trying=alone)
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


HOW = [(name, "compiled") for name in NAMES] + [(name, "plain") for name in ("qwen3_5", "lfm2", "mamba", "kimi_linear")]


@pytest.fixture(params=HOW, ids="-".join)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    name, how = request.param
    functions = compiled(request.getfixturevalue("compiled_scans")) if how == "compiled" else None
    with torch.inference_mode():
        yield Case(name, functions)


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
