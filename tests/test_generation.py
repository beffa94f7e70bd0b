from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from asyncengine import Deadlines, GenerationConfig, InvalidRequestError, RequestOptions
from asyncengine.generation import GREEDY_BELOW, MAX_BRANCHES, resolve
from asyncengine.generation_fields import MAX_STOP_STR_LENGTH, MAX_STOP_STRS
from asyncengine.loop.encoding import Encoded, encode
from asyncengine.loop.prepare import new_request
from asyncengine.loop.token_ids import token_ids_of
from asyncengine.step.model import ModelView
from asyncengine.testing import ByteTokenizer, ScriptedLoader

from .step.core_case import config, prompt_of

HUGE = 10**400


def refused(make: Callable[[], object], *parts: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        make()
    for part in parts:
        assert part in str(caught.value)


class TestRanges:
    @pytest.mark.parametrize("value", [0, -1, 1025, 1.0, True, "2", None, HUGE])
    def test_n(self, value: Any) -> None:
        refused(lambda: GenerationConfig(n=value), f"n is {value!r}", "allowed: 1..1024")

    @pytest.mark.parametrize("value", [-0.1, 1.01e20, 1e300, math.nan, math.inf, -math.inf, "1", True, HUGE])
    def test_temperature(self, value: Any) -> None:
        refused(lambda: GenerationConfig(temperature=value), f"temperature is {value!r}", "allowed: [0, 1e+20]")

    @pytest.mark.parametrize("value", [0, 0.0, 1.01, -1, math.nan, "x", HUGE])
    def test_top_p(self, value: Any) -> None:
        refused(lambda: GenerationConfig(top_p=value), f"top_p is {value!r}", "allowed: (0, 1]")

    @pytest.mark.parametrize("value", [-0.01, 1.01, math.nan, [], -HUGE])
    def test_min_p(self, value: Any) -> None:
        refused(lambda: GenerationConfig(min_p=value), f"min_p is {value!r}", "allowed: [0, 1]")

    @pytest.mark.parametrize("value", [0, -1, 1.5, True, "all"])
    def test_top_k(self, value: Any) -> None:
        refused(lambda: GenerationConfig(top_k=value), f"top_k is {value!r}", "allowed: >= 1 or None")

    def test_a_value_inside_the_range_is_told_what_it_is_not(self) -> None:
        refused(lambda: GenerationConfig(n=1.5), "n is 1.5; allowed: 1..1024, an integer")  # type: ignore[arg-type]
        refused(lambda: GenerationConfig(top_k=True), "top_k is True; allowed: >= 1 or None, an integer")

    @pytest.mark.parametrize("name", ["frequency_penalty", "presence_penalty"])
    @pytest.mark.parametrize("value", [-2.01, 2.01, math.nan, math.inf, "0"])
    def test_penalties(self, name: str, value: Any) -> None:
        refused(lambda: GenerationConfig(**{name: value}), f"{name} is {value!r}", "allowed: [-2, 2]")

    @pytest.mark.parametrize("value", [0, 0.0, -1, 1e-300, 9e-21, 1.01e20, 1e300, math.inf, math.nan, HUGE])
    def test_repetition_penalty(self, value: Any) -> None:
        refused(
            lambda: GenerationConfig(repetition_penalty=value),
            f"repetition_penalty is {value!r}; allowed: [1e-20, 1e+20]",
        )

    @pytest.mark.parametrize("value", [-1, 21, 1.0, True, None])
    def test_top_logprobs(self, value: Any) -> None:
        refused(
            lambda: GenerationConfig(logprobs=True, top_logprobs=value), f"top_logprobs is {value!r}", "allowed: 0..20"
        )

    def test_top_logprobs_need_logprobs(self) -> None:
        refused(lambda: GenerationConfig(top_logprobs=5), "top_logprobs is 5", "logprobs=True")
        assert GenerationConfig(logprobs=True, top_logprobs=20).top_logprobs == 20

    @pytest.mark.parametrize("value", ["final", None, 1, ["raw"]])
    def test_logprobs_mode(self, value: Any) -> None:
        refused(
            lambda: GenerationConfig(logprobs_mode=value), f"logprobs_mode is {value!r}", "'raw', 'masked', 'processed'"
        )

    @pytest.mark.parametrize("name", ["logprobs", "ignore_eos", "skip_special_tokens", "detokenize", "jump_forward"])
    @pytest.mark.parametrize("value", [1, 0, None, "yes"])
    def test_switches(self, name: str, value: Any) -> None:
        refused(lambda: GenerationConfig(**{name: value}), f"{name} is {value!r}", "expected True or False")

    @pytest.mark.parametrize("value", [-100.5, 101, math.nan, math.inf, "1", None, True, HUGE])
    def test_logit_bias(self, value: Any) -> None:
        refused(lambda: GenerationConfig(logit_bias={5: value}), f"logit_bias[5] is {value!r}", "allowed: [-100, 100]")

    @pytest.mark.parametrize("key", [-1, "5", 1.0, True, None])
    def test_logit_bias_keys(self, key: Any) -> None:
        refused(lambda: GenerationConfig(logit_bias={key: 1.0}), f"logit_bias has key {key!r}", "allowed: token ids")

    @pytest.mark.parametrize("value", [[(1, 2.0)], "5", 5])
    def test_logit_bias_is_a_mapping(self, value: Any) -> None:
        refused(lambda: GenerationConfig(logit_bias=value), f"logit_bias is {value!r}", "mapping of token id to bias")

    @pytest.mark.parametrize("value", [-1, 1.0, "5", True])
    def test_max_tokens(self, value: Any) -> None:
        refused(lambda: GenerationConfig(max_tokens=value), f"max_tokens is {value!r}", "allowed: >= 0 or None")

    @pytest.mark.parametrize("value", [-1, 1.0, None])
    def test_min_tokens(self, value: Any) -> None:
        refused(lambda: GenerationConfig(min_tokens=value), f"min_tokens is {value!r}", "allowed: >= 0")

    def test_min_tokens_lie_below_max_tokens(self) -> None:
        refused(lambda: GenerationConfig(min_tokens=5, max_tokens=4), "min_tokens is 5", "allowed: 0..max_tokens = 4")

    @pytest.mark.parametrize("value", [1.5, "x", True])
    def test_seed(self, value: Any) -> None:
        refused(lambda: GenerationConfig(seed=value), f"seed is {value!r}", "any integer")

    @pytest.mark.parametrize("value", ["", [""], ["a", ""], [5], [None], [b"x"]])
    def test_stop_strs_are_not_empty(self, value: Any) -> None:
        refused(lambda: GenerationConfig(stop_strs=value), "stop_strs has ", "allowed: non-empty strings")

    @pytest.mark.parametrize("value", [5, None, 1.5])
    def test_stop_strs_are_strings(self, value: Any) -> None:
        refused(lambda: GenerationConfig(stop_strs=value), f"stop_strs is {value!r}", "expected a string or a list")

    def test_stop_strs_are_bounded(self) -> None:
        refused(lambda: GenerationConfig(stop_strs=["x"] * 129), "stop_strs has 129 strings", "at most 128")
        refused(lambda: GenerationConfig(stop_strs="x" * 1025), "a string of 1025 characters", "at most 1024")
        GenerationConfig(stop_strs=["x" * MAX_STOP_STR_LENGTH] * MAX_STOP_STRS)

    @pytest.mark.parametrize("value", [[-1], ["a"], [1.0], [True], [None]])
    def test_stop_token_ids(self, value: Any) -> None:
        refused(lambda: GenerationConfig(stop_token_ids=value), f"stop_token_ids has {value[0]!r}", ">= 0")

    @pytest.mark.parametrize("value", [5, "ab", None])
    def test_stop_token_ids_are_a_list(self, value: Any) -> None:
        refused(lambda: GenerationConfig(stop_token_ids=value), f"stop_token_ids is {value!r}", "list of token ids")

    @pytest.mark.parametrize("value", [3, "json", {"type": "json"}, {}, [], {"type": "regex"}])
    def test_response_format_names_what_is_wrong(self, value: Any) -> None:
        refused(lambda: GenerationConfig(response_format=value), "response_format")

    @pytest.mark.parametrize("value", [[], [-1], [1.5], ["a"], "abc", 5, [True]])
    def test_allowed_token_ids_are_a_list_that_is_not_empty(self, value: Any) -> None:
        refused(
            lambda: GenerationConfig(allowed_token_ids=value), "allowed_token_ids", "allowed" if value == [] else ""
        )

    @pytest.mark.parametrize("value", ["word", [""], ["  "], [[]], [[-1]], [[1.5]], [3], 3, {"a": 1}, [["a"]]])
    def test_bad_words_are_texts_or_token_ids(self, value: Any) -> None:
        refused(lambda: GenerationConfig(bad_words=value), "bad_words")

    def test_bad_words_are_not_endless(self) -> None:
        refused(lambda: GenerationConfig(bad_words=["a"] * 1025), "bad_words has 1025", "at most 1024")

    @pytest.mark.parametrize("value", [3, [3], ["name"]])
    def test_logits_processors_are_callables(self, value: Any) -> None:
        refused(lambda: GenerationConfig(logits_processors=value), "logits_processors", "callables")

    @pytest.mark.parametrize("value", [-1, 21, 1.0, True, "3"])
    def test_prompt_logprobs_are_at_most_twenty(self, value: Any) -> None:
        refused(lambda: GenerationConfig(prompt_logprobs=value), f"prompt_logprobs is {value!r}", "0..20 or None")

    def test_what_is_at_the_edge_is_allowed(self) -> None:
        GenerationConfig(
            n=MAX_BRANCHES, temperature=0, top_p=1, top_k=1, min_p=0, frequency_penalty=-2, presence_penalty=2,
            repetition_penalty=1e-20, logprobs=True, top_logprobs=20, logit_bias={0: -100, 1: 100}, max_tokens=0,
            min_tokens=0, seed=-(2**70), stop_strs="x", stop_token_ids=[0],
        )  # fmt: skip
        GenerationConfig(
            temperature=1e20, top_p=5e-324, min_p=1, repetition_penalty=1e20, max_tokens=HUGE, top_k=HUGE, seed=HUGE
        )

    def test_numpy_floats_are_numbers(self) -> None:
        assert GenerationConfig(temperature=np.float64(0.5)).temperature == 0.5


class TestDict:
    def test_unknown_keys_are_refused_with_a_suggestion(self) -> None:
        refused(lambda: GenerationConfig.from_dict({"temprature": 1}), "'temprature'", "did you mean 'temperature'?")
        refused(lambda: GenerationConfig.from_dict({"stop": "x"}), "'stop'", "did you mean 'stop_strs'?")
        refused(lambda: GenerationConfig.from_dict({"zzz": 1}), "'zzz'", "known: n, temperature")
        refused(lambda: GenerationConfig.from_dict({5: 1}), "unknown generation key 5")  # type: ignore[dict-item]

    def test_round_trip(self) -> None:
        generation = GenerationConfig(n=3, stop_strs=["a", "b"], logit_bias={3: 1}, stop_token_ids=[1])
        assert GenerationConfig.from_dict(dataclasses.asdict(generation)) == generation

    def test_replace_checks(self) -> None:
        assert GenerationConfig(n=3).replace(seed=4) == GenerationConfig(n=3, seed=4)
        refused(lambda: GenerationConfig().replace(n=0), "n is 0")
        refused(lambda: GenerationConfig().replace(m=0), "unknown generation key 'm'")

    def test_does_not_share_what_the_caller_may_change(self) -> None:
        bias, stops = {1: 1.0}, ["a"]
        generation = GenerationConfig(logit_bias=bias, stop_strs=stops)
        bias[2] = 1e9
        stops.append("")
        assert generation.logit_bias == {1: 1.0}
        assert generation.stop_strs == ("a",)

    def test_iterators_are_read_once(self) -> None:
        generation = GenerationConfig(stop_strs=iter(["a", "b"]), stop_token_ids=iter([1]))
        assert generation.stop_strs == ("a", "b") and generation.stop_token_ids == (1,)


class TestResolving:
    def resolved(self, generation: GenerationConfig, defaults: GenerationConfig | None = None, **changes: Any) -> Any:
        values: dict[str, Any] = {"vocab_size": 100, "eos_token_ids": (99,), "max_tokens": 50, "seed": 7}
        return resolve(generation, defaults or GenerationConfig(), **(values | changes))

    @pytest.mark.parametrize("token_id", [100, 2**40])
    def test_ids_lie_inside_the_vocabulary(self, token_id: int) -> None:
        refused(
            lambda: self.resolved(GenerationConfig(logit_bias={token_id: 1})),
            f"logit_bias has token id {token_id}", "allowed: 0..99",
        )  # fmt: skip
        refused(
            lambda: self.resolved(GenerationConfig(stop_token_ids=[token_id])),
            f"stop_token_ids has token id {token_id}", "allowed: 0..99",
        )  # fmt: skip

    def test_the_callers_value_goes_before_the_models_before_the_default(self) -> None:
        defaults = GenerationConfig(temperature=0.3, top_k=5, top_p=0.5)
        params = self.resolved(GenerationConfig(temperature=0.9), defaults)
        assert (params.temperature, params.top_k, params.top_p, params.min_p) == (0.9, 5, 0.5, 0.0)
        assert self.resolved(GenerationConfig()).temperature == 1.0

    def test_an_explicit_zero_is_not_a_missing_value(self) -> None:
        defaults = GenerationConfig(temperature=0.3, frequency_penalty=1, min_p=0.5)
        params = self.resolved(GenerationConfig(temperature=0, frequency_penalty=0, min_p=0), defaults)
        assert (params.temperature, params.frequency_penalty, params.min_p) == (0, 0, 0)

    def test_very_low_temperatures_are_greedy(self) -> None:
        assert self.resolved(GenerationConfig(temperature=GREEDY_BELOW / 2)).temperature == 0
        assert self.resolved(GenerationConfig(temperature=GREEDY_BELOW)).temperature == GREEDY_BELOW

    def test_max_tokens_is_capped_by_the_room(self) -> None:
        assert self.resolved(GenerationConfig(max_tokens=80)).max_tokens == 50
        assert self.resolved(GenerationConfig(max_tokens=HUGE, min_tokens=HUGE)).min_tokens == 50
        assert self.resolved(GenerationConfig()).max_tokens == 50
        assert self.resolved(GenerationConfig(max_tokens=0)).max_tokens == 0

    def test_the_end_token_stops_unless_it_is_ignored(self) -> None:
        assert self.resolved(GenerationConfig(stop_token_ids=[3, 99])).stop_token_ids == (3, 99)
        assert self.resolved(GenerationConfig(stop_token_ids=[3], ignore_eos=True)).stop_token_ids == (3,)

    def test_the_seed_is_the_callers_or_a_fresh_one(self) -> None:
        assert self.resolved(GenerationConfig()).seed == 7
        assert self.resolved(GenerationConfig(seed=0)).seed == 0
        assert self.resolved(GenerationConfig(seed=-1)).seed == 2**64 - 1

    def test_a_top_k_of_the_whole_vocabulary_is_off(self) -> None:
        assert self.resolved(GenerationConfig(top_k=100)).top_k == 0
        assert self.resolved(GenerationConfig(top_k=99)).top_k == 99

    def test_the_number_of_logprobs(self) -> None:
        generations = (
            GenerationConfig(),
            GenerationConfig(logprobs=True),
            GenerationConfig(logprobs=True, top_logprobs=5),
        )
        assert [self.resolved(generation).num_logprobs for generation in generations] == [-1, 0, 5]


def view(tokenizer: bool = True, **changes: Any) -> ModelView:
    loader = ScriptedLoader(tokenizer=ByteTokenizer() if tokenizer else None)
    return loader.load(loader.check(config(**changes), None)).view(1)


class TestPrompt:
    @pytest.mark.parametrize("prompt", ["", [], ()])
    async def test_is_not_empty(self, prompt: Any) -> None:
        with pytest.raises(InvalidRequestError, match="at least one token"):
            await encode(prompt, view())

    @pytest.mark.parametrize("prompt", [5, None, b"abc", {"a": 1}, 1.5])
    async def test_is_text_or_ids(self, prompt: Any) -> None:
        with pytest.raises(InvalidRequestError, match="expected a string or token ids"):
            await encode(prompt, view())

    @pytest.mark.parametrize(("ids", "bad"), [([1, 257], 257), ([-1], -1), ([2**40], 2**40), ([HUGE], HUGE)])
    def test_ids_lie_inside_the_vocabulary(self, ids: list[int], bad: int) -> None:
        refused(lambda: token_ids_of(ids, view()), f"token id {bad};", "allowed: 0..256")

    @pytest.mark.parametrize("ids", [["a"], [1.5], [None], [[1]], [True], [False]])
    def test_ids_are_integers(self, ids: Any) -> None:
        refused(lambda: token_ids_of(ids, view()), "not a list of token ids", f"it has {ids[0]!r};", "in 0..256")

    @pytest.mark.parametrize(
        ("changes", "most"),
        [
            ({"max_single_sequence_length": 20, "max_total_sequence_length": 1000}, 20),
            ({"max_single_sequence_length": 1000, "max_total_sequence_length": 20}, 20),
            ({"max_single_sequence_length": 1000, "max_total_sequence_length": 23}, 20),  # whole pages of 4
        ],
    )
    def test_leaves_room_for_one_token(self, changes: dict[str, int], most: int) -> None:
        model = view(**changes)
        request = new_request(1, Encoded(prompt_of("x" * (most - 1))), None, RequestOptions(), model)
        assert request.params.max_tokens == 1
        for length in (most, most + 1, 500):
            refused(
                lambda length=length: new_request(1, Encoded(prompt_of("x" * length)), None, RequestOptions(), model),  # type: ignore[misc]
                f"the prompt has {length} tokens", f"allowed: 1..{most - 1}",
            )  # fmt: skip

    def test_stop_strings_need_a_tokenizer(self) -> None:
        generation = GenerationConfig(stop_strs="x")
        refused(
            lambda: new_request(1, Encoded(prompt_of("x")), generation, RequestOptions(), view(tokenizer=False)),
            "stop_strs",
        )

    def test_the_configuration_is_one(self) -> None:
        refused(
            lambda: new_request(1, Encoded(prompt_of("x")), {"n": 2}, RequestOptions(), view()),
            "expected GenerationConfig",
        )  # type: ignore[arg-type]


class TestOptions:
    @pytest.mark.parametrize("value", ["", 5, b"x"])
    def test_request_id(self, value: Any) -> None:
        refused(lambda: RequestOptions(request_id=value), f"request_id is {value!r}", "non-empty string")

    @pytest.mark.parametrize("value", [1.5, "high", True, None])
    def test_priority(self, value: Any) -> None:
        refused(lambda: RequestOptions(priority=value), f"priority is {value!r}", "an integer")

    @pytest.mark.parametrize("value", [5, {"total": 1}])
    def test_deadlines(self, value: Any) -> None:
        refused(lambda: RequestOptions(deadlines=value), f"deadlines is {value!r}")

    def test_when_full(self) -> None:
        refused(lambda: RequestOptions(when_full="drop"), "when_full is 'drop'", "'wait', 'raise'")  # type: ignore[arg-type]

    @pytest.mark.parametrize("name", ["queue", "first_token", "total"])
    @pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, "1", True, HUGE])
    def test_deadlines_are_seconds(self, name: str, value: Any) -> None:
        refused(lambda: Deadlines(**{name: value}), f"deadline {name} is {value!r}", "allowed: seconds > 0")

    @pytest.mark.parametrize("value", [True, "1", math.nan, math.inf, -math.inf, [1]])
    def test_what_they_are_counted_from_is_a_number(self, value: Any) -> None:
        refused(lambda: Deadlines(since=value), f"deadline since is {value!r}", "allowed: seconds of time.perf_counter")

    def test_very_long_deadlines_are_allowed(self) -> None:
        Deadlines(queue=1e300, first_token=10**12, total=1e-9)
