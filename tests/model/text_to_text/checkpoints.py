"""Tiny random checkpoints of models that write one text of another, and what transformers makes of a source."""

from __future__ import annotations

import functools
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForSeq2SeqLM, NllbTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

MOST = 10
"""Tokens that are written, where nothing else is said."""
ROOM = 48
"""Positions of encoder and decoder."""
PAD, BOS, EOS, START = 1, 0, 2, 3
FIRST = 8
"""The token of the byte 0."""
VOCABULARY = FIRST + 256
FARTHEST = 7
"""From here on, distances between tokens are one to models that have a bias for them."""
OF_KIND: dict[str, dict[str, Any]] = {
    "bart": {"decoder_start_token_id": EOS},
    "blenderbot": {"decoder_start_token_id": BOS, "pad_token_id": 5},
    "blenderbot-small": {"decoder_start_token_id": BOS, "pad_token_id": 5},
    "m2m_100": {"decoder_start_token_id": EOS},
    "marian": {"decoder_start_token_id": PAD, "bos_token_id": None},
    "mbart": {"decoder_start_token_id": START, "scale_embedding": True},
    "pegasus": {"decoder_start_token_id": PAD},
    "plbart": {"decoder_start_token_id": START},
}
_RELATIVE: dict[str, Any] = {
    "num_layers": 3, "num_decoder_layers": 2, "num_heads": 2, "d_kv": 24, "d_ff": 32, "decoder_start_token_id": PAD,
    "relative_attention_num_buckets": 6, "relative_attention_max_distance": FARTHEST,
}  # fmt: skip
RELATIVE: dict[str, dict[str, Any]] = {
    "t5": _RELATIVE,
    "t5 v1.1": _RELATIVE | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "mt5": _RELATIVE | {"tie_word_embeddings": False},
    "umt5": _RELATIVE | {"tie_word_embeddings": False},
}
"""Kinds that add a bias to scores by distance, of which the second to the last have a head of their own."""
KINDS = (*OF_KIND, *RELATIVE)


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and an end behind each text."""
    vocabulary = {character: byte + FIRST for byte, character in bytes_to_unicode().items()}
    special = {"<s>": BOS, "<pad>": PAD, "</s>": EOS, "<start>": START}
    special |= {f"<{spare}>": spare for spare in range(START + 1, FIRST)}
    backend = Tokenizer(models.BPE(vocab=vocabulary | special, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    backend.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", EOS)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>", bos_token="<s>")


LANGUAGES = ("eng_Latn", "deu_Latn", "fra_Latn", "ron_Latn")
LANGUAGE = {code: 4 + place for place, code in enumerate(LANGUAGES)}


def nllb() -> NllbTokenizer:
    """Letters and languages."""
    letters = ("▁", *map(chr, range(97, 123)))
    vocabulary = {"<s>": BOS, "<pad>": PAD, "</s>": EOS, "<unk>": 3, **LANGUAGE}
    vocabulary |= {letter: FIRST + place for place, letter in enumerate(letters)}
    return NllbTokenizer(vocabulary, [], additional_special_tokens=list(LANGUAGES), src_lang="eng_Latn")


def config(kind: str, **changes: Any) -> Any:
    """Of a tiny model."""
    values: dict[str, Any] = {
        "vocab_size": VOCABULARY, "d_model": 32, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS,
    }  # fmt: skip
    if kind in RELATIVE:
        return AutoConfig.for_model(kind.partition(" ")[0], **(values | RELATIVE[kind] | changes))
    values |= {
        "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 2,
        "encoder_ffn_dim": 40, "decoder_ffn_dim": 48, "max_position_embeddings": ROOM, "forced_eos_token_id": None,
        "tie_word_embeddings": False,
    }  # fmt: skip
    return AutoConfig.for_model(kind, **(values | OF_KIND[kind] | changes))


def _spread(name: str, weight: torch.Tensor) -> float:
    """How far a matrix's numbers are apart: so that what is written depends on the source, and is not one token over
    and over.
    """
    inputs = weight.shape[-1] ** -0.5
    if name == "shared.weight":  # of which the head may be the same: each token would follow upon itself
        return 0.1
    if "relative_attention_bias" in name:
        return 4.0
    if (
        ".SelfAttention.q" in name or ".EncDecAttention.q" in name
    ):  # scores are not scaled: what is left is for the bias
        return (0.3 if "Self" in name else 1.5) * inputs
    if "embed" in name or "shared" in name:
        return 1.0
    if "encoder_attn" in name:
        return (3 if "q_proj" in name or "k_proj" in name else 0.7) * inputs
    return inputs


def write(path: Path, kind: str, seed: int = 0, generation: dict[str, Any] | None = None, **changes: Any) -> Path:
    """Writes a random checkpoint; its configuration and what it says of generating may be changed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForSeq2SeqLM.from_config(config(kind, **changes), dtype=torch.float32)
        if kind in RELATIVE and RELATIVE[kind].get("tie_word_embeddings") is False:  # transformers ties it all the same
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.dim() > 1 and weight.requires_grad:
                    weight.normal_(std=_spread(name, weight))
            for name, buffer in model.named_buffers():
                if name == "final_logits_bias":
                    buffer.normal_(std=0.3)
    model.save_pretrained(path)
    if generation is not None:
        stated = json.loads((path / "generation_config.json").read_text())
        (path / "generation_config.json").write_text(json.dumps(stated | generation))
    tokenizer().save_pretrained(path)
    return path


def write_nllb(path: Path) -> Path:
    """The same with languages, as NLLB has them."""
    write(path, "m2m_100")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).unlink()
    nllb().save_pretrained(path)
    return path


def source(seed: int, tokens: int) -> list[int]:
    """Token ids, always the same for a seed; the last is the end."""
    numbers = torch.randint(FIRST, VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(seed))
    return [*numbers[:-1].tolist(), EOS]


@functools.lru_cache(maxsize=16)
def loaded(path: Path) -> Any:
    """The model as transformers loads it."""
    kind = AutoModelForSeq2SeqLM
    return kind.from_pretrained(path, dtype=torch.float32, attn_implementation="eager", local_files_only=True).eval()


def reference(path: Path, ids: list[int], most: int = MOST, begun: int = 1, **asked: Any) -> list[int]:
    """Greedy tokens by transformers' own `generate`, behind those that it begins with."""
    return references(path, [ids], most, begun, **asked)[0]


def references(path: Path, sources: list[list[int]], most: int = MOST, begun: int = 1, **asked: Any) -> list[list[int]]:
    """The same of several sources, which are padded to the longest."""
    key = path, repr(sources), most, begun, repr(asked)
    if key not in _REFERENCES:
        _REFERENCES[key] = _generated(path, sources, most, begun, asked)
    return [list(each) for each in _REFERENCES[key]]


_REFERENCES: dict[object, list[list[int]]] = {}


def _generated(path: Path, sources: list[list[int]], most: int, begun: int, asked: dict[str, Any]) -> list[list[int]]:
    model, longest = loaded(path), max(map(len, sources))
    padding = model.config.pad_token_id
    given = {
        "input_ids": torch.tensor([each + [padding] * (longest - len(each)) for each in sources]),
        "attention_mask": torch.tensor([[1] * len(each) + [0] * (longest - len(each)) for each in sources]),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = model.generate(**given, num_beams=1, do_sample=False, max_new_tokens=most, **asked)
    found: list[list[int]] = [each[begun:] for each in made.tolist()]
    ends = asked.get("eos_token_id", model.generation_config.eos_token_id)
    return [each[: each.index(ends) + 1] if ends in each else each for each in found]
