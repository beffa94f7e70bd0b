"""Token ids to text, piece by piece: UTF-8 is never broken and stop strings are honoured at character level.

Owned by whoever creates one: the loop to deliver text, the step thread to notice stop strings. Fed the same tokens,
both find the same end, however the tokens were cut into pieces.
"""

from __future__ import annotations

from collections.abc import Sequence

from asyncengine.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_LONGEST_CHARACTER = 4
"""Bytes, and so tokens, of the longest character."""
BEFORE = 8
"""Tokens of a prompt that decide how a decoder takes the first token behind it."""
_LONGEST_RUN = 32
"""Tokens after which undecodable output is taken for what it is instead of for an incomplete character."""


class Detokenizer:
    """Decodes a growing sequence of tokens.

    Each piece is decoded together with the one before it, and the text of that one is cut off: decoders that treat
    the first token specially (a leading space) thus never see a wrong first token. The method is the two offsets of
    Hugging Face's text-generation-inference; what differs is that text before an incomplete character is not held.

    Args:
        tokenizer: Decodes.
        skip_special_tokens: Whether special tokens have no text.
        before: The tokens before the first one, whose text is not returned: the end of a prompt.

    Attributes:
        before: As given, until it has been looked at.
    """

    __slots__ = (
        "_emitted", "_foreign", "_ids", "_prefix_text", "_read", "_skip_special_tokens", "_tokenizer", "before",
    )  # fmt: skip

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True, before: Sequence[int] = ()) -> None:
        self.before = before
        self._foreign = 0  # signs for what could not be decoded before, unless it turns out to begin a character
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._ids: list[int] = []  # the piece decoded last, then what is new
        self._read = 0  # where the new ones begin
        self._prefix_text = ""  # text of _ids[:_read]
        self._emitted = 0  # characters of the new ones' text that were returned already

    def push(self, token_ids: Sequence[int]) -> str:
        """Adds tokens and returns the text that is certain now."""
        if self.before:
            before, self.before = self.before, ()
            whole = len(before) - self._incomplete(before)
            self._push(before[:whole])
            self._push(before[whole:])
            self._foreign = len(self._decode()) - len(self._prefix_text) - self._emitted
        out = self._push(token_ids)
        return self._own(out) if self._foreign else out

    def _own(self, out: str) -> str:
        """Text without what is told of the tokens before."""
        cut = 0
        while cut < min(self._foreign, len(out)) and out[cut] == _REPLACEMENT:
            cut += 1
        self._foreign = self._foreign - cut if cut == len(out) else 0
        return out[cut:]

    def _push(self, token_ids: Sequence[int]) -> str:
        self._ids += token_ids
        text = self._decode()
        whole = ""
        if text.endswith(_REPLACEMENT) and len(self._ids) - self._read > _LONGEST_RUN:
            whole = self._take_whole()
            text = self._decode()
        if not text.endswith(_REPLACEMENT):
            return whole + self._take(text)
        out = text.rstrip(_REPLACEMENT)[len(self._prefix_text) + self._emitted :]
        self._emitted += len(out)
        return whole + out

    def _take_whole(self) -> str:
        """Returns the text up to the last token that completes a character; what comes after it is kept.

        Where none of the newest tokens does, they are undecodable: all but those that may still begin a character
        are taken as they stand.
        """
        ids = self._ids
        for end in range(len(ids) - 1, max(len(ids) - 1 - _LONGEST_RUN, self._read), -1):
            self._ids = ids[:end]
            text = self._decode()
            if not text.endswith(_REPLACEMENT) and len(text) > len(self._prefix_text):
                break
        else:
            end = len(ids) - _LONGEST_CHARACTER
            self._ids = ids[:end]
            text = self._decode()
        out = self._take(text)
        self._ids += ids[end:]
        return out

    def _take(self, text: str) -> str:
        """Returns what is new in the text of all tokens, which is certain."""
        out = text[len(self._prefix_text) + self._emitted :]
        self._emitted = 0
        if len(text) > len(self._prefix_text):
            del self._ids[: self._read]
            self._read = len(self._ids)
            self._prefix_text = self._decode()
        elif len(self._ids) - self._read > _LONGEST_RUN:  # special tokens that have no text
            del self._ids[self._read :]
        return out

    def flush(self) -> str:
        """Returns what was held back, as it stands: no more tokens will come."""
        text = self._decode()
        if behind := min(self._incomplete(self._ids), len(self._ids) - self._read):
            before = self._tokenizer.decode(self._ids[:-behind], self._skip_special_tokens)
            if before.startswith(self._prefix_text):
                text = before + self._tokenizer.decode(self._ids[-behind:], self._skip_special_tokens)
        out = text[len(self._prefix_text) + self._emitted :]
        self._emitted += len(out)
        return self._own(out) if self._foreign else out

    def _incomplete(self, token_ids: Sequence[int]) -> int:
        """How many tokens at the end begin a character that they do not complete.

        Decoders that know bytes by name tell all bytes in a row for undecodable if the last of them are.
        """
        for behind in range(min(_LONGEST_CHARACTER, len(token_ids))):
            text = self._tokenizer.decode(token_ids[: len(token_ids) - behind], self._skip_special_tokens)
            if not text.endswith(_REPLACEMENT):
                return behind
        return 0

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids, self._skip_special_tokens)


class TextStream:
    """A `Detokenizer` that ends at the first stop string.

    The string that *completes* first wins, so that the end does not depend on how the text arrives. Text that may
    yet turn out to begin a stop string is held back.

    Attributes:
        stopped_by: The stop string that was found, or None.
    """

    __slots__ = ("_detokenizer", "_held", "_longest", "_stop_strs", "stopped_by")

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop_strs: tuple[str, ...] = (),
        skip_special_tokens: bool = True,
        before: Sequence[int] = (),
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens, before)
        self._stop_strs = stop_strs
        self._longest = max(map(len, stop_strs), default=0)
        self._held = ""
        self.stopped_by: str | None = None

    def begin_behind(self, before: Sequence[int]) -> None:
        """Says what stands before the first token, which has not come yet."""
        self._detokenizer.before = before

    def push(self, token_ids: Sequence[int]) -> str:
        """Adds tokens and returns the text that may be shown now. Nothing after a stop string is."""
        if self.stopped_by is not None:
            return ""
        text = self._detokenizer.push(token_ids)
        return self._cut(text) if self._stop_strs else text

    def flush(self) -> str:
        """Returns what was held back: the branch has ended."""
        if self.stopped_by is not None:
            return ""
        text = self._detokenizer.flush()
        if not self._stop_strs:
            return text
        shown = self._cut(text)
        if self.stopped_by is None:
            shown, self._held = shown + self._held, ""
        return shown

    def _cut(self, text: str) -> str:
        text = self._held + text
        found = min(
            ((at + len(stop), at, stop) for stop in self._stop_strs if (at := text.find(stop)) >= 0),
            default=None,
        )
        if found is not None:
            self.stopped_by = found[2]
            self._held = ""
            return text[: found[1]]
        keep = len(text)
        for size in range(min(self._longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stop_strs):
                keep = len(text) - size
                break
        self._held = text[keep:]
        return text[:keep]
