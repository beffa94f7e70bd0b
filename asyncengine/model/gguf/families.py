"""Which architectures of llama.cpp's are which of transformers', and what their tensors are called there.

What llama.cpp's converter leaves out, because its own code knows it, is stated here; what it does to weights is undone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from asyncengine.errors import CheckpointError, UnsupportedModelError
from asyncengine.model.gguf import settings
from asyncengine.model.gguf.facts import Facts
from asyncengine.model.gguf.header import BlockTensor, Header
from asyncengine.model.gguf.placed import Placed, halves_from_pairs, numbers
from asyncengine.model.gguf.places import experts, interleaved_experts, short_convolution, value_heads

_LAYER = re.compile(r"blk\.(\d+)\.(.+)")
_PASSED_OVER = re.compile(
    r"(rope_freqs|rope_factors_(long|short)|blk\.\d+\.(rope_freqs|rope_factors_(long|short)))\.weight"
)
"""Tensors that become settings."""
_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}  # fmt: skip
_NORMED = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_NETWORK = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_BEFORE = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_BEHIND = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
_DENSE = _ATTENTION | _NETWORK | _BEFORE
_SANDWICH = _ATTENTION | _NETWORK | _NORMED | _BEHIND | {
    "attn_norm": "input_layernorm", "ffn_norm": "pre_feedforward_layernorm",
}  # fmt: skip
_ROUTED = {"ffn_gate_inp": "mlp.gate"}
_SHARED = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate", "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj", "ffn_down_shexp": "mlp.shared_expert.down_proj",
}  # fmt: skip

Place = Callable[[Facts, str, dict[str, BlockTensor]], Iterator[Placed]]
"""Given the beginning of a layer's names in the model, and its tensors by their names without the layer, takes out
those that it knows."""


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture.

    Attributes:
        model_type: As transformers calls it.
        model_class: The class of the model.
        settings: Further fields of the configuration.
        names: What tensors of a layer are called there.
        outside: What those are called that belong to no layer.
        pairs: Whether neighbouring outputs of queries and keys rotate together, where transformers rotates halves.
        shifted: Whether norms that have names of their own here are stored with one added.
        places: What else becomes of a layer's tensors.
    """

    model_type: str
    model_class: str
    settings: Callable[[Facts], dict[str, Any]] = settings.none
    names: Mapping[str, str] = field(default_factory=lambda: _DENSE)
    outside: Mapping[str, str] = field(default_factory=lambda: _OUTSIDE)
    pairs: bool = False
    shifted: bool = False
    places: tuple[Place, ...] = ()

    def config(self, facts: Facts) -> dict[str, Any]:
        """What a ``config.json`` would say."""
        common = settings.common(facts) | {"model_type": self.model_type, "architectures": [self.model_class]}
        return common | self.settings(facts)

    def placed(self, facts: Facts) -> Iterator[Placed]:
        """All parameters.

        Raises:
            UnsupportedModelError: There are tensors that this architecture is not known to have.
        """
        layers: dict[int, dict[str, BlockTensor]] = {}
        unknown = []
        for tensor in facts.tensors.values():
            name, _, last = tensor.name.rpartition(".")
            if found := _LAYER.fullmatch(tensor.name):
                layers.setdefault(int(found[1]), {})[found[2]] = tensor
            elif name in self.outside:
                yield self._placed(tensor, f"{self.outside[name]}.{last}", name, facts)
            elif not _PASSED_OVER.fullmatch(tensor.name):
                unknown.append(tensor.name)
        for layer, tensors in sorted(layers.items()):
            if layer >= facts.layers:  # of those that predict further tokens
                continue
            prefix = f"model.layers.{layer}."
            for place in self.places:
                yield from place(facts, prefix, tensors)
            for short, tensor in tensors.items():
                name, _, last = short.rpartition(".")
                if name in self.names:
                    yield self._placed(tensor, f"{prefix}{self.names[name]}.{last}", name, facts)
                elif not _PASSED_OVER.fullmatch(tensor.name):
                    unknown.append(tensor.name)
        if unknown:
            raise UnsupportedModelError(
                f"{facts.architecture} is not known to have {len(unknown)} of its tensors: {unknown[0]}, ..."
            )

    def _placed(self, tensor: BlockTensor, name: str, short: str, facts: Facts) -> Placed:
        if self.shifted and short.endswith("norm"):
            return Placed(name, (tensor,), change=numbers(lambda found: found - 1), keeps_codes=False)
        if self.pairs and short in ("attn_q", "attn_k"):
            heads = "attention.head_count" if short == "attn_q" else "attention.head_count_kv"
            return Placed(name, (tensor,), change=halves_from_pairs(facts.one(heads, facts("attention.head_count"))))
        return Placed(name, (tensor,))


def family_of(header: Header) -> Family:
    """What a file's model is.

    Raises:
        CheckpointError: It says nothing of that.
        UnsupportedModelError: It is none that is known here.
    """
    kind = header.metadata.get("general.architecture")
    if not isinstance(kind, str):
        raise CheckpointError("its metadata has no general.architecture")
    if header.metadata.get("general.type", "model") != "model":
        raise UnsupportedModelError(f"it is no model, but of type {header.metadata['general.type']!r}")
    facts = Facts(header)
    if kind == "llama" and facts.get("expert_count"):
        return _MIXTRAL
    if kind == "olmo2" and facts.get("attention.sliding_window"):
        return _OLMO3
    if kind not in FAMILIES:
        raise UnsupportedModelError(
            f"GGUF files of the architecture {kind!r} cannot be read; those of {', '.join(sorted(FAMILIES))} can"
        )
    return FAMILIES[kind]


_MIXTRAL = Family(
    "mixtral", "MixtralForCausalLM", settings.mixtral, _DENSE | _ROUTED, pairs=True, places=(experts("mlp.experts"),)
)
_OLMO = _ATTENTION | _NETWORK | _NORMED | _BEHIND
_OLMO3 = Family("olmo3", "Olmo3ForCausalLM", settings.windows, _OLMO)
_QWEN35 = _DENSE | _NORMED | {"post_attention_norm": "post_attention_layernorm"}
_LFM2 = _ATTENTION | {
    "attn_norm": "operator_norm", "ffn_norm": "ffn_norm", "attn_output": "self_attn.out_proj",
    "attn_q_norm": "self_attn.q_layernorm", "attn_k_norm": "self_attn.k_layernorm", "ffn_gate": "feed_forward.w1",
    "ffn_up": "feed_forward.w3", "ffn_down": "feed_forward.w2",
    "shortconv.in_proj": "conv.in_proj", "shortconv.out_proj": "conv.out_proj",
}  # fmt: skip
_LFM2_OUTSIDE = {
    "token_embd": "model.embed_tokens", "token_embd_norm": "model.embedding_norm", "output": "lm_head",
}  # fmt: skip

FAMILIES: dict[str, Family] = {
    "llama": Family("llama", "LlamaForCausalLM", settings.biases, pairs=True),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM"),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", settings.biases, _DENSE | _NORMED),
    "qwen2moe": Family(
        "qwen2_moe", "Qwen2MoeForCausalLM", settings.qwen2_moe, _DENSE | _ROUTED | _SHARED,
        places=(experts("mlp.experts"),),
    ),
    "qwen3moe": Family(
        "qwen3_moe", "Qwen3MoeForCausalLM", settings.qwen3_moe, _DENSE | _NORMED | _ROUTED,
        places=(experts("mlp.experts"),),
    ),
    "qwen35": Family(
        "qwen3_5_text", "Qwen3_5ForCausalLM", settings.qwen3_5, _QWEN35,
        shifted=True, places=(value_heads,),
    ),
    "qwen35moe": Family(
        "qwen3_5_moe_text", "Qwen3_5MoeForCausalLM", settings.qwen3_5_moe, _QWEN35 | _ROUTED | _SHARED,
        shifted=True, places=(value_heads, experts("mlp.experts")),
    ),
    "gemma": Family("gemma", "GemmaForCausalLM", settings.none, shifted=True),
    "gemma2": Family("gemma2", "Gemma2ForCausalLM", settings.gemma2, _SANDWICH, shifted=True),
    "gemma3": Family("gemma3_text", "Gemma3ForCausalLM", settings.gemma3, _SANDWICH, shifted=True),
    "phi3": Family(
        "phi3", "Phi3ForCausalLM", settings.phi3,
        _DENSE | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
    ),
    "starcoder2": Family(
        "starcoder2", "Starcoder2ForCausalLM", settings.starcoder2,
        _DENSE | {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
    ),
    "granite": Family("granite", "GraniteForCausalLM", settings.granite, pairs=True),
    "granitemoe": Family(
        "granitemoe", "GraniteMoeForCausalLM", settings.granite_moe,
        _DENSE | {"ffn_gate_inp": "block_sparse_moe.router"}, pairs=True,
        places=(experts("block_sparse_moe.experts"),),
    ),
    "smollm3": Family("smollm3", "SmolLM3ForCausalLM", settings.smollm3, pairs=True),
    "olmo2": Family("olmo2", "Olmo2ForCausalLM", settings.none, _OLMO),
    "command-r": Family("cohere", "CohereForCausalLM", settings.cohere, _DENSE | _NORMED),
    "cohere2": Family("cohere2", "Cohere2ForCausalLM", settings.cohere2),
    "glm4": Family(
        "glm4", "Glm4ForCausalLM", settings.glm4,
        _DENSE | {
            "post_attention_norm": "post_self_attn_layernorm", "post_ffw_norm": "post_mlp_layernorm",
            "ffn_up": "mlp.gate_up_proj",
        },
    ),
    "exaone4": Family("exaone4", "Exaone4ForCausalLM", settings.windows, _OLMO),
    "lfm2": Family(
        "lfm2", "Lfm2ForCausalLM", settings.lfm2, _LFM2, _LFM2_OUTSIDE, places=(short_convolution,)
    ),
    "gpt-oss": Family(
        "gpt_oss", "GptOssForCausalLM", settings.gpt_oss,
        _ATTENTION | {
            "attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm",
            "ffn_gate_inp": "mlp.router",
        },
        places=(interleaved_experts("mlp.experts"),),
    ),
}  # fmt: skip
"""By what llama.cpp calls them. Some names stand for several, which `family_of` tells apart."""
