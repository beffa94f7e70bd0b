"""The embedded model as a GGUF file, whole, with its tokenizer and chat template."""

import json
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from safetensors.torch import load_file

from asyncengine import tiny

HEADS = {"q_proj": 4, "k_proj": 2}
MARKS, END = 6, 2
"""Special tokens, which are the first; and the one that ends answers."""


def write_tiny(
    path: Path,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    model: Path = tiny.PATH,
    more: dict[str, Any] | None = None,
    split: int = 0,
    factors: list[float] | None = None,
    renamed: dict[str, str] | None = None,
    ends: TokenType = TokenType.CONTROL,
) -> Path:
    """Writes it.

    Args:
        path: Where.
        kind: What its matrices are stored as.
        model: Which of the embedded ones.
        more: Strings and numbers of the metadata that are added or replaced.
        split: Most tensors in a file; 0 writes one file.
        factors: What frequencies are divided by, (16,).
        renamed: Tokens that are called otherwise.
        ends: What kind of token the one is that ends answers.
    """
    config = json.loads((model / "config.json").read_text("utf-8"))
    # The library adds its own ending to the name of each part.
    options = {"split_max_tensors": split} if split else {}
    writer = GGUFWriter(path, "llama", **options)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    _add_tokenizer(writer, model, renamed or {}, ends)
    for key, value in (more or {}).items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", torch.tensor(factors).numpy())
    for name, tensor in load_file(model / "model.safetensors").items():
        found = names.get_name(name, try_suffixes=(".weight",))
        assert found is not None
        _add(writer, found, _paired(name, tensor.float(), config), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: GGUFWriter, name: str, tensor: torch.Tensor, kind: GGMLQuantizationType) -> None:
    numbers = tensor.contiguous().numpy()
    if tensor.ndim == 1:
        kind = GGMLQuantizationType.F32
    writer.add_tensor(name, gguf.quants.quantize(numbers, kind), raw_dtype=kind)


def _paired(name: str, tensor: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    """Neighbours rotate together in such files, where the halves of a head do in transformers."""
    own = next((heads for part, heads in HEADS.items() if part in name), None)
    return tensor if own is None else tensor.view(own, 2, -1, tensor.shape[-1]).transpose(1, 2).reshape(tensor.shape)


def _add_tokenizer(writer: GGUFWriter, model: Path, renamed: dict[str, str], ends: TokenType) -> None:
    stored = json.loads((model / "tokenizer.json").read_text("utf-8"))
    vocabulary = sorted(stored["model"]["vocab"], key=stored["model"]["vocab"].__getitem__)
    types = [TokenType.CONTROL if at < MARKS else TokenType.NORMAL for at in range(len(vocabulary))]
    types[END] = ends
    template = (model / "chat_template.jinja").read_text("utf-8")
    for old, new in renamed.items():
        template = template.replace(old, new)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")  # which keeps the digits of a number together, where the embedded one does not
    writer.add_token_list([renamed.get(token, token) for token in vocabulary])
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in stored["model"]["merges"]])
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(END)
    writer.add_add_bos_token(True)
    writer.add_chat_template(template)
