"""One architecture of llama.cpp's: what its model is in transformers, and where its tensors belong there."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from asyncengine.errors import CheckpointError, UnsupportedModelError
from asyncengine.model.gguf import settings
from asyncengine.model.gguf.facts import Facts
from asyncengine.model.gguf.header import BlockTensor
from asyncengine.model.gguf.placed import Given, Placed, halves_from_pairs, numbers

_LAYER = re.compile(r"blk\.(\d+)\.(.+)")
_PASSED_OVER = re.compile(r"(rope_freqs|rope_factors_(long|short))\.weight")
"""Tensors that become settings."""
_LASTS = ("weight", "bias")
_NOT_WHOLE = {
    "partial_rotary_factor", "qk_rope_head_dim", "global_head_dim", "position_embedding_type", "layers_block_type",
}  # fmt: skip
"""Fields of models that rotate only some of a head's numbers, or none."""

Tensors = dict[str, BlockTensor]
Place = Callable[[Facts, str, Tensors], Iterator[Placed | Given]]
"""Given the beginning of a layer's names in the model, and its tensors by their names without the layer, takes out
those that it knows."""


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture.

    Attributes:
        model_type: As transformers calls it.
        model_class: The class of the model.
        settings: Further fields of the configuration.
        names: What tensors of a layer are called there: without "weight" or "bias", or whole names.
        outside: What those are called that belong to no layer.
        layer: What the names of a layer begin with there.
        pairs: Whether neighbouring outputs of queries and keys rotate together, where transformers rotates halves.
        shifted: Whether norms that have names of their own here are stored with one added.
        places: What else becomes of a layer's tensors.
        places_outside: What else becomes of the others.
        differs: What may differ between layers, by its key.
    """

    model_type: str
    model_class: str
    settings: Callable[[Facts], dict[str, Any]]
    names: Mapping[str, str]
    outside: Mapping[str, str]
    layer: str = "model.layers.{}."
    pairs: bool = False
    shifted: bool = False
    places: tuple[Place, ...] = ()
    places_outside: tuple[Place, ...] = ()
    differs: tuple[str, ...] = ()

    def config(self, facts: Facts) -> dict[str, Any]:
        """What a ``config.json`` would say.

        Raises:
            CheckpointError: Something is missing, or does not fit together.
            UnsupportedModelError: It says what this architecture is not known to do.
        """
        if "attn_q" in self.names and not facts("attention.head_count"):
            raise CheckpointError(f"{facts.architecture}.attention.head_count is 0")
        common = settings.common(facts, self.differs)
        own = {"model_type": self.model_type, "architectures": [self.model_class]}
        found = common | own | self.settings(facts)
        if "attn_q" in self.names and "head_dim" in found and not found.keys() & _NOT_WHOLE:
            rotated = facts.get("rope.dimension_count", facts.head_dim)
            if rotated != facts.head_dim:
                raise UnsupportedModelError(
                    f"{facts.architecture} is not known to rotate {rotated} of a head's numbers"
                )
        return found

    def placed(self, facts: Facts) -> list[Placed | Given]:
        """All parameters.

        Raises:
            UnsupportedModelError: There are tensors that this architecture is not known to have.
        """
        layers: dict[int, Tensors] = {}
        outside: Tensors = {}
        for tensor in facts.tensors.values():
            if found := _LAYER.fullmatch(tensor.name):
                layers.setdefault(int(found[1]), {})[found[2]] = tensor
            else:
                outside[tensor.name] = tensor
        unknown: list[str] = []
        placed = list(self._placed(facts, "", outside, unknown))
        for layer, tensors in sorted(layers.items()):
            if layer < facts.layers:
                placed += self._placed(facts, self.layer.format(layer), tensors, unknown)
            elif layer >= facts("block_count"):  # those before that predict further tokens
                unknown += [tensor.name for tensor in tensors.values()]
        if unknown:
            raise UnsupportedModelError(
                f"{facts.architecture} is not known to have {len(unknown)} of its tensors: {unknown[0]}, ..."
            )
        return placed

    def _placed(self, facts: Facts, prefix: str, tensors: Tensors, unknown: list[str]) -> Iterator[Placed | Given]:
        """Those of one layer, or of none; adds to `unknown` what is left."""
        names, places = (self.names, self.places) if prefix else (self.outside, self.places_outside)
        _put_scales_to_weights(tensors, names)
        for place in places:
            yield from place(facts, prefix, tensors)
        if "attn_q" in names and "attn_qkv" not in names:
            _split_attention(facts, tensors)
        for short, tensor in tensors.items():
            name, _, last = short.rpartition(".")
            if short in names:
                yield Placed(prefix + names[short], (tensor,))
            elif name in names and last in _LASTS:
                yield self._one(facts, f"{prefix}{names[name]}.{last}", name, tensor)
            elif not _PASSED_OVER.fullmatch(short):
                unknown.append(tensor.name)

    def _one(self, facts: Facts, name: str, short: str, tensor: BlockTensor) -> Placed:
        if self.shifted and short.endswith("norm") and name.endswith("weight"):
            return Placed(name, (tensor,), change=numbers(lambda found: found - 1), keeps_codes=False)
        if self.pairs and short in ("attn_q", "attn_k"):
            heads = "attention.head_count" if short == "attn_q" else "attention.head_count_kv"
            count = facts.one(heads, facts("attention.head_count"))
            return Placed(name, (tensor,), change=halves_from_pairs(count), keeps_codes=len(tensor.shape) > 1)
        return Placed(name, (tensor,))


def _put_scales_to_weights(tensors: Tensors, names: Mapping[str, str]) -> None:
    """Weights in NVFP4 have a further scale each, or one for each expert. What their inputs would be scaled by, if
    these were rounded to four bits too, is for nothing here.
    """
    for short in [short for short in tensors if short.endswith(".scale") and short not in names]:
        weight = short.removesuffix("scale") + "weight"
        if weight in tensors:
            tensors[weight] = dataclasses.replace(tensors[weight], scale=tensors.pop(short))
            tensors.pop(short.removesuffix("scale") + "input_scale", None)


def _split_attention(facts: Facts, tensors: Tensors) -> None:
    """Queries, keys and values that are stored as one matrix become three."""
    for last in _LASTS:
        whole = tensors.pop(f"attn_qkv.{last}", None)
        if whole is None:
            continue
        heads = facts.one("attention.head_count_kv", facts("attention.head_count"))
        keys = heads * facts.head_dim
        values = heads * int(facts.get("attention.value_length") or facts.head_dim)
        queries = whole.shape[0] - keys - values
        tensors[f"attn_q.{last}"] = whole.part(0, queries)
        tensors[f"attn_k.{last}"] = whole.part(queries, keys)
        tensors[f"attn_v.{last}"] = whole.part(queries + keys, values)
