"""A tokenizer as transformers made it, kept on disk for the next load of the same files on the same machine.

To make one, transformers imports a list of all its models, reads the vocabulary as JSON in Python, and hands it to the
`tokenizers` library. Two things come of that: the library's object, which writes itself down as JSON, and a Python
object of strings, numbers and special tokens. Both are kept; the next load asks the library to read its own JSON, and
puts the other together without running what made it.

A tokenizer is kept only if, put together again, it is the same: the library's object in what it writes down, which is
the whole vocabulary and all rules, the other in each attribute and in how it writes a conversation. The file's name is
a digest of the directory, of everything in it that a tokenizer may be made of, of this program, and of the versions of
Python, transformers and tokenizers.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
import sys
import tempfile
from json.encoder import encode_basestring
from pathlib import Path
from typing import Any

from asyncengine.builds import cache_directory
from asyncengine.model import kept_file
from asyncengine.model.kept_file import version

MOST_FILES = 16
"""Kept at a time; the oldest goes first."""
MOST_BYTES = 64 << 20
"""Of one file. A vocabulary of 152,000 tokens takes 6 MB."""

_PLAIN = "transformers.tokenization_utils_tokenizers", "TokenizersBackend"
_UNUSED = ("_vocab", "_merges")
"""Attributes in which transformers' classes leave what they made the library's object of. Nothing but the writing of
files reads them again, and they are as large as the vocabulary."""
_BPE_FILES = ("vocab.json", "merges.txt")
_CONVERSATION = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]


def place_of(path: Path, sources: str) -> Path | None:
    """Where a tokenizer is kept; None if this user has no place for such things.

    Args:
        path: Its directory.
        sources: Digest of everything in it that a tokenizer may be made of.
    """
    program = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    about = (program, sys.version, version("transformers"), version("tokenizers"), str(path), sources)
    name = hashlib.sha256("\0".join(about).encode()).hexdigest()
    try:
        return cache_directory() / "tokenizers" / name
    except RuntimeError:  # no home directory
        return None


def recall(place: Path | None) -> Any:
    """The tokenizer that is kept there, or None. Of transformers it imports the tokenizer's class and nothing else."""
    content = None if place is None else kept_file.read(place)
    if content is None:
        return None
    try:
        return _assembled(content)
    except Exception:  # transformers reads the tokenizer's own files, and says what is wrong if something is
        return None


def keep(place: Path | None, tokenizer: Any) -> bool:
    """Keeps a tokenizer over the `tokenizers` library, if it can be put together again.

    It may be used meanwhile, in any thread.

    Returns:
        Whether it can.
    """
    if place is None:
        return False
    try:
        written = tokenizer.backend_tokenizer.to_str()
        about = _about(tokenizer)
        content = _content(about, _parts(tokenizer.backend_tokenizer, written))
        again = _assembled(content)
        if len(content) > MOST_BYTES or again.backend_tokenizer.to_str() != written or _about(again) != about:
            return False
        if _rendered(again) != _rendered(tokenizer):
            return False
    except Exception:  # whatever is odd about it: it will be read as it was
        return False
    kept_file.write(place, content, MOST_FILES)
    return True


def _about(tokenizer: Any) -> dict[str, Any]:
    """What there is to know of the Python object, in JSON's types.

    Raises:
        TypeError: It has attributes that cannot be written down.
    """
    state = {name: value for name, value in vars(tokenizer).items() if name not in _UNUSED}
    backend = state.pop("_tokenizer")
    return {
        "class": _class_of(tokenizer),
        "encode_special_tokens": backend.encode_special_tokens,
        "state": _written(state),
    }


def _content(about: dict[str, Any], parts: list[bytes]) -> bytes:
    """A line about the Python object, and the other object as the library writes it."""
    line = about | {"parts": [len(part) for part in parts]}
    return b"\n".join([json.dumps(line).encode(), b"".join(parts)])


def _assembled(content: bytes) -> Any:
    """What `_content` describes."""
    line, _, rest = content.partition(b"\n")
    about = json.loads(line)
    ends = [0, *itertools.accumulate(about["parts"])]
    backend = _joined([rest[start:end] for start, end in itertools.pairwise(ends)])
    backend.encode_special_tokens = about["encode_special_tokens"]
    module, name = about["class"]
    kind = getattr(importlib.import_module(module), name)
    tokenizer = kind.__new__(kind)
    vars(tokenizer).update(_read(about["state"]), _tokenizer=backend)
    return tokenizer


def _parts(backend: Any, written: str) -> list[bytes]:
    """What the library writes as JSON, or of a BPE all but its vocabulary, its tokens, and its merges.

    It reads tokens and merges by themselves in two thirds of the time that the same takes it within its JSON, where it
    cannot know what it reads before it has read it; and in less if the tokens are in order, since it sorts them. JSON
    of that size is taken apart as text: Python would make a list of each merge.
    """
    from tokenizers.models import BPE

    if not isinstance(backend.model, BPE):
        return [written.encode()]
    with tempfile.TemporaryDirectory() as directory:
        backend.model.save(directory)
        tokens, merges = (Path(directory, name).read_bytes() for name in _BPE_FILES)
    if merges.count(b" ") != merges.count(b"\n"):  # there are such within a token; the first line has one of each, too
        return [written.encode()]
    rest = written[: written.index('"vocab":{')]  # within a string, these quotes have backslashes before them
    numbers = json.loads(tokens)
    ordered = ",".join([f"{encode_basestring(token)}:{numbers[token]}" for token in sorted(numbers)])
    return [f'{rest}"vocab":{{}},"merges":[]}}}}'.encode(), f"{{{ordered}}}".encode(), merges]


def _joined(parts: list[bytes]) -> Any:
    """The library's object of `_parts`."""
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import BPE

    if len(parts) == 1:
        return Tokenizer.from_buffer(parts[0])
    whole = json.loads(parts[0])
    added, whole["added_tokens"] = whole["added_tokens"], []  # which get their numbers after the vocabulary's
    backend = Tokenizer.from_str(json.dumps(whole))
    settings = {name: value for name, value in whole["model"].items() if value is not None}
    for name in ("type", "vocab", "merges"):
        del settings[name]
    with tempfile.TemporaryDirectory() as directory:
        files = [Path(directory, name) for name in _BPE_FILES]
        for file, part in zip(files, parts[1:], strict=True):
            file.write_bytes(part)
        backend.model = BPE.from_file(*map(str, files), **settings)
    for special, tokens in itertools.groupby(added, key=lambda token: token["special"]):
        new = [AddedToken(**{name: value for name, value in token.items() if name != "id"}) for token in tokens]
        if special:
            backend.add_special_tokens(new)
        else:
            backend.add_tokens(new)
    return backend


def _class_of(tokenizer: Any) -> tuple[str, str]:
    """Module and name of the class that it gets.

    A class of a model that has nothing but a constructor of its own stands for the one that it is derived from, once
    it has constructed something; to import it would import the list of all models.

    Raises:
        TypeError: It is none of transformers', which is what may be imported.
    """
    for kind in type(tokenizer).__mro__:
        module, name = kind.__module__, kind.__qualname__
        if (module, name) == _PLAIN:
            return module, name
        own = {key for key, value in vars(kind).items() if callable(value) or hasattr(value, "__get__")}
        if not own <= {"__init__", "model"}:
            if not module.startswith("transformers."):
                raise TypeError(f"{module}.{name} is no class of transformers")
            return module, name
    raise TypeError(f"{type(tokenizer).__qualname__} is not over the tokenizers library")


def _rendered(tokenizer: Any) -> object:
    """A conversation as its template writes it, or what is wrong with that."""
    try:
        return tokenizer.apply_chat_template(_CONVERSATION, tokenize=False, add_generation_prompt=True)
    except Exception as error:
        return type(error), str(error)


def _written(value: Any) -> Any:
    """A value in JSON's types, so that `_read` makes the same of it."""
    from tokenizers import AddedToken

    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if kind in (list, tuple):
        return [kind.__name__, [_written(each) for each in value]]
    if kind is dict:
        return ["dict", [[_written(key), _written(each)] for key, each in value.items()]]
    if kind is AddedToken:
        return ["token", value.__getstate__()]
    raise TypeError(f"a tokenizer with a {kind.__qualname__} in it is not kept")


def _read(value: Any) -> Any:
    from tokenizers import AddedToken

    if not isinstance(value, list):
        return value
    kind, content = value
    if kind == "token":
        return AddedToken(**content)
    if kind == "dict":
        return {_read(key): _read(each) for key, each in content}
    return (tuple if kind == "tuple" else list)(_read(each) for each in content)
