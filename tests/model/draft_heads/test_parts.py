"""States that are kept by their places, taps, and entries that are not there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from asyncengine.errors import UnsupportedModelError
from asyncengine.model.draft_heads.eagle_config import eagle_config
from asyncengine.model.draft_heads.kept_states import KeptStates
from asyncengine.model.draft_heads.mtp_layouts import layout_of
from asyncengine.model.draft_heads.taps import Taps, tap_modules
from tests.model.draft_heads.eagle_heads import LLAMA

CPU = torch.device("cpu")
PAGE, PLACES, ROWS = 4, 24, 5


def test_a_place_has_the_newest_state_of_its_token_or_none() -> None:
    kept, random = KeptStates(PLACES, ROWS, PAGE, 2, torch.float32, CPU), np.random.default_rng(0)
    known: dict[int, float] = {}
    found = 0
    for number in range(300):
        places = random.permutation(PLACES)[: random.integers(8)]
        what = random.integers(4)
        if what < 2:
            states = 10.0 * number + torch.arange(len(places), dtype=torch.float32)[:, None].expand(-1, 2)
            kept.keep(places, states)
            known |= dict(zip(places.tolist(), states[:, 0].tolist(), strict=True))
            assert (kept.rows(places[-ROWS:]) >= 0).all()
        elif what == 2:
            kept.forget(places)
            for place in places.tolist():
                known.pop(place, None)
        else:
            copies = random.permutation(PLACES // PAGE)[:2]
            kept.copy(copies[None])
            for offset in range(PAGE):
                source, to = (copies * PAGE + offset).tolist()
                known.pop(to, None)
                if source in known:
                    known[to] = known[source]
        every = np.arange(PLACES)
        rows = kept.rows(every)
        there = every[rows >= 0]
        assert len(there) <= ROWS
        assert kept.states(rows[rows >= 0])[:, 0].tolist() == [known[place] for place in there.tolist()]
        found += len(there)
    assert found > 300
    kept.clear()
    assert (kept.rows(np.arange(PLACES)) == -1).all()


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(3))
        for layer in self.layers:
            nn.init.eye_(layer.weight).mul_(2)  # type: ignore[no-untyped-call, arg-type]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


@torch.inference_mode()
def test_taps_give_layers_in_the_order_that_is_asked_for() -> None:
    model, taps = Stack(), Taps([3, 0, 1, 0], 6, 2, torch.float32, CPU)
    with pytest.raises(UnsupportedModelError, match=r"no hidden states of its layers \[0, 1, 3\]"):
        taps.check()
    tap_modules(model, "layers.0.anything", taps)
    model(torch.ones(1, 4, 2))
    taps.check()
    assert taps.of(4)[:, ::2].tolist() == [[8.0, 1.0, 2.0, 1.0]] * 4
    with pytest.raises(UnsupportedModelError, match="in no list of layers"):
        tap_modules(nn.Sequential(nn.Linear(1, 1)), "0.anything", taps)


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({}, (2, 18, 33)),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 17, 32]}}, (2, 18, 33)),
        ({"eagle_aux_hidden_state_layer_ids": [1, 17, 32]}, (1, 17, 32)),
    ],
)
def test_layers_are_named_by_what_enters_them(changes: dict[str, object], layers: tuple[int, ...]) -> None:
    about = eagle_config(LLAMA | {"draft_vocab_size": 5} | changes, 36)
    assert about.target_layers == layers


def test_layouts_are_told_by_their_projection() -> None:
    assert layout_of({"mtp.fc.weight"}, 3).norm == "mtp.norm.weight"  # type: ignore[union-attr]
    assert layout_of({"model.layers.4.eh_proj.weight"}, 3) is None
