"""The head for multi-token prediction that a model's own checkpoint has: whether there is one, and how it is read."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn

from asyncengine.config import EngineConfig
from asyncengine.errors import CheckpointError, ConfigError
from asyncengine.model.attention.protocol import LayerSpec
from asyncengine.model.attention_modules import ATTENTION, text_config
from asyncengine.model.draft_heads.entries import spec_of
from asyncengine.model.draft_heads.mtp_layouts import LAYER, NORM, MtpLayout, layout_of, layouts
from asyncengine.model.draft_heads.plan import BuiltHead
from asyncengine.model.latent_attention import keep_latents
from asyncengine.model.text_names import name_in

_UNUSED = ("model.embed_tokens.weight", "lm_head.weight")
"""Of a model of one layer, what the head does not use."""


def mtp_plan(config: EngineConfig, checkpoint: Any, hf_config: Any, dtype: torch.dtype) -> MtpPlan:
    """The head of a model's own checkpoint.

    Args:
        config: What is wanted.
        checkpoint: Of the model, an `asyncengine.model.checkpoint.Checkpoint`.
        hf_config: The model's, as transformers reads it.
        dtype: Of weights and activations.

    Raises:
        ConfigError: It has none, or one that cannot be served.
    """
    from asyncengine.model.load_settings import keeps_latents
    from asyncengine.model.watching import watch

    text, shapes = text_config(hf_config), checkpoint.shapes
    wanted = f"speculative_mode is 'mtp' with model {config.model!r}"
    layout = layout_of(shapes, text.num_hidden_layers)
    if layout is None:
        looked = ", ".join(f"{each.projection!r} ({name})" for name, each in layouts(text.num_hidden_layers).items())
        raise ConfigError(f"{wanted}, whose checkpoint has no weights of such a head; looked for: {looked}")
    needed = [*layout.own, *([name_in(NORM, shapes)] if layout.of_normed else [])]
    if missing := [name for name in needed if name not in shapes]:
        raise ConfigError(f"{wanted}: {len(missing)} of the head's weights are missing: {', '.join(missing)}")
    expected = dict.fromkeys(needed, (text.hidden_size,)) | {
        layout.projection: (text.hidden_size, 2 * text.hidden_size)
    }
    table = (text.vocab_size, text.hidden_size)
    expected |= {name: table for name in (layout.embedding, layout.head) if name in shapes}
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise ConfigError(f"{wanted}: {name} is {shapes[name]}; expected {shape}")
    single = one_layer(text)
    try:
        watched = watch(single, latents=keeps_latents(config))
    except Exception as error:
        raise ConfigError(f"{wanted}: transformers cannot run its layer by itself: {error}") from error
    if watched is None or watched.recurrent or len(watched.attention) != 1:
        raise ConfigError(f"{wanted}: its layer does not attend as others do, when transformers runs it by itself")
    shared = [name for name in (layout.embedding, layout.head) if name not in shapes]
    nbytes = len(shared) * prod((text.vocab_size, text.hidden_size)) * dtype.itemsize
    if config.quantization != "none":  # the head stays in the dtype, and the checkpoint's own are counted as codes
        own = (name for name in shapes if name in layout.own or name.startswith(layout.layer))
        nbytes += sum(prod(shapes[name]) for name in own) * dtype.itemsize
    return MtpPlan(
        layout,
        single,
        (text.num_hidden_layers,),
        {name: spec_of(spec) for name, spec in watched.attention.items()},
        nbytes,
    )


@dataclass(frozen=True, slots=True)
class MtpPlan:
    """As `asyncengine.model.draft_heads.plan.HeadPlan`.

    Attributes:
        layout: How it is stored.
        config: Of a model of one layer, as transformers takes it.
        target_layers: As of the protocol.
        specs: As of the protocol.
        weight_bytes: As of the protocol, without those that are stored, unless the model is quantised: the checkpoint's
            own count them.
    """

    layout: MtpLayout
    config: Any
    target_layers: tuple[int, ...]
    specs: dict[str, LayerSpec]
    weight_bytes: int

    def rehearse(self, details: Any) -> None:
        """As the protocol says."""
        from asyncengine.model import architecture
        from asyncengine.model.rehearsal import rehearsed

        checkpoint, dtype = details.checkpoint, details.dtype
        shapes = {inner: checkpoint.shapes[name] for name, inner in self._of_layer(checkpoint).items()}
        shapes |= dict.fromkeys(_UNUSED, (1, self.config.hidden_size))
        kind, config = architecture.model_class(copy.deepcopy(self.config))
        found = rehearsed(checkpoint, kind, shapes, config, dtype, attn_implementation=ATTENTION)
        if found is not None:
            _check(checkpoint, found[1])

    def build(self, built: Any, details: Any) -> BuiltHead:
        """As the protocol says."""
        from asyncengine.model import architecture
        from asyncengine.model.draft_heads.mtp import MtpHead
        from asyncengine.model.draft_heads.weights import shared_weight
        from asyncengine.model.load_report import loaded
        from asyncengine.model.stored.weight import state_of

        checkpoint, dtype, device, layout = details.checkpoint, details.dtype, details.device, self.layout
        stored = state_of(checkpoint.plain, checkpoint.coded.values(), dtype)
        state: dict[str, Any] = {inner: stored[name] for name, inner in self._of_layer(checkpoint).items()}
        nothing = torch.zeros(1, self.config.hidden_size, dtype=dtype)
        state |= dict.fromkeys(_UNUSED, nothing)
        kind, config = architecture.model_class(copy.deepcopy(self.config))
        model, report = loaded(kind, state, config=config, dtype=dtype, attn_implementation=ATTENTION)
        _check(checkpoint, report)
        if details.latents:
            keep_latents(model)
        model = model.eval().requires_grad_(False)
        layers = architecture.record(model).attention

        def read(name: str) -> torch.Tensor:
            tensor: torch.Tensor = stored[name][...]
            return tensor.to(device=device, dtype=dtype)

        def own_or_shared(name: str, of_head: bool) -> tuple[nn.Parameter, int]:
            if name in stored:
                weight = read(name)
                return nn.Parameter(weight, requires_grad=False), weight.nbytes
            weight = shared_weight(built, details, of_head)
            return weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False), 0

        embedding, embedding_bytes = own_or_shared(layout.embedding, False)
        head, head_bytes = own_or_shared(layout.head, True)
        norms = [layout.embedding_norm, layout.state_norm]
        if layout.of_normed:
            norms.append(name_in(NORM, checkpoint.shapes))
        module = MtpHead(
            model.to(device), layers, layout, [read(name) for name in norms], read(layout.projection), embedding, head
        )
        module.to(device)
        nbytes = sum(weight.nbytes for weight in module.body.layers.parameters()) + module.projection.nbytes
        return BuiltHead(module, layers, nbytes + embedding_bytes + head_bytes, nbytes + head.nbytes)

    def _of_layer(self, checkpoint: Any) -> dict[str, str]:
        """The weights of its layer, by their names in the checkpoint: what they are called in a model of one layer."""
        layout = self.layout
        inner = {
            name: LAYER + name.removeprefix(layout.layer)
            for name in checkpoint.shapes
            if name.startswith(layout.layer) and name not in (*layout.own, layout.embedding, layout.head)
        }
        return inner | {layout.norm: NORM}


def _check(checkpoint: Any, report: Mapping[str, Any]) -> None:
    """Refuses weights that are not those of its layer.

    Raises:
        CheckpointError: As it says.
    """
    for names, what in (
        (sorted(report["missing_keys"]), "missing"),
        (sorted(name for name, *_ in report["mismatched_keys"]), "of another shape"),
        (sorted(report["unexpected_keys"]), "of no use"),
    ):
        if names:
            raise CheckpointError(f"{checkpoint.name}: {len(names)} weights of its head are {what}: {names[0]}, ...")


def one_layer(text: Any) -> Any:
    """The configuration of a model of one layer that is like the last ones of another, with hardly a vocabulary.

    Args:
        text: The other's.
    """
    single, count = copy.deepcopy(text), text.num_hidden_layers
    types = list(getattr(text, "layer_types", None) or ())
    for name, value in text.to_dict().items():
        if isinstance(value, list) and len(value) == count:
            setattr(single, name, value[-1:])
    if "full_attention" in types:
        single.layer_types = ["full_attention"]
    changes = {"num_hidden_layers": 1, "vocab_size": 1, "first_k_dense_replace": 0, "num_nextn_predict_layers": 0}
    for name, value in changes.items():
        if hasattr(single, name):
            setattr(single, name, value)
    single.pad_token_id = single.bos_token_id = single.eos_token_id = None
    single.tie_word_embeddings = False
    return single
