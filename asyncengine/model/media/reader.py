"""Reads media as a checkpoint's own processor prepares them, and places their tokens. On worker threads."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from asyncengine.errors import ContextLengthExceededError, InvalidRequestError
from asyncengine.media import PLURALS, Kind, MediaItem, PromptMedia, ReadPrompt, Sources, Write
from asyncengine.model.media.axes import Axes
from asyncengine.model.media.digest import digest_of
from asyncengine.model.media.preparation import Preparation, Prepared
from asyncengine.step.batch import Int64
from asyncengine.transcription import Transcribing


@dataclass(slots=True)
class _Given:
    """Those of one kind that a prompt has.

    Attributes:
        place: What stands for a piece of them while the prompt is written. Others may write tokens of the same id as
            pieces have in the end, which stand for nothing.
        number: How many were given.
        prepared: They, as they were prepared.
        counts: Tokens of each of these.
        left: Texts that stand for them and have no mark yet.
    """

    preparation: Preparation
    place: int
    number: int
    prepared: list[Prepared]
    counts: list[int]
    left: list[str]


class ProcessedMediaReader:
    """As `asyncengine.media.MediaReader`, over a processor of transformers'.

    Args:
        preparations: Of the kinds that it is to read.
        key: As of the protocol.
        axes: Finds where tokens are rotated to if there are images or videos; None if by their position.
        transcribing: As of the protocol.
    """

    def __init__(
        self,
        preparations: Sequence[Preparation],
        key: str,
        axes: Axes | None = None,
        transcribing: Transcribing | None = None,
    ) -> None:
        self.key = key
        self.kinds: Sequence[Kind] = [each.kind for each in preparations]
        self.token_ids: Mapping[Kind, int] = {each.kind: each.token_id for each in preparations}
        self.marks = {each.kind: each.mark for each in preparations}
        self.either = "video" in self.token_ids and self.token_ids["video"] == self.token_ids.get("image")
        """Whether a prompt may have either images or videos: the same tokens stand for both."""
        self._preparations = preparations
        self._axes = axes
        self.transcribing = transcribing

    def read(self, sources: Sources, write: Write, encode: Callable[[str], list[int]], most_tokens: int) -> ReadPrompt:
        """As the protocol says."""
        if self.either and sources.get("image") and sources.get("video"):
            raise InvalidRequestError("the prompt has images and videos; the model takes one of them at a time")
        given = self._prepared(sources, encode, most_tokens)
        by_mark = {each.preparation.mark: each for each in given}
        by_id = {each.preparation.token_id: each.place for each in given}
        marks = re.compile("|".join(map(re.escape, sorted(by_mark, key=len, reverse=True))))

        def expanded(text: str) -> list[int]:
            def replacement(found: re.Match[str]) -> str:
                each = by_mark[found[0]]
                if not each.left:
                    what = PLURALS[each.preparation.kind]
                    raise InvalidRequestError(
                        f"the prompt has more marks of {what} ({found[0]!r}) than {what}, {each.number}"
                    )
                return each.left.pop(0)

            return [by_id.get(token_id, token_id) for token_id in encode(marks.sub(replacement, text))]

        marked = np.array(write(expanded))
        ids, found = marked.copy(), []
        for each in given:
            places = np.flatnonzero(marked == each.place)
            self._check_places(each, len(places))
            ids[places] = each.preparation.token_id
            parts = zip(each.prepared, np.split(places, np.cumsum(each.counts)[:-1]), strict=True)
            found += [self._item(each.preparation, prepared, own, encode) for prepared, own in parts]
        axes = None if self._axes is None else self._axes.of(ids.tolist(), found)
        # What follows goes on from the last token, also where a video goes on for longer than the text behind it: so
        # transformers generates, and so the answer has its place when the next question is asked.
        shift = 0 if axes is None else int(axes[:, -1].max()) + 1 - len(ids)
        found.sort(key=lambda item: int(item.places[0]))
        return ReadPrompt(ids.tolist(), PromptMedia(tuple(found), self.key, axes, shift))

    def _prepared(self, sources: Sources, encode: Callable[[str], list[int]], most_tokens: int) -> list[_Given]:
        found, tokens = [], 0
        for place, preparation in enumerate(self._preparations):
            own = sources.get(preparation.kind, ())
            if not own:
                continue
            what = PLURALS[preparation.kind]
            if preparation.most is not None and len(own) > preparation.most:
                raise InvalidRequestError(f"the prompt has {len(own)} {what}; the model takes {preparation.most}")
            each = _Given(preparation, -1 - place, len(own), [], [], [])
            found.append(each)
            groups = [range(len(own))] if preparation.together else [range(at, at + 1) for at in range(len(own))]
            for group in groups:
                each.prepared.append(preparation.prepared(own, group))
                texts = each.prepared[-1].texts
                each.counts.append(sum(encode(text).count(preparation.token_id) for text in texts))
                each.left += texts
                if not each.counts[-1]:
                    raise InvalidRequestError(f"{what}[{group.start}]: it comes to no tokens")
                tokens += each.counts[-1]
                if tokens > most_tokens:  # before the next one is decoded
                    raise ContextLengthExceededError(
                        f"the prompt's first {group.stop} {what} come to {tokens} tokens; allowed: {most_tokens}"
                    )
        return found

    @staticmethod
    def _check_places(given: _Given, places: int) -> None:
        what, number = PLURALS[given.preparation.kind], given.number
        if given.left:
            mark = given.preparation.mark
            raise InvalidRequestError(
                f"the prompt has {number - len(given.left)} marks of {what} ({mark!r}); expected {number}"
            )
        if places != sum(given.counts):
            raise InvalidRequestError(
                f"the prompt has {places} tokens that stand for {what}; its {what} come to {sum(given.counts)}"
            )

    @staticmethod
    def _item(preparation: Preparation, prepared: Prepared, places: Int64, encode: Any) -> MediaItem:
        tokens = encode("".join(prepared.texts)) if preparation.kind == "audio" else ()
        digest = digest_of(preparation.kind, prepared.inputs)
        return MediaItem(
            preparation.kind, digest, prepared.inputs, places, preparation.token_id, preparation.whole, tokens
        )
