"""`Classifier`: a classification head, and what its numbers mean. A value; numpy alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from asyncengine.step.batch import Float32, Float64

Activation = Literal["softmax", "sigmoid", "none"]
"""What makes probabilities of logits; "none" where they are no logarithms of any, as of a regression."""


@dataclass(frozen=True, slots=True, eq=False)
class Classifier:
    """What turns the hidden state of a prompt's last token, behind the model's last norm, into logits.

    An encoder has a head of its own in front of it, and gives out logits itself.

    Attributes:
        weight: (labels, hidden); None of a model that gives out logits.
        bias: (labels,), or None.
        labels: Their names.
        activation: What makes probabilities of the logits.
    """

    weight: Float32 | None
    bias: Float32 | None
    labels: tuple[str, ...]
    activation: Activation

    def logits(self, hidden: Float32) -> Float32:
        """(labels,) float32, of one hidden state, (hidden,)."""
        if self.weight is None:
            return hidden
        logits: Float32 = self.weight @ hidden
        return logits if self.bias is None else logits + self.bias

    def probs(self, logits: Float32) -> Float32 | None:
        """(labels,) float32, of logits; None where they mean something else."""
        if self.activation == "none":
            return None
        exact: Float64 = logits.astype(np.float64)
        if self.activation == "sigmoid":
            return _sigmoid(exact).astype(np.float32)
        powers: Float64 = np.exp(exact - exact.max())
        probs: Float32 = (powers / powers.sum()).astype(np.float32)
        return probs


def sigmoid(logit: float) -> float:
    """The logistic function, which overflows nowhere."""
    return float(_sigmoid(np.array([logit]))[0])


def _sigmoid(logits: Float64) -> Float64:
    found: Float64 = np.exp(-np.logaddexp(0.0, -logits))
    return found
