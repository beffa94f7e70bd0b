"""What a loaded model can take at once. Immutable; the loader makes it, and everybody may read it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """What a loaded model can take.

    Attributes:
        max_num_sequence: Slots.
        max_single_sequence_length: Tokens in one sequence.
        prefill_chunk_size: Prompt tokens in one step.
        page_size: Tokens per block.
        num_blocks: Blocks.
        hybrid: Whether prefill chunks and decodes share a step.
        prefix_cache: Whether computed sequences are kept.
        max_recycling: Most finished sequences that are kept; None is unlimited.
        kept_states: How many states can be kept beside those of the slots, for a model that keeps a state for each
            sequence (of state-space layers, say) beside keys and values; None for a model that does not.
        drafted_states: How many more a step can set aside, for such a model: so many tokens can be drafted in it.
        whole_prompts: Whether a prompt is computed in one step, be it longer than `prefill_chunk_size`, for a model in
            which tokens look at those behind them. Such a model generates nothing.
    """

    max_num_sequence: int
    max_single_sequence_length: int
    prefill_chunk_size: int
    page_size: int
    num_blocks: int
    hybrid: bool = True
    prefix_cache: bool = True
    max_recycling: int | None = None
    kept_states: int | None = None
    drafted_states: int = 0
    whole_prompts: bool = False

    @property
    def reuses_prefixes(self) -> bool:
        """Whether a sequence can begin with what another one has computed: with its state, where there are some."""
        return self.prefix_cache and self.kept_states != 0

    @property
    def max_tokens(self) -> int:
        """Most tokens in one sequence, by its own limit and by the KV cache's capacity."""
        return min(self.max_single_sequence_length, self.num_blocks * self.page_size)

    def written_by_beams(self, prompt_tokens: int, num_beams: int) -> int:
        """How many tokens each of several beams may write behind a prompt that they share; less than 1 if none can.

        They share its whole blocks, and at worst nothing else.
        """
        whole, rest = divmod(prompt_tokens, self.page_size)
        return (self.num_blocks - whole) // num_beams * self.page_size - rest

    @property
    def max_prompt_tokens(self) -> int:
        """Most tokens in a prompt: one less, so that there is room for another, where something can be generated."""
        return self.max_tokens if self.whole_prompts else self.max_tokens - 1
