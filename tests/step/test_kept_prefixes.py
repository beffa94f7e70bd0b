"""What the prefix cache has, taken out of one core and put into another."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncengine import instructions as ins
from asyncengine.catalogue import Inventory, KeptPrefixes, Taken
from asyncengine.errors import (
    EngineFailedError,
    IllegalStateError,
    ModelNotLoadedError,
    PrefixCacheError,
)
from asyncengine.testing import ByteTokenizer, ScriptedLoader

from .core_case import Case, loaded


def whole(case: Case) -> Inventory:
    view = case.core.view
    found = case.ask(lambda to: ins.SavePrefixes(-1 if view is None else view.epoch, to))
    assert isinstance(found, Inventory)
    return found


def read(case: Case, inventory: Inventory, piece: slice = slice(None)) -> tuple[Any, Any]:
    """Which blocks of a piece are still there, and what the cache has for them: the model's cells have the tokens."""
    found = case.ask(lambda to: ins.ReadPrefixes(1, inventory.blocks[piece], inventory.adopted[piece], to))
    there, rows = found
    cells = rows.view(np.int64).reshape(-1, inventory.catalogue.tokens.shape[1])
    assert (cells == inventory.catalogue.tokens[piece][there]).all()
    case.check()
    return there, rows


def taken(case: Case) -> KeptPrefixes:
    """All that there is, in one piece."""
    inventory = whole(case)
    there, rows = read(case, inventory)
    assert there.all() and rows.shape[1] == sum(inventory.catalogue.parts.values())
    return KeptPrefixes(inventory.catalogue, 0, rows)


def put(case: Case, kept: KeptPrefixes, size: int = 1000) -> int:
    """Puts all in, in pieces of so many blocks; returns how many tokens are new."""
    tokens = 0
    for start in range(0, max(len(kept.rows), 1), size):
        piece = dataclasses.replace(kept, start=start, rows=kept.rows[start : start + size])
        found = case.ask(lambda to, piece=piece: ins.LoadPrefixes(piece, case.core.view.epoch, to))  # type: ignore[union-attr]
        case.check()
        assert isinstance(found, Taken) and found.room == (case.pool.num_free > 0)
        tokens += found.tokens
    return tokens


def answered(case: Case, prompt: str) -> int:
    """Lets the core answer; returns how many tokens it found in the cache. The model checks what is there."""
    number = case.add(prompt)
    case.run()
    assert case.text(number) == prompt
    return case.usage(number).cached_tokens


PROMPTS = st.lists(st.text("ab", min_size=1, max_size=30), min_size=1, max_size=6)


@settings(deadline=None)
@given(
    first=PROMPTS,
    second=PROMPTS,
    room=st.sampled_from([128, 40, 12]),
    size=st.sampled_from([1, 3, 1000]),
    most=st.sampled_from([None, 0, 1, 3]),
)
def test_what_one_has_computed_another_finds(
    first: list[str], second: list[str], room: int, size: int, most: int | None
) -> None:
    """Also where it has some of it already, or too little memory: then what was used last. What it has stays."""
    case = loaded()
    for prompt in first:
        answered(case, prompt)
    kept = taken(case)
    other = loaded(max_total_sequence_length=max(room, 64), prefix_cache_max_num_recycling_seqs=most)
    for prompt in second:
        answered(other, prompt)
    free, before = other.pool.num_free, taken(other).catalogue.tokens.tolist()
    new = put(other, kept, size)
    assert new % 4 == 0 and other.pool.num_used == 0
    assert other.pool.num_free == free - new // 4
    after = taken(other).catalogue.tokens.tolist()
    assert all(after.count(block) >= before.count(block) for block in before)
    tree = other.core.scheduler.blocks.tree  # type: ignore[union-attr]
    if other.pool.num_free and most is None:  # there was room for all
        assert put(other, kept, size) == 0
        for prompt in first:
            known = case.core.scheduler.blocks.tree.match(np.array(list(prompt.encode()), dtype=np.int32))  # type: ignore[union-attr]
            assert len(tree.match(np.array(list(prompt.encode()), dtype=np.int32))) >= len(known)
    for prompt in [*first, *second]:
        answered(other, prompt)
    other.check()


@pytest.mark.parametrize("size", [1, 2, 5])
def test_what_a_piece_follows_may_be_gone_by_then(size: int) -> None:
    """So it is left out: a block is worth nothing without all before it."""
    case = loaded()
    for tail in ("", "b" * 8, "c" * 8):
        answered(case, "aaaa" * 3 + tail)
    kept = taken(case)
    other = loaded()
    pieces = [
        dataclasses.replace(kept, start=start, rows=kept.rows[start : start + size])
        for start in range(0, len(kept.rows), size)
    ]
    new = 0
    for at, piece in enumerate(pieces):
        if at == 1:
            other.ask(ins.Reset)
        new = other.ask(lambda to, piece=piece: ins.LoadPrefixes(piece, 1, to)).tokens
        other.check()
        assert at == 0 or new == 0
    assert other.pool.num_cached == 0


@pytest.mark.parametrize("size", [1000, 4])
def test_what_was_used_last_comes_first_and_goes_last(size: int) -> None:
    case = loaded()
    for prompt in ("aaaa" * 3, "bbbb" * 3, "cccc" * 3, "aaaa" * 3):
        answered(case, prompt)
    kept = taken(case)
    firsts = [bytes(kept.catalogue.tokens[at].tolist()) for at in np.flatnonzero(kept.catalogue.before < 0).tolist()]
    assert firsts == [b"aaaa", b"cccc", b"bbbb"]
    again = loaded()
    assert put(again, kept, size) > 0
    assert taken(again).catalogue.tokens.tolist() == kept.catalogue.tokens.tolist()
    other = loaded(max_total_sequence_length=4 * 16)  # each has come to six blocks, with its answer
    assert put(other, kept, size) == 4 * 16
    assert [answered(other, each * 3) for each in ("aaaa", "cccc")] == [8, 8]
    third = loaded(max_total_sequence_length=4 * 18)
    put(third, kept, size)
    third.core.scheduler.blocks.make_room(6)  # type: ignore[union-attr]
    assert answered(third, "aaaa" * 3) == 8


def test_what_means_something_here_alone_stays_out() -> None:
    """What adapters and images have to do with."""
    loader = ScriptedLoader(adapters={"x": lambda prompt, branch: b"x"}, tokenizer=ByteTokenizer(), takes_images=True)
    case = Case(loader)
    case.load(adapters={"x": "x"})
    case.add("adapted prompt", adapter="x")
    case.run()
    assert taken(case).catalogue.tokens.size == 0
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


def test_what_is_evicted_before_it_is_read_is_left_out() -> None:
    """Whatever its block has by then. Nobody waits for what is being saved, and what was emptied is gone."""
    case = loaded(max_total_sequence_length=64)
    answered(case, "aaaa" * 4)
    inventory = whole(case)
    assert case.pool.num_used == 0
    first, _ = read(case, inventory, slice(0, 2))
    assert first.all()
    for other in ("bbbb", "cccc"):  # takes what it needs from the end
        answered(case, other * 3)
    there, rows = read(case, inventory, slice(2, None))
    assert (
        0 < there.sum() < len(there)
        and there.tolist() == sorted(there.tolist(), reverse=True)
        and len(rows) == there.sum()
    )
    case.ask(ins.Reset)
    assert not read(case, inventory)[0].any()
    answered(case, "aaaa" * 4)  # the same tokens again, and computed again
    assert not read(case, inventory)[0].any()


def test_a_full_cache_that_is_saved_takes_new_prompts() -> None:
    case = loaded(max_total_sequence_length=64, max_num_sequence=2)
    for letter in "abcdef":
        answered(case, letter * 9)
    assert case.pool.num_free < 2
    inventory = whole(case)
    running = [case.add(letter * 20, max_tokens=9) for letter in "xyz"]
    case.run()
    assert [case.text(number) for number in running] == [letter * 9 for letter in "xyz"]
    read(case, inventory)


def test_pins_are_kept_and_what_runs_is_not_disturbed() -> None:
    case = loaded()
    case.add("bbbb" * 4, pin="p", max_tokens=0)
    case.run()
    running = case.add("aaaa" * 4, max_tokens=30)
    case.step(3)
    kept = taken(case)
    assert kept.catalogue.tokens.size >= 16
    assert put(case, kept) == 0
    case.run()
    assert case.text(running) == "aaaa" * 4


def of_parts(kept: KeptPrefixes, **parts: int) -> KeptPrefixes:
    return dataclasses.replace(kept, catalogue=dataclasses.replace(kept.catalogue, parts=parts))


def test_only_what_is_new_counts_where_others_go() -> None:
    """Those that were pinned are more than are kept; when they are not any longer, they go."""
    case = loaded(prefix_cache_max_num_recycling_seqs=1)
    answered(case, "aaaa" * 4)
    kept = taken(case)
    other = loaded(prefix_cache_max_num_recycling_seqs=1)
    for pin in "pq":
        other.add(pin * 8, pin=pin, max_tokens=0)
        other.run()
    for pin in "pq":
        other.ask(lambda to, pin=pin: ins.Unpin(pin, to))
    assert put(other, kept) == 0
    assert [answered(other, pin * 8) for pin in "qp"] == [4, 0]


WRONG: list[tuple[Any, str]] = [
    (
        lambda kept: dataclasses.replace(
            kept, catalogue=dataclasses.replace(kept.catalogue, tokens=kept.catalogue.tokens[:, :2])
        ),
        "blocks of 2 tokens, not 4",
    ),
    (lambda kept: of_parts(kept, cell=32), "of another KV cache"),
    (lambda kept: of_parts(kept, cells=16), "of another KV cache"),
    (lambda kept: of_parts(kept, cells=32, more=0), "of another KV cache"),
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
    inventory = whole(case)
    nothing = inventory.blocks[:0], inventory.adopted[:0]
    for of_epoch in (ins.SavePrefixes, lambda epoch, to: ins.ReadPrefixes(epoch, *nothing, to)):
        assert case.ask(lambda to, of_epoch=of_epoch: of_epoch(99, to)) is None  # another model by now
    assert case.ask(lambda to: ins.LoadPrefixes(kept, 99, to)) is None
    case.ask(ins.Pause)
    assert taken(case).rows.tolist() == kept.rows.tolist() and put(case, kept) == 0
    case.ask(ins.Sleep)
    for make in (
        lambda to: ins.SavePrefixes(1, to),
        lambda to: ins.ReadPrefixes(1, *nothing, to),
        lambda to: ins.LoadPrefixes(kept, 1, to),
    ):
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
        case.ask(lambda to: ins.SavePrefixes(1, to))
    case.ask(ins.Unload)
    with pytest.raises(ModelNotLoadedError):
        case.ask(lambda to: ins.SavePrefixes(1, to))
