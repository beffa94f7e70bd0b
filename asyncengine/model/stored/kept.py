"""Codes that stay codes: a model is loaded around them.

transformers is given a tensor without memory for each of them, which it puts where the weight belongs, under whatever
name the model has for it. Then layers of codes take the places.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from asyncengine.errors import CheckpointError, UnsupportedModelError
from asyncengine.model.quantised.byte_linear import ByteLinear
from asyncengine.model.quantised.eight_bits import EightBits
from asyncengine.model.quantised.four_bit_experts import NAMES, hold, is_transposed
from asyncengine.model.quantised.four_bit_linear import FourBitLinear
from asyncengine.model.quantised.four_bits import GROUP, FourBits, joined
from asyncengine.model.quantised.fp8_linear import Fp8Linear, fits, quantised
from asyncengine.model.stored.nothing import Nothing, nothing
from asyncengine.model.stored.weight import OF_EXPERT, CodedWeight, Decoded, Lazy, OpenFiles

_ROLES = {
    "w1": "gate", "gate_proj": "gate", "w3": "up", "up_proj": "up", "w2": "down", "down_proj": "down",
}  # fmt: skip
"""What the weights of an expert are, by what checkpoints call them that store each expert by itself."""
_PARTS = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}
"""What transformers puts together for each of `NAMES`, one after the other."""
_SAMPLE = 1 << 12
"""Numbers of a parameter that are looked at."""
_Experts = dict[int, dict[str, CodedWeight]]


class KeptCodes:
    """The weights of a checkpoint that stay codes, and where transformers puts them.

    An embedding becomes numbers. Where codes of eight bits stay, it has its codes besides, as ``stored_codes``, for
    what can look rows up in them.

    Args:
        coded: Weights that are stored as codes.
        dtype: Of the model.
        forms: Which of them stay codes, as `Checkpoint.kept_forms` says it.
    """

    def __init__(self, coded: Iterable[CodedWeight], dtype: torch.dtype, forms: Collection[str]) -> None:
        self._dtype = dtype
        self._tables = "int8" in forms
        self._files = OpenFiles()
        self._alone: dict[int, CodedWeight] = {}  # by the address of what stands for it
        self._standing: dict[str, torch.Tensor] = {}
        # Of each layer, by the numbers in its name: its other parts may have other names in the model.
        self._experts: dict[tuple[str, ...], _Experts] = defaultdict(lambda: defaultdict(dict))
        for weight in coded:
            if not weight.stays(forms):
                continue
            expert = OF_EXPERT.fullmatch(weight.name)
            if expert is not None and expert[3] in _ROLES:
                self._experts[_numbers_in(expert[1])][int(expert[2])][_ROLES[expert[3]]] = weight
                self._standing[weight.name] = nothing(weight.shape, dtype)
            else:
                number = torch.full((), torch.nan, dtype=dtype)
                self._alone[number.data_ptr()] = weight
                self._standing[weight.name] = number.expand(weight.shape)

    def state(self) -> dict[str, Lazy]:
        """What transformers is to load in their places."""
        return {name: Lazy(partial(_itself, each), tuple(each.shape)) for name, each in self._standing.items()}

    def put(self, model: Any) -> int:
        """Makes layers of codes.

        Returns:
            How many weights are codes now.

        Raises:
            CheckpointError: Experts are incomplete.
            UnsupportedModelError: transformers made something else of some of the weights.
        """
        done = 0
        shared: dict[int, nn.Parameter | None] = {}
        for path, module in list(model.named_modules()):
            if all(getattr(module._parameters.get(name), "ndim", 0) == 3 for name in NAMES):
                done += self._put_experts(path, module)
                continue
            for name, parameter in list(module._parameters.items()):
                address = 0 if parameter is None else parameter.data_ptr()
                if address in shared:  # a head that is tied to the embedding
                    module._parameters[name] = shared[address]
                elif (weight := self._alone.pop(address, None)) is not None:
                    done += self._put_alone(model, path, name, weight)
                    if (put := module._parameters[name]) is not parameter:
                        shared[address] = put
        # What is left over is none of this model's, as layers that predict further tokens, unless it is lost in one.
        if lost := next((name for name, parameter in model.named_parameters() if _is_lost(parameter)), None):
            raise UnsupportedModelError(f"{lost} is made of weights that are stored as codes, or has no numbers")
        return done

    def _put_alone(self, model: Any, path: str, name: str, weight: CodedWeight) -> int:
        module = model.get_submodule(path)
        is_head = module is model.get_output_embeddings()
        is_layer = type(module) is nn.Linear and (not is_head or _may_be_bytes(model, weight))
        layer = self._layer(module, weight) if is_layer else None
        if layer is not None:
            parent, _, own = path.rpartition(".")
            setattr(model.get_submodule(parent), own, layer)
            return weight.size
        numbers = weight.numbers(self._files, self._dtype)  # its groups are in another order, say
        module._parameters[name] = nn.Parameter(numbers, requires_grad=False)
        if self._tables and module is model.get_input_embeddings() and weight.form != "none":
            module.stored_codes = codes_of(weight, self._files)
        return 0

    def _layer(self, module: nn.Linear, weight: CodedWeight) -> FourBitLinear | ByteLinear | Fp8Linear | None:
        """What can take a layer's place, or None."""
        found = codes_of(weight, self._files)
        if weight.form == "int8":
            return layer_of(found, module.bias, self._dtype)
        if isinstance(found, FourBits):
            return layer_of(found, module.bias, self._dtype) if found.group % GROUP == 0 else None
        if weight.form != "fp8" or not fits(module):
            return None
        # Scales of blocks become scales of outputs.
        found = EightBits(*quantised(found)) if isinstance(found, torch.Tensor) else found
        return Fp8Linear(found, module.bias, self._dtype)

    def _put_experts(self, path: str, module: Any) -> int:
        found: dict[str, list[tuple[CodedWeight, Decoded]]] = {}
        merged: _Experts | None = None
        for name in NAMES:
            parameter = module._parameters[name]
            if isinstance(parameter, Nothing):
                merged = merged or self._experts.pop(_numbers_in(path), {})
                weights = _in_order(path, merged, _PARTS[name], parameter.shape[0])
            elif (alone := self._alone.pop(parameter.data_ptr(), None)) is not None:
                weights = [alone]
            else:
                continue
            found[name] = [(weight, weight.read(self._files)) for weight in weights]
        codes = {name: [own for _, own in each if isinstance(own, FourBits)] for name, each in found.items()}
        held = {name: joined(own) for name, own in codes.items() if _fit(own, len(found[name]))}
        transposed = is_transposed(module, *(module._parameters[name] for name in NAMES))
        for name in found.keys() - held.keys():
            shape = module._parameters[name].shape
            numbers = [weight.numbers(self._files, self._dtype) for weight, _ in found[name]]
            module._parameters[name] = nn.Parameter(torch.cat(numbers).view(shape), requires_grad=False)
        if held:
            hold(module, held, transposed)
        return sum(weight.size for name in held for weight, _ in found[name])


def codes_of(weight: CodedWeight, files: OpenFiles) -> Decoded:
    """What is stored of a weight, as codes if there are any: of eight bits where that is its form."""
    return weight.read_bytes(files) if weight.form == "int8" else weight.read(files)


def layer_of(codes: Decoded, bias: nn.Parameter | None, dtype: torch.dtype) -> FourBitLinear | ByteLinear:
    """A linear layer of codes.

    Args:
        codes: Of four bits, or eight.
        bias: (outputs,), or None.
        dtype: Of the weight that they stand for.
    """
    assert not isinstance(codes, torch.Tensor)
    if isinstance(codes, FourBits):
        return FourBitLinear(codes, bias, dtype)
    return ByteLinear(codes, bias, dtype)


def _in_order(path: str, experts: _Experts, roles: tuple[str, ...], count: int) -> list[CodedWeight]:
    """The weights that transformers puts together, in its order."""
    try:
        return [experts[number][role] for number in range(count) for role in roles]
    except KeyError as error:
        raise CheckpointError(f"weights of the experts of {path} are missing: {error}") from error


def _fit(codes: list[FourBits], count: int) -> bool:
    """Whether matrices can be one."""
    return (
        len(codes) == count and len({(each.group, each.values) for each in codes}) == 1 and codes[0].group % GROUP == 0
    )


def _may_be_bytes(model: Any, weight: CodedWeight) -> bool:
    """Whether the weight of a head can stay codes."""
    return weight.form == "int8" and model.get_output_embeddings().weight is not model.get_input_embeddings().weight


def _is_lost(parameter: torch.Tensor) -> bool:
    """Whether it was made of what stands for codes."""
    if isinstance(parameter, Nothing):
        return True
    if parameter.is_meta or not parameter.is_floating_point() or parameter.dtype.itemsize < 2:
        return False
    # What is made of a placeholder has a large part that is NaN; all of a model need not be read to find it.
    sample = parameter.detach().reshape(-1)[:: max(parameter.numel() // _SAMPLE, 1)]
    return bool(sample.isnan().any())


def _numbers_in(name: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\d+", name))


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
