"""Tiny random encoders of many kinds, with tokenizers of their kinds, and what transformers says of texts by them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

WORDS = [
    "the", "a", "of", "in", "and", "is", "was", "one", "some", "cat", "dog", "tree", "house", "river", "king", "who",
    "what", "where", "lives", "runs", "eats", "old", "small", "red", "capital", "france", "paris", "rome", "italy", "?",
    ".", ",", "un", "##able", "##s", "##ing", "##ed",
]  # fmt: skip
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789'"

_SIZE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_WINDOW = {"local_attention": 8, "global_attn_every_n_layers": 2}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertConfig", _SIZE | {"max_position_embeddings": 64}),
    "roberta": ("RobertaConfig", _SIZE | {"max_position_embeddings": 66, "type_vocab_size": 1}),
    "xlm-roberta": ("XLMRobertaConfig", _SIZE | {"max_position_embeddings": 66, "type_vocab_size": 1}),
    "distilbert": ("DistilBertConfig", {
        "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 64,
    }),
    "electra": ("ElectraConfig", _SIZE | {"embedding_size": 16, "max_position_embeddings": 64}),
    "albert": ("AlbertConfig", _SIZE | {"embedding_size": 16, "max_position_embeddings": 64}),
    "mpnet": ("MPNetConfig", _SIZE | {"max_position_embeddings": 66}),
    "deberta-v2": ("DebertaV2Config", _SIZE | {
        "max_position_embeddings": 64, "relative_attention": True, "position_buckets": 8, "type_vocab_size": 0,
        "norm_rel_ebd": "layer_norm", "share_att_key": True, "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
    }),
    "modernbert": ("ModernBertConfig", _SIZE | _WINDOW | {"max_position_embeddings": 64}),
    "eurobert": ("EuroBertConfig", _SIZE | {"max_position_embeddings": 64, "num_key_value_heads": 2}),
    "esm": ("EsmConfig", _SIZE | {
        "max_position_embeddings": 66, "position_embedding_type": "rotary", "token_dropout": True,
    }),
    "fnet": ("FNetConfig", {
        "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "max_position_embeddings": 64,
    }),
    "gemma3": ("Gemma3TextConfig", _SIZE | {
        "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "use_bidirectional_attention": True,
        "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"],
    }),
}  # fmt: skip
"""The configuration's class and what it is given, by the model type in most cases."""
WITH_HEADS = tuple(kind for kind in KINDS if kind != "gemma3")


def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """One that puts texts together as those of its kind do: BERT's way, or RoBERTa's."""
    roberta = kind in ("roberta", "xlm-roberta", "mpnet")
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"] if roberta else ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    pieces = [*special, *WORDS, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    unknown = special[3]
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token=unknown, continuing_subword_prefix="##"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if roberta:
        first, pad, last = special[0], special[1], special[2]
        backend.post_processor = processors.RobertaProcessing((last, vocabulary[last]), (first, vocabulary[first]))
        names = {"bos_token": first, "cls_token": first, "eos_token": last, "sep_token": last}
    else:
        first, pad, last = special[1], special[0], special[2]
        backend.post_processor = processors.BertProcessing((last, vocabulary[last]), (first, vocabulary[first]))
        names = {"cls_token": first, "sep_token": last}
    tells = ["token_type_ids"] if kind in ("bert", "electra", "albert", "fnet") else []
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=unknown,
        pad_token=pad,
        mask_token=special[4],
        model_input_names=["input_ids", *tells, "attention_mask"],
        **names,
    )


def write(path: Path, kind: str, labels: int = 0, seed: int = 0, **settings: Any) -> Path:
    """A checkpoint of random weights.

    Args:
        path: Where.
        kind: One of `KINDS`.
        labels: Of a classification head; 0 for none.
        seed: Of the weights.
        **settings: Of the configuration, besides.
    """
    name, given = KINDS[kind]
    tokenizer = tokenizer_of(kind)
    tokens = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.cls_token_id,
        "eos_token_id": tokenizer.sep_token_id,
        "cls_token_id": tokenizer.cls_token_id,
        "sep_token_id": tokenizer.sep_token_id,
        "mask_token_id": tokenizer.mask_token_id,
    }
    config = getattr(transformers, name)(**(given | tokens | {"num_labels": labels or 2} | settings))
    torch.manual_seed(seed)
    model = (AutoModelForSequenceClassification if labels else AutoModel).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # large enough that a wrong token shows
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    model.eval().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def states(path: Path, texts: Sequence[str]) -> list[torch.Tensor]:
    """(tokens, hidden) of each text, by transformers, one at a time."""
    model, tokenizer = AutoModel.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    with torch.inference_mode():
        return [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0] for text in texts]


def logits(path: Path, texts: Sequence[str | tuple[str, str]]) -> list[torch.Tensor]:
    """(labels,) of each text or pair, by transformers, one at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    pairs = [text if isinstance(text, tuple) else (text,) for text in texts]
    with torch.inference_mode():
        return [model(**tokenizer(*pair, return_tensors="pt")).logits[0] for pair in pairs]
