"""Puts layers that the compiled code multiplies in the place of a model's own, one after the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import nn

from asyncengine.config import Quantization
from asyncengine.model.decoder.compiled_experts import CompiledExperts
from asyncengine.model.decoder.compiled_linear import CompiledLinear, Products
from asyncengine.model.decoder.experts import alone
from asyncengine.model.decoder.four_bit_matrix import packed
from asyncengine.model.decoder.head_products import LatentMatrix
from asyncengine.model.decoder.packed_experts import PackedExperts
from asyncengine.model.decoder.parts import ExpertParts, NotRecognised, Projection
from asyncengine.model.decoder.weights import PackedMatrix, Rounding, Weights
from asyncengine.model.latent_attention import LatentAttention
from asyncengine.model.quantised.byte_linear import ByteLinear
from asyncengine.model.quantised.four_bit_experts import NAMES, FourBitExperts
from asyncengine.model.quantised.four_bit_linear import FourBitLinear
from asyncengine.model.weight_writer import Writer, in_place

KINDS = (nn.Linear, FourBitLinear, ByteLinear)
"""Linear layers that are replaced, subclasses left out."""
_ALIGNMENT = 16
"""Sizes must be multiples of it: so many floats are in the widest vector."""


def compile_layers(model: Any, products: Products, but: Collection[nn.Module] = ()) -> None:
    """Puts a layer of the compiled code in the place of each linear layer and of all experts whose inputs fill vectors.

    Codes stay what they are, and then whatever else is rounded becomes bytes with a scale for each 32 inputs. Without
    codes the head becomes int8 at least, with a scale for each output. A layer that has several names stays one, and
    layers that share a weight share it still.

    Args:
        model: A causal language model of transformers. Each of its weights is let go before the next one is packed.
        products: What multiplies.
        but: Linear layers that stay as they are.
    """
    rounding = rounded_to(model, products.quantization)
    for layer in _latent(model):
        if _fits(layer.kv_b_proj, products.dtype) and not layer.qk_nope_head_dim % _ALIGNMENT:
            of_head = layer.qk_nope_head_dim, layer.v_head_dim
            how_latent: Rounding = "int8" if rounding == "int4" else rounding
            layer.kv_b_proj = LatentMatrix(products, layer.kv_b_proj, of_head, how_latent)
    head = id(model.get_output_embeddings())
    elsewhere, shared = _in_use_elsewhere(model), _shared(model)
    made: dict[int, CompiledLinear] = {}  # of what is shared, which lives until all of it is replaced
    # No list of layers: each weight is let go before the next one is packed.
    for module in [module for module in model.modules() if module._modules]:
        for name in list(module._modules):
            child: Any = module._modules[name]
            if type(child) in KINDS and child not in but and _fits(child, products.dtype):
                layer = made.get(id(child))
                if layer is None:
                    tied = made.get(id(child.weight))
                    how: Rounding = "int8" if id(child) == head and rounding == "int4" else rounding
                    layer = _compiled(products, child, tied, how, id(child.weight) in elsewhere)
                    made |= {id(each): layer for each in (child, child.weight) if id(each) in shared}
                module._modules[name] = layer
            elif (parts := _experts(child, products.dtype)) is not None:
                shapes = {each: getattr(child, each).shape for each in child._parameters}
                module._modules[name] = CompiledExperts(
                    products, PackedExperts(products.library, parts, rounding), shapes
                )
                del parts
            del child


def rounded_to(model: nn.Module, quantization: Quantization) -> Rounding:
    """What weights are rounded to, of a model that may have codes."""
    return "bytes" if has_codes(model) else quantization


def has_codes(model: nn.Module) -> bool:
    """Whether some of its weights are codes, in layers that are not compiled yet."""
    return any(isinstance(module, (FourBitLinear, ByteLinear, FourBitExperts)) for module in model.modules())


def narrow_share(model: nn.Module) -> float:
    """The share of a model's weights that have fewer bits than its other numbers; a tied head counts by itself."""
    codes = 2 * sum(each.numel() for each in model.parameters() if each.dtype is torch.uint8)  # two in a byte
    every = codes // 2 + sum(each.numel() for each in model.parameters())
    narrow = codes + sum(_weights(matrix) for matrix in _matrices(model) if matrix.scales is not None)
    tied = {id(layer.matrix): layer.weight.numel() for layer in _linears(model) if not layer.weight.is_meta}
    return narrow / (every + sum(tied.values()))


def weight_bytes(model: nn.Module) -> int:
    """Bytes of weights and buffers."""
    kinds = CompiledLinear, CompiledExperts, LatentMatrix
    made = [module for module in model.modules() if isinstance(module, kinds)]
    nowhere = {id(each) for module in made for each in module.parameters(recurse=False) if each.is_meta}
    tensors = [*(each for each in model.parameters() if id(each) not in nowhere), *model.buffers()]
    own = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return own + sum(matrix.nbytes for matrix in _matrices(model))


def writers(model: nn.Module) -> dict[int, list[Writer]]:
    """For each parameter that was packed, by its identity, what writes a new value into its places."""
    found: dict[int, list[Writer]] = {}
    for layer in _linears(model):
        weight, matrix, bias = layer.weight, layer.matrix, layer.bias
        if id(weight) not in found:
            found[id(weight)] = [] if weight.is_meta else [in_place(weight)]
            found[id(weight)].append(Writer(_writes(matrix), matrix.restorer))
        if bias is not None:
            found.setdefault(id(bias), [in_place(bias)]).append(Writer(layer.write_bias, layer.keep_bias))
    for module in model.modules():
        if isinstance(module, LatentMatrix):
            found[id(module.weight)] = [Writer(module.write, module.keep)]
        if isinstance(module, CompiledExperts):
            for name, writer in module.experts.named_writers().items():
                found[id(module._parameters[name])] = [writer]
    return found


def _latent(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, LatentAttention)]


def _linears(model: nn.Module) -> Iterator[CompiledLinear]:
    return (module for module in model.modules() if isinstance(module, CompiledLinear))


def _matrices(model: nn.Module) -> list[PackedMatrix]:
    """All that were packed, each once."""
    found = {id(layer.matrix): layer.matrix for layer in _linears(model)}
    several: list[Any] = [module.experts for module in model.modules() if isinstance(module, CompiledExperts)]
    several += (module for module in model.modules() if isinstance(module, LatentMatrix))
    return [*found.values(), *(matrix for each in several for matrix in each.matrices)]


def _weights(matrix: PackedMatrix) -> int:
    return int(matrix.struct.outputs * matrix.struct.inputs)


def _writes(matrix: PackedMatrix) -> Callable[[torch.Tensor], None]:
    return lambda value: matrix.write(0, value)


def _compiled(
    products: Products, layer: Any, tied: CompiledLinear | None, how: Rounding, elsewhere: bool
) -> CompiledLinear:
    """What takes a layer's place, whose weight is let go, unless it is in use elsewhere."""
    if tied is not None:
        return CompiledLinear(products, layer, tied.matrix, tied.weight)
    weights: Weights | None = Projection(layer).codes
    if weights is None:
        weights = layer.weight.detach()
    matrix = packed(products.library, [weights], [None], how)
    if elsewhere:
        return CompiledLinear(products, layer, matrix, layer.weight)
    nothing = torch.empty(layer.out_features, layer.in_features, dtype=products.dtype, device="meta")
    return CompiledLinear(products, layer, matrix, nn.Parameter(nothing, requires_grad=False))


def _fits(layer: Any, dtype: torch.dtype) -> bool:
    own = layer.weight.dtype if type(layer) is nn.Linear else layer.dtype
    return own is dtype and layer.in_features % _ALIGNMENT == 0


def _experts(module: nn.Module, dtype: torch.dtype) -> ExpertParts | None:
    """The parts of a module of experts; None if it is none, or the compiled code cannot do what it does."""
    if not all(getattr(module._parameters.get(name), "ndim", 0) for name in NAMES):
        return None
    try:
        parts = alone(module)
    except NotRecognised:
        return None
    fits = module.down_proj.dtype is dtype and not parts.inner % _ALIGNMENT and not parts.hidden % _ALIGNMENT
    return parts if fits else None


def _in_use_elsewhere(model: nn.Module) -> set[int]:
    """Identities of the parameters that something other than a linear layer uses."""
    others = (module for module in model.modules() if type(module) not in KINDS)
    return {id(parameter) for module in others for parameter in module._parameters.values()}


def _shared(model: nn.Module) -> set[int]:
    """Identities of linear layers that have several names, and of weights of several of them."""
    children: Iterator[Any] = (child for module in model.modules() for child in module._modules.values())
    linears = [child for child in children if type(child) in KINDS]
    names = Counter(map(id, linears))
    owners = Counter(id(layer.weight) for layer in {id(layer): layer for layer in linears}.values())
    return {identity for identity, count in (names | owners).items() if count > 1}
