"""What the prefix cache has, taken out of one core and put into another."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncengine import instructions as ins
from asyncengine.errors import (
    EngineFailedError,
    IllegalStateError,
    ModelNotLoadedError,
    PrefixCacheError,
)
from asyncengine.prefix_file import KeptPrefixes
from asyncengine.testing import ByteTokenizer, ScriptedLoader

from .core_case import Case, loaded


def taken(case: Case) -> KeptPrefixes:
    view = case.core.view
    assert view is not None
    try:
        catalogue = case.ask(lambda to: ins.SavePrefixes(view.epoch, "saved", to))
        content = {
            part: case.ask(lambda to, part=part: ins.ReadPrefixes(view.epoch, "saved", part, to))
            for part in catalogue.parts
        }
        assert {part: rows.shape[1] for part, rows in content.items()} == catalogue.parts
        case.check()
        return KeptPrefixes(catalogue, content)
    finally:
        case.ask(lambda to: ins.Unpin("saved", to))


def put(case: Case, kept: KeptPrefixes) -> int:
    found = case.ask(lambda to: ins.LoadPrefixes(kept, case.core.view.epoch, to))  # type: ignore[union-attr]
    case.check()
    assert isinstance(found, int)
    return found


def answered(case: Case, prompt: str) -> int:
    """Lets the core answer; returns how many tokens it found in the cache. The model checks what is there."""
    number = case.add(prompt)
    case.run()
    assert case.text(number) == prompt
    return case.usage(number).cached_tokens


PROMPTS = st.lists(st.text("ab", min_size=1, max_size=30), min_size=1, max_size=6)


@settings(deadline=None)
@given(first=PROMPTS, second=PROMPTS, room=st.sampled_from([128, 40, 12]))
def test_what_one_has_computed_another_finds(first: list[str], second: list[str], room: int) -> None:
    """Also where it has some of it already, or too little memory: then what was used last."""
    case = loaded()
    for prompt in first:
        answered(case, prompt)
    kept = taken(case)
    other = loaded(max_total_sequence_length=max(room, 64))
    for prompt in second:
        answered(other, prompt)
    free = other.pool.num_free
    new = put(other, kept)
    assert new % 4 == 0 and other.pool.num_used == 0
    assert other.pool.num_free == free - new // 4
    tree = other.core.scheduler.blocks.tree  # type: ignore[union-attr]
    if other.pool.num_free:  # there was room for all
        assert put(other, kept) == 0
        for prompt in first:
            whole = case.core.scheduler.blocks.tree.match(np.array(list(prompt.encode()), dtype=np.int32))  # type: ignore[union-attr]
            assert len(tree.match(np.array(list(prompt.encode()), dtype=np.int32))) >= len(whole)
    for prompt in [*first, *second]:
        answered(other, prompt)
    other.check()


def test_what_was_used_last_comes_first_and_goes_last() -> None:
    case = loaded()
    for prompt in ("aaaa" * 3, "bbbb" * 3, "cccc" * 3, "aaaa" * 3):
        answered(case, prompt)
    kept = taken(case)
    firsts = [bytes(kept.catalogue.tokens[at].tolist()) for at in np.flatnonzero(kept.catalogue.before < 0).tolist()]
    assert firsts == [b"aaaa", b"cccc", b"bbbb"]
    other = loaded(max_total_sequence_length=4 * 16)  # each has come to six blocks, with its answer
    assert put(other, kept) == 4 * 16
    assert [answered(other, each * 3) for each in ("aaaa", "cccc")] == [8, 8]
    third = loaded(max_total_sequence_length=4 * 18)
    put(third, kept)
    third.core.scheduler.blocks.make_room(6)  # type: ignore[union-attr]
    assert answered(third, "aaaa" * 3) == 8


def test_what_means_something_here_alone_stays_out() -> None:
    """What adapters and images have to do with."""
    loader = ScriptedLoader(adapters={"x": lambda prompt, branch: b"x"}, tokenizer=ByteTokenizer(), takes_images=True)
    case = Case(loader)
    case.load(adapters={"x": "x"})
    case.add("adapted prompt", adapter="x")
    case.run()
    assert taken(case).catalogue.num_tokens == 0
    reader = case.core.view.media_reader  # type: ignore[union-attr]
    tokens = ByteTokenizer()
    assert reader is not None
    text = "aaaabbb\0" + "cccc" * 4
    read = reader.read({"image": [b"picture"]}, lambda encode: encode(text), tokens.encode, 100)
    new = dataclasses.replace(case.new(read.token_ids), media=read.media)
    case.give(case.adding(new))
    case.run()
    kept = taken(case)
    assert kept.catalogue.tokens.tolist() == [[*b"aaaa"]]
    other = loaded()
    assert put(other, kept) == 4 and answered(other, "aaaabbb") == 4


def test_what_is_saved_is_not_evicted_before_it_is_read() -> None:
    """And is not read where it was emptied: the blocks may have something else by then."""
    case = loaded(max_total_sequence_length=64)
    answered(case, "aaaa" * 4)
    assert case.core.view is not None
    catalogue = case.ask(lambda to: ins.SavePrefixes(1, "saved", to))
    count = len(catalogue.before)
    assert case.pool.num_used == count
    answered(case, "bbbb" * 3)
    answered(case, "cccc" * 3)
    rows = case.ask(lambda to: ins.ReadPrefixes(1, "saved", "cells", to))
    cells = rows.view(np.int64).reshape(count, 4)
    assert (cells == catalogue.tokens).all()
    case.ask(ins.Reset)
    assert case.ask(lambda to: ins.ReadPrefixes(1, "saved", "cells", to)) is None
    case.check()


def test_pins_are_kept_and_what_runs_is_not_disturbed() -> None:
    case = loaded()
    case.add("bbbb" * 4, pin="p", max_tokens=0)
    case.run()
    running = case.add("aaaa" * 4, max_tokens=30)
    case.step(3)
    kept = taken(case)
    assert kept.catalogue.num_tokens >= 16
    assert put(case, kept) == 0
    case.run()
    assert case.text(running) == "aaaa" * 4


WRONG: list[tuple[Any, str]] = [
    (
        lambda kept: dataclasses.replace(
            kept, catalogue=dataclasses.replace(kept.catalogue, tokens=kept.catalogue.tokens[:, :2])
        ),
        r"blocks of \(2,\) tokens, not 4",
    ),
    (lambda kept: dataclasses.replace(kept, content={}), "of another model"),
    (lambda kept: dataclasses.replace(kept, content={"cells": kept.content["cells"][:, :8]}), "of another model"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_what_does_not_fit_is_refused_and_changes_nothing(change: Any, message: str) -> None:
    case = loaded()
    answered(case, "aaaa" * 4)
    kept = change(taken(case))
    other = loaded()
    with pytest.raises(PrefixCacheError, match=message):
        put(other, kept)
    other.check()
    assert other.pool.num_free == other.pool.num_blocks


def test_where_it_cannot_be() -> None:
    case = loaded()
    answered(case, "aaaa" * 4)
    kept = taken(case)
    assert case.ask(lambda to: ins.SavePrefixes(99, "saved", to)) is None  # another model by now
    assert case.ask(lambda to: ins.ReadPrefixes(99, "saved", "cells", to)) is None
    assert case.ask(lambda to: ins.ReadPrefixes(1, "saved", "cells", to)) is None  # it is not pinned any longer
    assert case.ask(lambda to: ins.LoadPrefixes(kept, 99, to)) is None
    case.ask(ins.Pause)
    assert taken(case).catalogue.num_tokens == kept.catalogue.num_tokens and put(case, kept) == 0
    case.ask(ins.Sleep)
    for make in (lambda to: ins.SavePrefixes(1, "saved", to), lambda to: ins.LoadPrefixes(kept, 1, to)):
        with pytest.raises(IllegalStateError, match="prefix_cache while the engine is sleeping"):
            case.ask(make)
    case.ask(ins.Wake)
    case.ask(lambda to: ins.UpdateWeights({"w": 1}, to))
    with pytest.raises(PrefixCacheError, match="replaced"):
        taken(case)
    with pytest.raises(PrefixCacheError, match="replaced"):
        put(case, kept)
    case.check()
    states = loaded(kept_states=3)
    with pytest.raises(PrefixCacheError, match="states are not kept"):
        taken(states)
    case.add("a")
    case.model.lose_device()
    case.step()
    with pytest.raises(EngineFailedError):
        case.ask(lambda to: ins.SavePrefixes(1, "saved", to))
    case.ask(ins.Unload)
    with pytest.raises(ModelNotLoadedError):
        case.ask(lambda to: ins.SavePrefixes(1, "saved", to))
