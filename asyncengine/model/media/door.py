"""The door of a model's decoder: what the model's own forward passes through it, and what is put in its place there.

Whatever a model makes of audio, it ends as embeddings that its forward gives to its decoder in the place of those of
some tokens. So a forward that goes no further than that door encodes, for any architecture, and whoever stands at the
door can put in what was encoded before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

_NAME = "inputs_embeds"


class _AtTheDoor(Exception):
    """Ends a forward that has shown what was looked for."""


def embeddings(model: Any, **given: Any) -> torch.Tensor | None:
    """(tokens, hidden) embeddings of one prompt, as a model's forward gives them to its decoder; None if it gives none.

    Args:
        model: The model.
        given: What its forward takes.
    """
    found: list[torch.Tensor | None] = []

    def look(module: Any, arguments: Any, keywords: Any) -> None:
        found.append(keywords.get(_NAME))
        raise _AtTheDoor

    handle = model.get_decoder().register_forward_pre_hook(look, with_kwargs=True)
    try:
        model(**given, use_cache=False)
    except _AtTheDoor:
        pass
    finally:
        handle.remove()
    return None if found[0] is None else found[0][0]


@contextlib.contextmanager
def without_embedding(model: Any) -> Iterator[None]:
    """Lets a model embed all tokens as zeros, also where the weights of its embeddings are no longer with it."""
    module = model.get_input_embeddings()

    def zeros(ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*ids.shape, module.embedding_dim, dtype=model.dtype, device=ids.device)

    module.forward = zeros
    try:
        yield
    finally:
        del module.forward


@contextlib.contextmanager
def replaced(model: Any, at: torch.Tensor, rows: torch.Tensor) -> Iterator[None]:
    """Has rows go through the door in the place of those that come.

    Args:
        model: The model.
        at: (N,) which of a step's tokens they stand for.
        rows: (N, hidden) they.
    """

    def put(module: Any, arguments: Any, keywords: Any) -> tuple[Any, Any]:
        embedded = keywords[_NAME].clone()
        embedded[0, at] = rows.to(embedded.dtype)
        return arguments, {**keywords, _NAME: embedded}

    handle = model.get_decoder().register_forward_pre_hook(put, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
