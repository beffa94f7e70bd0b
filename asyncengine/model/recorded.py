"""What was found of a model by watching it run: its layers that keep something of the tokens before."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace

from torch import nn

from asyncengine.model.attention.protocol import LayerSpec
from asyncengine.model.attention_modules import RecordedLayer
from asyncengine.model.latent_attention import LatentAttention
from asyncengine.model.recurrent.functions import Functions, called
from asyncengine.model.recurrent.recorded import RecurrentLayer, RecurrentSpec


@dataclass(frozen=True, slots=True)
class Watched:
    """Of any model of a configuration: what its layers need, by their names and in the order of execution.

    Attributes:
        attention: Of those that attend.
        recurrent: Of those that keep a state.
    """

    attention: dict[str, LayerSpec]
    recurrent: dict[str, RecurrentSpec] = field(default_factory=dict)

    @property
    def names(self) -> set[str]:
        """Of all of them."""
        return {*self.attention, *self.recurrent}

    @property
    def has_sinks(self) -> bool:
        """Whether some attend to learned sinks, which are weights."""
        return any(spec.has_sinks for spec in self.attention.values())


@dataclass(frozen=True, slots=True)
class Recorded:
    """Of one model: the layers themselves, in the order of execution.

    Attributes:
        attention: Those that attend.
        recurrent: Those that keep a state.
    """

    attention: list[RecordedLayer]
    recurrent: list[RecurrentLayer] = field(default_factory=list)

    def alone(self, names: Collection[str]) -> Recorded:
        """The same, with recurrent layers that do not continue, by their names."""
        if not names:
            return self
        recurrent = [
            replace(layer, spec=replace(layer.spec, continues=False)) if layer.name in names else layer
            for layer in self.recurrent
        ]
        return Recorded(self.attention, recurrent)

    def looking_ahead(self, names: Collection[str]) -> Recorded:
        """The same, with attention in which tokens of an image attend to all of it, by the names of the layers."""
        if not names:
            return self
        attention = [
            replace(layer, spec=replace(layer.spec, looks_ahead=True)) if layer.name in names else layer
            for layer in self.attention
        ]
        return Recorded(attention, self.recurrent)

    def calling(self, functions: Functions | None, in_place: bool = False) -> Recorded:
        """The same, with recurrent layers that call `functions`.

        Args:
            functions: Instead of transformers' own; None is what does without a compiler.
            in_place: Whether they change states of all sequences in place where layers call them in a step of decodes.
        """
        recurrent = [
            replace(layer, functions=functions, in_place=in_place and bool(called(layer.module, functions or {})))
            for layer in self.recurrent
        ]
        return Recorded(self.attention, recurrent)

    def apart(self, names: Collection[str]) -> Recorded:
        """The same, with recurrent layers whose states are gathered for each step, by their names."""
        if not names:
            return self
        recurrent = [replace(layer, in_place=False) if layer.name in names else layer for layer in self.recurrent]
        return Recorded(self.attention, recurrent)

    @property
    def uncalled(self) -> set[nn.Module]:
        """Modules within layers whose weights may be read by these, since they are not called."""
        latent = {layer.module.kv_b_proj for layer in self.attention if isinstance(layer.module, LatentAttention)}
        return latent | {
            module
            for layer in self.recurrent
            for name, module in layer.module.named_modules()
            if hasattr(module, "in_features") and name not in layer.spec.products
        }

    @property
    def watched(self) -> Watched:
        """What holds for any model of the same configuration."""
        return Watched(
            {layer.name: layer.spec for layer in self.attention}, {layer.name: layer.spec for layer in self.recurrent}
        )
