"""Which id stands for which image in the prefix cache."""

from __future__ import annotations

import numpy as np

from asyncengine.media import MediaItem, PromptMedia
from asyncengine.step import stand_ins
from asyncengine.step.stand_ins import StandIns

PROMPT = np.array([5, 0, 0, 6, 0, 7], dtype=np.int32)


def images(*digests: bytes) -> PromptMedia:
    places = [np.array([1, 2]), np.array([4])][: len(digests)]
    items = [MediaItem("image", digest, {}, own, 0) for digest, own in zip(digests, places, strict=True)]
    return PromptMedia(tuple(items))


def test_each_image_has_an_id_of_its_own_and_keeps_it() -> None:
    ids = StandIns()
    first = ids.put(PROMPT, images(b"a", b"b")).tolist()
    assert first == [5, -1, -1, 6, -2, 7]
    assert PROMPT.tolist() == [5, 0, 0, 6, 0, 7]
    assert ids.put(PROMPT, images(b"c", b"a")).tolist() == [5, -3, -3, 6, -1, 7]
    assert ids.put(PROMPT, images(b"b", b"b")).tolist() == [5, -2, -2, 6, -2, 7]
    assert images(b"a", b"b").plain(ids.put(PROMPT, images(b"a", b"b"))).tolist() == PROMPT.tolist()


def test_those_that_were_not_seen_for_long_are_forgotten() -> None:
    ids = StandIns(remembered=2)
    for digest in (b"a", b"b", b"a", b"c"):
        last = ids.put(PROMPT, images(digest))[1]
    assert last == -3
    assert ids.put(PROMPT, images(b"a"))[1] == -1
    assert ids.put(PROMPT, images(b"b"))[1] == -4


def test_ids_fit_their_column() -> None:
    ids = StandIns()
    ids._given = stand_ins._IDS - 1
    assert ids.put(PROMPT, images(b"a"))[1] == -(2**31) + 1
    assert ids.put(PROMPT, images(b"b"))[1] == -1
