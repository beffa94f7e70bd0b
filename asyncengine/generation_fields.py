"""What the fields of a `GenerationConfig` may be. Whatever else is an `InvalidRequestError` that names the field."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping

from asyncengine.errors import InvalidRequestError
from asyncengine.logits_processor import LogitsProcessor

MAX_STOP_STRS = 128
MAX_STOP_STR_LENGTH = 1024
MAX_BAD_WORDS = 1024


def _is_finite(value: float) -> bool:
    return -sys.float_info.max <= value <= sys.float_info.max  # math.isfinite refuses very large integers


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and _is_finite(value)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_integer(name: str, value: object, low: int | None, high: int | None, *, optional: bool = False) -> None:
    """Takes an integer within bounds; None of a bound is no bound."""
    if optional and value is None:
        return
    if (
        not isinstance(value, int)
        or isinstance(value, bool)
        or (low is not None and value < low)
        or (high is not None and value > high)
    ):
        allowed = "any integer" if low is None else f">= {low}" if high is None else f"{low}..{high}"
        # Of 1.5 and True a range alone says nothing.
        kind = "" if _is_integer(value) or low is None else ", an integer"
        raise InvalidRequestError(f"{name} is {value!r}; allowed: {allowed}{' or None' if optional else ''}{kind}")


def check_number(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    """Takes a number within bounds, or None."""
    if value is None:
        return
    bad = not isinstance(value, (int, float)) or isinstance(value, bool) or not _is_finite(value)
    if not bad:
        assert isinstance(value, (int, float))
        bad = value < low or (open_low and value == low) or value > high
    if bad:
        raise InvalidRequestError(f"{name} is {value!r}; allowed: {'(' if open_low else '['}{low:g}, {high:g}]")


def bias_of(bias: object) -> dict[int, float] | None:
    """What `logit_bias` is made to."""
    if bias is None:
        return None
    if not isinstance(bias, Mapping):
        raise InvalidRequestError(f"logit_bias is {bias!r}; expected a mapping of token id to bias")
    for token_id, value in bias.items():
        if not _is_integer(token_id) or token_id < 0:
            raise InvalidRequestError(f"logit_bias has key {token_id!r}; allowed: token ids >= 0")
        if not _is_number(value) or not -100 <= value <= 100:
            raise InvalidRequestError(f"logit_bias[{token_id}] is {value!r}; allowed: [-100, 100]")
    return {token_id: float(value) for token_id, value in bias.items()}


def stop_strs_of(value: object) -> tuple[str, ...]:
    """What `stop_strs` is made to: a string alone is a list of one."""
    strings = (value,) if isinstance(value, str) else value
    if not isinstance(strings, Iterable):
        raise InvalidRequestError(f"stop_strs is {value!r}; expected a string or a list of strings")
    strings = tuple(strings)
    if len(strings) > MAX_STOP_STRS:
        raise InvalidRequestError(f"stop_strs has {len(strings)} strings; allowed: at most {MAX_STOP_STRS}")
    for string in strings:
        if isinstance(string, str) and len(string) > MAX_STOP_STR_LENGTH:
            raise InvalidRequestError(
                f"stop_strs has a string of {len(string)} characters; allowed: at most {MAX_STOP_STR_LENGTH}"
            )
        if not isinstance(string, str) or not string:
            raise InvalidRequestError(f"stop_strs has {string!r}; allowed: non-empty strings")
    return strings


def token_ids_of(name: str, value: object) -> tuple[int, ...]:
    """Whatever gives token ids, as a tuple."""
    if not isinstance(value, Iterable) or isinstance(value, (str, bytes)):
        raise InvalidRequestError(f"{name} is {value!r}; expected a list of token ids")
    ids = tuple(value)
    for token_id in ids:
        if not _is_integer(token_id) or token_id < 0:
            raise InvalidRequestError(f"{name} has {token_id!r}; allowed: token ids >= 0")
    return ids


def bad_words_of(value: object) -> tuple[str | tuple[int, ...], ...]:
    """What `bad_words` is made to: text, and tuples of token ids."""
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise InvalidRequestError(f"bad_words is {value!r:.80}; expected a list of strings or of token id lists")
    words: list[str | tuple[int, ...]] = []
    for word in value:
        if isinstance(word, str) or not isinstance(word, Iterable):
            if not isinstance(word, str) or not word.strip():
                raise InvalidRequestError(f"bad_words has {word!r}; allowed: non-blank strings, lists of token ids")
            words.append(word)
        else:
            ids = token_ids_of("bad_words", word)
            if not ids:
                raise InvalidRequestError("bad_words has an empty list; allowed: at least one token id in each")
            words.append(ids)
    if len(words) > MAX_BAD_WORDS:
        raise InvalidRequestError(f"bad_words has {len(words)} entries; allowed: at most {MAX_BAD_WORDS}")
    return tuple(words)


def processors_of(value: object) -> tuple[LogitsProcessor, ...]:
    """What `logits_processors` is made to."""
    if not isinstance(value, Iterable):
        raise InvalidRequestError(f"logits_processors is {value!r:.80}; expected a list of callables")
    processors = tuple(value)
    for processor in processors:
        if not callable(processor):
            raise InvalidRequestError(f"logits_processors has {processor!r:.80}; allowed: callables")
    return processors
