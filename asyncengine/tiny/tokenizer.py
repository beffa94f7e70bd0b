"""A byte-level BPE tokenizer, trained on the corpus, and the chat template that goes with it."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS, PAD, END = "<|bos|>", "<|pad|>", "<|end|>"
ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
SPECIAL_TOKENS = (PAD, BOS, END, *ROLES.values())

VOCAB_SIZE = 1024

# GPT-2's pattern, except that every digit is a token of its own: sums and counting are done digit by digit.
_PIECES = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message.role not in ("system", "user", "assistant") -%}
        {{- raise_exception("The roles are system, user and assistant, not " ~ message.role) -}}
    {%- endif -%}
    {{- "<|" ~ message.role ~ "|>" ~ message.content ~ eos_token -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "<|assistant|>" -}}
{%- endif -%}
"""


def token_id(special: str) -> int:
    """The id of a special token: training numbers these first, in this order."""
    return SPECIAL_TOKENS.index(special)


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Trains the tokenizer. All 256 bytes are in its alphabet: any text can be encoded and comes back unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, token_id(BOS))]
    )
    return tokenizer
