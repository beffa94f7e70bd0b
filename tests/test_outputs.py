from __future__ import annotations

import dataclasses
import json

import pytest

from asyncengine import BranchResult, FinishReason, RequestOutput, RequestResult, Usage


def branch(index: int, text: str) -> BranchResult:
    return BranchResult(text, [1, 2], None, index, FinishReason.STOP, None)


def test_a_finish_reason_compares_equal_to_its_string() -> None:
    assert FinishReason.STOP == "stop" and f"{FinishReason.LENGTH}" == "length"
    assert [str(reason) for reason in FinishReason] == ["stop", "length", "abort", "error"]
    assert json.dumps(FinishReason.ABORT) == '"abort"'


def test_usage_adds_up() -> None:
    assert Usage(3, 4).total_tokens == 7


def test_a_result_reads_like_its_first_branch() -> None:
    result = RequestResult("r", [branch(0, "a"), branch(1, "b")], Usage(1, 4))
    assert (result.text, result.token_ids, result.finish_reason) == ("a", [1, 2], "stop")


@pytest.mark.parametrize("value", [Usage(1, 2), branch(0, "x"), RequestResult("r")])
def test_results_are_immutable(value: object) -> None:
    name = dataclasses.fields(value)[0].name  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, name, None)


def test_a_delta_has_no_more_than_was_asked_for() -> None:
    delta = RequestOutput("a", [97])
    assert (delta.logprobs, delta.index, delta.finish_reason, delta.stop_reason) == (None, 0, None, None)
