"""What the configuration of an EAGLE-3 head says, in the three layouts that are published. Imports no torch.

That of the method's authors and of SpecForge is a Llama's with a few settings more; that of the "speculators" library
has the Llama's settings in ``transformer_layer_config``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from asyncengine.errors import ConfigError

_STRANGE = (
    "fc_norm", "norm_output", "norm_before_fc", "parallel_drafting", "quantization_config", "sliding_window",
)  # fmt: skip
"""Settings of other heads, which compute something else where these are set."""


@dataclass(frozen=True, slots=True)
class EagleConfig:
    """One head.

    Attributes:
        llama: Settings of its layer, as `transformers.LlamaConfig` takes them.
        target_layers: Of the model, whose hidden states it sees as they enter them.
        target_hidden: Their width.
        width: Of its own states.
        vocab_size: Of the model.
        draft_vocab: Tokens that it can guess.
        norm_before_residual: Whether its layer adds to what its norm gave, not to what that took.
    """

    llama: Mapping[str, Any]
    target_layers: tuple[int, ...]
    target_hidden: int
    width: int
    vocab_size: int
    draft_vocab: int
    norm_before_residual: bool


def is_head(config: Mapping[str, Any]) -> bool:
    """Whether the configuration of a directory is that of a head, not of a model."""
    names = config.get("architectures") or [""]
    return "speculators_model_type" in config or "draft_vocab_size" in config or "eagle" in str(names[0]).lower()


def eagle_config(config: Mapping[str, Any], num_layers: int) -> EagleConfig:
    """Reads a head's configuration.

    Args:
        config: Its ``config.json``.
        num_layers: Of the model that it is for.

    Raises:
        ConfigError: It is not that of a head that can be served; the message says why.
    """
    if not is_head(config):
        raise ConfigError("its config.json is not that of an EAGLE-3 head; a whole model drafts as 'small_draft'")
    kind = config.get("speculators_model_type", "eagle3")
    if kind != "eagle3":
        raise ConfigError(f"its speculators_model_type is {kind!r}; expected 'eagle3'")
    llama = config.get("transformer_layer_config", config)
    if not isinstance(llama, Mapping):
        raise ConfigError("its transformer_layer_config is not an object")
    if llama.get("model_type", "llama") != "llama":
        raise ConfigError(f"its layers are of model type {llama['model_type']!r}; expected 'llama'")
    about = config.get("eagle_config") or {}
    if not isinstance(about, Mapping) or not about.get("use_aux_hidden_state", True):
        raise ConfigError("its eagle_config has no hidden states of several layers, so it is not of EAGLE-3")
    for name in _STRANGE:
        if found := llama.get(name) or config.get(name) or about.get(name):
            raise ConfigError(f"its {name} is {found!r}, which nothing here knows")
    if (layers := _integer(llama, "num_hidden_layers")) != 1:
        raise ConfigError(f"its num_hidden_layers is {layers}; expected 1, as heads of this kind have")
    width, vocab_size = _integer(llama, "hidden_size"), _integer(llama, "vocab_size")
    return EagleConfig(
        llama=llama,
        target_layers=_layers(config, about, num_layers),
        target_hidden=_integer(config, "target_hidden_size", width),
        width=width,
        vocab_size=vocab_size,
        draft_vocab=_integer(config, "draft_vocab_size", vocab_size),
        norm_before_residual=bool(config.get("norm_before_residual", "transformer_layer_config" in config)),
    )


def _layers(config: Mapping[str, Any], about: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """The layers whose input is meant. In ``eagle_config`` (SpecForge, SGLang) they are named by their output."""
    found = config.get("eagle_aux_hidden_state_layer_ids")
    if not found and (outputs := about.get("eagle_aux_hidden_state_layer_ids")):
        found = [layer + 1 for layer in outputs]
    layers = tuple(found or (2, num_layers // 2, num_layers - 3))
    if any(isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer <= num_layers for layer in layers):
        raise ConfigError(f"it sees the layers {list(layers)}; the model has {num_layers}")
    return layers


def _integer(config: Mapping[str, Any], name: str, otherwise: int | None = None) -> int:
    value = otherwise if config.get(name) is None else config[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"its {name} is {value!r}; expected an integer >= 1")
    return value
