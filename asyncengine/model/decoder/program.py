"""`CompiledDecoder`: a decoder whose whole step is one call of compiled code, without the GIL.

Owned by the step thread. What the code does is described at the top of decoder.cpp.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from asyncengine.config import Quantization
from asyncengine.model.attention.cpu import CpuCache, CpuPlan
from asyncengine.model.decoder.adapted import MATRICES, CompiledAdapters, CompiledFormat, Part, pieces_of
from asyncengine.model.decoder.byte_matrix import ByteMatrix
from asyncengine.model.decoder.four_bit_matrix import packed as packed_matrix
from asyncengine.model.decoder.packed_experts import ExpertsStruct, PackedExperts, small_dtype
from asyncengine.model.decoder.parts import Blueprint, LatentParts, LayerParts, NormPart, Projection
from asyncengine.model.decoder.weights import (
    DTYPES,
    NARROW,
    MatrixStruct,
    NormStruct,
    PackedMatrix,
    PackedNorm,
    PackedVector,
    Packing,
    Rounding,
    Weights,
    release,
)
from asyncengine.model.draft_heads.taps import Taps
from asyncengine.model.quantised.byte_linear import ByteLinear
from asyncengine.model.quantised.four_bit_experts import FourBitExperts
from asyncengine.model.quantised.four_bit_linear import FourBitLinear
from asyncengine.model.weight_writer import Writer
from asyncengine.step.batch import Float32, Int64, StepBatch

_LINEAR = (nn.Linear, FourBitLinear, ByteLinear)


class _AttentionStruct(ctypes.Structure):
    """As `Layer` in paged_attention.cpp."""

    _fields_ = (
        ("keys", ctypes.c_void_p), ("values", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in (
            "dtype", "page_size", "heads", "kv_heads", "key_dim", "value_dim", "window", "looks_ahead",
        )),
        ("scaling", ctypes.c_double), ("soft_cap", ctypes.c_double),
    )  # fmt: skip


class _LatentsStruct(ctypes.Structure):
    """As `Latents`."""

    _fields_ = (
        ("query", MatrixStruct), ("query_norm", NormStruct), ("norm", NormStruct), ("into", MatrixStruct),
        ("out_of", MatrixStruct), ("rank", ctypes.c_int64), ("plain", ctypes.c_int64),
    )  # fmt: skip


class _LayerStruct(ctypes.Structure):
    """As `DecoderLayer`."""

    _fields_ = (
        *((name, NormStruct) for name in (
            "before_attention", "after_attention", "before_mlp", "after_mlp", "query_norm", "key_norm",
        )),
        *((name, MatrixStruct) for name in ("qkv", "output", "gate_up", "down")),
        ("experts", ExpertsStruct), ("latents", _LatentsStruct),
        ("gated", ctypes.c_int64), ("parallel", ctypes.c_int64),
        ("cosines", ctypes.c_void_p), ("sines", ctypes.c_void_p), ("sinks", ctypes.c_void_p),
        ("attention", _AttentionStruct),
    )  # fmt: skip


class _DecoderStruct(ctypes.Structure):
    """As `Decoder`."""

    _fields_ = (
        ("layers", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in (
            "num_layers", "dtype", "narrow", "hidden", "intermediate", "rotary", "activation", "pairs",
        )),
        ("positions", ctypes.c_void_p),
        ("embedding", MatrixStruct),
        *((name, ctypes.c_double) for name in ("embedding_scale", "residual_scale", "logit_scale", "logit_cap")),
        ("norm", NormStruct), ("head", MatrixStruct),
    )  # fmt: skip


class _StepStruct(ctypes.Structure):
    """As `DecoderStep`."""

    _fields_ = (
        ("token_ids", ctypes.c_void_p), ("positions", ctypes.c_void_p), ("sample_index", ctypes.c_void_p),
        ("samples", ctypes.c_int64), ("logits", ctypes.c_void_p), ("plan", ctypes.c_void_p),
        ("pool_spans", ctypes.c_void_p), ("pools", ctypes.c_int64), ("pooled", ctypes.c_void_p),
        ("adapters", ctypes.c_void_p), ("token_adapters", ctypes.c_void_p), ("pieces", ctypes.c_void_p),
        ("num_pieces", ctypes.c_int64), ("seen", ctypes.c_void_p), ("images", ctypes.c_void_p),
        ("cosines", ctypes.c_void_p), ("sines", ctypes.c_void_p), ("deep", ctypes.c_void_p),
        ("num_deep", ctypes.c_int64), ("taps", ctypes.c_void_p),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Seen:
    """What a step has of images, audio and videos.

    Attributes:
        index: (T,) int64 which row each token is embedded with, or -1.
        rows: (rows, hidden) float32.
        deep: (rows, hidden) float32 each, which is added behind each of the first layers.
        rotation: (T, rotary / 2) float32 cosines and sines of all tokens; None if they are those of their positions.
    """

    index: Int64
    rows: torch.Tensor
    deep: tuple[torch.Tensor, ...] = ()
    rotation: tuple[torch.Tensor, torch.Tensor] | None = None


class _Layer:
    """One layer's weights."""

    def __init__(
        self, library: Any, parts: LayerParts, dtype: torch.dtype, rounding: Rounding, later: Packing | None
    ) -> None:
        def packed(parts: Sequence[Projection], turns: int = 1) -> tuple[PackedMatrix, Sequence[Projection]]:
            weights = [part.weight if (codes := part.codes) is None else codes for part in parts]
            biases = [part.bias for part in parts]
            copies = any(part.period is not None for part in parts)  # which would all be there until they are packed
            then = None if copies else later
            matrix = packed_matrix(library, weights, biases, rounding, turns=turns, later=then)
            for linear in {part.linear for part in parts}:
                release(linear, "weight")
                release(linear, "bias")
            return matrix, parts

        spec = parts.recorded.spec
        self.matrices = {"qkv": packed(parts.qkv), "output": packed([parts.output])}
        if parts.down is not None:
            self.matrices["gate_up"] = packed(parts.gate_up, turns=len(parts.gate_up))
            self.matrices["down"] = packed([parts.down])
        self.experts = None if parts.experts is None else PackedExperts(library, parts.experts, rounding, dtype)
        self.latents = None if parts.latents is None else _Latents(library, parts.latents, rounding, later)
        if parts.latents is not None and parts.latents.query is not None:
            self.matrices["query"] = packed([parts.latents.query])
        self.gated = len(parts.gate_up) > 1
        norms = {
            "before_attention": (parts.before_attention, 0),
            "after_attention": (parts.after_attention, 0),
            "before_mlp": (parts.before_mlp, 0),
            "after_mlp": (parts.after_mlp, 0),
            "query_norm": (parts.query_norm, spec.key_dim),
            "key_norm": (parts.key_norm, spec.key_dim),
        }
        self.norms = {
            name: (PackedNorm(part, size if part.of_heads else 0, later), part)
            for name, (part, size) in norms.items()
            if part is not None
        }
        if parts.latents is not None:
            of_latents = {"latents.norm": parts.latents.norm, "latents.query_norm": parts.latents.query_norm}
            self.norms |= {
                name: (PackedNorm(part, 0, later), part) for name, part in of_latents.items() if part is not None
            }
        self.parallel = parts.parallel
        self.query_scale = parts.query_scale
        self.rotation = parts.rotation
        sinks = parts.recorded.sinks
        self.sinks = None if sinks is None else (PackedVector(sinks, later=later), sinks)
        self.spec = spec


class _Latents:
    """The matrix behind latents, as queries are multiplied with it, and what comes out of attention."""

    def __init__(self, library: Any, parts: LatentParts, rounding: Rounding, later: Packing | None) -> None:
        weight = parts.matrix.weight
        assert isinstance(weight, nn.Parameter)
        self.parts = parts
        how: Rounding = "int8" if rounding == "int4" else rounding
        into, out_of = parts.split(weight.detach())
        self.into = packed_matrix(library, into, [None] * len(into), how, later=later)
        self.out_of = packed_matrix(library, out_of, [None] * len(out_of), how, later=later)
        release(parts.matrix, "weight")

    def writers(self) -> list[Writer]:
        """What writes a new weight into its places."""

        def write(at: int, matrix: PackedMatrix) -> Writer:
            def write_parts(weight: torch.Tensor) -> None:
                for number, part in enumerate(self.parts.split(weight)[at]):
                    matrix.write(number, part)

            return Writer(write_parts, matrix.restorer)

        return [write(0, self.into), write(1, self.out_of)]


def _in_bytes(
    library: Any, weight: Weights, bias: torch.Tensor | None, rounding: Rounding, later: Packing | None
) -> PackedMatrix:
    """A head or an embedding, whose rows can be looked up but in four bits."""
    if isinstance(weight, torch.Tensor):
        return packed_matrix(library, [weight], [bias], rounding, later=later)
    return ByteMatrix(library, [weight], [bias], later=later)


def _has_codes(parts: LayerParts) -> bool:
    query = [] if parts.latents is None or parts.latents.query is None else [parts.latents.query]
    projections = (*parts.qkv, *query, parts.output, *parts.gate_up, *([] if parts.down is None else [parts.down]))
    return any(isinstance(part.linear, (FourBitLinear, ByteLinear)) for part in projections) or (
        parts.experts is not None and isinstance(parts.experts.module, FourBitExperts)
    )


def rounding_of(blueprint: Blueprint, quantization: Quantization) -> Rounding:
    """What a compiled step's numbers are rounded to, of a model's layers that are no codes."""
    return "bytes" if any(map(_has_codes, blueprint.layers)) else quantization


class CompiledDecoder:
    """A model's weights, packed, and the code that runs them.

    Attributes:
        adapters: Those that a step may be asked for, once `adapters_of` has made a place for them.
        rotary: How many dimensions of a head rotate.
        pairs: Whether neighbouring ones rotate together.
        as_stored: Whether some of the layers came as codes.
        rounded_to: What the layers' numbers are rounded to, of those that do not.
        taps: Where hidden states go, if somebody reads them.

    Args:
        blueprint: The model's parts. They give their weights up.
        library: The compiled code.
        dtype: Of weights and KV cache.
        quantization: How weights are stored, that of the library: in `dtype`; as int8, with one scale for each output;
            or the layers' in four bits, as far as they fit, and embedding and head as int8. Where some come as codes
            already, these stay, and what does not is rounded to bytes with a scale for each 32 inputs.
        later: Takes what is to be packed; None packs at once, so that memory is let go matrix by matrix.
    """

    def __init__(
        self,
        blueprint: Blueprint,
        library: Any,
        dtype: torch.dtype,
        quantization: Quantization = "none",
        later: Packing | None = None,
    ) -> None:
        self._library = library
        self._dtype = dtype
        self._quantization: Quantization = quantization
        self.adapters: CompiledAdapters | None = None
        self.taps: Taps | None = None
        self.as_stored = any(map(_has_codes, blueprint.layers))
        self.rounded_to = rounding_of(blueprint, quantization)
        self._layers = [_Layer(library, parts, dtype, self.rounded_to, later) for parts in blueprint.layers]
        self._norm = (PackedNorm(blueprint.norm, later=later), blueprint.norm)
        for _, part in self._norms():
            release(part.module, "weight")
            release(part.module, "bias")
        self._positions = None
        if blueprint.positions is not None:
            self._positions = PackedVector(blueprint.positions.weight, later=later)
        position_rows = None if self._positions is None else self._positions.values[blueprint.first_position :]
        tied = blueprint.head.weight is blueprint.embedding.weight
        rounding: Rounding = "int8" if self.rounded_to == "int4" else self.rounded_to
        table = blueprint.embedding.__dict__.pop("stored_codes", None)
        head = (table if tied else Projection(blueprint.head).codes) or blueprint.head.weight
        self._head = _in_bytes(library, head, blueprint.head.bias, rounding, later)
        del head
        self._embedding = self._head
        if not tied:
            self._embedding = _in_bytes(library, table or blueprint.embedding.weight, None, rounding, later)
        del table
        for module in (blueprint.head, blueprint.embedding):
            release(module, "weight")
        if blueprint.positions is not None:
            release(blueprint.positions, "weight")
        if tied:
            blueprint.head.weight = blueprint.embedding.weight
        release(blueprint.head, "bias")
        self._modules = (blueprint.embedding, blueprint.head, blueprint.positions)
        self.rotary, self.pairs = blueprint.rotary, blueprint.pairs
        self.vocab_size = blueprint.head.out_features
        embedding = MatrixStruct.from_buffer_copy(self._embedding.struct)
        embedding.bias = None
        self._layer_structs = (_LayerStruct * len(self._layers))()
        self._struct = _DecoderStruct(
            ctypes.addressof(self._layer_structs),
            len(self._layers),
            DTYPES[dtype],
            NARROW[quantization],
            blueprint.embedding.embedding_dim,
            max((layer.down.inputs for layer in blueprint.layers if layer.down is not None), default=0),
            blueprint.rotary,
            blueprint.activation,
            int(blueprint.pairs),
            None if position_rows is None else position_rows.data_ptr(),
            embedding,
            blueprint.embedding_scale,
            blueprint.residual_scale,
            blueprint.logit_scale,
            blueprint.logit_cap,
            self._norm[0].struct,
            self._head.struct,
        )
        self._step = _StepStruct()

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        layers = sum(matrix.nbytes for layer in self._layers for matrix, _ in layer.matrices.values())
        experts = (layer.experts for layer in self._layers if layer.experts is not None)
        layers += sum(matrix.nbytes for each in experts for matrix in each.matrices)
        latents = (layer.latents for layer in self._layers if layer.latents is not None)
        layers += sum(each.into.nbytes + each.out_of.nbytes for each in latents)
        return layers + self._head.nbytes + (0 if self._embedding is self._head else self._embedding.nbytes)

    def bind(self, caches: Sequence[CpuCache]) -> None:
        """Uses a KV cache from now on."""
        for struct, layer, cache in zip(self._layer_structs, self._layers, caches, strict=True):
            for name, (norm, _) in layer.norms.items():
                inner, _, own = name.rpartition(".")
                setattr(struct.latents if inner else struct, own, norm.struct)
            for name, (matrix, _) in layer.matrices.items():
                setattr(struct.latents if name == "query" else struct, name, matrix.struct)
            if layer.latents is not None:
                struct.latents.into, struct.latents.out_of = layer.latents.into.struct, layer.latents.out_of.struct
                struct.latents.rank, struct.latents.plain = layer.spec.value_dim, layer.latents.parts.plain
            if layer.experts is not None:
                struct.experts = layer.experts.struct
            struct.gated, struct.parallel = layer.gated, layer.parallel
            if layer.rotation is not None:
                struct.cosines, struct.sines = (table.data_ptr() for table in layer.rotation)
            struct.sinks = None if layer.sinks is None else layer.sinks[0].values.data_ptr()
            described = cache.layers.get(layer.spec) or cache.layer(layer.spec)
            struct.attention = _AttentionStruct.from_buffer_copy(described.buffer)
            struct.attention.scaling *= layer.query_scale

    def logits(self, batch: StepBatch, plan: CpuPlan, seen: Seen | None = None) -> torch.Tensor:
        """Runs a step; returns (M, vocabulary) float32, one row per entry of `batch.sample_index`."""
        return self.run(batch, plan, seen)[0]

    def run(self, batch: StepBatch, plan: CpuPlan, seen: Seen | None = None) -> tuple[torch.Tensor, Float32]:
        """Runs a step.

        Args:
            batch: It.
            plan: Of its attention.
            seen: Its images, audio and videos.

        Returns:
            (M, vocabulary) float32, one row per entry of `batch.sample_index`, and (P, hidden), the sum of the hidden
            states of each of `batch.pool_spans`.
        """
        ids = np.ascontiguousarray(batch.token_ids, np.int32)
        positions = np.ascontiguousarray(batch.positions, np.int32)
        index = np.ascontiguousarray(batch.sample_index, np.int64)
        logits = torch.empty(len(index), self.vocab_size, dtype=torch.float32)
        step = self._step
        step.token_ids, step.positions, step.sample_index = ids.ctypes.data, positions.ctypes.data, index.ctypes.data
        step.samples, step.logits, step.plan = len(index), logits.data_ptr(), plan.address
        spans = np.ascontiguousarray(batch.pool_spans, np.int64)
        pooled = np.empty((len(spans), self._struct.hidden), np.float32)
        step.pool_spans, step.pools, step.pooled = spans.ctypes.data, len(spans), pooled.ctypes.data
        step.num_pieces = 0
        if batch.adapters is not None:
            assert self.adapters is not None
            tokens, pieces = pieces_of(batch)
            step.adapters, step.token_adapters = self.adapters.address, tokens.ctypes.data
            step.pieces, step.num_pieces = pieces.ctypes.data, len(pieces)
        step.seen, step.num_deep, step.cosines = None, 0, None
        if seen is not None:
            deep = (ctypes.c_void_p * len(seen.deep))(*(each.data_ptr() for each in seen.deep))
            step.seen, step.images = seen.index.ctypes.data, seen.rows.data_ptr()
            step.deep, step.num_deep = ctypes.addressof(deep), len(seen.deep)
            if seen.rotation is not None:
                step.cosines, step.sines = (table.data_ptr() for table in seen.rotation)
        step.taps = None
        if self.taps is not None:
            places = [self.taps.place(layer) for layer in range(len(self._layers) + 1)]
            taps = (ctypes.c_void_p * len(places))(*places)
            step.taps = ctypes.addressof(taps)
        if self._library.decoder_step(ctypes.addressof(self._struct), ctypes.addressof(step)):
            raise MemoryError("no memory for the activations of a step")
        return logits, pooled

    def adapters_of(self, model: nn.Module) -> CompiledAdapters:
        """Makes a place for adapters, which call layers as the model does."""
        names = {module: name for name, module in model.named_modules()}
        layers: dict[str, tuple[int, int]] = {}
        matrices = []
        for layer in self._layers:
            found: dict[str, list[Part]] = {}
            every: dict[str, tuple[PackedMatrix | None, Sequence[Projection]]] = {**layer.matrices}
            if layer.experts is not None:
                every["router"] = layer.experts.router, layer.experts.router_parts
            for name in MATRICES:
                matrix, parts = every.get(name, (None, ()))
                for number, part in enumerate(parts):
                    assert matrix is not None
                    found.setdefault(name, []).append(Part(names[part.linear], part, matrix.places[number]))
                    if name != "router" or type(part.linear) in _LINEAR:  # others are no layers to those who adapt some
                        layers[names[part.linear]] = part.shape
            matrices.append(found)
        dtype = small_dtype(self._library, self._dtype, self._quantization)
        self.adapters = CompiledAdapters(CompiledFormat(self._library, dtype, layers, matrices))
        return self.adapters

    def writers(self) -> dict[int, list[Writer]]:
        """For each parameter that was packed, by its identity, what writes a new value into its places."""
        found: dict[int, list[Writer]] = {}

        def note(matrix: PackedMatrix, number: int, part: Projection) -> None:
            linear = part.linear
            write = Writer(lambda value: matrix.write(number, part.weight_of(value)), matrix.restorer)
            found.setdefault(id(linear.weight), []).append(write)
            if getattr(linear, "bias", None) is not None:
                write = Writer(lambda value: matrix.write_bias(number, part.bias_of(value)), matrix.restorer)
                found.setdefault(id(linear.bias), []).append(write)

        for layer in self._layers:
            for matrix, parts in layer.matrices.values():
                for number, part in enumerate(parts):
                    note(matrix, number, part)
            if layer.latents is not None:
                found[id(layer.latents.parts.matrix.weight)] = layer.latents.writers()
            if layer.experts is not None:
                found |= layer.experts.writers()
            if layer.sinks is not None:
                values, sinks = layer.sinks
                found[id(sinks)] = [Writer(values.write, values.restorer)]
        embedding, head, positions = self._modules
        note(self._head, 0, Projection(head))
        if self._embedding is not self._head:
            write = Writer(lambda value: self._embedding.write(0, value), self._embedding.restorer)
            found[id(embedding.weight)] = [write]
        for norm, norm_part in self._norms():
            vectors = [(norm_part.module.weight, norm.weight), (getattr(norm_part.module, "bias", None), norm.bias)]
            for parameter, vector in vectors:
                if vector is not None:
                    found[id(parameter)] = [Writer(vector.write, vector.restorer)]
        if positions is not None and self._positions is not None:
            found[id(positions.weight)] = [Writer(self._positions.write, self._positions.restorer)]
        return found

    def _norms(self) -> list[tuple[PackedNorm, NormPart]]:
        return [self._norm, *(norm for layer in self._layers for norm in layer.norms.values())]
