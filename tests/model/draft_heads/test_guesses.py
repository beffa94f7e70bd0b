"""What heads guess within an engine is what their descriptions give, computed anew from the whole text each time."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from asyncengine import AsyncEngine, EngineConfig, GenerationConfig
from asyncengine.model.draft_heads.drafter import HeadDrafter
from asyncengine.step.batch import Int64
from asyncengine.step.drafting import Drafting, Drafts
from asyncengine.step.slots import SlotTable
from tests.model import checkpoints
from tests.model.draft_heads import eagle_heads, mtp_heads

SQUEEZED: dict[str, Any] = {
    "device": "cpu", "max_num_sequence": 6, "kv_cache_page_size": 4, "max_single_sequence_length": 60,
    "max_total_sequence_length": 120, "prefill_chunk_size": 16, "prefix_cache_mode": "disable", "spec_draft_length": 3,
}  # fmt: skip
Guess = tuple[list[int], list[int]]


@pytest.fixture
def guessed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Guess]]:
    """All that is guessed: behind which text, and what."""
    found: list[Guess] = []
    propose = Drafting.propose

    def noting(self: Drafting, table: SlotTable, slots: Int64, lengths: Int64) -> Drafts | None:
        drafts = propose(self, table, slots, lengths)
        assert self.failure is None
        if drafts is not None:
            ends = np.cumsum(drafts.lengths)
            for slot, end, length in zip(slots.tolist(), ends.tolist(), drafts.lengths.tolist(), strict=True):
                found.append((table.known_tokens(slot).tolist(), drafts.token_ids[end - length : end].tolist()))
        return drafts

    copied = 0
    copy = HeadDrafter.copy

    def counting(self: HeadDrafter, copies: Int64) -> None:
        nonlocal copied
        copied += len(copies)
        copy(self, copies)

    monkeypatch.setattr(Drafting, "propose", noting)
    monkeypatch.setattr(HeadDrafter, "copy", counting)
    yield found
    assert copied >= 2, "no branch began with a copy of a block"


async def ask(config: EngineConfig) -> None:
    """Some sequences at once, in pieces, more than there is room for; one prompt has several answers."""
    random = np.random.default_rng(0)
    prompts = [random.integers(1, 199, size).tolist() for size in (1, 7, 37, 22, 14)]
    greedy = GenerationConfig(temperature=0, max_tokens=14)
    wishes = [greedy, greedy.replace(n=3), greedy, greedy, greedy]
    async with AsyncEngine(config) as engine:
        await engine.generate_many(prompts, wishes)
        assert engine.metrics().counters.preemptions > 0


def check(guessed: list[Guess], reference: Any) -> None:
    """Whether every second guess is as it should be: of each text there are many."""
    made = [(text, found) for text, found in guessed if found]
    assert len(made) > 30
    for text, found in made[::2]:
        assert found == reference.guesses(text, len(found))


@pytest.mark.parametrize(
    ("layout", "tensors", "changes"),
    [
        ("authors", eagle_heads.weights(), {}),
        ("specforge", eagle_heads.weights(own_embedding=True), {"decoder_backend": "transformers"}),
        ("speculators", eagle_heads.weights(199), {"attention_backend": "torch"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.in_short("speculators--", "authors--")
def test_eagle_heads_guess_what_their_description_gives(
    layout: str, tensors: dict[str, Any], changes: dict[str, Any], tmp_path: Path, guessed: list[Guess]
) -> None:
    target = checkpoints.write(tmp_path / "target", "llama")
    head = eagle_heads.write(tmp_path / "head", layout, tensors)
    config = EngineConfig(str(target), speculative_mode="eagle3", additional_models=[str(head)], **SQUEEZED, **changes)  # type: ignore[arg-type]
    asyncio.run(ask(config))
    model = AutoModelForCausalLM.from_pretrained(target)
    check(guessed, eagle_heads.Reference(tensors, model, layout == "speculators"))


@pytest.mark.parametrize(
    ("architecture", "layout", "own"),
    [
        ("deepseek_v3", "deepseek", True),
        ("glm4_moe", "deepseek", False),
        ("qwen2", "mimo", False),
        ("qwen3_5", "qwen", False),
    ],
)
@pytest.mark.in_short("deepseek_v3", "qwen3_5")
def test_heads_for_multi_token_prediction_guess_what_their_description_gives(
    architecture: str, layout: str, own: bool, tmp_path: Path, guessed: list[Guess]
) -> None:
    target = mtp_heads.write(tmp_path, architecture, layout, own)
    asyncio.run(ask(EngineConfig(str(target), speculative_mode="mtp", **SQUEEZED)))
    check(guessed, mtp_heads.Reference(target, layout))
