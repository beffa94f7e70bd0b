"""`TokenSpelling`: the bytes that tokens stand for, as a decoder of the `tokenizers` library takes them. Immutable."""

from __future__ import annotations

import json
import re
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenSpelling:
    """How a vocabulary spells bytes: with GPT-2's letters, or as text with signs for spaces and names for bytes.

    Args:
        letters: Byte of each letter that stands for one; none if tokens are text.
        signs: Texts in a token that stand for others, such as SentencePiece's for a space.
        names: Whether a token may be the name of a byte, such as ``<0xE6>``.
    """

    def __init__(self, letters: dict[str, int], signs: tuple[tuple[str, str], ...] = (), names: bool = False) -> None:
        self._letters = letters
        self._signs = signs
        self._names = names

    def bytes_of(self, token: str) -> bytes:
        """The bytes that a token, as the vocabulary has it, adds to a text."""
        if self._letters:
            try:
                return bytes([self._letters[letter] for letter in token])
            except KeyError:  # an added token that is written as it is
                return token.encode()
        if self._names and (byte := _BYTE.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        for sign, text in self._signs:
            token = token.replace(sign, text)
        return token.encode()


def spelling_of(decoder: Any) -> TokenSpelling | None:
    """What a decoder does to each token by itself; None if it does what is not known here.

    What it does to a text as a whole, such as leaving out the space at its beginning, is no matter of a token's bytes.
    """
    try:
        state = json.loads(decoder.__getstate__())
    except Exception:  # there is none, or one that is written in Python
        return None
    parts = state["decoders"] if state["type"] == "Sequence" else [state]
    if [part["type"] for part in parts] == ["ByteLevel"]:
        return TokenSpelling(_letters())
    signs: list[tuple[str, str]] = []
    names = whole = False
    for part in parts:
        kind = part["type"]
        if kind == "Replace" and not whole and "String" in part["pattern"]:
            signs.append((part["pattern"]["String"], part["content"]))
        elif kind == "Metaspace" and not whole:
            signs.append((part["replacement"], " "))
        elif kind == "ByteFallback" and not whole:
            names = True
        elif kind == "Fuse":
            whole = True
        elif kind != "Strip" or not whole:
            return None
    return TokenSpelling({}, tuple(signs), names)


def _letters() -> dict[str, int]:
    """GPT-2's letters: what can be printed stands for itself, the other bytes follow one another from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + at): byte for at, byte in enumerate(others)}
