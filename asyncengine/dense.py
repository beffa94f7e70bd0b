"""`Dense`: a layer behind the pooling of an embedding model. A value; numpy alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from asyncengine.step.batch import Float32

Squash = Literal["identity", "tanh"]
"""What a layer does to its outputs."""


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """A linear layer of Sentence Transformers' (Reimers and Gurevych, 2019).

    Attributes:
        weight: (outputs, inputs).
        bias: (outputs,), or None.
        squash: What it does to its outputs.
    """

    weight: Float32
    bias: Float32 | None
    squash: Squash

    def __call__(self, vectors: Float32) -> Float32:
        """(vectors, outputs) of (vectors, inputs)."""
        found: Float32 = vectors @ self.weight.T
        if self.bias is not None:
            found += self.bias
        return np.tanh(found) if self.squash == "tanh" else found
