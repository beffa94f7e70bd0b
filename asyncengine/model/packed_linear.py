"""Linear layers whose weights oneDNN has put into the order in which it reads them.

torch's own linear layer hands its weight over as it is, and the product puts it in order again in each step. For few
rows that takes longer than the product. Used on the CPU where the model runs as transformers has it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn

from asyncengine.model.weight_writer import Writer, in_place

_ROWS = 16
"""Of the input for which the order is chosen. It serves a single row and hundreds equally well."""
_LEAST = 1 << 18
"""Weights of a layer, below which calling oneDNN takes longer than it saves."""


def supports(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether layers can be packed, and are the faster for it."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise") or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype is torch.float32


class PackedLinear(nn.Module):
    """Takes the place of a linear layer, whose weight and bias keep their names, shapes and dtypes.

    Attributes:
        weight: (outputs, inputs), in an order of oneDNN's.
        bias: (outputs,), or None, as it was.
        tied: The weight as it was, if another module has it too, as embeddings have that of a tied head. In a tuple,
            which torch does not take for a parameter of this module.

    Args:
        linear: Its weight is let go.
        tied: Whether another module has the weight too.
    """

    def __init__(self, linear: nn.Linear, tied: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = nn.Parameter(_packed(linear.weight.detach()), requires_grad=False)
        self.bias = linear.bias
        self.tied = (linear.weight,) if tied else ()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., inputs) to (..., outputs)."""
        output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, "none", [], "")
        return output

    def write(self, value: torch.Tensor) -> None:
        """Replaces the weight."""
        self.weight = nn.Parameter(_packed(value.detach()), requires_grad=False)

    def keep(self) -> Callable[[], None]:
        """What puts the present weight back."""
        present = self.weight

        def restore() -> None:
            self.weight = present

        return restore


def pack(model: nn.Module, but: Collection[nn.Module] = ()) -> int:
    """Puts a `PackedLinear` in the place of every linear layer that is large enough.

    Args:
        model: The model.
        but: Layers that stay as they are.

    Returns:
        How many there are.
    """
    holders: dict[int, int] = {}
    places: dict[int, list[tuple[nn.Module, str]]] = {}  # of each layer; its weight is held by nothing but the model
    for module in model.modules():
        for parameter in module._parameters.values():
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
        for name, child in module._modules.items():
            if type(child) is nn.Linear and child.weight.numel() >= _LEAST and child not in but:
                places.setdefault(id(child), []).append((module, name))
    for (module, name), *others in places.values():
        child = getattr(module, name)
        packed = PackedLinear(child, holders[id(child.weight)] > 1)
        for holder, called in ((module, name), *others):
            setattr(holder, called, packed)
        del child
    return len(places)


def writers(model: nn.Module) -> dict[int, list[Writer]]:
    """For each weight that was packed, by its identity, what writes a new value into its places."""
    found: dict[int, list[Writer]] = {}
    for layer in model.modules():
        if isinstance(layer, PackedLinear):
            each = [in_place(weight) for weight in layer.tied]
            for weight in layer.tied:  # whose places another layer may have begun to list
                each = found.setdefault(id(weight), each)
            each.append(Writer(layer.write, layer.keep))
            found[id(layer.weight)] = each
    return found


def _packed(weight: torch.Tensor) -> Any:
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS)
