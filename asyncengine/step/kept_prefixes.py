"""What the prefix cache has, outside of it: as a value that another engine with the same model can take over.

Both ways run on the step thread. What requests with adapters have computed stays out, and so does all behind an image
or another medium, whose tokens mean nothing elsewhere.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from asyncengine.errors import PrefixCacheError
from asyncengine.prefix_file import Catalogue, KeptPrefixes
from asyncengine.step.batch import Int32
from asyncengine.step.model import KeepingModel
from asyncengine.step.scheduler import Scheduler


def catalogue_of(scheduler: Scheduler, model: KeepingModel, pin: str) -> Catalogue:
    """What the prefix cache has. It is kept from being evicted, as what is pinned is, until the pin is undone.

    Args:
        scheduler: Whose cache it is.
        model: Has the keys and values.
        pin: Its name.
    """
    page_size = scheduler.limits.page_size
    tokens, before, blocks = list[Int32](), list[int](), list[int]()
    ends: dict[int, int] = {-1: -1}  # by the number of an edge, which block is its last
    for edge in scheduler.blocks.tree.edges():
        if edge.before not in ends:  # behind a medium
            continue
        pages = edge.tokens.reshape(-1, page_size)
        whole = int(np.argmax(np.append((pages < 0).any(axis=1), True)))
        first, at = len(blocks), ends[edge.before]
        tokens.append(pages[:whole])
        blocks += edge.blocks[:whole].tolist()
        before += [at, *range(first, first + whole - 1)][:whole]
        if whole == len(pages):
            ends[edge.number] = first + whole - 1
    scheduler.blocks.tree.pin_blocks(pin, np.array(blocks, dtype=np.int32))
    return Catalogue(
        np.concatenate([np.empty((0, page_size), dtype=np.int32), *tokens]),
        np.array(before, dtype=np.int32),
        model.kept_parts(),
    )


def read(scheduler: Scheduler, model: KeepingModel, pin: str, part: str) -> NDArray[np.uint8] | None:
    """(blocks, bytes) what a part of the KV cache has for what was pinned by `catalogue_of`.

    None if that is not there any longer, because the prefix cache was emptied meanwhile.

    Raises:
        PrefixCacheError: It does not belong to the checkpoint, whose weights were replaced.
    """
    blocks = scheduler.blocks.tree.pinned(pin)
    return None if blocks is None else model.read_blocks(part, blocks)


def put(kept: KeptPrefixes, scheduler: Scheduler, model: KeepingModel) -> int:
    """Makes prefixes known, as far as there are free blocks: nothing is taken back for them.

    Args:
        kept: They.
        scheduler: To whose cache.
        model: Takes the keys and values.

    Returns:
        Tokens that were not known before.

    Raises:
        PrefixCacheError: They do not fit the cache.
    """
    pool, tree = scheduler.blocks.pool, scheduler.blocks.tree
    tokens, before = kept.catalogue.tokens, kept.catalogue.before
    page_size, count = scheduler.limits.page_size, len(before)
    if tokens.shape != (count, page_size):
        raise PrefixCacheError(f"the kept prefixes have blocks of {tokens.shape[1:]} tokens, not {page_size}")
    blocks = np.full(count, -1, dtype=np.int32)  # where each lies here; -1 if there is no room
    new = np.zeros(count, dtype=np.bool_)
    paths: list[list[int]] = []
    for end in sorted(set(range(count)) - set(before.tolist())):
        path = [end]
        while (at := int(before[path[-1]])) >= 0:
            path.append(at)
        path.reverse()
        there = tree.match(tokens[path].reshape(-1))
        blocks[path[: len(there)]] = there
        wanted = [at for at in path[len(there) :] if blocks[at] < 0][: pool.num_free]
        blocks[wanted], new[wanted] = pool.allocate(len(wanted)), True
        paths.append([at for at in path if blocks[at] >= 0])
    own = blocks[new]
    try:
        model.write_blocks(own, kept.content, np.flatnonzero(new))
        for path in reversed(paths):  # what was used last comes last
            tree.insert(tokens[path].reshape(-1), blocks[path])
    finally:
        pool.release(own)
    tree.trim(in_use=scheduler.num_running)
    return len(own) * page_size
