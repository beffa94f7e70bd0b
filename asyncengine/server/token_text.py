"""A token's own text and bytes, wherever it stands."""

from __future__ import annotations

from typing import cast

from asyncengine.tokenizer import SpellingTokenizer, Tokenizer

REPLACEMENT = "\ufffd"


def token_text(tokenizer: Tokenizer, token_id: int) -> tuple[str, bytes | None]:
    """Text of a token and its bytes, where they are known. What is only part of a character is U+FFFD in the text.

    A space that the token begins with is there, though a decoder may leave it out where the token begins a text.
    """
    raw = cast(SpellingTokenizer, tokenizer).token_bytes(token_id) if hasattr(tokenizer, "token_bytes") else None
    if raw is not None:
        return raw.decode(errors="replace"), raw
    alone = tokenizer.decode([token_id], skip_special_tokens=False)
    text = tokenizer.decode([token_id, token_id], skip_special_tokens=False)[len(alone) :] or alone
    return text, None if REPLACEMENT in text else text.encode()
