from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from asyncengine.model.buckets import padding
from asyncengine.model.step_inputs import StepInputs


@pytest.mark.parametrize("packed", [False, True])
def test_inputs_arrive_as_the_model_takes_them(packed: bool) -> None:
    inputs = StepInputs(torch.device("cpu"), packed)
    step = dataclasses.replace(
        padding(3),
        token_ids=np.array([151_935, 0, 7], np.int32),
        positions=np.array([0, 1, 131_071], np.int32),
        sample_index=np.array([2, 2, 0, 1, 1]),
    )
    first = inputs.send(step)
    inputs.send(padding(40))  # the next step leaves this one's alone
    assert [tensor.tolist() for tensor in first] == [[[151_935, 0, 7]], [[0, 1, 131_071]], [2, 2, 0, 1, 1]]
    assert all(tensor.dtype == torch.int64 for tensor in first)


def test_a_step_without_samples() -> None:
    ids, _, index = StepInputs(torch.device("cpu"), packed=True).send(padding(2))
    assert ids.shape == (1, 2)
    assert index.shape == (0,)
