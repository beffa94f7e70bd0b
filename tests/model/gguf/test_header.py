"""Headers of GGUF files: what they say, and that nothing but an error comes of one that is damaged."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asyncengine.errors import CheckpointError, UnsupportedModelError
from asyncengine.model.gguf.checkpoint import GgufCheckpoint
from asyncengine.model.gguf.header import BlockTensor, Header, read_header

pytestmark = pytest.mark.loops("either")

MATRIX = np.arange(64 * 32, dtype=np.float32).reshape(64, 32)


def small(path: Path) -> Path:
    """A file that has a value of each kind and two tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 1)
    writer.add_float32("llama.rope.freq_base", 10000.0)
    writer.add_bool("some.flag", True)
    writer.add_int8("some.small", -3)
    writer.add_uint64("some.large", 1 << 40)
    writer.add_float64("some.double", 0.1)
    writer.add_array("some.words", ["a", "", "zwölf"])
    writer.add_array("some.numbers", [1, 2, 3])
    writer.add_tensor("token_embd.weight", MATRIX)
    writer.add_tensor(
        "output.weight",
        gguf.quants.quantize(MATRIX, gguf.GGMLQuantizationType.Q8_0),
        raw_dtype=gguf.GGMLQuantizationType.Q8_0,
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def contents(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return small(tmp_path_factory.mktemp("gguf") / "small.gguf").read_bytes()


def written(tmp_path: Path, contents: bytes, name: str = "model.gguf") -> Path:
    path = tmp_path / name
    path.write_bytes(contents)
    return path


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def made(
    metadata: bytes = b"",
    tensors: bytes = b"",
    counts: tuple[int, int] = (0, 0),
    magic: bytes = b"GGUF",
    version: bytes = struct.pack("<I", 3),
) -> bytes:
    """A file, of its parts; counts are of tensors and of values."""
    return magic + version + struct.pack("<QQ", *counts) + metadata + tensors


def entry(name: bytes, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def test_reads_what_is_there(tmp_path: Path, contents: bytes) -> None:
    path = written(tmp_path, contents)
    header = read_header(path)
    assert header.metadata == {
        "general.architecture": "llama", "llama.block_count": 1, "llama.rope.freq_base": 10000.0, "some.flag": True,
        "some.small": -3, "some.large": 1 << 40, "some.double": 0.1, "some.words": ["a", "", "zwölf"],
        "some.numbers": [1, 2, 3],
    }  # fmt: skip
    plain, coded = header.tensors["token_embd.weight"], header.tensors["output.weight"]
    assert (plain.shape, plain.blocks.name, plain.rows, plain.row_bytes) == ((64, 32), "F32", 64, 128)
    assert (coded.shape, coded.blocks.name, coded.rows, coded.row_bytes) == ((64, 32), "Q8_0", 64, 34)
    assert contents[plain.start : plain.start + MATRIX.nbytes] == MATRIX.tobytes()
    assert contents[plain.part(3, 2).start :][:256] == MATRIX[3:5].tobytes()
    assert coded.part(3, 2).start == coded.start + 3 * 34
    assert tuple(header.files) == (path,)


@pytest.mark.parametrize(("first", "count"), [(-1, 2), (0, 65), (64, 1), (2, -1)])
def test_there_is_no_part_beyond_a_tensor(first: int, count: int) -> None:
    with pytest.raises(CheckpointError, match=r"shape \(64, 32\)"):
        BlockTensor("w", 0, (64, 32), Path("f"), 0).part(first, count)


def test_the_digest_is_of_the_header_alone(tmp_path: Path, contents: bytes) -> None:
    last, words = bytes([contents[-1] ^ 1]), contents.replace(b"zw", b"Zw")
    digests = [read_header(written(tmp_path, each)).digest for each in (contents, contents[:-1] + last, words)]
    assert digests[0] == digests[1] != digests[2]


def valued(value: bytes, key: bytes = b"k") -> bytes:
    """A file with one value, of which its kind is given too."""
    return made(string(key) + value, counts=(0, 1))


HUGE = 1 << 62
DAMAGED: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "damaged or incomplete"),
    "other": (made(magic=b"GGML"), "not a GGUF file: it begins with b'GGML'"),
    "text": (b"version https://git-lfs.github.com/spec/v1\n", "not a GGUF file"),
    "first version": (made(version=struct.pack("<I", 1)), "of version 1; versions 2 and 3"),
    "later version": (made(version=struct.pack("<I", 4)), "of version 4"),
    "big endian": (made(version=struct.pack(">I", 3)), "byte order of another processor"),
    "counts of values": (made(counts=(0, HUGE)), "damaged"),
    "counts of tensors": (made(counts=(HUGE, 0)), "damaged"),
    "key": (made(struct.pack("<Q", HUGE), counts=(0, 1)), "a string of"),
    "string": (valued(struct.pack("<IQ", 8, HUGE)), "a string of"),
    "kind": (valued(struct.pack("<I", 13)), "a value of kind 13"),
    "array": (valued(struct.pack("<IIQ", 9, 4, HUGE)), "an array of"),
    "array beyond the end": (valued(struct.pack("<IIQ", 9, 4, 20)), "damaged"),
    "strings": (valued(struct.pack("<IIQ", 9, 8, HUGE)), "damaged"),
    "strings beyond the end": (valued(struct.pack("<IIQQ", 9, 8, 1, 9)), "strings end"),
    "long string of several": (valued(struct.pack("<IIQQ", 9, 8, 2, HUGE)), "damaged"),
    "arrays of arrays": (valued(struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000), "of kind 9"),
    "array of another kind": (valued(struct.pack("<IIQ", 9, 13, 3)), "of kind 13"),
    "alignment": (valued(struct.pack("<II", 4, 0), b"general.alignment"), "general.alignment is 0"),
    "text for an alignment": (
        valued(struct.pack("<I", 8) + string(b"x"), b"general.alignment"), "general.alignment is 'x'"
    ),
    "dimensions": (made(tensors=string(b"w") + struct.pack("<I", 5), counts=(1, 0)), "5 dimensions"),
    "no dimensions": (made(tensors=string(b"w") + struct.pack("<I", 0), counts=(1, 0)), "0 dimensions"),
    "beyond the end": (made(tensors=entry(b"w", (32, 4)), counts=(1, 0)), "w would end behind"),
    "far beyond the end": (made(tensors=entry(b"w", (2**63, 2**63, 2**63)), counts=(1, 0)), "w would end behind"),
    "offset": (made(tensors=entry(b"w", (1,), offset=2**64 - 1), counts=(1, 0)), "w would end behind"),
    "blocks": (made(tensors=entry(b"w", (33,), kind=2), counts=(1, 0)), "in blocks of 32"),
    "type": (made(tensors=entry(b"w", (32,), kind=4), counts=(1, 0)), "ggml's type 4"),
    "twice": (made(tensors=entry(b"w", (0,)) * 2 + bytes(64), counts=(2, 0)), "the same name"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_file_is_an_error_that_names_it(what: str, tmp_path: Path) -> None:
    contents, message = DAMAGED[what]
    path = written(tmp_path, contents)
    tracemalloc.start()
    try:
        with pytest.raises((CheckpointError, UnsupportedModelError), match=message) as found:
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert str(path) in str(found.value)


def test_a_file_cut_anywhere_is_an_error(tmp_path: Path, contents: bytes) -> None:
    for length in range(0, len(contents), 1):
        if length > 700 and length % 97:  # the tensors
            continue
        path = written(tmp_path, contents[:length])
        with pytest.raises(CheckpointError, match=str(path)):
            read_header(path)
    assert read_header(written(tmp_path, contents))


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(CheckpointError, match=str(path)):
            read_header(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_has_another_outcome(tmp_path: Path, contents: bytes, data: st.DataObject) -> None:
    found = bytearray(contents)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, 699))
        found[at : at + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
    path = written(
        tmp_path, bytes(found[: data.draw(st.integers(0, len(found)))] if data.draw(st.booleans()) else found)
    )
    for read in (read_header, GgufCheckpoint):
        outcome = _outcome(read, path)
        assert outcome is None or str(path) in str(outcome)


def _outcome(read: Callable[[Path], Any], path: Path) -> Exception | None:
    try:
        read(path)
    except (CheckpointError, UnsupportedModelError) as error:
        return error
    return None


def split(tmp_path: Path, counts: tuple[int, ...] = (3, 3, 3), names: tuple[str, ...] = ("a", "b", "c")) -> list[Path]:
    """A model in three files, each of which says of how many it is."""
    paths = []
    for part, (count, name) in enumerate(zip(counts, names, strict=True)):
        metadata = string(b"split.count") + struct.pack("<IH", 2, count)
        contents = made(metadata, entry(name.encode(), (1,)), (1, 1))
        contents += bytes(-len(contents) % 32 + 4)
        paths.append(written(tmp_path, contents, f"m-{part + 1:05}-of-00003.gguf"))
    return paths


def test_a_model_in_several_files_is_read_from_the_first(tmp_path: Path) -> None:
    paths = split(tmp_path)
    header: Header = read_header(paths[0])
    assert tuple(header.files) == tuple(paths)
    assert {name: tensor.file for name, tensor in header.tensors.items()} == dict(zip("abc", paths, strict=True))


def test_what_is_wrong_with_several_files(tmp_path: Path) -> None:
    paths = split(tmp_path)
    with pytest.raises(CheckpointError, match=r"part 2 of 3; name the first, m-00001-of-00003.gguf"):
        read_header(paths[1])
    paths[2].unlink()
    with pytest.raises(CheckpointError, match=r"1 of 3 files are missing: m-00003-of-00003.gguf"):
        read_header(paths[0])
    with pytest.raises(CheckpointError, match=r"m-00003-of-00003.gguf has tensors that an earlier file has: a"):
        read_header(split(tmp_path, names=("a", "b", "a"))[0])
    alone = written(tmp_path, split(tmp_path)[0].read_bytes(), "alone.gguf")
    with pytest.raises(CheckpointError, match=r"alone.gguf is one of 3 files"):
        read_header(alone)
