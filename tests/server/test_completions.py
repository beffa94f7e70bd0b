from __future__ import annotations

import asyncio
from typing import Any

import pytest

from asyncengine import AsyncEngine, EngineConfig, PromptScore
from asyncengine.server import create_app
from tests.server.serving import (
    MODEL,
    client_of,
    completion,
    echo_engine,
    error,
    events,
    scripted_engine,
    served,
    until,
)

pytestmark = [pytest.mark.loops("either"), pytest.mark.usefixtures("one_torch_thread")]


async def test_a_completion_has_openai_s_shape() -> None:
    async with served() as client:
        found = (await client.post("/v1/completions", json=completion("hello"))).json()
        assert found["object"] == "text_completion" and found["model"] == MODEL and found["id"].startswith("cmpl-")
        assert found["choices"] == [{"index": 0, "text": "hello", "finish_reason": "stop", "logprobs": None}]
        assert found["usage"] == {
            "prompt_tokens": 5,
            "completion_tokens": 6,
            "total_tokens": 11,
            "prompt_tokens_details": {"cached_tokens": 0},
        }


@pytest.mark.loops("each")
async def test_a_stream_adds_up_to_the_whole() -> None:
    async with served(echo_engine(step_seconds=0.001)) as client:
        body = completion("hällo", stream=True, n=2, echo=True, max_tokens=None)
        chunks = events((await client.post("/v1/completions", json=body)).text)
        for index in range(2):
            choices = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
            assert "".join(choice["text"] for choice in choices) == "hällohällo"
            assert [choice["finish_reason"] for choice in choices].count("stop") == 1
            assert choices[-1]["finish_reason"] == "stop"
        assert all("usage" not in chunk for chunk in chunks)
        assert len({chunk["id"] for chunk in chunks}) == 1


async def test_usage_comes_last_where_it_is_asked_for_and_always_where_that_is() -> None:
    async with served(echo_engine(step_seconds=0.001)) as client:
        body = completion("hello", stream=True, stream_options={"include_usage": True})
        chunks = events((await client.post("/v1/completions", json=body)).text)
        assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
        assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["total_tokens"] == 11
        body["stream_options"]["continuous_usage_stats"] = True
        chunks = events((await client.post("/v1/completions", json=body)).text)
        generated = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert generated == sorted(generated) and generated[-1] == 6
        assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {5}


async def test_many_prompts_have_their_branches_in_order() -> None:
    async with served() as client:
        body = completion(["one", "two"], n=2)
        found = (await client.post("/v1/completions", json=body)).json()
        assert [(c["index"], c["text"]) for c in found["choices"]] == [(0, "one"), (1, "one"), (2, "two"), (3, "two")]
        assert found["usage"]["prompt_tokens"] == 6
        chunks = events((await client.post("/v1/completions", json=body | {"stream": True})).text)
        texts = dict.fromkeys(range(4), "")
        for chunk in chunks:
            for choice in chunk["choices"]:
                texts[choice["index"]] += choice["text"]
        assert texts == {0: "one", 1: "one", 2: "two", 3: "two"}


@pytest.mark.parametrize("prompt", [[104, 105], [[104, 105]]])
async def test_a_prompt_may_be_token_ids(prompt: Any) -> None:
    async with served() as client:
        found = (await client.post("/v1/completions", json=completion(prompt, echo=True))).json()
        assert [choice["text"] for choice in found["choices"]] == ["hihi"]


async def test_logprobs_are_those_of_the_text_s_tokens() -> None:
    async with served() as client:
        for logprobs in (0, 1):
            found = (await client.post("/v1/completions", json=completion("abc", logprobs=logprobs))).json()
            [choice] = found["choices"]
            assert choice["logprobs"] == {
                "tokens": ["a", "b", "c"],
                "token_logprobs": [0.0, -1.0, -2.0],
                "top_logprobs": [{"a": 0.0}, {"b": -1.0}, {"c": -2.0}] if logprobs else None,
                "text_offset": [0, 1, 2],
            }
            body = completion("abc", logprobs=logprobs, stream=True)
            chunks = events((await client.post("/v1/completions", json=body)).text)
            parts = [choice["logprobs"] for chunk in chunks for choice in chunk["choices"]]
            assert [token for part in parts for token in part["tokens"]] == ["a", "b", "c"]
            assert [offset for part in parts for offset in part["text_offset"]] == [0, 1, 2]


async def test_fewest_and_most_tokens_stop_strings_and_end_of_text_are_honoured() -> None:
    async def text(**fields: Any) -> tuple[str, str]:
        answer = await client.post("/v1/completions", json=completion("a prompt", **fields))
        [choice] = answer.json()["choices"]
        return choice["text"], choice["finish_reason"]

    async with served(scripted_engine("one, two, three, four, five")) as client:
        assert await text() == ("one, two, three,", "length")  # OpenAI's default is 16
        assert await text(max_tokens=5) == ("one, ", "length")
        assert await text(max_tokens=100, stop=", three") == ("one, two", "stop")
        assert await text(max_tokens=100, stop=["nothing", " two"]) == ("one,", "stop")
        assert await text(max_tokens=100, stop_token_ids=[ord("t")]) == ("one, ", "stop")
        ignored, reason = await text(max_tokens=40, ignore_eos=True)
        assert ignored == "one, two, three, four, five" and reason == "length"


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"suffix": "x"}, "suffix"),
    ({"best_of": 3}, "best_of"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"prompt_logprobs": -1, "echo": True, "logprobs": 1}, "prompt_logprobs"),
    ({"echo": True, "logprobs": 21}, "logprobs"),
    ({"n": 0}, "n"),
    ({"n": "two"}, "n"),
    ({"temperature": -1}, "temperature"),
    ({"top_p": 2}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"frequency_penalty": 3}, "frequency_penalty"),
    ({"logprobs": 21}, "logprobs"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"100000": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 1000}}, "logit_bias"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", ""]}, "stop"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"min_tokens": 4, "max_tokens": 2}, "min_tokens"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [1000]}, "prompt"),
    ({"prompt": "x" * 5000}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"response_format": {"type": "made up"}}, "response_format"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_everything": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    ({"deadlines": {"total": -1}}, "deadlines"),
    ({"priority": "high"}, "priority"),
    ({"messages": []}, "messages"),
    ({"max_tokns": 3}, "max_tokns"),
]


async def test_what_is_wrong_is_a_400_by_name() -> None:
    async with served() as client:
        for fields, param in WRONG:
            refused = await client.post("/v1/completions", json=completion(**{"prompt": "hello", **fields}))
            assert refused.status_code == 400, (fields, refused.text)
            assert error(refused)["param"] == param, refused.text
            after = await client.post("/v1/completions", json=completion("hello"))
            assert after.json()["choices"][0]["text"] == "hello"


async def test_nothing_is_passed_over_in_silence() -> None:
    async with served() as client:
        for body in (completion(), completion(stream=True)):
            ignored = await client.post("/v1/completions", json=body | {"user": "me", "store": None, "metadata": {}})
            assert ignored.headers["x-ignored-fields"] == "metadata, user"
        honoured = await client.post("/v1/completions", json=completion(suffix=None, seed=3, top_k=-1))
        assert honoured.status_code == 200 and "x-ignored-fields" not in honoured.headers
        unknown = await client.post("/v1/completions", json=completion(temprature=1))
        assert "did you mean 'temperature'?" in error(unknown)["message"]


@pytest.mark.loops("each")
async def test_an_error_inside_a_stream_has_the_shape_of_an_error() -> None:
    engine = scripted_engine({"known": "hello"})
    async with served(engine) as client:
        dropped = await client.post("/v1/completions", json=completion("strange", stream=True))
        assert dropped.status_code == 200
        *_, last = events(dropped.text)
        assert set(last["error"]) == {"message", "type", "param", "code"}
        assert last["error"]["code"] == "request_dropped"
        whole = await client.post("/v1/completions", json=completion("strange"))
        assert whole.status_code == 400 and error(whole)["code"] == "request_dropped"
        many = await client.post("/v1/completions", json=completion(["known", "strange"]))
        assert many.status_code == 400
        await engine.debug_call_func_on_all_workers("fail_next", RuntimeError("boom"))
        failed = await client.post("/v1/completions", json=completion("known", stream=True))
        *_, last = events(failed.text)
        assert last["error"]["type"] == "api_error" and last["error"]["code"] == "step"


@pytest.mark.loops("each")
async def test_a_deadline_ends_a_request_with_an_error() -> None:
    async with served(echo_engine(step_seconds=0.01)) as client:
        body = completion("x" * 500, max_tokens=400, deadlines={"total": 0.05})
        late = await client.post("/v1/completions", json=body)
        assert late.status_code == 408 and error(late)["code"] == "deadline_exceeded"
        chunks = events((await client.post("/v1/completions", json=body | {"stream": True})).text)
        assert chunks[-1]["error"]["code"] == "deadline_exceeded"


async def test_a_lower_priority_goes_first() -> None:
    engine = echo_engine(max_num_sequence=1)
    async with served(engine) as client:
        await engine.pause()
        done: list[int] = []

        async def ask(priority: int) -> None:
            await client.post("/v1/completions", json=completion(f"p{priority}", priority=priority))
            done.append(priority)

        calls = []
        for count, priority in enumerate((5, 1, -3), 1):
            calls.append(asyncio.ensure_future(ask(priority)))
            await until(lambda count=count: engine.metrics().num_requests_waiting >= count)
        await engine.resume()
        await asyncio.gather(*calls)
        assert done == [-3, 1, 5]


async def test_echoed_logprobs_are_those_that_the_engine_scores() -> None:
    texts = ["Once upon a time", "What is the capital of France?"]
    async with AsyncEngine(EngineConfig("tiny", mode="local")) as engine:
        async with client_of(create_app(engine)) as client:
            scores = await engine.score(texts, top_logprobs=2)
            prompts: list[Any] = [texts, [score.token_ids for score in scores]]
            for limit in (0, 1):
                for prompt in prompts:
                    body = {"prompt": prompt, "echo": True, "logprobs": 2, "max_tokens": limit, "temperature": 0}
                    found = (await client.post("/v1/completions", json=body)).json()["choices"]
                    for text, score, choice in zip(texts, scores, found, strict=True):
                        _check_scores(choice, score, text, limit)
                    chunks = events((await client.post("/v1/completions", json=body | {"stream": True})).text)
                    for index, choice in enumerate(found):
                        parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
                        assert "".join(part["text"] for part in parts) == choice["text"]
                        for name, whole in choice["logprobs"].items():
                            assert [entry for part in parts for entry in part["logprobs"][name]] == whole


def _check_scores(choice: dict[str, Any], score: PromptScore, text: str, limit: int) -> None:
    found, size = choice["logprobs"], len(score.token_ids)
    assert choice["text"].startswith(text)
    assert {len(values) for values in found.values()} == {size + limit}, "one entry per token, also of one that ends it"
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    assert found["tokens"][0] == "<|bos|>" and "".join(found["tokens"][1:size]) == text
    for offset, token in zip(found["text_offset"][1:size], found["tokens"][1:size], strict=True):
        assert text[offset:].startswith(token)
    assert found["text_offset"][:2] == [0, 0]
    for logprob, top, entry in zip(
        found["token_logprobs"][1:size], found["top_logprobs"][1:size], score.logprobs[1:], strict=True
    ):
        assert entry is not None and logprob == pytest.approx(entry.logprob, abs=1e-4)
        assert max(top.values()) == pytest.approx(entry.top_logprobs[0], abs=1e-4)
        assert len(top) == (2 if any(entry.logprob == other for other in entry.top_logprobs) else 3)


async def test_prompt_logprobs_are_a_field_of_their_own() -> None:
    async with echo_engine() as engine:
        async with client_of(create_app(engine)) as client:
            [score] = await engine.score(["Once upon a time"], top_logprobs=3)
            body = completion("Once upon a time", prompt_logprobs=3, max_tokens=2, n=2)
            for choice in (await client.post("/v1/completions", json=body)).json()["choices"]:
                assert choice["logprobs"] is None and choice["text"] == "On"
                assert choice["prompt_logprobs"][0] is None
                for token, found, entry in zip(
                    score.token_ids[1:], choice["prompt_logprobs"][1:], score.logprobs[1:], strict=True
                ):
                    assert entry is not None
                    assert found[str(token)]["logprob"] == pytest.approx(entry.logprob, abs=1e-4)
                    for rank, other in enumerate(entry.top_ids, 1):
                        assert found[str(other)]["rank"] == rank
                    assert found[str(token)]["rank"] is None or token in entry.top_ids
            chunks = events((await client.post("/v1/completions", json=body | {"stream": True, "n": 1})).text)
            having = [c for chunk in chunks for c in chunk["choices"] if "prompt_logprobs" in c]
            assert len(having) == 1 and len(having[0]["prompt_logprobs"]) == len(score.token_ids)


@pytest.mark.loops("each")
async def test_a_prompt_that_is_aborted_before_it_is_scored_is_an_error() -> None:
    engine = echo_engine(max_num_sequence=1)
    async with served(engine) as client:
        await engine.pause()
        body = completion("hello", echo=True, logprobs=1, max_tokens=0)
        asked = asyncio.ensure_future(client.post("/v1/completions", json=body))
        await until(lambda: engine.metrics().num_requests_waiting == 1)
        await engine.reset()
        response = await asked
        assert response.status_code == 503 and error(response)["code"] == "request_aborted"
