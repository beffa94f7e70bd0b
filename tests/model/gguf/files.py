"""Writes tiny checkpoints as GGUF files, as llama.cpp's converter does; knows nothing of how the engine reads them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file
from transformers import AutoConfig

from tests.model.gguf.kinds import KINDS, Kind, common, frequencies

Array = torch.Tensor
Named = Iterator[tuple[str, Array]]
F32 = gguf.GGMLQuantizationType.F32
_ARCHITECTURES = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")
_LAYER = re.compile(r"(?:model|backbone|transformer)\.(?:layers|h)\.(\d+)\.")


def write(
    path: Path,
    checkpoint: Path,
    architecture: str,
    *,
    type_: gguf.GGMLQuantizationType = F32,
    rounded: bool = False,
    edit: Callable[[dict[str, Any], dict[str, Array]], None] | None = None,
) -> Path:
    """Writes a checkpoint's weights and configuration, without a tokenizer.

    Args:
        path: The file.
        checkpoint: The directory of the original.
        architecture: One of `KINDS`.
        type_: Of all matrices whose rows are whole blocks.
        rounded: Whether they are stored as floats that have been through that type.
        edit: Changes metadata and tensors before they are written.
    """
    kind, config = KINDS[architecture], AutoConfig.from_pretrained(checkpoint).get_text_config()
    config.allow_global_per_layer_attribute_access = True
    metadata = common(config) | kind.metadata(config)
    names = gguf.get_tensor_name_map(_ARCHITECTURES[kind.name], metadata["block_count"])
    tensors: dict[str, Array] = {}
    for name, tensor in _stacked(load_file(checkpoint / "model.safetensors")):
        if ".act_fn." in name:  # of xIELU
            metadata.setdefault(f"xielu.{name.rpartition('.')[2]}", []).append(float(tensor))
            continue
        for changed, value in _changed(kind, config, name, tensor):
            found = changed if changed.startswith("blk.") else names.get_name(changed, (".weight", ".bias"))
            assert found is not None, f"llama.cpp has no name for {changed}"
            tensors[found] = value
    if divisors := frequencies(config):
        tensors["rope_freqs.weight"] = torch.tensor(divisors)
    if edit is not None:
        edit(metadata, tensors)
    writer = gguf.GGUFWriter(path, kind.name)
    for key, value in metadata.items():
        if value is not None:
            _add(writer, key if key.startswith("xielu") else f"{kind.name}.{key}", value)
    for name, tensor in tensors.items():
        array = np.ascontiguousarray(tensor.float().numpy())
        quantised = type_ is not F32 and array.ndim > 1 and not any(word in name for word in ("norm", "conv1d", "bias"))
        if quantised and array.shape[-1] % gguf.GGML_QUANT_SIZES[type_][0] == 0:
            blocks = quantize(array, type_)
            if rounded:
                writer.add_tensor(name, dequantize(blocks, type_).reshape(array.shape))
            else:
                writer.add_tensor(name, blocks, raw_dtype=type_)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    names = {bool: "add_bool", int: "add_uint32", float: "add_float32", str: "add_string", list: "add_array"}
    getattr(writer, names[type(value)])(key, value)


def _stacked(state: dict[str, Array]) -> Named:
    """The experts of a layer as one tensor each, and so what is between streams of Gemma 3n."""
    experts: dict[str, dict[int, Array]] = {}
    for name, tensor in state.items():
        if found := _EXPERT.fullmatch(name):
            experts.setdefault(f"{found[1]}.{found[3]}.weight", {})[int(found[2])] = tensor
        elif found := re.fullmatch(r"(.*\.altup_\w+)\.(\d)\.weight", name):
            experts.setdefault(f"{found[1]}.weight", {})[int(found[2])] = tensor
        else:
            yield name, tensor
    for name, each in experts.items():
        yield name, torch.stack([each[index] for index in range(len(each))])


def _changed(kind: Kind, config: Any, name: str, tensor: Array) -> Named:
    """What llama.cpp's converter makes of one tensor."""
    layer = found[1] if (found := _LAYER.match(name)) else ""
    if kind.permuted and re.search(r"\.[qk]_proj\.", name):
        heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
        tensor = tensor.reshape(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
    if kind.shifted and name.endswith("norm.weight") and "linear_attn" not in name:
        tensor = tensor + 1
    if kind.name == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        tensor = tensor.T
    if kind.name == "gpt2" and not name.startswith("transformer."):
        name = f"transformer.{name}"
    if "query_key_value" in name:
        tensor = tensor.view(config.num_attention_heads, 3, -1, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)
    if kind.name == "gemma4":
        name = name.replace("router.scale", f"blk.{layer}.ffn_gate_inp.scale").replace(
            "router.per_expert_scale", f"blk.{layer}.ffn_down_exps.scale"
        )
        name = name[name.find("blk.") :] if "blk." in name else name
        name = f"{name}.weight" if name.endswith(("layer_scalar", "experts.down_proj", "gate_up_proj")) else name
    if kind.name == "gemma3n" and name.endswith("_scale"):
        name += ".weight"
    if kind.name in ("qwen35", "qwen35moe") and "linear_attn" in name:
        tensor = _tiled(config, name, tensor)
    if kind.name == "falcon-h1":
        tensor = _multiplied(config, name, tensor)
    if name.endswith(".A_log"):
        tensor = -tensor.exp()
    if (
        name.endswith(("A_log", ".D"))
        and tensor.ndim == 1
        and kind.name not in ("mamba", "qwen35", "qwen35moe", "qwen3next")
    ):
        tensor = tensor[:, None]
    if "conv1d.weight" in name or "conv.conv.weight" in name:
        tensor = tensor.squeeze(1)
    if name.endswith("mixer.norm.weight") or name.endswith("mamba.norm.weight"):
        tensor = tensor.view(getattr(config, "n_groups", None) or config.mamba_n_groups, -1)
    name = name.replace(".dt_bias", ".dt_proj.bias").replace("e_score_correction_bias", "e_score_correction.bias")
    name = f"{name}.bias" if name.endswith("expert_bias") else name
    if kind.name == "lfm2moe":
        for short, full in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
            name = name.replace(f"experts.{short}.", f"experts.{full}.")
    if kind.name == "gpt-oss" and ".experts." in name:
        yield from _gpt_oss_experts(layer, name.rpartition(".")[2], tensor)
    elif "block_sparse_moe.input_linear" in name or "shared_mlp.input_linear" in name:
        ending = "exps" if "sparse" in name else "shexp"
        for part, half in zip(("gate", "up"), tensor.chunk(2, -2), strict=True):
            yield f"blk.{layer}.ffn_{part}_{ending}.weight", half
    elif name.endswith("kv_b_proj.weight"):
        heads = tensor.view(config.num_attention_heads, -1, tensor.shape[-1])
        keys, values = heads[:, : config.qk_nope_head_dim], heads[:, config.qk_nope_head_dim :]
        yield name.replace("kv_b", "k_b"), keys.transpose(1, 2)
        yield name.replace("kv_b", "v_b"), values
    elif "in_proj_qkvz" in name:
        width, group = config.linear_key_head_dim, config.linear_num_value_heads // config.linear_num_key_heads
        by_head = tensor.view(config.linear_num_key_heads, -1, tensor.shape[-1])
        parts = torch.split(by_head, [width, width, *[group * config.linear_value_head_dim] * 2], 1)
        *mixed, gate = (part.flatten(0, 1) for part in parts)
        yield f"blk.{layer}.attn_qkv.weight", torch.cat(mixed)
        yield f"blk.{layer}.attn_gate.weight", gate
    elif name.endswith("sinks"):
        yield f"blk.{layer}.attn_sinks.weight", tensor
    else:
        yield name, tensor


def _gpt_oss_experts(layer: str, name: str, tensor: Array) -> Named:
    last = "bias" if name.endswith("_bias") else "weight"
    tensor = tensor if last == "bias" else tensor.transpose(1, 2)
    if name.startswith("down"):
        yield f"blk.{layer}.ffn_down_exps.{last}", tensor
    else:
        yield f"blk.{layer}.ffn_gate_exps.{last}", tensor[:, ::2]
        yield f"blk.{layer}.ffn_up_exps.{last}", tensor[:, 1::2]


def _tiled(config: Any, name: str, tensor: Array) -> Array:
    """Value heads in the order in which llama.cpp repeats key heads: the first of each of these, the second, ..."""
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads

    def reordered(part: Array, width: int) -> Array:
        return part.reshape(keys, values // keys, width, *part.shape[1:]).transpose(0, 1).reshape(part.shape)

    mixed = 2 * keys * config.linear_key_head_dim
    if "in_proj_qkv." in name or "conv1d" in name:
        return torch.cat([tensor[:mixed], reordered(tensor[mixed:], config.linear_value_head_dim)])
    if "in_proj_z" in name:
        return reordered(tensor, config.linear_value_head_dim)
    if "out_proj" in name:
        return reordered(tensor.T, config.linear_value_head_dim).T
    return tensor if "norm" in name else reordered(tensor, 1)


def _multiplied(config: Any, name: str, tensor: Array) -> Array:
    """Falcon-H1's factors go into its weights."""
    factors = {
        "mlp": {"down_proj": config.mlp_multipliers[1], "gate_proj": config.mlp_multipliers[0]},
        "attention": {
            "k_proj": config.key_multiplier * config.attention_in_multiplier,
            "q_proj": config.attention_in_multiplier,
            "v_proj": config.attention_in_multiplier,
            ".o_proj": config.attention_out_multiplier,
        },
        "rest": {
            "mamba.out_proj": config.ssm_out_multiplier,
            "lm_head": config.lm_head_multiplier,
            "embed_tokens": config.embedding_multiplier,
        },
    }
    for part in factors.values():
        for piece, factor in part.items():
            if piece in name:
                return tensor.mul(factor)
    if "mamba.in_proj" in name:
        state = config.mamba_n_groups * config.mamba_d_state
        widths = [config.mamba_d_ssm, config.mamba_d_ssm, state, state, config.mamba_n_heads]
        by_row = torch.cat(
            [torch.full((width, 1), factor) for width, factor in zip(widths, config.ssm_multipliers, strict=True)]
        )
        return tensor.mul(config.ssm_in_multiplier).mul(by_row)
    return tensor
