"""What the prefix cache has, outside of it: as values that another engine with the same model can take over.

Both ways run on the step thread, a piece at a time: steps go on between two of them, and what is evicted meanwhile is
left out. Nothing is kept from being evicted for it. What requests with adapters have computed stays out, and so does
all behind an image or another medium, whose tokens mean nothing elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from asyncengine.catalogue import Catalogue, Inventory, KeptPrefixes, Taken
from asyncengine.errors import PrefixCacheError
from asyncengine.step.batch import Int32, Int64
from asyncengine.step.model import KeepingModel
from asyncengine.step.scheduler import Scheduler


def inventory(scheduler: Scheduler, model: KeepingModel) -> Inventory:
    """What the prefix cache has now.

    Args:
        scheduler: Whose cache it is.
        model: Has the keys and values.
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
    lie = np.array(blocks, dtype=np.int32)
    catalogue = Catalogue(
        np.concatenate([np.empty((0, page_size), dtype=np.int32), *tokens]),
        np.array(before, dtype=np.int32),
        model.kept_parts(),
    )
    return Inventory(catalogue, lie, scheduler.blocks.pool.adopted(lie))


def read(
    scheduler: Scheduler, model: KeepingModel, blocks: Int32, adopted: Int64
) -> tuple[NDArray[np.bool_], NDArray[np.uint8]]:
    """What the KV cache has for some blocks of an inventory.

    Returns:
        (blocks,) which of them are still there, and (blocks that are, bytes) of these.

    Raises:
        PrefixCacheError: It does not belong to the checkpoint, whose weights were replaced.
    """
    there = scheduler.blocks.pool.adopted(blocks) == adopted
    return there, model.read_blocks(blocks[there])


def put(kept: KeptPrefixes, scheduler: Scheduler, model: KeepingModel) -> Taken:
    """Makes a piece known, as far as there are free blocks and what it follows is known: nothing is evicted for it.

    What comes later, be it in a later piece, counts as used before what came first, and all of it as used before what
    there was.

    Args:
        kept: The piece.
        scheduler: To whose cache.
        model: Takes the keys and values.

    Raises:
        PrefixCacheError: It does not fit the cache.
    """
    pool, tree = scheduler.blocks.pool, scheduler.blocks.tree
    tokens, page_size, start = kept.catalogue.tokens, scheduler.limits.page_size, kept.start
    if tokens.shape[1] != page_size:
        raise PrefixCacheError(f"the kept prefixes have blocks of {tokens.shape[1]} tokens, not {page_size}")
    if [*kept.catalogue.parts.items()] != [*model.kept_parts().items()]:
        raise PrefixCacheError("the kept prefixes are of another KV cache")
    tree.trim(in_use=scheduler.num_running)
    free = pool.num_free
    blocks = np.full(start + len(kept.rows), -1, dtype=np.int32)  # where each lies here; -1 if it does not
    new, paths = np.zeros(len(kept.rows), dtype=np.bool_), list[Int64]()
    try:
        for path in _paths(kept.catalogue.before, start, len(blocks)):
            there = tree.known(tokens[path].reshape(-1))
            blocks[path[: len(there)]] = there
            lacking = path[blocks[path] < 0]
            if not len(lacking) or lacking[0] < start:  # what it follows is not here
                continue
            wanted = lacking[: pool.num_free]
            blocks[wanted], new[wanted - start] = pool.allocate(len(wanted)), True
            paths.append(path[: len(path) - len(lacking) + len(wanted)])
        model.write_blocks(blocks[start:][new], kept.rows if new.all() else kept.rows[new])
        for path in paths:
            tree.insert(tokens[path].reshape(-1), blocks[path], used_last=False)
    finally:
        pool.release(blocks[start:][new])
    tree.trim(in_use=scheduler.num_running)
    return Taken((free - pool.num_free) * page_size, pool.num_free > 0)


def _paths(before: Int32, start: int, stop: int) -> Iterator[Int64]:
    """(blocks,) each: the ways from first blocks to those of [start, stop) that none there follows, in their order."""
    places = np.arange(stop)
    # Blocks mostly follow the one right before them: the first of each such run.
    runs = np.maximum.accumulate(np.where(before[:stop] == places - 1, 0, places))
    followed = np.zeros(stop + 1, dtype=np.bool_)
    followed[before[start:stop]] = True  # the last one stands for -1
    for end in (start + np.flatnonzero(~followed[start:stop])).tolist():
        parts, at = list[Int64](), end
        while at >= 0:
            first = int(runs[at])
            parts.append(places[first : at + 1])
            at = int(before[first])
        yield np.concatenate(parts[::-1])
