"""Models that write one text of another: what they write is what they write in transformers, token for token."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import itertools
import json
import logging
import shutil
import weakref
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, T5ForConditionalGeneration
from transformers.utils import logging as transformers_logging

from asyncengine import (
    AsyncEngine,
    AudioPrompt,
    CheckpointError,
    ConfigError,
    ContextLengthExceededError,
    EngineConfig,
    FinishReason,
    GenerationConfig,
    InvalidRequestError,
    Regex,
    SourcePrompt,
    UnsupportedModelError,
)
from asyncengine.model.encoder_decoder import loading as shared_loading
from asyncengine.model.encoder_decoder.details import Shape
from asyncengine.model.encoder_decoder.model import SourceEncoder
from asyncengine.model.loader import TransformersLoader
from asyncengine.model.text_to_text import loading
from tests.loop.harness import eventually
from tests.model.text_to_text import checkpoints
from tests.model.text_to_text.checkpoints import (
    EOS,
    FARTHEST,
    FIRST,
    KINDS,
    LANGUAGE,
    MOST,
    PAD,
    ROOM,
    VOCABULARY,
    source,
)

pytestmark = pytest.mark.loops("either")

LENGTHS = (1, 3, 4, 5, 33)
"""Tokens of sources: about a block."""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a random checkpoint once and returns its directory."""
    found: dict[object, Path] = {}

    def get(kind: str = "bart", seed: int = 0, **changes: Any) -> Path:
        key = kind, seed, repr(changes)
        if key not in found:
            found[key] = checkpoints.write(tmp_path_factory.mktemp(kind), kind, seed, **changes)
        return found[key]

    return get


def engine(path: Path, **changes: Any) -> AsyncEngine:
    values: dict[str, Any] = {"device": "cpu", "dtype": "float32", "kv_cache_page_size": 4, "max_num_sequence": 4}
    return AsyncEngine(EngineConfig(str(path), **(values | changes)))


@pytest.fixture(scope="module")
def served(written: Callable[..., Path]) -> Iterator[AsyncEngine]:
    """One that is loaded for several tests, which leave it as it is."""
    serving = engine(written())
    assert serving._config is not None
    asyncio.run(serving.reload(serving._config))
    yield serving
    asyncio.run(serving.shutdown())


def most(tokens: int, **changes: Any) -> GenerationConfig:
    return GenerationConfig(max_tokens=tokens, ignore_eos=False, **changes)


async def answers(serving: AsyncEngine, sources: list[list[int]], tokens: int = MOST) -> list[list[int]]:
    results = await asyncio.gather(*[serving.generate(each, most(tokens)) for each in sources])
    return [list(each.token_ids) for each in results]


async def free_again(serving: AsyncEngine) -> None:
    await serving.reset()
    metrics = serving.metrics()
    assert metrics.kv_blocks_free == metrics.kv_blocks_total


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.in_short("t5 v1.1", "umt5", "marian", "m2m_100", "bart", "mbart")
async def test_greedy_equals_transformers(kind: str, written: Callable[..., Path]) -> None:
    """Several sources at once, each twice, in chunks that end within them."""
    path = written(kind)
    sources = [source(seed, length) for seed, length in enumerate(LENGTHS)]
    expected = checkpoints.references(path, sources)
    assert len({tuple(each) for each in expected}) == len(expected)
    assert len(set(itertools.chain(*expected))) > 10
    async with engine(path, prefill_chunk_size=10) as serving:
        assert await answers(serving, [*sources, *sources]) == [*expected, *expected]
        assert serving.metrics().counters.preemptions == 0
        await free_again(serving)


@pytest.mark.parametrize("backend", ["cpu", pytest.param("torch", marks=pytest.mark.long)])
async def test_models_without_positions_go_as_far_as_sequences_may(backend: str, written: Callable[..., Path]) -> None:
    """And what they add to scores is the same for all that is far."""
    path, given = written("t5 v1.1"), source(3, 70)
    assert len(given) > ROOM > 6 * FARTHEST
    async with engine(path, max_single_sequence_length=72 + ROOM, attention_backend=backend) as serving:
        result = await serving.generate(given, GenerationConfig(ignore_eos=True))
        assert len(result.token_ids) == ROOM - 1 and result.finish_reason is FinishReason.LENGTH
        assert list(result.token_ids) == checkpoints.reference(path, given, ROOM - 1, eos_token_id=VOCABULARY)
    loader = TransformersLoader()
    lengths = [
        loader.check(EngineConfig(str(path), max_single_sequence_length=most), None).details for most in (None, 9000)
    ]
    assert [(each.sources, each.written, each.max_length) for each in lengths] == [
        (2048, 2048, 4096),
        (9000, 9000, 9000),
    ]


async def test_transformers_says_nothing_of_a_head_that_is_no_table_of_tokens(
    written: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    """Which it makes of any T5's until it sees the weights."""
    logger = logging.getLogger("transformers.modeling_utils")
    transformers_logging.set_verbosity_warning()
    logger.addHandler(caplog.handler)
    try:
        AutoModelForSeq2SeqLM.from_pretrained(written("t5 v1.1"))
        assert "we will NOT tie them" in caplog.text
        caplog.clear()
        async with engine(written("t5 v1.1")):
            assert not caplog.records
    finally:
        logger.removeHandler(caplog.handler)
        transformers_logging.set_verbosity_error()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
async def test_in_fewer_bits(dtype: str, written: Callable[..., Path]) -> None:
    """As transformers does it, which leaves some of T5's weights in float32 beside float16."""
    path, given = written("t5 v1.1"), source(3, 9)
    async with engine(path, dtype=dtype) as serving:
        result = await serving.generate(given, most(3, logprobs=True))
        loaded = serving._thread.core.loaded
        assert loaded is not None
        [held] = loaded.model.debug_call("weight_bytes", ())
        model = loaded.model._text._model  # type: ignore[attr-defined]
        wide = {name.split(".")[-2] for name, each in model.named_parameters() if each.dtype is torch.float32}
        assert wide == ({"wo"} if dtype == "float16" else set())
        reckoned = TransformersLoader().check(engine(path, dtype=dtype)._config, None).details.weight_bytes  # type: ignore[arg-type]
        assert 0 <= held - reckoned < 0.01 * held
    there = AutoModelForSeq2SeqLM.from_pretrained(path, dtype=dtype)
    decoded = torch.tensor([[PAD, *result.token_ids[:2]]])
    with torch.no_grad():
        logits = there(torch.tensor([given]), decoder_input_ids=decoded).logits[0].float()
    expected = logits.log_softmax(-1)[torch.arange(3), torch.tensor(result.token_ids)]
    found = [each.logprob for each in result.outputs[0].logprobs or ()]
    assert found == pytest.approx(expected.tolist(), abs={"float16": 0.02, "bfloat16": 0.15}[dtype])


SETTINGS: list[dict[str, Any]] = [
    {},
    {"kv_cache_page_size": 16, "prefix_cache_mode": "disable"},
    {"attention_backend": "torch", "kv_cache_page_size": 8},
    {"max_total_sequence_length": 64, "prefix_cache_mode": "disable", "kv_cache_page_size": 1},
    {"prefill_mode": "chunked", "max_num_sequence": 2, "prefill_chunk_size": 7},
]


@pytest.mark.parametrize(
    "changes",
    [pytest.param(each, marks=() if each else pytest.mark.long, id=",".join(each) or "plain") for each in SETTINGS],
)
@pytest.mark.in_short(
    "prefill_mode,max_num_sequence,prefill_chunk_size", "max_total_sequence_length,prefix_cache_mode,kv_cache_page_size"
)
async def test_however_it_is_served(changes: dict[str, Any], written: Callable[..., Path]) -> None:
    path = written()
    sources = [source(seed, length) for seed, length in enumerate(LENGTHS)]
    expected = checkpoints.references(path, sources)
    async with engine(path, **changes) as serving:
        assert await answers(serving, [*sources, *sources]) == [*expected, *expected]
        preempted = serving.metrics().counters.preemptions
        assert preempted > 0 if "max_total_sequence_length" in changes else preempted == 0
        assert await answers(serving, sources[-1:]) == expected[-1:]
        await free_again(serving)


@pytest.mark.parametrize("kind", ["bart", "t5", pytest.param("umt5", marks=pytest.mark.long)])
async def test_sources_of_any_length_come_and_go(kind: str, written: Callable[..., Path]) -> None:
    """At random, over few blocks, with branches and aborts: what each writes is its own, and all blocks come back."""
    path, random = written(kind), np.random.default_rng(7)
    sources = [source(seed, int(random.integers(1, ROOM + 1))) for seed in range(10)]
    expected = checkpoints.references(path, sources)
    async with engine(path, max_total_sequence_length=112, max_num_sequence=5, prefill_chunk_size=13) as serving:

        async def ask(number: int) -> None:
            which, tokens, branches = (
                int(random.integers(10)),
                int(random.integers(0, MOST + 1)),
                int(random.integers(1, 3)),
            )
            stream = await serving.add_request(sources[which], most(tokens, n=branches))
            if number % 4 == 3:
                stream.abort()
                result = await stream
                found = [list(branch.token_ids) for branch in result.outputs]
                assert all(each == expected[which][: len(each)] for each in found)
                return
            for branch in (await stream).outputs:
                assert list(branch.token_ids) == expected[which][:tokens]

        await asyncio.gather(*[ask(number) for number in range(28)])
        assert serving.metrics().counters.preemptions > 0
        await free_again(serving)


@pytest.mark.parametrize(
    ("kind", "few"),
    [pytest.param("m2m_100", {"decoder_layers": 1}, marks=pytest.mark.long), ("t5 v1.1", {"num_decoder_layers": 1})],
)
async def test_over_the_kernel_for_gpus(
    kind: str, few: dict[str, int], written: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In Triton's interpreter."""
    from asyncengine.model.attention.select import Selection
    from tests.model.attention import triton_device

    triton_device.require_triton()
    monkeypatch.setattr(
        shared_loading,
        "select_attention",
        lambda *_: Selection(triton_device.TritonOnDevice(programs=12, parts_bytes=1 << 19)),
    )
    path = written(kind, **few)
    sources = [source(seed, length) for seed, length in enumerate((16, 17))]
    async with engine(path, kv_cache_page_size=16) as serving:
        found = await answers(serving, sources, 2)
    assert found == checkpoints.references(path, sources, 2)


async def test_one_source_is_encoded_once(served: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, encoded = SourceEncoder._made, list[bytes]()

    def note(self: Any, given: Any, item: Any) -> Any:
        encoded.append(item.digest)
        return encode(self, given, item)

    monkeypatch.setattr(SourceEncoder, "_made", note)
    given = source(70, 9)
    first = await served.generate(given, most(4, n=3))
    again = await served.generate(SourcePrompt(given), most(4))
    other = await served.generate(SourcePrompt(source(71, 9)), most(4))
    assert len(encoded) == 2 and other.usage.cached_tokens == 0
    assert [branch.token_ids for branch in first.outputs] == [again.token_ids] * 3
    assert (first.usage.prompt_tokens, first.usage.cached_tokens, again.usage.cached_tokens) == (10, 0, 9)
    assert first.usage.completion_tokens == 12


async def test_a_text_is_what_is_read(served: AsyncEngine, written: Callable[..., Path]) -> None:
    """The tokenizer puts an end behind it; what is written streams, and ends before a stop string."""
    expected = checkpoints.reference(written(), checkpoints.tokenizer()("How are you?")["input_ids"])
    result = await served.generate("How are you?", most(MOST))
    assert list(result.token_ids) == expected and result.usage.prompt_tokens == 13 + 1
    assert result.finish_reason is FinishReason.LENGTH
    said, ids = "", list[int]()
    async for output in served.stream("How are you?", most(MOST)):
        said += output.text
        ids += output.token_ids
    assert (said, ids) == (result.text, expected)
    assert result.text == checkpoints.tokenizer().decode(expected)
    stop = result.text[3:5]
    cut = await served.generate("How are you?", most(MOST, stop_strs=stop))
    assert (cut.text, cut.finish_reason) == (result.text.partition(stop)[0], FinishReason.STOP)
    nothing = await served.generate("How are you?", most(0))
    assert not nothing.token_ids and nothing.usage.prompt_tokens == 14


async def test_what_the_answer_begins_with(served: AsyncEngine, written: Callable[..., Path]) -> None:
    given, begun = source(3, 6), checkpoints.tokenizer()("Ja", add_special_tokens=False)["input_ids"]
    expected = checkpoints.reference(written(), given, begun=3, decoder_input_ids=torch.tensor([[EOS, *begun]]))
    for decoder in ("Ja", begun):
        stream = await served.add_request(SourcePrompt(given, decoder), most(MOST))
        assert list((await stream).token_ids) == expected
        assert stream.prompt_token_ids.tolist() == [EOS] * 7 + begun


async def test_draws_and_log_probabilities(served: AsyncEngine, written: Callable[..., Path]) -> None:
    given = source(4, 7)
    config = most(8, n=3, temperature=1.0, seed=7)
    first, second = [await served.generate(given, config) for _ in range(2)]
    drawn = [list(branch.token_ids) for branch in first.outputs]
    assert drawn == [list(branch.token_ids) for branch in second.outputs]
    assert len({tuple(each) for each in drawn}) == 3
    result = await served.generate(given, most(3, logprobs=True))
    with torch.no_grad():
        decoded = torch.tensor([[EOS, *result.token_ids[:2]]])
        logits = checkpoints.loaded(written())(torch.tensor([given]), decoder_input_ids=decoded).logits[0]
    likely = logits.log_softmax(-1).max(-1)
    assert list(result.token_ids) == likely.indices.tolist()
    found = [each.logprob for each in result.outputs[0].logprobs or ()]
    assert found == pytest.approx(likely.values.tolist(), abs=1e-3)


async def test_what_is_written_has_a_form(served: AsyncEngine) -> None:
    result = await served.generate(source(4, 7), most(MOST, response_format=Regex("[0-9]{3}-[a-c]{2}")))
    assert len(result.text) == 6 and result.text[3] == "-" and result.finish_reason is FinishReason.STOP


async def test_a_penalty_counts_what_is_written_alone(served: AsyncEngine, written: Callable[..., Path]) -> None:
    """And what it begins with: not what stands for the source."""
    given = source(6, 9)
    expected = checkpoints.reference(written(), given, repetition_penalty=1.7)
    assert expected != checkpoints.reference(written(), given)
    assert list((await served.generate(given, most(MOST, repetition_penalty=1.7))).token_ids) == expected


RULES: list[dict[str, Any]] = [
    {"no_repeat_ngram_size": 2, "suppress_tokens": list(range(20, VOCABULARY))},
    {"encoder_no_repeat_ngram_size": 1, "begin_suppress_tokens": list(range(20, 130))},
    {"bad_words_ids": [[PAD], *([token] for token in range(100, VOCABULARY))], "forced_bos_token_id": 4},
]


@pytest.mark.parametrize("rules", RULES, ids=[",".join(each) for each in RULES])
async def test_what_its_checkpoint_says_of_generating(
    rules: dict[str, Any], written: Callable[..., Path], tmp_path: Path
) -> None:
    path, plain = tmp_path / "ruled", written("mbart")
    shutil.copytree(plain, path)
    changed("generation_config.json", num_beams=3, length_penalty=2.0, **rules)(path)
    sources = [source(seed, length) for seed, length in enumerate(LENGTHS)]
    begun = 2 if "forced_bos_token_id" in rules else 1
    expected = [checkpoints.reference(path, each, begun=begun) for each in sources]  # padding has n-grams, too
    expected = [each[: MOST - 1] for each in expected]
    assert expected != [each[: MOST - 1] for each in checkpoints.references(plain, sources)]
    async with engine(path) as serving:
        assert await answers(serving, sources, MOST - 1) == expected
        [note] = serving.health().notes
        assert "requests with num_beams = 3" in note


async def test_what_is_said_of_generating_may_stand_in_the_configuration(
    written: Callable[..., Path], tmp_path: Path
) -> None:
    """As in checkpoints from before there was a file for it."""
    path = tmp_path / "old"
    shutil.copytree(written(), path)
    (path / "generation_config.json").unlink()
    said = {"no_repeat_ngram_size": 1, "forced_bos_token_id": 4, "repetition_penalty": 1.7, "num_beams": 2}
    changed("config.json", decoder_start_token_id=EOS, **said)(path)
    given = source(2, 9)
    expected = checkpoints.reference(path, given, begun=2)
    assert expected != checkpoints.reference(written(), given)[: MOST - 1]
    async with engine(path) as serving:
        assert await answers(serving, [given], MOST - 1) == [expected]
        loaded = serving._thread.core.loaded
        assert loaded is not None and loaded.default_generation_config.repetition_penalty == 1.7
        [note] = serving.health().notes
        assert "num_beams = 2" in note


async def test_the_end_of_a_text(served: AsyncEngine, written: Callable[..., Path], tmp_path: Path) -> None:
    """As far as the checkpoint says that it may come."""
    path = tmp_path / "ending"
    shutil.copytree(written(), path)
    given = source(3, 6)
    text = checkpoints.reference(written(), given)
    end = text[4]
    changed("generation_config.json", eos_token_id=end)(path)
    first = text.index(end) + 1
    async with engine(path) as serving:
        result = await serving.generate(given, most(MOST))
        assert list(result.token_ids) == text[:first] and result.finish_reason is FinishReason.STOP
    changed("generation_config.json", min_length=first + 2)(path)
    async with engine(path) as serving:
        result = await serving.generate(given, most(MOST))
        expected = checkpoints.reference(written(), given, min_length=first + 2, eos_token_id=end)
        assert list(result.token_ids) == expected
        assert len(result.token_ids) > first


async def test_languages(tmp_path: Path) -> None:
    """NLLB's: the source's stands before it, the answer's is what the decoder begins with."""
    path, own = checkpoints.write_nllb(tmp_path), checkpoints.nllb()
    own.src_lang = "ron_Latn"
    ids = own("abc def")["input_ids"]
    assert ids[0] == LANGUAGE["ron_Latn"]
    expected = checkpoints.reference(path, ids, begun=2, forced_bos_token_id=LANGUAGE["fra_Latn"])
    async with engine(path) as serving:
        asked = SourcePrompt("abc def", src_lang="ron_Latn", tgt_lang="fra_Latn")
        stream = await serving.add_request(asked, most(MOST - 1))
        assert list((await stream).token_ids) == expected
        assert stream.prompt_token_ids.tolist() == [EOS] * len(ids) + [EOS, LANGUAGE["fra_Latn"]]
        own.src_lang = "eng_Latn"
        plain = await serving.generate("abc def", most(MOST))
        assert list(plain.token_ids) == checkpoints.reference(path, own("abc def")["input_ids"])
        with pytest.raises(InvalidRequestError, match=r"tgt_lang is 'fr', .* near it: 'fra_Latn'"):
            await serving.generate(SourcePrompt("abc", tgt_lang="fr"))
        with pytest.raises(InvalidRequestError, match=r"src_lang is 'deu'.* near it: 'deu_Latn'"):
            await serving.generate(SourcePrompt("abc", src_lang="deu"))


async def test_how_long_it_may_be(served: AsyncEngine, written: Callable[..., Path]) -> None:
    """As long as there are positions, of the encoder and of the decoder each."""
    with pytest.raises(
        ContextLengthExceededError, match=r"the source has 49 tokens; the model's encoder takes 1\.\.48"
    ):
        await served.generate(source(1, ROOM + 1))
    with pytest.raises(ContextLengthExceededError, match=r"begins with 48 tokens; .* room for 48"):
        await served.generate(SourcePrompt(source(1, 3), [FIRST] * (ROOM - 1)))
    expected = checkpoints.reference(written(), source(1, 3), ROOM - 1)
    result = await served.generate(source(1, 3), GenerationConfig(ignore_eos=True))
    assert list(result.token_ids[: len(expected)]) == expected
    assert len(result.token_ids) == ROOM - 1 and result.finish_reason is FinishReason.LENGTH
    whole = await served.generate(source(1, ROOM), GenerationConfig(ignore_eos=True))
    assert len(whole.token_ids) == ROOM - 1


async def test_positions_that_begin_behind_padding(written: Callable[..., Path]) -> None:
    """There are fewer of them, and none is looked up that is not there."""
    async with engine(written("m2m_100", pad_token_id=5)) as serving:
        result = await serving.generate(source(1, 3), GenerationConfig(ignore_eos=True))
    assert len(result.token_ids) == ROOM - 4 - 1


async def test_sequences_may_be_shorter(written: Callable[..., Path]) -> None:
    async with engine(written(), max_single_sequence_length=30) as serving:
        result = await serving.generate(source(1, 9), GenerationConfig(ignore_eos=True))
        assert len(result.token_ids) == 30 - 12 - 1
        with pytest.raises(ContextLengthExceededError, match=r"allowed: 1\.\.29"):
            await serving.generate(source(1, 30))


WRONG: list[tuple[Callable[[AsyncEngine], Awaitable[Any]], str]] = [
    (lambda it: it.generate(""), "source is ''"),
    (lambda it: it.generate([]), r"source is \(\)"),
    (lambda it: it.generate(b"a"), "expected|takes that alone"),  # type: ignore[arg-type]
    (
        lambda it: it.generate([FIRST, VOCABULARY]),
        f"source has {VOCABULARY}; allowed: token ids in 0..{VOCABULARY - 1}",
    ),
    (lambda it: it.generate(SourcePrompt("a", [-1])), r"decoder has -1; allowed"),
    (lambda it: it.generate([FIRST, True]), "source has True; allowed"),  # type: ignore[list-item]
    (lambda it: it.generate(SourcePrompt("a", tgt_lang="de")), "tgt_lang is 'de'; .* knows no languages|no languages"),
    (lambda it: it.generate(pieces()), "the prompt has no source"),
    (lambda it: it.chat([{"role": "user", "content": "Hello"}]), "the prompt is a conversation"),
    (lambda it: it.embed(["a"]), "gives out no hidden states|cannot embed"),
    (lambda it: it.score(["ab"]), "prompt_logprobs is 0; tokens that stand for what .* reads"),
    (lambda it: it.classify([("a", "b")]), "takes that alone"),
    (lambda it: it.generate(AudioPrompt("a", [b"x"])), "the prompt has audio; the model takes none: it reads texts"),
    (lambda it: it.transcribe(b"x"), "the model takes none: it reads texts"),
]


async def pieces() -> Any:
    yield "a"


@pytest.mark.parametrize(("ask", "message"), WRONG)
async def test_wrong_prompts(ask: Callable[[AsyncEngine], Awaitable[Any]], message: str, served: AsyncEngine) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        await ask(served)


async def test_what_was_never_admitted_counts_its_tokens_alone(written: Callable[..., Path]) -> None:
    """And not what fills the source's last block."""
    async with engine(written(), max_queue_size=1) as serving:
        await serving.pause()
        first = await serving.add_request(source(1, 9))
        waits = asyncio.ensure_future(serving.add_request(source(1, 9)))
        await eventually(lambda: serving.metrics().num_requests_queued == 1)
        await serving.reset()
        usages = [(await first).usage, (await (await waits)).usage]
    assert [usage.prompt_tokens for usage in usages] == [9 + 1, 9 + 1]


async def test_a_prompt_is_kept_for_later(served: AsyncEngine) -> None:
    given = source(50, 8)
    name = await served.pin_prompt(SourcePrompt(given))
    assert (await served.generate(given, most(2))).usage.cached_tokens == 8
    assert await served.unpin_prompt(name)


async def test_other_models_take_no_sources() -> None:
    async with AsyncEngine(EngineConfig("tiny", device="cpu")) as serving:
        with pytest.raises(
            InvalidRequestError, match="the prompt is a SourcePrompt; 'tiny' does not write one text of"
        ):
            await serving.generate(SourcePrompt("Once"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"source": 3}, "source is 3"),
        ({"source": "a", "decoder": {}}, "decoder is {}"),
        ({"source": "a", "src_lang": ""}, "src_lang is ''"),
        ({"source": [4], "src_lang": "de"}, "which have their language among them"),
    ],
)
def test_wrong_source_prompts(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        SourcePrompt(**given)


@pytest.mark.parametrize("kind", ["bart", "t5 v1.1"])
async def test_sleep_wake_and_new_weights(kind: str, written: Callable[..., Path]) -> None:
    path, other, given = written(kind), written(kind, seed=1), source(1, 9)
    async with engine(path) as serving:
        [before] = await answers(serving, [given])
        await serving.sleep()
        await serving.wake()
        assert await answers(serving, [given]) == [before]
        state = dict(checkpoints.loaded(other).state_dict())
        await serving.update_weights(state)
        assert await answers(serving, [given]) == [checkpoints.reference(other, given)] != [before]


async def test_it_comes_and_goes(written: Callable[..., Path]) -> None:
    """In the place of another model, and another in its place; nothing of it is left."""
    async with AsyncEngine(EngineConfig("tiny", device="cpu")) as serving:
        await serving.pause()
        waits = await serving.add_request([5, 6, 7], GenerationConfig(max_tokens=9, allowed_token_ids=list(range(100))))
        own = engine(written())._config
        assert own is not None
        await serving.reload(own.replace(tokenizer="tiny"), in_flight="carry")
        with pytest.raises(InvalidRequestError, match="it was not read as a source"):
            await waits
        await serving.resume()
        loaded = serving._thread.core.loaded
        assert loaded is not None
        model = weakref.ref(loaded.model._text._model)  # type: ignore[attr-defined]
        del loaded
        given = source(1, 9)
        expected = checkpoints.reference(written(), given)
        assert await answers(serving, [given]) == [expected]
        await serving.pause()
        goes_over = await serving.add_request(given, most(MOST))
        await serving.reload(own.replace(tokenizer="tiny", max_num_sequence=2), in_flight="carry")
        await serving.resume()
        assert list((await goes_over).token_ids) == expected
        await serving.pause()
        misfit = await serving.add_request(given, most(MOST))
        await serving.reload(EngineConfig("tiny", device="cpu"), in_flight="carry")
        with pytest.raises(InvalidRequestError, match="does not take its source texts"):
            await misfit
        gc.collect()
        assert model() is None


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"speculative_mode": "ngram"}, ConfigError, "speculative_mode is 'ngram'; .* writes one text of another"),
    ({"quantization": "int8"}, ConfigError, "quantization is 'int8'"),
    ({"decoder_backend": "compiled"}, ConfigError, "decoder_backend is 'compiled'"),
    ({"images": True}, UnsupportedModelError, "images is True; .* takes none: it reads texts"),
    ({"mla": True}, UnsupportedModelError, "mla is True"),
    ({"max_single_sequence_length": 5}, ConfigError, r"takes up to 48 tokens .* allow 48 behind it: 6\.\.96"),
    ({"max_single_sequence_length": 97}, ConfigError, r"6\.\.96"),
]


@pytest.mark.parametrize(("changes", "kind", "message"), REFUSED)
async def test_settings_that_are_refused(
    changes: dict[str, Any], kind: type[Exception], message: str, written: Callable[..., Path]
) -> None:
    with pytest.raises(kind, match=message):
        async with engine(written(), **changes):
            pass


def changed(name: str, **values: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        stated = json.loads((path / name).read_text())
        (path / name).write_text(json.dumps(stated | values))

    return change


def no_start(path: Path) -> None:
    changed("config.json", decoder_start_token_id=None, bos_token_id=None)(path)
    (path / "generation_config.json").unlink()


DAMAGED: list[tuple[Callable[[Path], None], type[Exception], str]] = [
    (lambda path: (path / "tokenizer.json").unlink(), CheckpointError, "there are no tokenizer files"),
    (no_start, CheckpointError, "decoder_start_token_id is None"),
    (
        changed("generation_config.json", forced_bos_token_id=VOCABULARY),
        CheckpointError,
        f"forced_bos_token_id is {VOCABULARY}; expected a token id in 0..{VOCABULARY - 1}, or null",
    ),
    (changed("generation_config.json", forced_bos_token_id=[4]), CheckpointError, r"forced_bos_token_id is \[4\]"),
    (changed("generation_config.json", suppress_tokens=["a"]), CheckpointError, "says of generating cannot be read"),
    (changed("config.json", decoder_layers=3), CheckpointError, "weights are missing"),
    (
        changed("config.json", architectures=["BartForSequenceClassification"]),
        UnsupportedModelError,
        "is a BartForSequenceClassification, which writes no texts",
    ),
    (
        changed("config.json", model_type="led"),
        UnsupportedModelError,
        "model type 'led'.* encoder-decoder .* code of its own",
    ),
    (changed("config.json", model_type="switch_transformers"), UnsupportedModelError, "it has experts; Whisper and"),
]


@pytest.mark.parametrize(("damage", "kind", "message"), DAMAGED)
async def test_checkpoints_that_are_refused(
    damage: Callable[[Path], None], kind: type[Exception], message: str, written: Callable[..., Path], tmp_path: Path
) -> None:
    path = tmp_path / "damaged"
    shutil.copytree(written(), path)
    damage(path)
    with pytest.raises(kind, match=message):
        async with engine(path):
            pass


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ({"relative_attention_max_distance": 3}, CheckpointError, "relative_attention_max_distance is 3 .*_buckets 6"),
        (
            {"relative_attention_num_buckets": 3},
            CheckpointError,
            "relative_attention_num_buckets 3; expected at least 4",
        ),
        ({"num_decoder_layers": 3}, CheckpointError, "weights are missing"),
        ({"architectures": ["T5EncoderModel"]}, UnsupportedModelError, "is a T5EncoderModel, which writes no texts"),
    ],
)
async def test_checkpoints_of_t5_that_are_refused(
    values: dict[str, Any], kind: type[Exception], message: str, written: Callable[..., Path], tmp_path: Path
) -> None:
    path = tmp_path / "damaged"
    shutil.copytree(written("t5"), path)
    changed("config.json", **values)(path)
    with pytest.raises(kind, match=message):
        async with engine(path):
            pass


def test_what_older_transformers_attend_to_in_their_own_code(
    written: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(T5ForConditionalGeneration, "_supports_sdpa", False)
    with pytest.raises(UnsupportedModelError, match=r"is a T5ForConditionalGeneration, which attends .* of its own"):
        TransformersLoader().check(EngineConfig(str(written("t5"))), None)


@pytest.mark.parametrize("stated", [{"forced_bos_token_id": VOCABULARY}, {"suppress_tokens": ["a"]}], ids=str)
def test_what_it_says_of_generating_is_looked_at_before_the_present_model_goes(
    stated: dict[str, Any], written: Callable[..., Path], tmp_path: Path
) -> None:
    path = tmp_path / "damaged"
    shutil.copytree(written(), path)
    changed("generation_config.json", **stated)(path)
    config = engine(path)._config
    assert config is not None
    with pytest.raises(CheckpointError, match=r"generating|forced_bos"):
        TransformersLoader().check(config, None)


async def test_what_computes_something_else_is_refused(
    written: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = loading.shape_of

    def wrong(*given: Any) -> Shape:
        shape = right(*given)
        return dataclasses.replace(shape, spec=dataclasses.replace(shape.spec, scaling=1.0))

    monkeypatch.setattr(loading, "shape_of", wrong)
    with pytest.raises(UnsupportedModelError, match="does not compute over a paged KV cache"):
        async with engine(written()):
            pass


async def test_two_vocabularies(written: Callable[..., Path]) -> None:
    """As some of Marian's have: what is read has tokens that are never written."""
    path = written("marian", share_encoder_decoder_embeddings=False, decoder_vocab_size=200, vocab_size=VOCABULARY)
    given = [250, 199, 263, EOS]
    async with engine(path) as serving:
        assert await answers(serving, [given]) == [checkpoints.reference(path, given)]
        with pytest.raises(InvalidRequestError, match=r"decoder has 200; allowed: token ids in 0\.\.199"):
            await serving.generate(SourcePrompt(given, [200]))
