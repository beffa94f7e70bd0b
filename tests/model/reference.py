"""What transformers says about a checkpoint: in one forward over tokens that may follow a prompt, or step by step."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


class Reference:
    """A checkpoint as transformers runs it.

    A model that finds each of some tokens the likeliest after those before it generates just these, by induction: to
    check tokens takes one forward over all of them, where to generate them takes one for each.
    """

    def __init__(self, path: Path) -> None:
        # By its own attention: some versions take one of torch's where the model caps logits, which that does not do.
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
        self.model.generation_config.eos_token_id = None

    def after_each(self, prompt: Sequence[int], tokens: Sequence[int]) -> list[int]:
        """The likeliest token after the prompt, after the prompt and the first token, and so on."""
        with torch.inference_mode():
            logits = self.model(torch.tensor([[*prompt, *tokens[:-1]]]), use_cache=False).logits[0]  # (length, words)
        likeliest: list[int] = logits[len(prompt) - 1 :].argmax(-1).tolist()
        return likeliest

    def generated(self, prompt: Sequence[int], tokens: int) -> list[int]:
        """So many tokens, as `generate` finds them."""
        ids = torch.tensor([list(prompt)])
        ones = torch.ones_like(ids)
        output = self.model.generate(ids, attention_mask=ones, max_new_tokens=tokens, do_sample=False)
        found: list[int] = output[0, len(prompt) :].tolist()
        return found


@lru_cache(maxsize=4)
def reference(path: Path) -> Reference:
    return Reference(path)
