from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

from asyncengine import ConfigError, EngineConfig

WRONG: list[tuple[str, Any, str]] = [
    ("model", "", "expected a non-empty string"),
    ("model", 7, "expected a non-empty string"),
    ("model", None, "expected a non-empty string"),
    ("tokenizer", "", "expected a non-empty string"),
    ("device", "tpu", "allowed: 'auto', 'cpu', 'cuda', 'cuda:N'"),
    ("device", "cuda:", "allowed: 'auto', 'cpu', 'cuda', 'cuda:N'"),
    ("device", "cuda:x", "allowed: 'auto', 'cpu', 'cuda', 'cuda:N'"),
    ("device", "cuda:\N{SUPERSCRIPT TWO}", "allowed: 'auto', 'cpu', 'cuda', 'cuda:N'"),
    ("dtype", "int8", "allowed: 'auto', 'float32', 'bfloat16', 'float16'"),
    ("dtype", ["float32"], "allowed: 'auto', 'float32', 'bfloat16', 'float16'"),
    ("mode", "fast", "allowed: 'local', 'interactive', 'server'"),
    ("max_num_sequence", 0, "expected an integer >= 1"),
    ("max_num_sequence", 1.0, "expected an integer >= 1"),
    ("max_num_sequence", True, "expected an integer >= 1"),
    ("max_total_sequence_length", -1, "expected an integer >= 1"),
    ("max_single_sequence_length", 0, "expected an integer >= 1"),
    ("prefill_chunk_size", 0, "expected an integer >= 1"),
    ("kv_cache_page_size", 0, "expected an integer >= 1"),
    ("kv_cache_page_size", "16", "expected an integer >= 1"),
    ("gpu_memory_utilization", 0.0, "expected a number in (0.0, 1.0]"),
    ("gpu_memory_utilization", 1.01, "expected a number in (0.0, 1.0]"),
    ("gpu_memory_utilization", math.nan, "expected a number in (0.0, 1.0]"),
    ("gpu_memory_utilization", "0.9", "expected a number in (0.0, 1.0]"),
    ("prefix_cache_mode", "lru", "allowed: 'radix', 'disable'"),
    ("prefix_cache_max_num_recycling_seqs", -1, "expected an integer >= 0"),
    ("prefill_mode", "mixed", "allowed: 'hybrid', 'chunked'"),
    ("additional_models", ("draft",), "only 'small_draft' and 'eagle3' take a model"),
    ("additional_models", ["draft"], "only 'small_draft' and 'eagle3' take a model"),
    ("additional_models", [""], "expected a non-empty string"),
    ("additional_models", "draft", "expected a list"),
    ("additional_models", 5, "expected a list"),
    ("speculative_mode", "eagle", "allowed: 'disable', 'ngram', 'small_draft'"),
    ("spec_draft_length", 4, "expected 0, or another speculative_mode"),
    ("spec_draft_length", -1, "expected an integer >= 0"),
    ("spec_draft_length", 33, "expected an integer in 0..32"),
    ("spec_draft_length", None, "expected an integer in 0..32"),
    ("adapters", ["dir"], "expected directories by names"),
    ("adapters", {"": "dir"}, "expected non-empty strings"),
    ("adapters", {"sql": 5}, "expected non-empty strings"),
    ("tensor_parallel_shards", 2, "only 1 is available"),
    ("attention_backend", "flash", "allowed: 'auto', 'cpu', 'torch', 'triton', 'flashinfer', 'flash_attention_3'"),
    ("grammar_backend", "outlines", "allowed: 'auto', 'llguidance', 'xgrammar'"),
    ("decoder_backend", "own", "allowed: 'auto', 'compiled', 'transformers'"),
    ("kv_cache_dtype", "fp8_e5m2", "allowed: 'auto', 'fp8_e4m3'"),
    ("graph_capture", "never", "allowed: 'idle', 'load'"),
    ("quantization", "int5", "allowed: 'auto', 'none', 'int8', 'int4', 'fp8'"),
    ("images", "yes", "allowed: True, False, None"),
    ("audio", "yes", "allowed: True, False, None"),
    ("videos", "yes", "allowed: True, False, None"),
    ("mla", "yes", "allowed: True, False, None"),
    ("max_queue_size", 0, "expected an integer >= 1"),
    ("step_timeout", 0, "expected a number in (0.0, inf]"),
    ("step_timeout", math.nan, "expected a number in (0.0, inf]"),
]


@pytest.mark.parametrize(("name", "value", "allowed"), WRONG)
def test_a_wrong_value_is_named_beside_what_is_allowed(name: str, value: Any, allowed: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(**({"model": "x"} | {name: value}))
    message = str(caught.value)
    assert message.startswith(f"{name} is ")
    assert allowed in message


def test_every_field_is_checked() -> None:
    assert {name for name, _, _ in WRONG} == {field.name for field in dataclasses.fields(EngineConfig)}


RIGHT: dict[str, list[Any]] = {
    "device": ["auto", "cpu", "cuda", "cuda:0", "cuda:12"],
    "max_num_sequence": [None, 1, 4096],
    "gpu_memory_utilization": [None, 0.01, 1, 1.0],
    "prefix_cache_max_num_recycling_seqs": [None, 0, 5],
    "additional_models": [(), []],
    "adapters": [{}, {"sql": "adapters/sql", "law": "law"}],
    "step_timeout": [0.1, 60, math.inf],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in RIGHT.items() for value in values])
def test_what_is_at_the_edge_is_allowed(name: str, value: Any) -> None:
    config = EngineConfig("x", **{name: value})
    assert EngineConfig.from_json(config.to_json()) == config


def test_json_round_trip_keeps_every_field() -> None:
    config = EngineConfig(
        "some/model", tokenizer="t", device="cuda:1", mode="local", max_num_sequence=3, prefill_mode="chunked",
        gpu_memory_utilization=0.5, max_queue_size=9, step_timeout=1.5,
    )  # fmt: skip
    text = config.to_json()
    assert EngineConfig.from_json(text) == config
    assert set(json.loads(text)) == {field.name for field in dataclasses.fields(EngineConfig)}


def test_fields_may_be_left_out_of_the_json() -> None:
    assert EngineConfig.from_json('{"model": "x"}') == EngineConfig("x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tiny", "not JSON"),
        ("tiny", "EngineConfig(model='tiny')"),
        ("", "not JSON"),
        ("[1]", "expected an object"),
        ("null", "expected an object"),
        ("{}", "no 'model'"),
        ('{"model": "x", "max_num_sequences": 4}', "did you mean 'max_num_sequence'?"),
        ('{"model": "x", "zzz": 4}', "known: model, tokenizer"),
        ('{"model": "x", "max_num_sequence": "4"}', "max_num_sequence is '4'"),
    ],
)
def test_bad_json_is_explained(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig.from_json(text)
    assert message in str(caught.value)


def test_deeply_nested_json_is_a_config_error() -> None:
    with pytest.raises(ConfigError):
        EngineConfig.from_json("[" * 100_000)


def test_replace_checks_what_it_changes() -> None:
    config = EngineConfig("x", mode="local")
    assert config.replace(max_num_sequence=2) == EngineConfig("x", mode="local", max_num_sequence=2)
    with pytest.raises(ConfigError, match="did you mean 'max_num_sequence'"):
        config.replace(max_num_seq=2)
    with pytest.raises(ConfigError, match="max_num_sequence is 0"):
        config.replace(max_num_sequence=0)


def test_is_immutable_and_hashable() -> None:
    config = EngineConfig("x", additional_models=[])  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.model = "y"  # type: ignore[misc]
    assert hash(config) == hash(EngineConfig("x"))


def test_is_a_value_error_too() -> None:
    with pytest.raises(ValueError, match="model is ''"):
        EngineConfig("")


def test_a_draft_model_is_named_beside_the_mode_that_uses_it() -> None:
    config = EngineConfig("x", speculative_mode="small_draft", additional_models=["y"], spec_draft_length=4)  # type: ignore[arg-type]
    assert config.additional_models == ("y",)
    assert EngineConfig.from_json(config.to_json()) == config
    with pytest.raises(
        ConfigError, match=r"additional_models is \(\) with speculative_mode 'small_draft'; expected one"
    ):
        EngineConfig("x", speculative_mode="small_draft")
