"""Random combinations of everything a request may ask for, in engines of every kind, against the scalar reference.

A case is a model, some thirty requests, and engines that serve them all at once. What each branch got is compared with
what it should have got alone: one plain forward, no cache, no chunks, and a sampler that takes one row at a time.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from asyncengine import (
    AsyncEngine,
    EngineConfig,
    RequestDroppedError,
    RequestOptions,
    RequestResult,
    tiny,
)
from asyncengine.grammar.select import make_backend
from asyncengine.metrics import Counters
from asyncengine.model.loader import TransformersLoader
from asyncengine.model.tokenizer import load_tokenizer
from tests.model import letters
from tests.model.adapters import merge, save_adapter
from tests.model.draft_heads import mtp_heads
from tests.model.scalar_reference import Reference, check_entry
from tests.model.wishes import LIMIT, Case, case


async def pieces(prompt: list[int]) -> AsyncIterator[list[int]]:
    for start in range(0, len(prompt), 5):
        yield prompt[start : start + 5]
        await asyncio.sleep(0)


Outcome = tuple[RequestResult, RequestDroppedError | None]


async def outcome(engine: AsyncEngine, drawn: Case, index: int) -> Outcome:
    """Of one request; each has a priority."""
    prompt, options = drawn.prompts[index], RequestOptions(priority=index % 3 - 1, adapter=drawn.adapter(index))
    given = pieces(prompt) if drawn.in_pieces(index) else prompt
    stream = await engine.add_request(given, drawn.wishes[index], options)
    try:
        return await stream, None
    except RequestDroppedError as error:
        return stream.result(), error


async def served(config: EngineConfig, drawn: Case, run_ahead: bool) -> tuple[list[Outcome], Counters]:
    """All requests at once, and what was counted."""
    async with AsyncEngine(config, loader=TransformersLoader(run_ahead=run_ahead)) as engine:
        outcomes = await asyncio.gather(*(outcome(engine, drawn, index) for index in range(len(drawn.wishes))))
        metrics = engine.metrics()
        assert metrics.kv_blocks_used == 0
        return outcomes, metrics.counters


def check(references: Mapping[str | None, Reference], drawn: Case, outcomes: list[Outcome]) -> None:
    for index, (prompt, wish, (result, error)) in enumerate(zip(drawn.prompts, drawn.wishes, outcomes, strict=True)):
        reference = references[drawn.adapter(index)]
        assert len(result.outputs) == wish.n
        assert result.usage.prompt_tokens == len(prompt)
        assert result.usage.completion_tokens == sum(len(branch.token_ids) for branch in result.outputs)
        if error is not None:
            reference.check_contradiction(prompt, wish, result.outputs, LIMIT)
            continue
        for branch in result.outputs:
            reference.check(prompt, wish, branch, LIMIT)
        if wish.prompt_logprobs is None:
            assert result.prompt_logprobs is None
            continue
        assert (result.prompt_token_ids, result.prompt_logprobs[0]) == (prompt, None)
        assert len(result.prompt_logprobs) == len(prompt)
        rows = reference.logits(prompt)
        for row, token_id, entry in zip(rows, prompt[1:], result.prompt_logprobs[1:], strict=False):
            check_entry(row, token_id, entry, wish.prompt_logprobs)


def combine(
    path: Path,
    seed: int,
    requests: int,
    engines: int,
    end: int,
    directory: Path,
    recurrent: bool = False,
    head: Mapping[str, Any] | None = None,
) -> None:
    """One case: so many requests in so many engines, whose knobs and modes are drawn; or a head drafts in all."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    plain: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
    models = {name: AutoModelForCausalLM.from_pretrained(path, **plain) for name in (None, "one", "two")}
    for number, name in enumerate(("one", "two")):
        factors = save_adapter(directory / name, models[None], number, rank=3 + number, alpha=6.0)
        merge(models[name], factors, 6.0 / (3 + number))
    vocabulary = models[None].config.vocab_size
    backend = make_backend("llguidance", load_tokenizer(path), vocabulary, (end,))
    references = {name: Reference(model, tokenizer, backend.compile, end) for name, model in models.items()}
    drawn = case(seed, vocabulary, end, tokenizer(letters.STORY).input_ids, requests, engines)
    preempted, short = 0, False
    for index, knobs in enumerate(drawn.engines):
        if recurrent and knobs.get("speculative_mode") == "small_draft":  # it cannot draft
            knobs = {**knobs, "speculative_mode": "ngram"}
        if knobs.get("speculative_mode") == "small_draft":
            knobs = {**knobs, "additional_models": [str(path)]}
        if head is not None:
            knobs = {**knobs, "additional_models": [], **head}
        config = EngineConfig.from_dict({
            "model": str(path), "device": "cpu", "dtype": "float32",
            "max_single_sequence_length": LIMIT, "max_total_sequence_length": 4096, "max_num_sequence": 32,
            "kv_cache_page_size": 8, "adapters": {name: str(directory / name) for name in ("one", "two")}, **knobs,
        })  # fmt: skip
        outcomes, counters = asyncio.run(served(config, drawn, run_ahead=index % 2 == 0))
        preempted, short = preempted + counters.preemptions, short or "max_total_sequence_length" in knobs
        assert head is None or counters.accepted_draft_tokens < counters.draft_tokens
        check(references, drawn, outcomes)
    assert preempted > 0 or not short or head is not None, "blocks were meant to run out"


@pytest.mark.parametrize("seed", range(int(os.environ.get("CASES", "3"))))
@pytest.mark.in_short("0")
def test_whatever_is_asked_for_together_is_what_the_reference_gives(
    checkpoint: Callable[..., Path], tmp_path: Path, seed: int
) -> None:
    """The first three cases have all the knobs between them."""
    architecture = ["llama", "gemma2", "gpt2"][seed % 3]
    layers = {"n_layer": 2} if architecture == "gpt2" else {"num_hidden_layers": 2}
    path = checkpoint(architecture, vocab_size=letters.VOCABULARY, eos_token_id=letters.END, **layers)
    letters.write(path)
    combine(path, seed, requests=22, engines=3, end=letters.END, directory=tmp_path)


def test_so_it_is_with_recurrent_layers(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    path = checkpoint(
        "qwen3_5", vocab_size=letters.VOCABULARY, eos_token_id=letters.END, num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    letters.write(path)
    combine(path, seed=1, requests=16, engines=2, end=letters.END, directory=tmp_path, recurrent=True)


@pytest.mark.long
def test_so_it_is_with_the_tiny_model_and_its_head(tmp_path: Path) -> None:
    head = {"speculative_mode": "eagle3", "additional_models": ["tiny-eagle3"]}
    combine(Path(tiny.PATH), seed=4, requests=12, engines=1, end=2, directory=tmp_path, head=head)


@pytest.mark.long
def test_so_it_is_with_a_head_of_the_model_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mtp_heads, "LAYERS", 1)
    path = mtp_heads.write(
        tmp_path / "model", "qwen2", "mimo", vocab_size=letters.VOCABULARY + 1, eos_token_id=letters.END
    )  # fmt: skip
    letters.write(path)  # to which transformers adds a token of Qwen's
    head = {"speculative_mode": "mtp", "spec_draft_length": 2}
    combine(path, seed=1, requests=28, engines=1, end=letters.END, directory=tmp_path, head=head)
