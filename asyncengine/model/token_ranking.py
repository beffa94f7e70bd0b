"""The ranking of a row's tokens: highest value first, among equals lowest id first. Functions without state.

NaN never makes them fail; `argmax` takes it as -inf.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from asyncengine.model.device_copy import at_hand

_ARGMAX_CHUNK = 128
_ARGMAX_DIRECT = 1 << 15  # logits: below it, fewer calls are faster


def argmax(logits: Tensor) -> Tensor:
    """The first token of each row's ranking; NaN counts as -inf, and the result is 0 where nothing is left.

    Args:
        logits: (rows, vocab) of any float type.

    Returns:
        (rows,) int64.
    """
    if not at_hand(logits):
        return _without_nan(logits).argmax(-1)
    if logits.numel() < _ARGMAX_DIRECT:
        tokens = logits.argmax(-1, keepdim=True)
    else:  # amax is vectorised on the CPU and argmax is not, so find the chunk first
        chunk = chunked(logits, _ARGMAX_CHUNK, torch.amax).argmax(-1, keepdim=True)
        ids = (chunk * _ARGMAX_CHUNK + torch.arange(_ARGMAX_CHUNK)).clamp_(max=logits.shape[1] - 1)  # (rows, chunk)
        tokens = ids.gather(1, logits.gather(1, ids).argmax(-1, keepdim=True))
    broken = logits.gather(1, tokens).isnan().squeeze(1)
    tokens = tokens.squeeze(1)
    if broken.any():
        tokens[broken] = _without_nan(logits[broken]).argmax(-1)
    return tokens


def top_tokens(values: Tensor, k: int) -> Tensor:
    """The first k tokens of each row's ranking.

    Each of them lies in one of the k chunks with the highest maxima (equal maxima: the lower chunk first): of any
    other chunk's tokens, those k chunks hold k that are ranked before. So one pass over the row finds the chunks, and
    only their tokens are sorted.

    Args:
        values: (rows, vocab) float32.
        k: 1..vocab.

    Returns:
        (rows, k) int64, in the order of the ranking. Arbitrary tokens in a row with NaN.
    """
    rows, vocab = values.shape
    chunk = 1 << max(3, min(7, (vocab // k).bit_length() // 2))  # about sqrt(vocab / k)
    if 2 * k * chunk > vocab:
        ids = torch.arange(vocab, device=values.device).expand(rows, -1)
    else:
        maxima = chunked(values, chunk, torch.amax)
        best = _rank_keys(maxima, torch.arange(maxima.shape[1], device=values.device)).topk(k, dim=-1).values
        ids = (_ids(best).unsqueeze(-1) * chunk + torch.arange(chunk, device=values.device)).flatten(1)
        values = values.gather(1, ids.clamp(max=vocab - 1))
    keys = _rank_keys(values, ids).masked_fill_(ids >= vocab, torch.iinfo(torch.int64).min)
    return _ids(keys.topk(k, dim=-1).values)


def chunked(values: Tensor, chunk: int, reduce: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Reduces each chunk of a row (rows, n) on its own, to (rows, chunks); the last chunk may be short."""
    whole = values.shape[1] // chunk * chunk
    parts = []
    if whole:
        parts.append(reduce(values[:, :whole].view(-1, whole // chunk, chunk), -1))
    if whole < values.shape[1]:
        parts.append(reduce(values[:, whole:], -1).unsqueeze(1))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _rank_keys(values: Tensor, ids: Tensor) -> Tensor:
    """Integers, no two equal, in the order of the ranking: the float's bits above, the id's complement below."""
    bits = (values + 0.0).view(torch.int32)  # -0.0 becomes 0.0: they are equal, and their bits must be
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.long() << 32) | (0x7FFFFFFF - ids)


def _ids(keys: Tensor) -> Tensor:
    return 0x7FFFFFFF - (keys & 0x7FFFFFFF)


def _without_nan(logits: Tensor) -> Tensor:
    return torch.nan_to_num(logits, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
