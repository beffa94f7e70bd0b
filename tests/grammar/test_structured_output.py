"""Contract 13 to 17 and 29 for requests with a response format: on a real model, whatever else goes on."""

from __future__ import annotations

import asyncio
import importlib.util
import re
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from asyncengine import AsyncEngine, EngineConfig, GenerationConfig, InvalidRequestError, RequestDroppedError
from asyncengine.grammar.select import make_backend
from asyncengine.response_format import Choice, EbnfGrammar, JsonSchema, Regex, StructuralTag, StructuralTags
from asyncengine.testing import ByteTokenizer
from tests.grammar.conftest import CONFIG
from tests.grammar.fakes import FakeBackend
from tests.model import checkpoints

pytestmark = pytest.mark.loops("either")

needs_xgrammar = pytest.mark.skipif(importlib.util.find_spec("xgrammar") is None, reason="xgrammar is not installed")
SCHEMA = {
    "type": "object",
    "properties": {"id": {"type": "integer", "minimum": 0}, "word": {"type": "string", "maxLength": 12}},
    "required": ["id", "word"],
    "additionalProperties": False,
}
END = 2


def sampled(seed: int, format_: Any = None, **changes: Any) -> GenerationConfig:
    values = {"temperature": 1.0, "seed": seed, "max_tokens": 60, "response_format": format_}
    return GenerationConfig(**(values | changes))


TEXTS: list[tuple[Any, str]] = [
    (Choice(("yes", "no", 'a "quoted" \\ one\n')), r'yes|no|a "quoted" \\ one\n'),
    (Regex("[a-f]{2,5}-[0-9]{3}"), "[a-f]{2,5}-[0-9]{3}"),
    (EbnfGrammar('start: pair ("," pair)?\npair: "(" /[0-9]{1,2}/ ")"'), r"\(\d{1,2}\)(,\(\d{1,2}\))?"),
    (EbnfGrammar('root ::= [a-c] "=" ("x" | "yy")'), r"[abc]=(x|yy)"),
    ({"type": "choice", "choice": ["één", "東京"]}, "één|東京"),
]


async def test_the_text_matches_and_ends_with_stop(engine: AsyncEngine) -> None:
    for format_, pattern in TEXTS:
        results = await engine.generate_many(["x"] * 8, [sampled(seed, format_) for seed in range(8)])
        for result in results:
            assert re.fullmatch(pattern, result.text), result.text
            assert result.finish_reason == "stop"


async def test_a_text_that_nothing_can_follow_ends_at_once_and_without_an_end_token(engine: AsyncEngine) -> None:
    result = await engine.generate("x", sampled(0, Choice(("maybe",)), min_tokens=40))
    assert result.text == "maybe"
    assert END not in result.token_ids
    assert (result.finish_reason, result.outputs[0].stop_reason) == ("stop", None)


async def test_a_text_that_may_go_on_ends_with_the_end_token_unless_it_is_ignored(engine: AsyncEngine) -> None:
    result = await engine.generate("x", sampled(0, Regex("[ab]+"), logit_bias={END: 50.0}))
    assert result.token_ids[-1] == END
    assert result.outputs[0].stop_reason == END
    assert re.fullmatch("[ab]+", result.text)
    endless = await engine.generate("x", sampled(0, Regex("[ab]+"), logit_bias={END: 50.0}, ignore_eos=True))
    assert endless.finish_reason == "length"
    assert re.fullmatch("[ab]{60,}", endless.text)
    late = await engine.generate("x", sampled(0, Regex("[ab]+"), logit_bias={END: 50.0}, min_tokens=20))
    assert late.token_ids.index(END) == 20


async def test_a_model_without_an_end_token_ends_where_nothing_can_follow(tmp_path: Path, random_model: Path) -> None:
    checkpoints.write(tmp_path, "llama", vocab_size=1030, num_hidden_layers=1)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((random_model / name).read_text("utf-8"), "utf-8")
    async with AsyncEngine(EngineConfig(str(tmp_path), **CONFIG)) as engine:
        results = await engine.generate_many(["x"] * 6, [sampled(seed, Regex("[ab]{2,3}")) for seed in range(6)])
        assert {len(result.text) for result in results} == {3}
        assert {result.finish_reason for result in results} == {"stop"}
        cut = await engine.generate("x", sampled(0, Regex("[ab]+")))
        assert cut.finish_reason == "length"
        assert re.fullmatch("[ab]+", cut.text)


TAGS = StructuralTags(
    [
        StructuralTag("<fn=add>", {"type": "array", "items": {"enum": [0, 1]}, "maxItems": 2}, "</fn>"),
        StructuralTag("<fn=say>", {"type": "string", "maxLength": 3}, "</fn>"),
    ],
    triggers=["<fn="],
)
LESS, F, N, EQUALS = 33, 75, 83, 34  # the tokens '<', 'f', 'n' and '='


def spell_the_trigger(logits: Any, row: Any) -> None:
    at = len(row.token_ids) % 9
    if at < 4:
        logits[(LESS, F, N, EQUALS)[at]] += 100.0


async def test_free_text_has_no_trigger_but_at_the_beginning_of_a_tag(engine: AsyncEngine) -> None:
    config = sampled(3, TAGS, n=16, max_tokens=120, logits_processors=[spell_the_trigger])
    result = await engine.generate("x", config)
    piece = re.compile(r'<fn=add>\[\s*([01](\s*,\s*[01])?)?\s*\]</fn>|<fn=say>"([^"\\]|\\.)*"</fn>', re.DOTALL)
    tags = free = 0
    for branch in result.outputs:
        tags += len(piece.findall(branch.text))
        rest = piece.sub("", branch.text)
        free += len(rest.partition("<fn=")[0])
        if "<fn=" in rest:  # cut inside a tag
            assert branch.finish_reason == "length"
            assert rest.count("<fn=") == 1
    assert tags > 16, "hardly a tag was begun: the test would notice nothing"
    assert free > 16, "there was no free text"


async def test_special_tokens_may_begin_and_end_a_tag(engine: AsyncEngine) -> None:
    tags = StructuralTags([StructuralTag("<|user|>n=", {"enum": [1, 23]}, "<|assistant|>")], triggers=["<|user|>"])
    result = await engine.generate("x", sampled(1, tags, logit_bias={4: 8.0}, skip_special_tokens=False, n=8))
    found = re.findall(r"<\|user\|>n=(1|23)<\|assistant\|>", "".join(branch.text for branch in result.outputs))
    assert len(found) > 5
    for branch in result.outputs:
        at = [i for i, token in enumerate(branch.token_ids) if token == 4]
        assert all(branch.token_ids[i + 1 : i + 2] in ([83], []) for i in at), "'n' follows the special token"


WRONG: list[tuple[Any, str]] = [
    (Regex("(a"), "unclosed group"),
    (Regex("a(?=b)"), "look-around"),
    (Regex("()"), "no text but the empty one"),
    (EbnfGrammar("start: nowhere"), "nowhere"),
    (EbnfGrammar('root ::= "a'), "GBNF"),
    (JsonSchema({"type": "nothing"}), "nothing"),
    (JsonSchema({"type": "object", "required": ["a"], "properties": {"a": False}}), "nsatisfiable"),
    (JsonSchema({"type": "integer", "minimum": 5, "maximum": 3}), "minimum"),
    (JsonSchema({"not": {"type": "null"}}), "not"),
    (JsonSchema({"$ref": "#/nowhere"}), "nowhere"),
    (JsonSchema(False), "false"),
    (StructuralTags([StructuralTag("a<|user|>", True, "")]), "special token"),
    (StructuralTags([StructuralTag("<a>", {"type": "nothing"}, "")]), "nothing"),
]


async def test_a_grammar_that_does_not_compile_is_refused_before_admission(engine: AsyncEngine) -> None:
    for wrong, part in WRONG:
        with pytest.raises(InvalidRequestError, match="response_format cannot be compiled") as caught:
            await engine.add_request("x", sampled(0, wrong))
        assert part in str(caught.value)
        assert "<non-verbose" not in str(caught.value)
    assert sum(engine.metrics().counters.requests.values()) == 0
    assert len((await engine.generate("x", sampled(0, max_tokens=3, ignore_eos=True))).token_ids) == 3


async def test_each_branch_has_its_own_matcher(engine: AsyncEngine) -> None:
    branches = (await engine.generate("x", sampled(5, JsonSchema(SCHEMA), n=6))).outputs
    for index, branch in enumerate(branches):
        alone = await engine.generate("x", sampled(5 + index, JsonSchema(SCHEMA)))
        assert branch.token_ids == alone.token_ids
    assert len({branch.text for branch in branches}) == 6


async def test_more_branches_than_slots(random_model: Path) -> None:
    async with AsyncEngine(EngineConfig(str(random_model), **(CONFIG | {"max_num_sequence": 2}))) as few:
        narrow = await few.generate("x", sampled(5, JsonSchema(SCHEMA), n=5))
    async with AsyncEngine(EngineConfig(str(random_model), **CONFIG)) as many:
        wide = await many.generate("x", sampled(5, JsonSchema(SCHEMA), n=5))
    assert [branch.token_ids for branch in narrow.outputs] == [branch.token_ids for branch in wide.outputs]


async def test_preemption_does_not_change_what_is_drawn(random_model: Path) -> None:
    configs = [sampled(seed, JsonSchema(SCHEMA), n=2, frequency_penalty=0.3) for seed in range(6)]
    async with AsyncEngine(EngineConfig(str(random_model), **CONFIG)) as engine:
        undisturbed = await engine.generate_many(["abc"] * 6, configs)
        assert engine.metrics().counters.preemptions == 0
    squeezed_config = CONFIG | {"max_total_sequence_length": 160, "prefill_chunk_size": 16}
    async with AsyncEngine(EngineConfig(str(random_model), **squeezed_config)) as engine:
        squeezed = await engine.generate_many(["abc"] * 6, configs)
        assert engine.metrics().counters.preemptions > 0
    for a, b in zip(undisturbed, squeezed, strict=True):
        assert [branch.token_ids for branch in a.outputs] == [branch.token_ids for branch in b.outputs]
        assert [branch.finish_reason for branch in a.outputs] == [branch.finish_reason for branch in b.outputs]


async def test_a_hit_in_the_prefix_cache_changes_nothing(engine: AsyncEngine) -> None:
    prompt = "Once upon a time there was a bear who lived near a lake and liked to swim in it every day."
    first = await engine.generate(prompt, sampled(1, JsonSchema(SCHEMA)))
    second = await engine.generate(prompt, sampled(1, JsonSchema(SCHEMA)))
    assert second.usage.cached_tokens > 0
    assert second.token_ids == first.token_ids


async def test_neighbours_do_not_notice_a_grammar(engine: AsyncEngine) -> None:
    plain = [sampled(seed, ignore_eos=True, temperature=0.8) for seed in range(4)]
    alone = await engine.generate_many(["x"] * 4, plain)
    mixed = [config for pair in zip(plain, [sampled(9, JsonSchema(SCHEMA))] * 4, strict=True) for config in pair]
    together = await engine.generate_many(["x"] * 8, mixed)
    assert [result.token_ids for result in together[::2]] == [result.token_ids for result in alone]


async def test_a_request_is_carried_over_a_reload_in_the_middle_of_its_text(random_model: Path) -> None:
    config = EngineConfig(str(random_model), **CONFIG)
    async with AsyncEngine(config) as engine:
        expected = await engine.generate("x", sampled(4, Regex("[a-z]{200}"), max_tokens=250))
        stream = await engine.add_request("x", sampled(4, Regex("[a-z]{200}"), max_tokens=250))
        await anext(stream)
        await engine.reload(config, in_flight="carry")
        assert stream.usage is None, "it was through before the reload"
        result = await stream
        assert result.token_ids == expected.token_ids
        assert re.fullmatch("[a-z]{200}", result.text)
        assert result.finish_reason == "stop"


@pytest.mark.loops("each")
async def test_leaving_frees_what_a_constrained_request_holds(engine: AsyncEngine) -> None:
    async with engine.stream("x", sampled(0, Regex("[a-z]{400}"), max_tokens=500)) as stream:
        await anext(aiter(stream))
    await engine.abort_request("nobody")
    assert engine.metrics().kv_blocks_used == 0
    assert engine.metrics().num_requests_running == 0


async def test_a_stop_string_ends_a_constrained_text_before_it(engine: AsyncEngine) -> None:
    result = await engine.generate("x", sampled(0, Regex('"[a-z]{5}END[a-z]{5}"'), stop_strs=["END"]))
    assert re.fullmatch('"[a-z]{5}', result.text)
    assert result.outputs[0].stop_reason == "END"


@pytest.mark.loops("each")
async def test_deltas_add_up_to_the_result(engine: AsyncEngine) -> None:
    stream = await engine.add_request("x", sampled(2, Choice(("Zürich 東京 🙂🙂",))))
    text, ids = "", []
    async for output in stream:
        assert "\ufffd" not in output.text
        text += output.text
        ids += output.token_ids
    assert text == stream.result().text == "Zürich 東京 🙂🙂"
    assert ids == stream.result().token_ids


@pytest.mark.parametrize("tokens", [0, 1, 5])
async def test_max_tokens_is_exact(engine: AsyncEngine, tokens: int) -> None:
    result = await engine.generate("x", sampled(0, Regex("[a-z]{90}"), max_tokens=tokens))
    assert len(result.token_ids) == tokens
    assert result.finish_reason == "length"


async def test_logprobs_may_be_of_the_masked_distribution(engine: AsyncEngine) -> None:
    config = sampled(0, Choice(("yes", "no")), logprobs=True, top_logprobs=20, logprobs_mode="processed")
    entries = (await engine.generate("x", config)).outputs[0].logprobs
    assert entries is not None
    assert 2 <= len(entries[0].top_ids) < 20
    raw = (await engine.generate("x", config.replace(logprobs_mode="raw"))).outputs[0].logprobs
    assert raw is not None
    assert len(raw[0].top_ids) == 20


# Faults


@pytest.mark.parametrize("fault", [ValueError("broken"), SystemExit(3)])
async def test_a_grammar_that_raises_ends_its_own_request_alone(engine: AsyncEngine, fault: BaseException) -> None:
    def at_third(count: int) -> None:
        if count == 3:
            raise fault

    def always() -> None:
        raise fault

    faults: dict[str, dict[str, Any]] = {
        "matcher": {"on_matcher": always}, "fill": {"on_fill": at_third}, "accept": {"on_accept": at_third},
    }  # fmt: skip
    expected = await engine.generate("y", sampled(1, ignore_eos=True))
    for moment, where in faults.items():
        FakeBackend(**where).put_into(engine)
        broken = await engine.add_request("x", sampled(0, Regex("x"), n=2))
        fine = await engine.add_request("y", sampled(1, ignore_eos=True))
        with pytest.raises(RequestDroppedError) as caught:
            await broken
        assert caught.value.__cause__ is not None
        assert str(fault) in str(caught.value)
        assert broken.usage is not None
        assert broken.usage.completion_tokens == (0 if moment == "matcher" else 6)
        assert (await fine).token_ids == expected.token_ids
        assert engine.metrics().kv_blocks_used == 0
    assert engine.metrics().counters.failed_steps == 0


async def test_a_token_that_the_grammar_refuses_ends_its_request(engine: AsyncEngine) -> None:
    def spoil(logits: Any, row: Any) -> None:
        logits[:] = float("nan")  # nothing can be drawn, and token 0 is taken

    with pytest.raises(RequestDroppedError, match="does not take token 0"):
        await engine.generate("x", sampled(0, Choice(("yes", "no")), logits_processors=[spoil]))


# The other library


@needs_xgrammar
async def test_an_engine_over_xgrammar_gives_texts_that_match_and_end_with_stop(random_model: Path) -> None:
    asked = [*TEXTS[:3], TEXTS[4], (JsonSchema(SCHEMA, "none"), r'\{"id":\d+,"word":"[^"]*"\}'), (TAGS, "[^<]*")]
    asked[2] = (EbnfGrammar('root ::= "(" [0-9]{1,2} ")"'), r"\(\d{1,2}\)")
    configs = [sampled(seed, format_, n=2, max_tokens=90) for seed, (format_, _) in enumerate(asked)]
    async with AsyncEngine(EngineConfig(str(random_model), **CONFIG, grammar_backend="xgrammar")) as engine:
        results = await engine.generate_many(["x"] * len(configs), configs)
        walked = await engine.generate_many(["x"] * len(configs), [c.replace(jump_forward=False) for c in configs])
        for (format_, pattern), result, other in zip(asked, results, walked, strict=True):
            assert [branch.token_ids for branch in result.outputs] == [branch.token_ids for branch in other.outputs]
            for branch in result.outputs:
                if format_ is TAGS or branch.finish_reason == "length":
                    continue
                assert re.fullmatch(pattern, branch.text), branch.text
                assert branch.finish_reason == "stop"
        assert sum(result.finish_reason == "stop" for result in results) >= 4
        with pytest.raises(InvalidRequestError, match="cannot be compiled: xgrammar does not know the schema's 'not'"):
            await engine.add_request("x", sampled(0, JsonSchema({"not": {"type": "null"}})))
        assert engine.metrics().kv_blocks_used == 0


# Compiling


@pytest.mark.loops("each")
async def test_compiles_once_and_on_neither_the_loop_nor_the_step_thread(engine: AsyncEngine) -> None:
    gate = threading.Event()
    backend = FakeBackend(gate=gate).put_into(engine)
    config = sampled(0, Regex("x"), max_tokens=2)
    tasks = [asyncio.create_task(engine.generate("x", config)) for _ in range(8)]
    ticks = 0
    while not engine._grammars[1]._compiling:  # type: ignore[index]
        ticks += 1
        await asyncio.sleep(0)
    plain = await engine.generate("x", sampled(0, max_tokens=2))
    assert len(plain.token_ids) >= 1, "neither the loop nor the step waits for the compiler"
    gate.set()
    results = await asyncio.gather(*tasks)
    assert {tuple(result.token_ids) for result in results} == {(7, 7)}
    assert len(backend.compiled) == 1
    thread = backend.compiled[0][1]
    assert thread != threading.current_thread().name
    assert not thread.startswith("asyncengine")
    await engine.generate("x", config)
    assert len(backend.compiled) == 1


@pytest.mark.parametrize(
    ("backend", "extra"), [("auto", "grammar"), ("llguidance", "grammar"), ("xgrammar", "xgrammar")]
)
def test_a_library_that_is_not_installed_is_named(backend: Any, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("llguidance", "xgrammar"):
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, f"asyncengine.grammar.{name}_backend", raising=False)
    with pytest.raises(InvalidRequestError, match=rf"asyncengine\[{extra}\]"):
        make_backend(backend, ByteTokenizer(), 257, (256,))


@needs_xgrammar
def test_where_only_xgrammar_is_installed_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    monkeypatch.delitem(sys.modules, "asyncengine.grammar.llguidance_backend", raising=False)
    backend = make_backend("auto", ByteTokenizer(), 257, (256,))
    assert type(backend).__name__ == "XgrammarBackend"
    matcher = backend.compile(Choice(("a",))).matcher()
    matcher.accept(ord("a"))
    assert matcher.finished
    with pytest.raises(
        InvalidRequestError, match=r"needs llguidance, which is not installed: .*asyncengine\[grammar\]"
    ):
        make_backend("llguidance", ByteTokenizer(), 257, (256,))


@needs_xgrammar
async def test_xgrammar_without_an_end_token_says_so(tmp_path: Path, random_model: Path) -> None:
    checkpoints.write(tmp_path, "llama", vocab_size=1030, num_hidden_layers=1)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((random_model / name).read_text("utf-8"), "utf-8")
    async with AsyncEngine(EngineConfig(str(tmp_path), **CONFIG, grammar_backend="xgrammar")) as engine:
        with pytest.raises(InvalidRequestError, match="needs a model with an end-of-sequence token"):
            await engine.generate("x", sampled(0, Choice(("a",))))
        assert len((await engine.generate("x", sampled(0, max_tokens=3))).token_ids) == 3


def test_a_tokenizer_that_cannot_tell_its_tokens_is_named() -> None:
    with pytest.raises(InvalidRequestError, match="object cannot tell"):
        make_backend("auto", object(), 257, (256,))


async def test_a_model_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    checkpoints.write(tmp_path, "llama")
    async with AsyncEngine(EngineConfig(str(tmp_path), **CONFIG)) as engine:
        with pytest.raises(InvalidRequestError, match="response_format needs a tokenizer"):
            await engine.generate([1, 2], sampled(0, Regex("a")))
