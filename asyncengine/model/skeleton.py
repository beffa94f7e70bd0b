"""A model that needs no transformers: the parameters that the compiled step takes, under their names, and its parts.

`described` writes down what `recognise` found in a model of transformers'; `assembled` makes the same out of that and
of the weight files. The modules of a `Skeleton` compute nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import nn

from asyncengine.model.attention.protocol import LayerSpec
from asyncengine.model.attention_modules import RecordedLayer, text_config
from asyncengine.model.building import BUILDING
from asyncengine.model.checkpoint import Checkpoint
from asyncengine.model.decoder.parts import Blueprint, LayerParts, NormPart, Projection
from asyncengine.model.findings import Findings
from asyncengine.model.hidden_states import hidden_size
from asyncengine.model.load_settings import DEFAULT_LONGEST
from asyncengine.model.quantised.byte_linear import ByteLinear
from asyncengine.model.quantised.four_bit_linear import FourBitLinear
from asyncengine.model.stored.kept import codes_of, layer_of
from asyncengine.model.stored.tensor import TORCH_DTYPES, StoredTensor
from asyncengine.model.stored.weight import CodedWeight, OpenFiles

Kind = TypeVar("Kind", bound=nn.Module)

_NORMS = ("before_attention", "after_attention", "before_mlp", "after_mlp", "query_norm", "key_norm")
_NUMBERS = (
    "first_position", "activation", "rotary", "pairs", "embedding_scale", "residual_scale", "logit_scale", "logit_cap",
)  # fmt: skip


class Skeleton(nn.Module):
    """Stands for a model of transformers' whose weights the compiled step has.

    Args:
        path: Of the checkpoint.
        dtype: Of the model.
    """

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        super().__init__()
        self._path = path
        self._dtype = dtype

    def place(self, name: str) -> tuple[nn.Module, str]:
        """The module that a dotted name leads through, made where there is none, and the last part of the name."""
        module: nn.Module = self
        *path, last = name.split(".")
        for step in path:
            if step not in module._modules:
                module.add_module(step, nn.Module())
            module = module.get_submodule(step)
        return module, last

    def add(self, name: str, module: Kind) -> Kind:
        """Puts a module under a dotted name."""
        holder, last = self.place(name)
        holder.add_module(last, module)
        return module

    def transformed(self) -> Any:
        """The model that it stands for, without weights. That takes seconds, and is for debugging."""
        from asyncengine.model import architecture

        config = architecture.read_config(Checkpoint(self._path))
        with BUILDING, torch.device("meta"):
            model = architecture.bare(config, self._dtype)
        return model.eval().requires_grad_(False)


class _Head(nn.Linear):
    def reset_parameters(self) -> None:
        """Initialises nothing: random numbers without memory would make torch import its compiler."""


class _Table(nn.Embedding):
    def reset_parameters(self) -> None:
        """As that of `_Head`."""


def described(model: Any, layers: list[RecordedLayer], parts: Blueprint, checkpoint: Checkpoint) -> Findings | None:
    """What `assembled` needs to know of a model that is compiled; None if it could not do without transformers.

    It cannot where a parameter is stored neither as it is nor as codes, or is none of the compiled step's, or where
    layers have experts or keep latents, or where positions rotate in a way that is more than frequencies.
    """
    names = {module: name for name, module in model.named_modules()}
    parameters = dict(model.named_parameters())
    sinks = [id(layer.sinks) for layer in layers if layer.sinks is not None]
    coded = {module: name for module, name in names.items() if isinstance(module, (ByteLinear, FourBitLinear))}
    of_codes = [f"{name}.weight" for name in coded.values()]
    stored = {tensor.name: tensor for tensor in checkpoint.plain} | checkpoint.coded
    dtype = parts.embedding.weight.dtype
    for name, parameter in parameters.items():
        if not parameter.is_meta and id(parameter) not in sinks:
            return None
        if name not in of_codes and not _is_stored(stored.get(name), parameter, dtype):
            return None
    if checkpoint.coded and any(part.transposed for layer in parts.layers for part in (*layer.qkv, layer.output)):
        return None  # codes are not turned
    named = dict(model.named_parameters(remove_duplicate=False))
    if any(name not in named for name in model.state_dict()):
        return None  # a buffer with contents
    if any(part.experts is not None or part.latents is not None for part in parts.layers):
        return None
    tables = list({id(part.rotation[0]): part.rotation for part in parts.layers if part.rotation is not None}.values())
    rotations = [_frequencies(model, *table) for table in tables]
    if any(found is None for found in rotations):
        return None
    numbers = {id(table[0]): number for number, table in enumerate(tables)}
    own_names = {id(parameter): name for name, parameter in parameters.items()}
    text = text_config(model.config)
    description = {
        "vocab_size": text.vocab_size,
        "longest": getattr(text, "max_position_embeddings", None) or DEFAULT_LONGEST,
        "hidden_size": hidden_size(model),
        "parameters": list(parameters),
        "codes": of_codes,
        "buffers": [
            [name, list(buffer.shape), str(buffer.dtype)[6:]]
            for name, buffer in model.named_buffers()
            if model.get_submodule(name.rpartition(".")[0]) not in coded
        ],
        "tied": parts.head.weight is parts.embedding.weight,
        "head": names[parts.head],
        "embedding": names[parts.embedding],
        "positions": None if parts.positions is None else names[parts.positions],
        "norm": _norm_to(parts.norm, names),
        "numbers": {name: getattr(parts, name) for name in _NUMBERS},
        "scales": [found[1] for found in rotations if found is not None],
        "layers": [
            {
                "module": layer.name,
                "spec": dataclasses.asdict(layer.spec),
                "sinks": None if layer.sinks is None else own_names[id(layer.sinks)],
                "norms": {name: _norm_to(norm, names) for name in _NORMS if (norm := getattr(part, name)) is not None},
                "qkv": [_projection_to(each, names) for each in part.qkv],
                "output": _projection_to(part.output, names),
                "gate_up": [_projection_to(each, names) for each in part.gate_up],
                "down": None if part.down is None else _projection_to(part.down, names),
                "rotation": None if part.rotation is None else numbers[id(part.rotation[0])],
                "parallel": part.parallel,
                "query_scale": part.query_scale,
            }
            for layer, part in zip(layers, parts.layers, strict=True)
        ],
    }
    tensors = {f"frequencies.{number}": found[0] for number, found in enumerate(rotations) if found is not None}
    return Findings(description, tensors)


def assembled(
    findings: Findings, checkpoint: Checkpoint, max_length: int, dtype: torch.dtype, forms: Collection[str]
) -> tuple[Skeleton, list[RecordedLayer], Blueprint]:
    """A skeleton whose weights are mapped from their files, or made of what is stored, its attention layers, its parts.

    Args:
        findings: What `described` found of the same checkpoint.
        checkpoint: It.
        max_length: How many positions will be asked for.
        dtype: Of the model.
        forms: Which codes stay codes, as `Checkpoint.kept_forms` says it.
    """
    about, files = findings.description, OpenFiles()
    skeleton = Skeleton(checkpoint.path, dtype)
    embedding_at, head_at, positions_at = about["embedding"], about["head"], about["positions"]
    table, of_codes = f"{embedding_at}.weight", set(about["codes"])
    looked_up = checkpoint.coded.get(table)
    stored_codes = None
    if looked_up is not None and "int8" in forms and looked_up.stays(forms):
        stored_codes = codes_of(looked_up, files)  # and numbers are of no use
    names = set(about["parameters"]) - of_codes
    numbers = _numbers(checkpoint, names if stored_codes is None else names - {table}, dtype, files)
    if looked_up is not None and stored_codes is not None:
        numbers[table] = torch.empty(looked_up.shape, dtype=dtype, device="meta")
    parameters = {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in numbers.items()}
    if about["tied"]:
        parameters[f"{head_at}.weight"] = parameters[table]
    with torch.device("meta"):
        embedding = skeleton.add(embedding_at, _Table(*parameters[table].shape))
        if f"{head_at}.weight" not in of_codes:
            outputs, inputs = parameters[f"{head_at}.weight"].shape
            skeleton.add(head_at, _Head(inputs, outputs, bias=False))
        positions = None
        if positions_at is not None:
            positions = skeleton.add(positions_at, _Table(*parameters[f"{positions_at}.weight"].shape))
    for name in about["codes"]:
        at = name.removesuffix(".weight")
        codes = codes_of(checkpoint.coded[name], files)
        skeleton.add(at, layer_of(codes, parameters.pop(f"{at}.bias", None), dtype))
    for name, parameter in parameters.items():
        module, last = skeleton.place(name)
        module.register_parameter(last, parameter)
    if stored_codes is not None:
        vars(embedding)["stored_codes"] = stored_codes
    head = cast("nn.Linear", skeleton.get_submodule(head_at))
    for name, shape, its_dtype in about["buffers"]:
        module, last = skeleton.place(name)
        module.register_buffer(last, torch.empty(shape, dtype=getattr(torch, its_dtype), device="meta"))
    rotations = []
    for number, scale in enumerate(about["scales"]):
        rotations.append(_tables(max_length, findings.tensors[f"frequencies.{number}"], scale))
    layers = []
    for each in about["layers"]:
        module = skeleton.get_submodule(each["module"])
        sinks = None if each["sinks"] is None else parameters[each["sinks"]]
        layers.append(RecordedLayer(each["module"], module, LayerSpec(**each["spec"]), sinks))
    norm = _norm_from(about["norm"], skeleton)
    assert norm is not None
    blueprint = Blueprint(
        embedding=embedding,
        positions=positions,
        layers=tuple(
            LayerParts(
                **cast("Any", {name: _norm_from(each["norms"].get(name), skeleton) for name in _NORMS}),
                qkv=tuple(_projection_from(part, skeleton) for part in each["qkv"]),
                output=_projection_from(each["output"], skeleton),
                gate_up=tuple(_projection_from(part, skeleton) for part in each["gate_up"]),
                down=None if each["down"] is None else _projection_from(each["down"], skeleton),
                experts=None,
                rotation=None if each["rotation"] is None else rotations[each["rotation"]],
                parallel=each["parallel"],
                query_scale=each["query_scale"],
                recorded=layer,
            )
            for each, layer in zip(about["layers"], layers, strict=True)
        ),
        norm=norm,
        head=head,
        **about["numbers"],
    )
    return skeleton, layers, blueprint


def _is_stored(stored: StoredTensor | CodedWeight | None, parameter: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether `_numbers` makes a parameter of what is stored."""
    if stored is None or stored.shape != tuple(parameter.shape) or parameter.dtype is not dtype:
        return False
    return isinstance(stored, CodedWeight) or stored.dtype in TORCH_DTYPES


def _numbers(checkpoint: Checkpoint, names: set[str], dtype: torch.dtype, files: OpenFiles) -> dict[str, torch.Tensor]:
    """Parameters by name: mapped where they are stored in the model's dtype, else made of what is stored."""
    found = {name: checkpoint.coded[name].numbers(files, dtype) for name in names & checkpoint.coded.keys()}
    as_they_are = set()
    for tensor in checkpoint.plain:
        if tensor.name in names:
            if tensor.aligned and TORCH_DTYPES[tensor.dtype] is dtype:
                as_they_are.add(tensor.name)
            else:
                found[tensor.name] = files.tensor(tensor).to(dtype, copy=not tensor.aligned)
    return found | checkpoint.mapped(as_they_are)


def _frequencies(model: nn.Module, cosines: torch.Tensor, sines: torch.Tensor) -> tuple[torch.Tensor, float] | None:
    """What makes the tables of a rotation, bit for bit: frequencies, which the model has as a buffer, and a factor."""
    scale = float(cosines[0, 0])  # position 0 is not rotated
    for buffer in model.buffers():
        if buffer.dtype is torch.float32 and buffer.shape == cosines.shape[1:] and not buffer.is_meta:
            made = _tables(len(cosines), buffer, scale)
            if torch.equal(made[0], cosines) and torch.equal(made[1], sines):
                return buffer.clone(), scale
    return None


def _tables(count: int, frequencies: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of `count` positions, (count, rotary / 2) each."""
    angles = torch.arange(count, dtype=torch.float32)[:, None] * frequencies
    return angles.cos() * scale, angles.sin() * scale


def _projection_to(part: Projection, names: dict[nn.Module, str]) -> list[Any]:
    return [names[part.linear], part.start, part.stop, part.period, part.transposed]


def _projection_from(written: list[Any], skeleton: Skeleton) -> Projection:
    name, *others = written
    return Projection(skeleton.get_submodule(name), *others)


def _norm_to(part: NormPart, names: dict[nn.Module, str]) -> list[Any]:
    return [names[part.module], part.epsilon, part.offset, part.centred, part.of_heads]


def _norm_from(written: list[Any] | None, skeleton: Skeleton) -> NormPart | None:
    if written is None:
        return None
    name, *others = written
    return NormPart(skeleton.get_submodule(name), *others)
