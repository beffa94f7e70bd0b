from __future__ import annotations

import numpy as np
import torch

from asyncengine.model.packed_buffer import PackedBuffer

CPU = torch.device("cpu")


def test_sections_arrive_under_their_names_at_aligned_places() -> None:
    buffer = PackedBuffer(CPU, capacity=64)
    sent = buffer.send_sections({"ids": np.arange(5), "slots": np.array([-1, 2**31 - 1]), "none": np.zeros(0)})
    assert {name: view.tolist() for name, view in sent.items()} == {
        "ids": [0, 1, 2, 3, 4],
        "slots": [-1, 2**31 - 1],
        "none": [],
    }
    assert all(view.dtype == torch.int32 for view in sent.values())
    assert all((view.data_ptr() - buffer.tensor.data_ptr()) % 16 == 0 for view in sent.values())


def test_the_address_on_the_device_stays() -> None:
    buffer = PackedBuffer(CPU, capacity=8)
    first = buffer.send(np.arange(8, dtype=np.int32))
    address, generation = first.data_ptr(), buffer.generation
    for i in range(10):
        assert buffer.send(np.full(3, i, np.int32)).data_ptr() == address
        assert first[:4].tolist() == [i, i, i, 3]
    assert buffer.generation == generation


def test_a_buffer_that_is_too_small_grows_and_says_so() -> None:
    buffer = PackedBuffer(CPU, capacity=8)
    old = buffer.tensor
    assert not buffer.reserve(8)
    assert buffer.send(np.arange(9, dtype=np.int32)).tolist() == list(range(9))
    assert buffer.generation == 1
    assert buffer.tensor is not old
    assert buffer.capacity == 16


def test_a_step_does_not_write_where_the_one_before_is_still_read_from() -> None:
    buffer = PackedBuffer(CPU, capacity=4, places=3)
    arrays = [buffer._host_array().ctypes.data for _ in range(4) if buffer._copy(0, 1) is not None]
    assert len(set(arrays[:3])) == 3
    assert arrays[3] == arrays[0]
