"""What a caller wants of a prompt's hidden states, and from them to a vector. On the event loop; values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import numpy as np

from asyncengine.errors import InvalidRequestError
from asyncengine.outputs import Pooling
from asyncengine.step.batch import Float32
from asyncengine.step.model import ModelView


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingOptions:
    """How texts become vectors.

    Attributes:
        pooling: Which hidden states make the vector: ``"mean"``, ``"last"`` or, of an encoder, ``"cls"``, the first
            token's. None is the checkpoint's own way.
        normalize: Whether the vector has length 1.
        dimensions: How many of the vector's numbers are kept, from the front; None keeps all. Makes sense for models
            that were trained for it (Matryoshka representations, Kusupati et al., 2022).
    """

    pooling: Pooling | None = None
    normalize: bool = True
    dimensions: int | None = None

    def __post_init__(self) -> None:
        if self.pooling is not None and self.pooling not in get_args(Pooling):
            allowed = ", ".join(map(repr, get_args(Pooling)))
            raise InvalidRequestError(f"pooling is {self.pooling!r:.80}; allowed: {allowed}, None")
        if not isinstance(self.normalize, bool):
            raise InvalidRequestError(f"normalize is {self.normalize!r:.80}; expected True or False")
        wanted = self.dimensions
        if wanted is not None and (isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 1):
            raise InvalidRequestError(f"dimensions is {wanted!r:.80}; allowed: integers >= 1, or None")

    def vector(self, hidden: Float32) -> Float32:
        """The embedding out of what the model gives, (hidden,)."""
        kept = hidden[: self.dimensions]
        if self.normalize:
            length = float(np.linalg.norm(kept.astype(np.float64)))
            kept = (kept / length).astype(np.float32) if length else kept
        return np.ascontiguousarray(kept)


@dataclass(frozen=True, slots=True)
class ClassificationOptions:
    """That texts are classified: by the last token's hidden state, as transformers does, or by what an encoder's own
    head says.
    """


Reading = EmbeddingOptions | ClassificationOptions
"""What is read off a prompt, where nothing is generated."""


def pooling_of(options: Reading, view: ModelView) -> Pooling:
    """How a model embeds, be it for its classification head.

    Raises:
        InvalidRequestError: It cannot, or not like this.
    """
    if isinstance(options, ClassificationOptions):
        if view.classifier is None:
            raise InvalidRequestError(
                f"{view.config.model!r} cannot classify: its checkpoint has no classification head; "
                + ("generate and rerank need none" if view.has_head else "embed needs none")
            )
        return "last"
    if view.hidden_size is None:
        raise InvalidRequestError(
            f"{view.config.model!r} cannot embed: it gives out no hidden states"
            + ("" if view.classifier is None else "; it classifies")
        )
    wanted = options.dimensions
    if wanted is not None and wanted > view.hidden_size:
        raise InvalidRequestError(f"dimensions is {wanted}; allowed: 1..{view.hidden_size}, the model's hidden size")
    pooling = options.pooling or view.pooling
    found = next((each for each in view.poolings if each == pooling), None)
    if found is None:
        given = f"{pooling!r}" if options.pooling else f"not given, and {view.config.model!r} pools by {pooling!r}"
        raise InvalidRequestError(f"pooling is {given}; allowed here: {', '.join(map(repr, view.poolings))}")
    return found
