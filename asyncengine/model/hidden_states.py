"""Hidden states behind a model's last norm, as its head sees them. On the step thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from asyncengine.step.batch import Float32, Int64


@contextmanager
def hidden_states(model: nn.Module | None) -> Iterator[list[torch.Tensor]]:
    """Keeps what the model's body hands to its head, (tokens, hidden), one entry per forward.

    The body is what `transformers.AutoModel` would be: no weights are held twice, and nothing is computed twice.
    """
    assert model is not None
    found: list[torch.Tensor] = []

    def keep(module: nn.Module, arguments: Any, output: Any) -> None:
        found.append(output[0][0])

    handle = _body(model).register_forward_hook(keep)
    try:
        yield found
    finally:
        handle.remove()


def hidden_size(model: nn.Module) -> int | None:
    """Width of the hidden states that come out of a model; None if there is no telling, and then it cannot embed."""
    find: Any = getattr(model, "get_output_embeddings", None)
    size = None if find is None else getattr(find(), "in_features", None)
    return size if isinstance(size, int) and _body(model) is not model else None


def summed(hidden: list[torch.Tensor], spans: Int64) -> Float32:
    """(P, hidden) float32: the sum of the rows of each span, from and to, of the one (tokens, hidden) that was kept.

    Raises:
        LookupError: None was: the model does not run its body as a module.
    """
    if not hidden:
        raise LookupError("the model gives out no hidden states")
    sums = [hidden[0][first:end].sum(dim=0, dtype=torch.float32) for first, end in spans.tolist()]
    pooled: Float32 = torch.stack(sums).cpu().numpy()
    return pooled


def _body(model: nn.Module) -> nn.Module:
    find: Any = getattr(model, "get_decoder", None)
    body = getattr(model, "base_model", model) if find is None else find()
    assert isinstance(body, nn.Module)
    return body
