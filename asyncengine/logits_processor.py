"""User code that changes one request's logits. Values and types; no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from asyncengine.step.batch import Int32


@dataclass(frozen=True, slots=True)
class LogitsRow:
    """Whose logits a processor is given.

    Attributes:
        prompt_token_ids: (prompt tokens,) read only.
        token_ids: (tokens generated so far,) read only.
        branch: Which branch of its request it is; of a beam search, which beam, whose tokens may be others each time.
    """

    prompt_token_ids: Int32
    token_ids: Int32
    branch: int


LogitsProcessor = Callable[[Any, LogitsRow], Any]
"""Given the logits of one row, a torch tensor (vocabulary,) of float32 on the model's device, and whose they are.

Changes them in place and returns None, or returns others of the same shape. It runs on the step thread before each
token of each branch of its request, so every request waits for it; what it raises ends its own request alone.
"""
