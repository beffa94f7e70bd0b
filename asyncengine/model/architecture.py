"""Whether and how a transformers model can be served: found out by watching it, not by knowing its name.

A dummy forward with an attention function that records its calls yields, per layer, everything the KV cache needs, and
a cache that records who keeps which state in it (`asyncengine.model.recurrent.recorded`) the same of recurrent layers.
What cannot be served shows in the same way: layers that do neither, attend twice, or not causally.
"""

from __future__ import annotations

import copy
import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from asyncengine.errors import CheckpointError, UnsupportedModelError
from asyncengine.media import PLURALS, Kind
from asyncengine.model.attention.protocol import LayerSpec
from asyncengine.model.attention_modules import ATTENTION, HOOK, RecordedLayer, hooked, text_config
from asyncengine.model.building import BUILDING
from asyncengine.model.checkpoint import Checkpoint
from asyncengine.model.latent_attention import LatentAttention, keep_latents
from asyncengine.model.media.modules import senses
from asyncengine.model.recorded import Recorded, Watched
from asyncengine.model.recurrent.recorded import RecurrentLayer, recording
from asyncengine.model.stored.weight import CodedWeight
from asyncengine.model.text_to_text.kind import why_not

_LAYER_TYPES = {"full_attention", "sliding_attention", "attention"}
_RECURRENT_TYPES = {"linear_attention", "conv", "mamba", "hybrid", "hybrid_sliding"}
_STATELESS_TYPES = {"mlp", "moe"}
"""Layers that look at no other token."""
_HARMLESS = {
    "cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "full_attention_mask", "logits_to_keep",
    "position_embeddings", "position_ids", "sliding_attention_mask",
}  # fmt: skip
"""Tensors that models pass along to the attention function although it has no use for them here."""


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers calls; (1, heads, tokens, dim) in, (1, tokens, heads, dim) out."""
    hook = getattr(module, HOOK)
    kwargs["attention_mask"] = attention_mask
    query, key, value = (given[0].transpose(0, 1) for given in (query, key, value))
    if not isinstance(module, LatentAttention):
        return hook(module, query, key, value, kwargs)[None], None
    rotated = key.shape[2] - value.shape[2]
    attended = hook(module, module.absorb(query, rotated), key, value, kwargs)
    return module.expand(attended, query.shape[2], rotated)[None], None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attend)


def model_class(config: Any, media: bool = False) -> tuple[Any, Any]:
    """The class of transformers that `AutoModelForCausalLM` would take, and the configuration that it would give it.

    Args:
        config: Of a checkpoint.
        media: Whether it is to be the class that takes media; it is where there is no other.
    """
    mappings = _mappings(config)
    if media:
        mappings.reverse()
    found = next(mapping[type(config)] for mapping in mappings if type(config) in mapping)
    if isinstance(found, (list, tuple)):
        named = getattr(config, "architectures", None) or ()
        found = next((each for each in found if each.__name__ in named), found[0])
    of_text = getattr(config, "sub_configs", {}).get("text_config")
    return found, config.get_text_config() if of_text is not None and found.config_class is of_text else config


def _mappings(config: Any) -> list[Any]:
    """Where a configuration's class is looked up: in the first of these for text, in the last of them for media.

    Those of models that listen are among encoder-decoder models and others that speak, too.
    """
    kinds: list[Any] = [AutoModelForCausalLM, AutoModelForImageTextToText]
    if getattr(config, "audio_token_id", None) is not None:
        kinds += [AutoModelForSeq2SeqLM, AutoModelForMultimodalLM]
    return [kind._model_mapping for kind in kinds]


def no_media(config: Any, kind_of_media: Kind) -> str:
    """Why transformers' class for a configuration takes no images, audio or videos that were encoded before; empty if
    it does, as far as its configuration tells: of videos, it may have the token of images.
    """
    kind, _ = model_class(config, media=True)
    of_token: Kind = "image" if kind_of_media == "video" else kind_of_media
    if getattr(config, f"{of_token}_token_id", None) is None:
        return f"{kind.__name__} has no token that stands for {PLURALS[kind_of_media]}"
    if kind_of_media != "audio" and "mm_encoder_outputs" not in inspect.signature(kind.forward).parameters:
        return f"{kind.__name__} takes none that are encoded in transformers {transformers.__version__}"
    return ""


def bare(config: Any, dtype: torch.dtype | None = None, media: bool = False, latents: bool = False) -> Any:
    """A model without weights, whatever device is the default; it attends by our function.

    Args:
        config: Of a checkpoint.
        dtype: Of its weights; as the configuration says, if it is not given.
        media: As `model_class` has it.
        latents: Whether it keeps those of multi-head latent attention.
    """
    kind, config = model_class(config, media)
    given = {} if dtype is None else {"dtype": dtype}
    model = kind._from_config(config, attn_implementation=ATTENTION, **given)
    if latents:
        keep_latents(model)
    return model


def attend_here(model: Any) -> None:
    """Lets a model attend by our function, but for what looks or listens, which attends as transformers does."""
    model.set_attn_implementation(ATTENTION)
    for module in senses(model):
        if isinstance(module, PreTrainedModel):
            try:
                module.set_attn_implementation("sdpa")
            except ValueError:
                module.set_attn_implementation("eager")


def turned_weights(kind: Any, config: Any) -> set[str]:
    """Names of weights that a model stores as (inputs, outputs), where linear layers have (outputs, inputs)."""
    with torch.device("meta"):
        model = kind(copy.deepcopy(config))  # which a model may change
    return {f"{name}.weight" for name, module in model.named_modules() if type(module) is Conv1D}


def coded_for(checkpoint: Checkpoint, kind: Any, config: Any) -> list[CodedWeight]:
    """The weights that a checkpoint stores as codes, each of them the way round in which a model has it."""
    coded = list(checkpoint.coded.values())
    if not coded:
        return coded
    with BUILDING:
        turned = turned_weights(kind, config)
    return [weight.turned() if weight.belongs_to(turned) else weight for weight in coded]


def waits(model: PreTrainedModel) -> str | None:
    """Why a forward waits for a CUDA device in its middle, in words; None if no reason is known.

    The sizes of groups of tokens, one for each expert, are on the device. torch computes products of such groups
    without looking at them in bfloat16 alone.
    """
    downs = (getattr(module, "down_proj", None) for module in model.modules())
    if not any(isinstance(down, nn.Parameter) and down.dim() == 3 for down in downs):
        return None
    how = text_config(model.config)._experts_implementation
    if how == "grouped_mm" and model.dtype is torch.bfloat16:
        return None
    return f"experts in {str(model.dtype).removeprefix('torch.')} ({how}) make the host wait"


def read_config(checkpoint: Checkpoint) -> Any:
    """A checkpoint's configuration, if its architecture can be served as far as the configuration tells.

    Raises:
        UnsupportedModelError: It cannot; the message has the name and the reason.
    """
    try:
        config = AutoConfig.from_pretrained(checkpoint.path, local_files_only=True)
    except Exception as error:
        kind = checkpoint.config.get("model_type")
        if kind is None:
            raise CheckpointError(f"{checkpoint.path / 'config.json'} has no model_type") from error
        raise UnsupportedModelError(
            f"{checkpoint.name}: transformers cannot read the configuration of a {kind!r} model: {error}"
        ) from error
    for each in (config, text_config(config)):  # codes are turned into numbers before transformers sees them
        if hasattr(each, "quantization_config"):
            del each.quantization_config
    name = _name(config)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} is an encoder-decoder model: {why_not(config.model_type)}")
    if not any(type(config) in mapping for mapping in _mappings(config)):
        raise UnsupportedModelError(f"{name} has no causal language model in transformers")
    if not model_class(config)[0]._can_set_attn_implementation():
        raise UnsupportedModelError(
            f"{name} computes attention in its own code, not through transformers' attention interface, so its keys "
            "and values cannot be kept in pages"
        )
    types = _layer_types(config)
    known = _LAYER_TYPES | _RECURRENT_TYPES | _STATELESS_TYPES
    if strange := sorted(set(types) - known):
        raise UnsupportedModelError(
            f"{name} has layers of type {', '.join(map(repr, strange))}; only full and sliding attention and recurrent "
            "layers can be served"
        )
    if not hasattr(Cache, "get_conv_state") and (recurrent := sorted(_RECURRENT_TYPES.intersection(types))):
        raise UnsupportedModelError(
            f"{name} has layers of type {', '.join(map(repr, recurrent))}, which need transformers 5.22 or later; "
            f"there is {transformers.__version__}"
        )
    return config


def _layer_types(config: Any) -> list[str]:
    """What a configuration says of its layers, one by one; nothing if it does not."""
    return list(getattr(text_config(config), "layer_types", None) or ())


def record(model: PreTrainedModel, tokens: int = 4) -> Recorded:
    """Runs a dummy forward of `tokens` tokens and returns what keeps something of the tokens before, in order.

    Works on a model without weights, too (on the meta device).

    Raises:
        UnsupportedModelError: A layer cannot be served.
    """
    name = _name(model.config)
    names = {module: path for path, module in model.named_modules()}
    layers: list[RecordedLayer] = []

    def recorder(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kwargs: dict[str, Any]
    ) -> torch.Tensor:
        layers.append(_recorded(name, names[module], module, query, key, value, kwargs))
        return query.new_zeros(query.shape[0], query.shape[1], value.shape[-1])

    device = next(model.parameters()).device
    ids = torch.zeros(1, tokens, dtype=torch.long, device=device)
    positions = torch.arange(tokens, device=device)[None]
    # Who does not say that it has such layers is run without a cache, of which it might want other things.
    recurs = not _RECURRENT_TYPES.isdisjoint(_layer_types(model.config))
    watching: AbstractContextManager[list[RecurrentLayer]] = nullcontext([])
    if recurs:
        watching = recording(model, name)
    with hooked(dict.fromkeys(names, recorder)), torch.inference_mode(), watching as recurrent:
        model(input_ids=ids, position_ids=positions, use_cache=False)
    seen: set[nn.Module] = set()
    for layer in layers:
        if layer.module in seen:
            raise UnsupportedModelError(f"{name}: {layer.name} attends more than once per token")
        seen.add(layer.module)
    expected = text_config(model.config).num_hidden_layers
    expected -= sum(kind in _STATELESS_TYPES for kind in _layer_types(model.config))
    short = len(layers) + len(recurrent) < expected if recurrent else len(layers) != expected
    if short:
        raise UnsupportedModelError(
            f"{name}: {len(layers) + len(recurrent)} of {expected} layers attend or keep a state in transformers' "
            "cache; the others keep one that nothing here has room for"
        )
    again = {layer.module for layer in recurrent}
    if len(again) != len(recurrent):
        raise UnsupportedModelError(f"{name}: a recurrent layer runs more than once per token")
    return Recorded(layers, recurrent)


def layers_of(model: PreTrainedModel, watched: Watched | None) -> Recorded:
    """The layers of a model with its weights that keep something of the tokens before.

    Args:
        model: It.
        watched: What `record` found in a model of the same configuration without weights; None if that did not run.
            Learned sinks are weights, so a model that has some is recorded once more.
    """
    modules = dict(model.named_modules())
    if watched is None or watched.has_sinks or not watched.names <= set(modules):
        return record(model)
    attention = [RecordedLayer(name, modules[name], spec, None) for name, spec in watched.attention.items()]
    recurrent = [RecurrentLayer(name, modules[name], spec) for name, spec in watched.recurrent.items()]
    return Recorded(attention, recurrent)


def _recorded(
    model_name: str,
    name: str,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kwargs: dict[str, Any],
) -> RecordedLayer:
    arguments = dict(kwargs)
    scaling = arguments.pop("scaling", None)
    window = arguments.pop("sliding_window", None)
    soft_cap = arguments.pop("softcap", None)
    sinks = arguments.pop("s_aux", None)
    strange = sorted(
        argument
        for argument, given in arguments.items()
        if isinstance(given, (torch.Tensor, list, tuple)) and argument not in _HARMLESS
    )
    if strange:
        raise UnsupportedModelError(
            f"{model_name}: {name} passes {', '.join(strange)} to its attention, which no back end here knows"
        )
    if arguments.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise UnsupportedModelError(f"{model_name}: {name} attends to later tokens as well")
    tokens, heads, key_dim = query.shape
    if key.shape[0] != tokens or value.shape[0] != tokens or heads % key.shape[1]:
        raise UnsupportedModelError(
            f"{model_name}: {name} attends from {tuple(query.shape)} to keys {tuple(key.shape)} and values "
            f"{tuple(value.shape)}; expected one key and value per token and heads in equal groups"
        )
    spec = LayerSpec(
        num_heads=heads,
        num_kv_heads=key.shape[1],
        key_dim=key_dim,
        value_dim=value.shape[2],
        scaling=key_dim**-0.5 if scaling is None else float(scaling),
        sliding_window=int(window) if window else None,
        soft_cap=float(soft_cap) if soft_cap else None,
        has_sinks=sinks is not None,
        values_in_keys=isinstance(module, LatentAttention),
    )
    return RecordedLayer(name, module, spec, sinks)


def _name(config: Any) -> str:
    architectures = getattr(config, "architectures", None)
    return f"{architectures[0] if architectures else type(config).__name__} (model type {config.model_type!r})"
