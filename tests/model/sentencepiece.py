"""A tokenizer as SentencePiece's are converted: signs for spaces, names for bytes, a space put before every text."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from asyncengine.model.tokenizer import FastTokenizer

WORDS = ("true", "is", "hello", "Paris")
BOS = 1
LETTERS = "▁abcdefghijklmnopqrstuvwxyzHP.,!"


def sentencepiece() -> FastTokenizer:
    """With each of the words twice: as the beginning of one, and within one."""
    vocabulary = {token: index for index, token in enumerate(("<unk>", "<s>", "</s>"))}
    for token in (*(f"<0x{byte:02X}>" for byte in range(256)), *LETTERS):
        vocabulary[token] = len(vocabulary)
    merges = []
    for word in (*(f"▁{word}" for word in WORDS), *WORDS):
        for end in range(1, len(word)):
            merge = (word[:end], word[end])
            if "".join(merge) not in vocabulary:
                vocabulary["".join(merge)] = len(vocabulary)
                merges.append(merge)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return FastTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>"))
