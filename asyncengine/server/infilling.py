"""``suffix``: text that is to follow the answer, for models that were trained to fill a gap.

Such a model has three special tokens: before what comes before the gap, before what comes after it, and where it is to
begin. They are looked for in the tokenizer, since no configuration names them.
"""

from __future__ import annotations

from collections.abc import Sequence

from asyncengine.loop.encoding import TextPrompt
from asyncengine.server.refusal import Refusal
from asyncengine.tokenizer import Tokenizer

MARKS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen coder, CodeGemma, newer Granite
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, Granite code
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"),  # DeepSeek
)
"""How models call the three."""


def around_gap(prompts: Sequence[TextPrompt], suffix: str, tokenizer: Tokenizer) -> list[TextPrompt]:
    """Prompts that ask a model for what stands between each of them and `suffix`.

    Raises:
        Refusal: The model has no such tokens, or a prompt is not text.
    """
    found = next((marks for marks in MARKS if all(_is_one_token(mark, tokenizer) for mark in marks)), None)
    if found is None:
        message = f"suffix: the model has no tokens for filling a gap, such as {' '.join(MARKS[0])}"
        raise Refusal(400, message, "unsupported_field", "suffix")
    before, after, middle = found
    filled: list[TextPrompt] = []
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise Refusal(400, "prompt is token ids; expected text beside suffix", "invalid_field", "prompt")
        filled.append(f"{before}{prompt}{after}{suffix}{middle}")
    return filled


def _is_one_token(mark: str, tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer has a token of that name; it may put others around every text."""
    around, ids = tokenizer.encode(""), tokenizer.encode(mark)
    return len(ids) == len(around) + 1 and any(tokenizer.decode([token_id], False) == mark for token_id in ids)
