"""Guesses behind images, and beside them: token for token what transformers says without guesses."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from asyncengine import AsyncEngine
from asyncengine.model.runner import TorchModel
from asyncengine.step.batch import Int64, StepBatch
from asyncengine.step.drafting import Drafting, Drafts
from asyncengine.step.slots import SlotTable
from tests.model import checkpoints
from tests.model.draft_heads import eagle_heads
from tests.model.draft_heads import sighted as seeing
from tests.model.media.checkpoints import VOCABULARY, picture
from tests.model.media.test_engine import asking, check, engine, greedy

pytestmark = pytest.mark.loops("either")

FIRST, SECOND, THIRD = picture(1, 48, 32), picture(2, 40, 24), picture(3, 32, 48)
LETTERS = list(range(70, 76))
"""All that may be said, so that it repeats itself and some guesses are right."""
TOKENS = 16
CONVERSATIONS = [
    asking("Look: ", FIRST, " and ", SECOND, " which?"),
    asking("what is ", FIRST),
    asking(SECOND, "is other than", FIRST),
]
GUESSING: dict[str, Any] = {
    "images": True, "spec_draft_length": 3, "max_total_sequence_length": 136, "max_single_sequence_length": 136,
    "prefill_chunk_size": 48,
}  # fmt: skip


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[StepBatch]:
    """Those of models, in their order; those of a draft model, too."""
    found: list[StepBatch] = []
    logits = TorchModel.logits

    def noting(self: TorchModel, batch: StepBatch) -> torch.Tensor:
        found.append(batch)
        return logits(self, batch)

    monkeypatch.setattr(TorchModel, "logits", noting)
    return found


@pytest.fixture
def guessed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], list[int]]]:
    """All that is guessed: behind which text, and what."""
    found: list[tuple[list[int], list[int]]] = []
    propose = Drafting.propose

    def noting(self: Drafting, table: SlotTable, slots: Int64, lengths: Int64) -> Drafts | None:
        drafts = propose(self, table, slots, lengths)
        assert self.failure is None
        if drafts is not None:
            each = np.split(drafts.token_ids, np.cumsum(drafts.lengths)[:-1])
            for slot, guess in zip(slots.tolist(), each, strict=True):
                found.append((table.known_tokens(slot).tolist(), guess.tolist()))
        return drafts

    monkeypatch.setattr(Drafting, "propose", noting)
    return found


async def together(serving: AsyncEngine, *asked: Any) -> list[Any]:
    """The results of several requests, which begin in the same step, in their order."""
    async with AsyncExitStack() as entered:
        await serving.pause()
        streams = [await entered.enter_async_context(each) for each in asked]
        await serving.resume()
        return await asyncio.gather(*streams)


async def are_as_told(serving: AsyncEngine, path: Path) -> None:
    """Compares three conversations, more than there is room for."""
    wish = greedy(TOKENS, allowed_token_ids=LETTERS)
    results = await together(serving, text(serving), *(serving.chat(messages, wish) for messages in CONVERSATIONS))
    for messages, result in zip(CONVERSATIONS, results[1:], strict=True):
        check(path, messages, result, TOKENS, LETTERS)
    assert sum(result.usage.preemptions for result in results) > 0
    counters = serving.metrics().counters
    assert 0 < counters.accepted_draft_tokens < counters.draft_tokens


async def goes_on(serving: AsyncEngine, path: Path) -> None:
    """Compares the second turn of a conversation."""
    wish = greedy(TOKENS, allowed_token_ids=LETTERS)
    again = await serving.chat(CONVERSATIONS[0], wish)  # nobody has its blocks now
    said = {"role": "assistant", "content": [{"type": "text", "text": again.text}]}
    more = [*CONVERSATIONS[0], said, *asking("So?")]
    second = await serving.chat(more, wish.replace(n=2))
    assert second.usage.cached_tokens > again.usage.prompt_tokens
    assert second.usage.draft_tokens > 0
    first, other = second.outputs
    check(path, more, first, TOKENS, LETTERS)
    assert list(other.token_ids) == list(first.token_ids)


def text(serving: AsyncEngine) -> Any:
    """A request that is guessed from the first step on in which it decodes."""
    return serving.chat(asking("assistant: fffff"), greedy(2 * TOKENS, allowed_token_ids=LETTERS[:1]))


@pytest.mark.parametrize(
    "architecture", ["qwen3_vl", "gemma3", pytest.param("llava", marks=pytest.mark.long), "qwen3_5"]
)
@pytest.mark.in_short("qwen3_5")
async def test_what_repeats_itself_is_guessed_behind_images(
    architecture: str, sighted: Callable[..., Path], steps: list[StepBatch]
) -> None:
    path = sighted(architecture)
    async with engine(path, **GUESSING, speculative_mode="ngram") as serving:
        await are_as_told(serving, path)
        await goes_on(serving, path)
        await serving.reset()
        steps.clear()
        other = asking("what is ", THIRD)
        plain, seeing = await together(serving, text(serving), serving.chat(other, greedy()))
        assert list(plain.token_ids) == LETTERS[:1] * 2 * TOKENS
        check(path, other, seeing)
    assert any(step.media and step.draft_lengths is not None for step in steps)


async def test_a_head_of_the_model_sees_what_the_model_sees(
    tmp_path: Path, guessed: list[tuple[list[int], list[int]]]
) -> None:
    path = seeing.write(tmp_path)
    async with engine(path, **GUESSING, speculative_mode="mtp", prefix_cache_mode="disable") as serving:
        await are_as_told(serving, path)
    asked = asking("Look: ", None, " and ", None, " which?")
    reference = seeing.Reference(path, asked, [FIRST, SECOND])
    prompt = np.array(reference.prompt)
    texts = 0
    for text, guess in guessed:
        known = np.array(text[: len(prompt)])
        if texts < 12 and guess and len(known) == len(prompt) and (known[known >= 0] == prompt[known >= 0]).all():
            assert reference.guesses([*reference.prompt, *text[len(prompt) :]], len(guess), LETTERS) == guess
            texts += 1
    assert texts > 5


@pytest.mark.parametrize("mode", ["small_draft", "eagle3"])
@pytest.mark.in_short("eagle3")
async def test_who_sees_no_images_guesses_behind_them(
    mode: str,
    sighted: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    steps: list[StepBatch],
) -> None:
    if mode == "small_draft":
        path = sighted("llava")
        checkpoints.write(tmp_path, "llama", vocab_size=VOCABULARY, max_position_embeddings=1024)
        for file in path.glob("token*"):
            shutil.copy(file, tmp_path)
    else:
        path = sighted("qwen3_vl")
        monkeypatch.setattr(eagle_heads, "VOCAB", VOCABULARY)
        eagle_heads.write(tmp_path, "specforge", eagle_heads.weights(), vocab_size=VOCABULARY)
    changes: dict[str, Any] = {"speculative_mode": mode, "additional_models": [str(tmp_path)]}
    async with engine(path, **GUESSING, **changes) as serving:
        await are_as_told(serving, path)
        await goes_on(serving, path)
        if mode == "small_draft":
            reader = serving._thread.core.view.media_reader  # type: ignore[union-attr]
            token_id = reader.token_ids["image"]  # type: ignore[union-attr]
            assert any(not step.media and token_id in step.token_ids for step in steps)
        assert not any("images" in note or "drafting failed" in note for note in serving.health().notes)
