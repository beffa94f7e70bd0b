"""A checkpoint on disk: where it is, whether it is whole, how large it is. Reads headers, never weights.

Where weights are stored as codes, it reads what says of each how: a shape, or a few hundred bytes of JSON.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import threading
from collections.abc import Collection, Mapping
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch

from asyncengine.config import Quantization
from asyncengine.errors import CheckpointError, InvalidRequestError, UnsupportedModelError
from asyncengine.generation import GenerationConfig
from asyncengine.model.stored.formats import coded_weights
from asyncengine.model.stored.tensor import SIZES, TORCH_DTYPES, tensors_of
from asyncengine.model.text_files import PROCESSORS, json_in

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "tekken.json",
    "sentencepiece.bpe.model", "source.spm", "target.spm",
)  # fmt: skip

_BESIDE_CODES = ("k_scale", "v_scale", "q_scale", "prob_scale")
"""What tools for quantisation store of attention, for caches in fp8."""
_AHEAD = 1 << 21
"""Bytes that are asked for at once. Linux reads only the beginning of what is more than a device takes in one piece."""
_TOKENIZER_SOURCES = (".json", ".jinja", ".txt", ".model", ".py")


class Checkpoint:
    """A checkpoint directory that has passed every check its headers allow.

    Attributes:
        name: What messages call it.
        path: Where its configuration and its tokenizer are.
        weight_files: Where its weights are.
        tensors: All that is stored there, as far as it is not in pickles.
        coded: The weights that are stored as codes, by the names of their parameters.
        plain: The tensors that are stored as they are.
        complete: Whether a weight that the model has no use for is an error.
        eos_token_ids: Tokens that end a text.

    Args:
        path: The directory.

    Raises:
        CheckpointError: Something is missing, truncated or unreadable.
        UnsupportedModelError: Weights are quantised in a way that cannot be read.
    """

    complete = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path)
        self.config = self._json("config.json")
        self._generation = self._json("generation_config.json", optional=True)
        self.eos_token_ids = self._ends()
        self._read_headers()
        self._reading: threading.Thread | None = None
        self._enough = threading.Event()

    def _read_headers(self) -> None:
        """Finds out which weights there are."""
        path, self.weight_files = self.path, self._weight_files()
        self.tensors = [tensor for file in self.weight_files for tensor in tensors_of(file)]
        try:
            beside = self._json("hf_quant_config.json", optional=True)
            self.coded = coded_weights(self.config, {tensor.name: tensor for tensor in self.tensors}, beside)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{path}: {error}") from error
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
        self.plain = [tensor for tensor in self.tensors if not self._goes_with_codes(tensor.name)]

    def _goes_with_codes(self, name: str) -> bool:
        """Whether a tensor is no parameter: a part of a weight's codes, or what else is stored beside those."""
        layer, _, last = name.rpartition(".")
        if name in self._parts or (self.coded and last in _BESIDE_CODES):
            return True
        return layer in self._coded_layers and not last.endswith("bias")

    @cached_property
    def _parts(self) -> set[str]:
        return {part.name for weight in self.coded.values() for part in weight.parts.values()}

    @cached_property
    def _coded_layers(self) -> set[str]:
        return {name.rpartition(".")[0] for name in self.coded}

    @property
    def narrowest(self) -> Quantization:
        """What its codes can be kept as, where nothing else is asked for: most of its numbers must be such."""
        codes = sum(weight.size for weight in self.coded.values() if weight.form == "int4")
        return "int4" if 2 * codes > sum(map(prod, self.shapes.values())) else "none"

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype that most of the weights are stored in."""
        sizes: dict[str, int] = {}
        for tensor in self.plain:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + prod(tensor.shape)
        for name in sorted(sizes, key=lambda name: -sizes[name]):
            if name in TORCH_DTYPES:
                return TORCH_DTYPES[name]
        named = self.config.get("dtype", self.config.get("torch_dtype"))
        dtype = getattr(torch, named, None) if isinstance(named, str) else None
        return dtype if isinstance(dtype, torch.dtype) else torch.float32

    def stored_in(self, dtype: torch.dtype) -> bool:
        """Whether all weights are stored in `dtype`, so that a model in it is mapped from the files."""
        return bool(self.tensors) and all(TORCH_DTYPES.get(tensor.dtype) is dtype for tensor in self.tensors)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The parameters' shapes by name, as far as they are in safetensors files."""
        plain = {tensor.name: tensor.shape for tensor in self.plain}
        return plain | {name: weight.shape for name, weight in self.coded.items()}

    @cached_property
    def media_key(self) -> str:
        """Equal for checkpoints that read images, audio and videos alike."""
        found = hashlib.sha256()
        for name in ("config.json", *PROCESSORS, "tokenizer.json"):
            path = self.path / name
            found.update(path.read_bytes() if path.exists() else b"")
            found.update(b"\0")
        return found.hexdigest()

    def check_unchanged(self) -> None:
        """Whether the weights that were read are those that the headers were of.

        Raises:
            CheckpointError: They are others.
        """

    def kept_forms(self, quantization: str, device: str) -> frozenset[str]:
        """Which codes stay codes.

        Those of eight bits stay where they are multiplied, on the CPU: in "int8", and beside others of four in "int4".

        Args:
            quantization: `EngineConfig.quantization`.
            device: Its type.
        """
        if quantization == "int8":
            return frozenset({"int8"} if device == "cpu" else ())
        if quantization == "int4" and device == "cpu" and any(each.form == "int4" for each in self.coded.values()):
            return frozenset({"int4", "int8"})
        return frozenset({quantization})

    def weight_bytes(self, dtype: torch.dtype, forms: Collection[str] = ()) -> int:
        """Bytes of all weights once they are in `dtype`.

        Args:
            dtype: Of whatever is stored as floats or as codes.
            forms: Which codes stay codes, as `kept_forms` says it.
        """
        if not self.tensors:  # not safetensors: its size on disk is the best guess
            return sum(file.stat().st_size for file in self.weight_files)
        sizes = SIZES | dict.fromkeys(("F64", "F32", "F16", "BF16"), dtype.itemsize)
        plain = sum(prod(tensor.shape) * sizes.get(tensor.dtype, 1) for tensor in self.plain)
        return plain + sum(
            weight.kept_nbytes if weight.stays(forms) else prod(weight.shape) * dtype.itemsize
            for weight in self.coded.values()
        )

    def read_ahead(self, free: int) -> None:
        """Asks the system to read the weight files, on a thread: much of a load is something else.

        Args:
            free: Bytes of memory that can be had. If the files are more than half of it, nothing is asked for.
        """
        sizes = {file: file.stat().st_size for file in self.weight_files}
        if 2 * sum(sizes.values()) > free or not hasattr(os, "posix_fadvise"):
            return

        def ask() -> None:
            with contextlib.suppress(OSError):  # a file system that takes no advice, or a file that has gone
                ask_for_all()

        def ask_for_all() -> None:
            for path, size in sizes.items():
                with path.open("rb") as file:
                    for start in range(0, size, _AHEAD):
                        if self._enough.is_set():
                            return
                        # It waits while the device has as much to do as it can queue.
                        os.posix_fadvise(file.fileno(), start, _AHEAD, os.POSIX_FADV_WILLNEED)

        self._reading = threading.Thread(target=ask, name="asyncengine-read-ahead", daemon=True)
        self._reading.start()

    def stop_reading_ahead(self) -> None:
        """Asks for no more; returns when the thread is gone."""
        self._enough.set()
        if self._reading is not None:
            self._reading.join()

    def mapped(self, names: set[str]) -> dict[str, torch.Tensor]:
        """Tensors whose only copy in memory is the page cache; nothing is read before somebody looks at it.

        The `safetensors` library looks at each tensor when it is asked for it, and the system then reads all around.

        Args:
            names: Which ones; each begins at a multiple of its numbers' size, which `StoredTensor.aligned` says.
        """
        storages: dict[Path, Any] = {}
        found = {}
        for tensor in self.tensors:
            if tensor.name not in names:
                continue
            if tensor.file not in storages:
                size = tensor.file.stat().st_size
                storages[tensor.file] = torch.UntypedStorage.from_file(str(tensor.file), False, size)
            dtype = TORCH_DTYPES[tensor.dtype]
            whole = torch.empty(0, dtype=dtype).set_(storages[tensor.file])
            begin = tensor.start // dtype.itemsize
            found[tensor.name] = whole[begin : begin + prod(tensor.shape)].view(tensor.shape)
        return found

    @cached_property
    def tokenizer_key(self) -> str | None:
        """Equal for equal tokenizers; None if there are no tokenizer files."""
        return tokenizer_key(self.path)

    @cached_property
    def generation_defaults(self) -> GenerationConfig:
        """What ``generation_config.json`` says about sampling; nonsense in it is passed over."""
        return sampling_of(self._generation)

    @property
    def classifies(self) -> bool:
        """Whether it says that it has a classification head."""
        architectures = self.config.get("architectures")
        named = architectures[0] if isinstance(architectures, list) and architectures else None
        return isinstance(named, str) and named.endswith("ForSequenceClassification")

    def _ends(self) -> tuple[int, ...]:
        text = self.config.get("text_config")
        stated = {"generation_config.json": self._generation, "config.json": self.config}
        for file, values in (*stated.items(), ("config.json", text if isinstance(text, dict) else {})):
            eos = values.get("eos_token_id")
            if eos is not None:
                ends = eos if isinstance(eos, list) else [eos]
                if not all(isinstance(each, int) for each in ends):
                    raise CheckpointError(f"{self.path / file}: eos_token_id is {eos!r:.80}; expected token ids")
                return tuple(ends)
        return ()

    def _json(self, name: str, optional: bool = False) -> dict[str, Any]:
        path = self.path / name
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            if optional:
                return {}
            raise CheckpointError(f"{path} does not exist") from error
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"{path} is not a JSON object")
        return values

    def _weight_files(self) -> list[Path]:
        for single, index in (
            ("model.safetensors", "model.safetensors.index.json"),
            ("pytorch_model.bin", "pytorch_model.bin.index.json"),
        ):
            if (self.path / index).exists():
                weight_map = self._json(index).get("weight_map")
                if not isinstance(weight_map, dict) or not weight_map:
                    raise CheckpointError(f"{self.path / index} has no weight_map")
                for name in weight_map.values():
                    if not isinstance(name, str) or not name.strip("./\0"):
                        raise CheckpointError(f"{self.path / index} has {name!r:.80} in its weight_map; expected files")
                files = [self.path / name for name in sorted(set(weight_map.values()))]
                missing = [file.name for file in files if not file.exists()]
                if missing:
                    raise CheckpointError(f"{self.path}: {len(missing)} weight files are missing: {missing[0]}, ...")
                return files
            if (self.path / single).exists():
                return [self.path / single]
        raise CheckpointError(f"{self.path} has no weights: neither model.safetensors nor pytorch_model.bin")


def sampling_of(values: Mapping[str, Any]) -> GenerationConfig:
    """What a checkpoint says about sampling; nonsense in it is passed over.

    Args:
        values: By the names that they have in ``generation_config.json``.
    """
    defaults: dict[str, Any] = {}
    for key in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "length_penalty", "early_stopping"):
        value = values.get(key)
        if value is None or (key == "top_k" and value == 0):
            continue
        try:
            GenerationConfig(**{key: value})
        except InvalidRequestError:
            continue
        defaults[key] = value
    if values.get("do_sample") is False:
        defaults["temperature"] = 0.0
    return GenerationConfig(**defaults)


def has_tokenizer(path: Path) -> bool:
    """Whether a directory has tokenizer files."""
    return any((path / name).exists() for name in _TOKENIZER_FILES)


def tokenizer_key(path: Path) -> str | None:
    """Digest of a directory's tokenizer files; None if there are none."""
    digest = hashlib.sha256()
    found = False
    for name in _TOKENIZER_FILES:
        file = path / name
        if file.exists():
            found = True
            digest.update(_digest(file))
    return digest.hexdigest() if found else None


def tokenizer_sources(path: Path) -> str:
    """Digest of everything in a directory that its tokenizer may be made of: its files, settings and chat templates."""
    digest = hashlib.sha256()
    for file in sorted([*path.glob("*"), *path.glob("additional_chat_templates/*")]):
        if file.suffix in _TOKENIZER_SOURCES and not file.name.endswith(".index.json") and file.is_file():
            digest.update(f"{file.relative_to(path)}\0".encode() + _digest(file))
    return digest.hexdigest()


def _digest(file: Path) -> bytes:
    """Of a file's content, which is read once as long as the file stays as it is."""
    stat = file.stat()
    return _digest_once(file, stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns)


@functools.lru_cache(maxsize=64)
def _digest_once(file: Path, *_stamps: int) -> bytes:
    try:
        return hashlib.sha256(file.read_bytes()).digest()
    except OSError as error:  # it may be a directory
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error


def same_vocabulary(one: Path, other: Path) -> bool:
    """Whether two directories' tokenizers have the same tokens under the same ids, as far as both have a fast one.

    Raises:
        CheckpointError: The files of one are damaged.
    """
    files = [path / "tokenizer.json" for path in (one, other)]
    if not all(file.exists() for file in files):
        return True
    if _digest(files[0]) == _digest(files[1]):
        return True
    first, second = map(_vocabulary, files)
    return first == second


def _vocabulary(file: Path) -> tuple[Any, dict[str, int]]:
    """Tokens and ids of a ``tokenizer.json``: the model's own, and those that were added.

    Raises:
        CheckpointError: It has none.
    """
    values = json_in(file, {})
    try:
        added = {token["content"]: token["id"] for token in values.get("added_tokens", ())}
        return values["model"].get("vocab"), added
    except (AttributeError, LookupError, TypeError) as error:
        raise CheckpointError(f"{file} has no vocabulary as one of the tokenizers library has") from error
