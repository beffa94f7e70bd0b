"""What Whisper's decoder may say next, as transformers holds it to."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, WhisperTimeStampLogitsProcessor

from asyncengine.logits_processor import LogitsRow


class Rules:
    """Tokens that are never said, those that nothing begins with, and times that come in pairs and do not go back.

    Args:
        generation: What the model's checkpoint says of generating.
        no_times: The token that says that there are none.
        end: The token that ends a text.
        vocab_size: How many tokens there are.

    Attributes:
        first_time: The token of the earliest time; all later ones follow it.
    """

    def __init__(self, generation: GenerationConfig, no_times: int, end: int, vocab_size: int) -> None:
        self.first_time = no_times + 1
        self._never = _ids(generation, "suppress_tokens", vocab_size)
        self._not_first = _ids(generation, "begin_suppress_tokens", vocab_size)
        times = GenerationConfig(eos_token_id=end)
        times.no_timestamps_token_id = no_times
        times.max_initial_timestamp_index = getattr(generation, "max_initial_timestamp_index", None)
        self._times = WhisperTimeStampLogitsProcessor(times, begin_index=0)

    def without_times(self, logits: torch.Tensor, row: LogitsRow) -> None:
        """As `asyncengine.logits_processor.LogitsProcessor`."""
        if self._never.device != logits.device:
            self._never, self._not_first = self._never.to(logits.device), self._not_first.to(logits.device)
        logits.index_fill_(0, self._never, -torch.inf)
        if not len(row.token_ids):
            logits.index_fill_(0, self._not_first, -torch.inf)

    def with_times(self, logits: torch.Tensor, row: LogitsRow) -> torch.Tensor:
        """As `asyncengine.logits_processor.LogitsProcessor`."""
        self.without_times(logits, row)
        said = torch.from_numpy(row.token_ids.astype(np.int64))[None]
        held: torch.Tensor = self._times(said, logits[None])[0]
        return held


def _ids(generation: Any, name: str, vocab_size: int) -> torch.Tensor:
    return torch.tensor([token for token in getattr(generation, name, None) or () if 0 <= token < vocab_size]).long()
