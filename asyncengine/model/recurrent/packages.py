"""Packages with kernels for recurrent layers, which transformers uses on a GPU where they are installed."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from importlib.util import find_spec

from asyncengine.model.recurrent.recorded import RecurrentLayer

_CONVOLUTION, _DELTA, _MAMBA = "causal_conv1d", "fla", "mamba_ssm"
_KERNELS = {
    "causal_conv1d_fn": _CONVOLUTION,
    "causal_conv1d_update": _CONVOLUTION,
    "torch_chunk_gated_delta_rule": _DELTA,
    "torch_recurrent_gated_delta_rule": _DELTA,
    "chunk_kimi_delta_attention": _DELTA,
    "recurrent_kimi_delta_attention": _DELTA,
    "mamba2_chunk_scan": _MAMBA,
    "mamba2_selective_state_update": _MAMBA,
    "mamba_selective_scan": _MAMBA,
    "mamba_selective_state_update": _MAMBA,
}
"""By the names of transformers' functions, which it replaces by kernels of these modules."""
_DISTRIBUTIONS = {_CONVOLUTION: "causal-conv1d", _DELTA: "flash-linear-attention", _MAMBA: "mamba-ssm"}


def missing(layers: Iterable[RecurrentLayer]) -> list[str]:
    """Distributions that have kernels for some of the layers, and are not installed."""
    called: set[str] = set()
    for layer in layers:
        forward = inspect.unwrap(type(layer.module).forward)
        called.update(forward.__code__.co_names)
    modules = {_KERNELS[name] for name in called if name in _KERNELS}
    return sorted(_DISTRIBUTIONS[module] for module in modules if find_spec(module) is None)
