"""Files of prefix caches: written and read piece by piece, whole or not at all."""

from __future__ import annotations

import json
import os
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asyncengine import PrefixCacheError, catalogue, prefix_file
from asyncengine.catalogue import Catalogue
from asyncengine.prefix_file import PrefixReader, PrefixWriter

IDENTITY = {"weights": "abc", "program": "def"}
COUNT = 7
CATALOGUE = Catalogue(
    np.arange(4 * COUNT, dtype=np.int32).reshape(COUNT, 4),
    np.array([-1, 0, 1, 0, 3, -1, 5], dtype=np.int32),
    {"0.keys": 3, "0.values": 6},
)
ROWS = np.arange(9 * COUNT, dtype=np.uint8).reshape(COUNT, 9)
ALL = np.ones(COUNT, dtype=np.bool_)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "PIECE_BYTES", 30)  # three blocks


def write(path: Path, there: Any = ALL, identity: Any = IDENTITY) -> int:
    writer = PrefixWriter(path, CATALOGUE, identity)
    try:
        for piece in CATALOGUE.pieces():
            writer.add(there[piece], ROWS[piece][there[piece]])
        return writer.commit()
    finally:
        writer.discard()


def read(path: Path) -> tuple[Catalogue, Any]:
    reader = PrefixReader(path, IDENTITY)
    try:
        found = reader.catalogue()
        return found, np.concatenate([reader.rows(piece) for piece in found.pieces()])
    finally:
        reader.close()


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "prefixes"
    assert write(path) == 4 * COUNT and path.stat().st_mode & 0o777 == 0o600
    found, rows = read(path)
    assert (found.tokens == CATALOGUE.tokens).all() and (found.before == CATALOGUE.before).all()
    assert [*found.parts.items()] == [*CATALOGUE.parts.items()] and (rows == ROWS).all()
    with safetensors.safe_open(path, framework="numpy") as file:  # of the format whose name it has
        assert (file.get_tensor("content") == ROWS).all() and file.metadata()["format"] == "asyncengine prefix cache 1"


@pytest.mark.parametrize(
    ("there", "before"),
    [([1, 1, 0, 1, 0, 0, 0], [-1, 0, 0]), ([1, 0, 0, 1, 1, 1, 1], [-1, 0, 1, -1, 3]), ([0] * COUNT, [])],
)
def test_what_was_gone_meanwhile_is_left_out(there: list[int], before: list[int], tmp_path: Path) -> None:
    path, left = tmp_path / "prefixes", np.array(there, dtype=np.bool_)
    assert write(path, left) == 4 * left.sum()
    found, rows = read(path)
    assert found.before.tolist() == before
    assert (found.tokens == CATALOGUE.tokens[left]).all() and (rows == ROWS[left]).all()


def test_a_file_that_ends_anywhere_else_is_damaged(tmp_path: Path) -> None:
    """Cut at every byte, or longer than it was, also by whole blocks."""
    path = tmp_path / "prefixes"
    write(path)
    content = path.read_bytes()
    for added in (b"\0", content):
        path.write_bytes(content + added)
        with pytest.raises(PrefixCacheError, match="is damaged, or not a prefix cache"):
            read(path)
    for length in reversed(range(len(content))):
        os.truncate(path, length)
        with pytest.raises(PrefixCacheError, match="is damaged, or not a prefix cache"):
            read(path)


def test_a_file_that_is_cut_while_it_is_read_is_told(tmp_path: Path) -> None:
    """A map of it would end the process there."""
    path = tmp_path / "prefixes"
    write(path)
    reader = PrefixReader(path, IDENTITY)
    pieces = [*reader.catalogue().pieces()]
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    os.truncate(path, header + 9 * 3 + 9 * 2)  # amid the second piece
    assert (reader.rows(pieces[0]) == ROWS[pieces[0]]).all()
    with pytest.raises(PrefixCacheError, match="cut off while it was read"):
        reader.rows(pieces[1])
    reader.close()


def test_a_file_that_is_replaced_while_it_is_read_is_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "prefixes"
    write(path)
    reader = PrefixReader(path, IDENTITY)
    pieces = [*reader.catalogue().pieces()]
    write(path, np.zeros(COUNT, dtype=np.bool_))
    assert (np.concatenate([reader.rows(piece) for piece in pieces]) == ROWS).all()
    reader.close()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["I32", "U8", "x", "[]", '{"a": NaN}']),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["dtype", "shape", "x"]), inner),
    max_leaves=6,
)
ARRAYS = ("content", "tokens", "before")
PLACES = [
    (), ("__metadata__",), ("content",), ("before",),
    *(("__metadata__", name) for name in ("format", "identity", "parts")),
    *((name, field) for name in ARRAYS for field in ("dtype", "shape", "data_offsets")),
    *((name, field, at) for name in ARRAYS for field in ("shape", "data_offsets") for at in (0, 1)),
]  # fmt: skip


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.sampled_from(PLACES), value=JSON | st.sampled_from([-1, 1 << 40, 1 << 100, [0, 1 << 62], [[]]]))
def test_whatever_a_header_says_it_is_read_as_it_was_or_refused(place: Any, value: Any, tmp_path: Path) -> None:
    path = tmp_path / "prefixes"
    write(path)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    about = json.loads(content[8 : 8 + length])
    at: Any = {"": about}
    for key in ("", *place)[:-1]:
        at = at[key]
    last = ("", *place)[-1]
    if isinstance(at, list) and last == len(at):  # the shape of `before`
        at.append(value)
    else:
        at[last] = value
    about = about if place else value
    text = json.dumps(about).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    try:
        found, rows = read(path)
    except PrefixCacheError:
        return
    assert (found.tokens == CATALOGUE.tokens).all() and (rows == ROWS).all()


@pytest.mark.parametrize("size", [1 << 62, 1 << 100, -1, True, 4.0])
def test_sizes_that_are_none(size: Any, tmp_path: Path) -> None:
    """Of nothing, so that they fit whatever is there."""
    path = tmp_path / "prefixes"
    arrays = {
        "content": {"dtype": "U8", "shape": [0, 9], "data_offsets": [0, 0]},
        "tokens": {"dtype": "I32", "shape": [0, size], "data_offsets": [0, 0]},
        "before": {"dtype": "I32", "shape": [0], "data_offsets": [0, 0]},
    }
    write(path)
    with safetensors.safe_open(path, framework="numpy") as file:
        text = json.dumps(arrays | {"__metadata__": file.metadata()}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(PrefixCacheError, match="tokens is malformed"):
        read(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ((1 << 62).to_bytes(8, "little") + b"{}", "ends before its header"),
        ((1 << 21).to_bytes(8, "little") + b" " * (1 << 21), "ends before its header"),  # it is there, and too long
        ((1 << 20).to_bytes(8, "little") + b"[" * (1 << 20), "recursion"),
        ((2).to_bytes(8, "little") + b"{}", "it has nothing"),
        ((2).to_bytes(8, "little") + b"\xff\xfe", "Expecting value"),
        (b"\x80\x04K\x03.", "ends before its header"),  # a pickle
    ],
)
def test_files_of_another_kind(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "prefixes"
    path.write_bytes(content)
    with pytest.raises(PrefixCacheError, match=rf"is damaged, or not a prefix cache: .*{words}"):
        read(path)


def test_what_is_no_regular_file_is_neither_read_nor_replaced(tmp_path: Path) -> None:
    """To open a pipe may be to wait for ever; to replace a device or a directory is not what anybody means."""
    pipe, folder = tmp_path / "pipe", tmp_path / "folder"
    os.mkfifo(pipe)
    folder.mkdir()
    for path in (pipe, folder):
        with pytest.raises(PrefixCacheError, match="is no regular file"):
            read(path)
        with pytest.raises(PrefixCacheError, match=r"cannot write .* it is no regular file"):
            write(path)
    assert sorted(os.listdir(tmp_path)) == ["folder", "pipe"] and not pipe.is_file()
    link = tmp_path / "link"
    link.symlink_to("nothing yet")
    assert write(link) and read(link)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may do anything")
def test_where_nothing_may_be_read_or_written(tmp_path: Path) -> None:
    path = tmp_path / "prefixes"
    write(path)
    path.chmod(0)
    with pytest.raises(PrefixCacheError, match=r"cannot read .* Permission denied"):
        read(path)
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PrefixCacheError, match=r"cannot write .* Permission denied"):
            write(path)
    finally:
        tmp_path.chmod(0o700)


@contextmanager
def full_disk(at: int) -> Iterator[None]:
    """No file of this process gets longer."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (at, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("at", [0, 500])
def test_a_full_disk_leaves_what_was_there(at: int, tmp_path: Path) -> None:
    path = tmp_path / "prefixes"
    path.write_bytes(b"before")
    with full_disk(at), pytest.raises(PrefixCacheError, match=r"cannot write .*: File too large"):
        write(path)
    assert os.listdir(tmp_path) == ["prefixes"] and path.read_bytes() == b"before"
    assert write(path)


def test_it_is_on_the_disk_before_it_is_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or else a power failure may leave a file of zeros, as large as it should be."""
    path, done = tmp_path / "prefixes", list[Any]()
    sync, replace = os.fsync, os.replace

    def synced(file: int) -> None:
        (written,) = tmp_path.iterdir()
        done.append(written.read_bytes())
        sync(file)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda *names: (done.append("in its place"), replace(*names)))
    write(path, ALL * (np.arange(COUNT) < 3))
    assert done == [path.read_bytes(), "in its place"]


@pytest.mark.parametrize("what", ["writes", "reads"])
def test_whoever_gives_up_waits_for_nobody_and_leaves_nothing(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While another thread is at it: that one clears up when it comes back."""
    path, begun, goes_on = tmp_path / "prefixes", threading.Event(), threading.Event()
    write(path)
    made: Any = PrefixWriter(path, CATALOGUE, IDENTITY) if what == "writes" else PrefixReader(path, IDENTITY)
    name = "ascontiguousarray" if what == "writes" else "empty"
    original = getattr(np, name)

    def held(*given: Any, **named: Any) -> Any:
        begun.set()
        assert goes_on.wait(10)
        return original(*given, **named)

    monkeypatch.setattr(prefix_file.np, name, held)  # type: ignore[attr-defined]
    work = (lambda: made.add(ALL, ROWS)) if what == "writes" else made.catalogue
    thread = threading.Thread(target=work)
    thread.start()
    assert begun.wait(10)
    (made.discard if what == "writes" else made.close)()
    file = made._lent.file
    assert not file.closed
    goes_on.set()
    thread.join()
    assert file.closed and os.listdir(tmp_path) == ["prefixes"]


def test_what_was_given_up_does_not_come_into_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even at the last moment."""
    writer = PrefixWriter(tmp_path / "prefixes", CATALOGUE, IDENTITY)
    writer.add(ALL, ROWS)
    monkeypatch.setattr(os, "fsync", lambda file: writer.discard())
    writer.commit()
    assert os.listdir(tmp_path) == []
