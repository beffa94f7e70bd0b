"""`Vocabulary`: the tokens in a GGUF file's metadata, and what each of them is. Immutable."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from asyncengine.errors import CheckpointError, UnsupportedModelError
from asyncengine.model.gguf.pre_tokenizers import PreTokenizer, pre_tokenizer_of

PREFIX = "tokenizer.ggml."
_KINDS = ("gpt2", "gemma4", "llama")
_PARTS = ("bos", "eos", "eot", "eom", "unknown", "padding")
_SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unknown": 0}
"""What files of that kind mean if they do not say."""
_MARK = re.compile(r"[<\[].+[>\]]")
_ENDS = frozenset({
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<|eom_id|>",
    "<|endoftext|>", "<|end_of_text|>", "<end_of_turn>", "<turn|>", "<|tool_response>", "<eos>", "</s>", "<EOT>",
    "_<EOT>", "[EOT]", "[EOS]", "<end_of_utterance>", "<｜end▁of▁sentence｜>", "[e~[",
})  # fmt: skip
"""Tokens that end an answer whatever a file says of them, as llama.cpp has it."""
_NO_ENDS = (
    ({"<|return|>", "<|call|>"}, "<|end|>"), ({"<|calls|>", "<|flush|>"}, "<|end|>"), ({"<|tool_response>"}, "</s>"),
)  # fmt: skip
"""Where there are such tokens, another one ends a part of an answer, or is text."""
_LONGEST = 4096
"""Characters of a token."""


class TokenType(IntEnum):
    """What a token is, by the numbers in the file."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Tokens, and what they are.

    Attributes:
        tokens: By id.
        types: Of each, as `TokenType`.
        special: Ids of those that are no text: they are looked for in texts, and left out of answers.
        parts: Ids of those that play a part: "bos", "eos", "eot", "eom", "unknown", "padding".
        ends: Ids of those that end an answer.
        cut: How text is cut before merges apply; None in SentencePiece's kind, which does not cut it.
        adds_bos: Whether texts begin with the bos token.
        adds_eos: Whether they end with the eos token.
    """

    tokens: list[str]
    types: Sequence[int]
    special: frozenset[int]
    parts: dict[str, int]
    ends: frozenset[int]
    cut: PreTokenizer | None
    adds_bos: bool
    adds_eos: bool

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> Vocabulary:
        """The vocabulary of a file.

        Raises:
            UnsupportedModelError: Its kind, or the way it cuts text, is not known.
            CheckpointError: Parts of it do not fit together.
        """
        kind = metadata[f"{PREFIX}model"]
        if kind not in _KINDS:
            raise UnsupportedModelError(f"the GGUF file's kind of tokenizer, {kind!r}, is not known")
        name = "gemma4" if kind == "gemma4" else metadata.get(f"{PREFIX}pre")
        cut = None if kind == "llama" else pre_tokenizer_of(name)
        tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(listed(metadata, "tokens"))]
        if len(set(tokens)) != len(tokens):
            raise CheckpointError(f"the GGUF file has the token {Counter(tokens).most_common(1)[0][0]!r} twice")
        if (longest := max(map(len, tokens))) > _LONGEST:
            raise CheckpointError(f"the GGUF file has a token of {longest} characters")
        if f"{PREFIX}token_type" in metadata:
            types = listed(metadata, "token_type", len(tokens))
        else:
            types = [TokenType.NORMAL] * len(tokens)
        special = {index for index, type_ in enumerate(types) if type_ in (TokenType.UNKNOWN, TokenType.CONTROL)}
        ends = _ends(tokens)
        special |= ends
        parts = _parts(metadata, len(tokens), {} if cut else _SENTENCEPIECE_IDS)
        for part in ("bos", "eos", "eot", "eom"):
            token_id = parts.get(part)
            if token_id is None:
                continue
            if types[token_id] != TokenType.NORMAL or _MARK.fullmatch(tokens[token_id]):
                special.add(token_id)
            else:  # a word, by a default of what wrote the file: it must not vanish from texts
                del parts[part]
        ends |= {parts[part] for part in ("eos", "eot", "eom") if part in parts}
        adds_bos, adds_eos = (metadata.get(f"{PREFIX}add_{part}_token") for part in ("bos", "eos"))
        for part, added in (("bos", adds_bos), ("eos", adds_eos)):
            if added and part not in parts:
                raise CheckpointError(f"the GGUF file adds a special token to texts, but has none: {part}")
        if adds_bos is None or kind == "gemma4":  # some files of Gemma 4 deny it; llama.cpp adds it all the same
            adds_bos = (cut is None or cut.begins) and "bos" in parts
        return cls(tokens, types, frozenset(special), parts, frozenset(ends), cut, bool(adds_bos), bool(adds_eos))

    def named(self, part: str) -> str | None:
        """The token that plays a part; None if there is none, or if it is a word."""
        token_id = self.parts.get(part)
        return self.tokens[token_id] if token_id in self.special and token_id is not None else None


def listed(metadata: Mapping[str, Any], name: str, count: int | None = None) -> list[Any]:
    """A list of the tokenizer's.

    Args:
        metadata: The file's.
        name: Of the list, without `PREFIX`.
        count: Of the tokens, if there has to be an entry for each.

    Raises:
        CheckpointError: It is not there, or not of that length.
    """
    values = metadata.get(f"{PREFIX}{name}")
    if not values:
        raise CheckpointError(f"the GGUF file's tokenizer has no {PREFIX}{name}")
    if count is not None and len(values) != count:
        raise CheckpointError(f"the GGUF file has {count} tokens, but {len(values)} entries in {PREFIX}{name}")
    return list(values)


def _ends(tokens: Sequence[str]) -> set[int]:
    found = {token: index for index, token in enumerate(tokens) if token in _ENDS}
    for known, other in _NO_ENDS:
        if known <= found.keys():
            found.pop(other, None)
    return set(found.values())


def _parts(metadata: Mapping[str, Any], count: int, defaults: Mapping[str, int]) -> dict[str, int]:
    """Ids of the tokens that play a part, of `count` tokens. Files are known whose padding is none of them."""
    parts = {}
    for part in _PARTS:
        token_id = metadata.get(f"{PREFIX}{part}_token_id", defaults.get(part))
        if token_id is not None and 0 <= token_id < count:
            parts[part] = token_id
        elif token_id is not None and part in ("bos", "eos"):
            raise CheckpointError(f"the GGUF file's {part} token is {token_id}, but it has {count} tokens")
    return parts
