"""What a launch of fused kernels computes."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from asyncengine.model.decoder.parts import NormPart, NotRecognised, Projection

NO_ACTIVATION = -1


def load_kernels() -> Any:
    """The module with the kernels.

    Raises:
        NotRecognised: Triton is not there, or does not work.
    """
    try:
        return importlib.import_module("asyncengine.model.fused.kernels")
    except Exception as error:  # whatever a package that does not fit the system raises when it is imported
        raise NotRecognised(f"triton cannot be imported: {error}") from error


@dataclass(frozen=True, slots=True)
class Formula:
    """Stands for cap(residual + factor * activation(norm(x) @ weights.T + biases)).

    Attributes:
        parts: The linear layers that have the weights, up to three, side by side.
        norm: Of their input.
        gated: Whether they are a gate and an up projection: activation(gate) * up is one result.
        activation: By `blueprint.ACTIVATIONS`; of the gate, if there is one.
        factor: Of the result, before the residual is added.
        cap: What it is capped by, softly; 0 is nothing.
        dtype: Of the result of few tokens; that of the weights, if not given.
    """

    parts: Sequence[Projection]
    norm: NormPart | None = None
    gated: bool = False
    activation: int = NO_ACTIVATION
    factor: float = 1.0
    cap: float = 0.0
    dtype: torch.dtype | None = None

    @property
    def width(self) -> int:
        """How many results a token has."""
        outputs = [part.weight.shape[0] for part in self.parts]
        return outputs[0] if self.gated else sum(outputs)
