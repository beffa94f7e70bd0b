"""The parts of a decoder that the compiled step can run: where its weights are and what is done with them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from asyncengine.model.attention_modules import RecordedLayer
from asyncengine.model.latent_attention import by_head
from asyncengine.model.quantised.byte_linear import ByteLinear
from asyncengine.model.quantised.eight_bits import EightBits
from asyncengine.model.quantised.four_bit_experts import FourBitExperts
from asyncengine.model.quantised.four_bit_linear import FourBitLinear
from asyncengine.model.quantised.four_bits import FourBits


class NotRecognised(Exception):  # it is an answer, not an error
    """The model is not of the family; the message says what differs."""


@dataclass(frozen=True, slots=True)
class NormPart:
    """x / rms(x) * (weight + offset) + bias.

    Attributes:
        module: Has the weight, and the bias if there is one.
        epsilon: Added to the mean square.
        offset: 1 where the weights are stored less one (Gemma), else 0.
        centred: Whether the mean of x is taken off first (LayerNorm).
        of_heads: Whether each head is normed by itself.
    """

    module: nn.Module
    epsilon: float
    offset: float
    centred: bool
    of_heads: bool = False

    @property
    def weight(self) -> torch.Tensor:
        """(size,), or (heads, size) where each head has its own."""
        weight = self.module.weight
        assert isinstance(weight, torch.Tensor)
        return weight

    @property
    def bias(self) -> torch.Tensor | None:
        """Like `weight`, or None."""
        bias = getattr(self.module, "bias", None)
        return bias if isinstance(bias, torch.Tensor) else None


@dataclass(frozen=True, slots=True)
class Projection:
    """Some outputs of a linear layer: all of them, unless the model has fused several projections into one layer.

    Attributes:
        linear: The layer.
        start: The first output that is taken of every `period`.
        stop: The one after the last; None is the end.
        period: So many outputs lie together; None is all. Fewer, where every head has its query, key and value.
        transposed: Whether the layer stores (inputs, outputs).
    """

    linear: nn.Module
    start: int = 0
    stop: int | None = None
    period: int | None = None
    transposed: bool = False

    @property
    def weight(self) -> torch.Tensor:
        """(outputs, inputs)"""
        weight = self.linear.weight
        assert isinstance(weight, torch.Tensor)
        return self.weight_of(weight)

    @property
    def bias(self) -> torch.Tensor | None:
        """(outputs,) or None"""
        bias = getattr(self.linear, "bias", None)
        return self.bias_of(bias) if isinstance(bias, torch.Tensor) else None

    @property
    def codes(self) -> FourBits | EightBits | None:
        """The weight's codes, if the layer has some."""
        if isinstance(self.linear, ByteLinear):
            of_all = self.linear.eight_bits
            zeros = None if of_all.zeros is None else self.taken(of_all.zeros)
            return EightBits(self.taken(of_all.codes), self.taken(of_all.scales), zeros)
        if not isinstance(self.linear, FourBitLinear):
            return None
        whole = self.linear.four_bits
        zeros = None if whole.zeros is None else self.taken(whole.zeros)
        return FourBits(self.taken(whole.codes), self.taken(whole.scales), zeros, whole.values)

    @property
    def numbers(self) -> torch.Tensor:
        """(outputs, inputs), of codes as well."""
        codes = self.codes
        return self.weight if codes is None else codes.weight(torch.float32)

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs of the whole layer."""
        weight = self.linear.weight
        assert isinstance(weight, torch.Tensor)
        if isinstance(self.linear, FourBitLinear):
            return self.linear.out_features, self.linear.in_features
        outputs, inputs = weight.T.shape if self.transposed else weight.shape
        return outputs, inputs

    @property
    def inputs(self) -> int:
        """How many."""
        return self.shape[1]

    def weight_of(self, whole: torch.Tensor) -> torch.Tensor:
        """What of the layer's weight belongs to the projection; (outputs, inputs)."""
        return self.taken(whole.T if self.transposed else whole)

    def bias_of(self, whole: torch.Tensor) -> torch.Tensor:
        """What of the layer's bias belongs to the projection; (outputs,)."""
        return self.taken(whole)

    def taken(self, whole: torch.Tensor) -> torch.Tensor:
        """What belongs to the projection of something that has a row for each of the layer's outputs."""
        if self.period is None and self.start == 0 and self.stop is None:
            return whole
        if self.period is None:
            return whole[self.start : self.stop]
        return whole.view(-1, self.period, *whole.shape[1:])[:, self.start : self.stop].flatten(0, 1)


@dataclass(frozen=True, slots=True)
class Routing:
    """To which experts a token is sent.

    Attributes:
        router: Has the weight, (experts, hidden), whose products choose, and its bias if there is one.
        top: How many a token is sent to.
        chosen_first: Whether the softmax that weighs them is over those that were chosen; else it is over all.
        normalised: Whether the weights of those that were chosen add up to 1.
        sigmoid: Whether experts are weighed by sigmoids, not by a softmax.
        scale: What their answers are multiplied by at last.
        correction: The module and the name of what is added to the scores that choose, (experts,), but not to those
            that weigh; None if nothing is.
        groups: Neighbours that are chosen together, by the sum of their two best; 1 if that is not done.
        groups_asked: How many groups experts are chosen from.
    """

    router: nn.Module
    top: int
    chosen_first: bool
    normalised: bool
    sigmoid: bool = False
    scale: float = 1.0
    correction: tuple[nn.Module, str] | None = None
    groups: int = 1
    groups_asked: int = 1


@dataclass(frozen=True, slots=True)
class Beside:
    """How much an MLP counts that stands beside experts.

    Attributes:
        gate: A linear layer of one output, whose sigmoid its answer is multiplied by; or None.
        scale: What the answer is multiplied by as well.
    """

    gate: Projection | None = None
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class ExpertParts:
    """Experts in the place of an MLP or beside one, each with a gate, of which every token is sent to a few.

    Attributes:
        module: Has their weights, (experts, outputs, inputs) or (experts, inputs, outputs), and perhaps biases.
        activation: As `Blueprint.activation`.
        alpha: Of the clamped activation.
        limit: Of the clamped activation.
        alternating: Whether a gate's and an up projection's outputs alternate; else they follow each other.
        transposed: Whether a weight is stored as (inputs, outputs).
        routing: None if they are asked by something else.
        beside: None if no MLP is beside them.
    """

    module: nn.Module
    activation: int
    alpha: float
    limit: float
    alternating: bool
    transposed: bool
    routing: Routing | None = None
    beside: Beside | None = None

    @property
    def count(self) -> int:
        """Experts."""
        return len(self.down_of(_tensor(self.module, "down_proj")))

    @property
    def inner(self) -> int:
        """Outputs of a gate, which are inputs of a down projection."""
        return self.down_of(_tensor(self.module, "down_proj"))[0].shape[1]

    @property
    def hidden(self) -> int:
        """Outputs of a down projection, which are inputs of a gate."""
        return self.down_of(_tensor(self.module, "down_proj"))[0].shape[0]

    def gate_up_of(self, whole: torch.Tensor) -> list[torch.Tensor]:
        """(inner, hidden) each: gate and up projection of the first expert, of the second, and so on."""
        return self._halves(whole.transpose(1, 2) if self.transposed else whole)

    def gate_up_bias_of(self, whole: torch.Tensor) -> list[torch.Tensor]:
        """(inner,) each, in the same order."""
        return self._halves(whole)

    def down_of(self, whole: torch.Tensor) -> list[torch.Tensor]:
        """(hidden, inner) of each expert."""
        return list(whole.transpose(1, 2) if self.transposed else whole)

    def four_bits_of(self, name: str) -> list[FourBits] | None:
        """As `gate_up_of` or `down_of`, the codes of a parameter, if it has four bits."""
        if not isinstance(self.module, FourBitExperts) or name not in self.module.four_bit_shapes:
            return None
        whole = self.module.four_bits(name)
        size = whole.shape[0] // self.count
        starts = range(0, whole.shape[0], size)
        if name == "down_proj":
            return [whole.rows(start, start + size) for start in starts]
        if self.alternating:
            return [whole.rows(start + half, start + size, 2) for start in starts for half in (0, 1)]
        halves = range(0, whole.shape[0], size // 2)
        return [whole.rows(start, start + size // 2) for start in halves]

    def _halves(self, whole: torch.Tensor) -> list[torch.Tensor]:
        halves = (whole[:, ::2], whole[:, 1::2]) if self.alternating else whole.chunk(2, dim=1)
        return [half[expert] for expert in range(len(whole)) for half in halves]


def _tensor(module: nn.Module, name: str) -> torch.Tensor:
    value = getattr(module, name)
    assert isinstance(value, torch.Tensor)
    return value


@dataclass(frozen=True, slots=True)
class LatentParts:
    """What is between the first projections and attention where latents are kept.

    Attributes:
        matrix: The module whose weight, (heads * (plain + value), rank), makes keys and values of latents.
        heads: How many there are.
        plain: How many numbers of a head's query do not rotate.
        norm: Of latents.
        query: From what `query_norm` leaves to queries; None if these are projected at once.
        query_norm: Of the inputs of that.
    """

    matrix: nn.Module
    heads: int
    plain: int
    norm: NormPart
    query: Projection | None
    query_norm: NormPart | None

    def split(self, weight: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Of each head what makes latents of its query, (rank, plain), and what makes its values, (value, rank)."""
        into, out_of = by_head(weight, self.heads, self.plain)
        return list(into), list(out_of)


@dataclass(frozen=True, slots=True)
class LayerParts:
    """One layer. A norm that is None is not there.

    Attributes:
        qkv: Projections to queries, keys and values, in this order; with latents to queries, or what these are made of,
            and to latents with what rotates of the key.
        gate_up: Gate and up projection of the MLP, or the latter alone; none where there are experts alone.
        down: None where there are experts alone.
        experts: None where there is an MLP alone.
        rotation: Cosines and sines, (positions, rotary / 2) float32 each; the same tensors for layers that rotate
            alike.
        parallel: Whether the MLP stands beside attention: it sees what attention sees, through its own norm if it has
            one.
        query_scale: What queries are multiplied by before attention.
        whole_mlp: The module that stands for gate, up and down projection and experts, where it is not looked into.
        latents: None where keys and values are kept.
    """

    before_attention: NormPart | None
    after_attention: NormPart | None
    before_mlp: NormPart | None
    after_mlp: NormPart | None
    query_norm: NormPart | None
    key_norm: NormPart | None
    qkv: tuple[Projection, ...]
    output: Projection
    gate_up: tuple[Projection, ...]
    down: Projection | None
    experts: ExpertParts | None
    rotation: tuple[torch.Tensor, torch.Tensor] | None
    parallel: bool
    query_scale: float
    recorded: RecordedLayer
    whole_mlp: nn.Module | None = None
    latents: LatentParts | None = None


@dataclass(frozen=True, slots=True)
class Blueprint:
    """A whole decoder, in the modules that hold its weights.

    Attributes:
        activation: 0 silu, 1 gelu by tanh, 2 gelu by erf, 3 relu, 4 relu squared, 5 silu of a clamped gate (gpt-oss).
        positions: Embeddings of positions, added to those of tokens; row `first_position` is that of position 0.
        embedding_scale: What embeddings are multiplied by.
        rotary: How many dimensions of a head rotate.
        pairs: Whether neighbouring dimensions rotate together; else those of the two halves do.
    """

    embedding: nn.Embedding
    positions: nn.Embedding | None
    first_position: int
    layers: tuple[LayerParts, ...]
    norm: NormPart
    head: nn.Linear | ByteLinear
    activation: int
    rotary: int
    pairs: bool
    embedding_scale: float
    residual_scale: float
    logit_scale: float
    logit_cap: float
