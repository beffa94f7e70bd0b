"""The tokenizer in a GGUF file's metadata, written as the files that transformers reads.

llama.cpp has two kinds for decoders: BPE by its merges ("gpt2", and "gemma4"), and SentencePiece's ("llama"), where
those neighbours are joined whose token has the highest score. The `tokenizers` library does both by merges.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from asyncengine.errors import CheckpointError
from asyncengine.model.gguf.pre_tokenizers import PreTokenizer
from asyncengine.model.gguf.vocabulary import PREFIX, TokenType, Vocabulary, listed

_NO_TOKENIZER = (None, "none", "no_vocab")
_TEMPLATE = "tokenizer.chat_template"
_SPACE = "\u2581"
_PHI3_KEEPS_SPACE = ("<unk>", "<s>", "<|endoftext|>")


def write_tokenizer(metadata: Mapping[str, Any], directory: Path) -> Vocabulary | None:
    """Writes a tokenizer's files; nothing if the GGUF file has no tokenizer.

    Args:
        metadata: The file's, with arrays as lists and tokens as strings.
        directory: Where tokenizer.json and tokenizer_config.json go.

    Returns:
        Its vocabulary.

    Raises:
        UnsupportedModelError: Its kind, or the way it cuts text, is not known.
        CheckpointError: Parts of it do not fit together.
    """
    if metadata.get(f"{PREFIX}model") in _NO_TOKENIZER:
        return None
    vocabulary = Vocabulary.of(metadata)
    if vocabulary.cut is None:
        backend = _sentencepiece(metadata, vocabulary)
    else:
        backend = _by_merges(metadata, vocabulary, vocabulary.cut)
    _add_tokens(backend, vocabulary, phi3=vocabulary.cut is None and metadata.get("general.architecture") == "phi3")
    _surround(backend, vocabulary)
    (directory / "tokenizer.json").write_text(backend.to_str(), encoding="utf-8")
    config = json.dumps(_config(metadata, vocabulary), ensure_ascii=False, indent=2)
    (directory / "tokenizer_config.json").write_text(config + "\n", encoding="utf-8")
    return vocabulary


def _by_merges(metadata: Mapping[str, Any], vocabulary: Vocabulary, cut: PreTokenizer) -> Tokenizer:
    merges: list[tuple[str, str]] = []
    for merge in listed(metadata, "merges"):
        end = merge.find(" ", 1)  # of what may itself begin with a space
        merges.append((merge[:end], merge[end + 1 :]))
    backend = Tokenizer(_bpe(vocabulary, merges, byte_fallback=not cut.letters, ignore_merges=cut.whole_words))
    pieces: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in cut.patterns]
    if cut.letters:
        pieces.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        backend.decoder = decoders.ByteLevel()
    else:
        backend.normalizer = normalizers.Replace(" ", _SPACE)
        backend.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    if cut.composed:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(pieces)
    return backend


def _sentencepiece(metadata: Mapping[str, Any], vocabulary: Vocabulary) -> Tokenizer:
    """Whose merges are all pairs of tokens that make another one, in the order of its score."""
    scores = listed(metadata, "scores", len(vocabulary.tokens))
    usual = [index for index, type_ in enumerate(vocabulary.types) if type_ == TokenType.NORMAL]
    known = {vocabulary.tokens[index] for index in usual}
    merges: list[tuple[str, str]] = []
    for index in sorted(usual, key=lambda index: -scores[index]):
        token = vocabulary.tokens[index]
        pairs = ((token[:end], token[end:]) for end in range(1, len(token)))
        merges.extend(pair for pair in pairs if pair[0] in known and pair[1] in known)
    unknown = vocabulary.named("unknown")
    backend = Tokenizer(_bpe(vocabulary, merges, byte_fallback=True, unk_token=unknown, fuse_unk=True))
    prefix = metadata.get(f"{PREFIX}add_space_prefix", True)
    spaces = normalizers.Replace(" ", _SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefix else spaces
    parts = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prefix else parts)
    return backend


def _bpe(vocabulary: Vocabulary, merges: list[tuple[str, str]], **settings: Any) -> models.BPE:
    """The model of the `tokenizers` library.

    Raises:
        CheckpointError: There are merges of what is no token, or to what is none.
    """
    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    try:
        return models.BPE(ids, merges, **settings)
    except Exception as error:  # the library has none of its own
        raise CheckpointError(f"the merges in the GGUF file do not fit its tokens: {error}") from error


def _add_tokens(backend: Tokenizer, vocabulary: Vocabulary, phi3: bool) -> None:
    """Tells it which tokens to look for in a text before anything else.

    Args:
        backend: With all tokens.
        vocabulary: What they are.
        phi3: Whether they take the spaces after them, as Phi-3's do; the file does not say so.
    """
    special: list[AddedToken] = []
    others: list[AddedToken] = []
    for index, token in enumerate(vocabulary.tokens):
        takes_spaces = phi3 and token not in _PHI3_KEEPS_SPACE
        if index in vocabulary.special:
            special.append(AddedToken(token, normalized=False, special=True, rstrip=takes_spaces))
        elif vocabulary.types[index] == TokenType.USER_DEFINED and token != f"[PAD{index}]":  # an id without a token
            others.append(AddedToken(token, normalized=False, rstrip=takes_spaces))
    backend.add_special_tokens(special)
    backend.add_tokens(others)


def _surround(backend: Tokenizer, vocabulary: Vocabulary) -> None:
    """Tells it which tokens to put around a text."""
    bos, eos = vocabulary.named("bos"), vocabulary.named("eos")
    before = [bos] if bos and vocabulary.adds_bos else []
    after = [eos] if eos and vocabulary.adds_eos else []
    if around := {token: backend.token_to_id(token) for token in [*before, *after]}:
        one, two = [*before, "$A", *after], [*before, "$B:1", *after]
        backend.post_processor = TemplateProcessing(single=one, pair=one + two, special_tokens=list(around.items()))


def _config(metadata: Mapping[str, Any], vocabulary: Vocabulary) -> dict[str, Any]:
    """What transformers is to know besides. Tokens that are not there are said to be None: some classes add theirs."""
    config: dict[str, Any] = {
        "tokenizer_class": "TokenizersBackend",  # the classes of models put together again what they know better
        "bos_token": vocabulary.named("bos"),
        "eos_token": vocabulary.named("eos"),
        "unk_token": vocabulary.named("unknown"),
        "pad_token": vocabulary.named("padding"),
        "add_bos_token": vocabulary.adds_bos,
        "add_eos_token": vocabulary.adds_eos,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    template = metadata.get(_TEMPLATE)
    named = {
        key.removeprefix(f"{_TEMPLATE}."): value for key, value in metadata.items() if key.startswith(f"{_TEMPLATE}.")
    }
    if named:
        templates = {"default": template, **named} if template else named
        config["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    elif template:
        config["chat_template"] = template
    return config
