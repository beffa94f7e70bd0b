import pytest
import torch

from asyncengine.errors import InsufficientMemoryError
from asyncengine.model.memory import GIB, GraphReserve, free_bytes, kv_budget, total_bytes

BLOCK = 1 << 20


def budget(
    available: int = GIB, wanted: int | None = None, useful: int = 10**9, graphs: GraphReserve | None = None
) -> int:
    return kv_budget(
        available=available,
        share=0.5,
        bytes_per_block=BLOCK,
        page_size=16,
        wanted_tokens=wanted,
        useful_tokens=useful,
        graphs=graphs,
    ).num_blocks


def test_takes_its_share_of_what_is_available() -> None:
    assert budget() == 512


def test_takes_no_more_than_can_be_used() -> None:
    assert budget(useful=100) == 7


def test_takes_what_is_wanted_in_whole_blocks() -> None:
    assert budget(wanted=17) == 2


def test_what_does_not_fit_is_refused_with_its_arithmetic() -> None:
    with pytest.raises(InsufficientMemoryError) as caught:
        budget(wanted=16 * 513)
    message = str(caught.value)
    assert "max_total_sequence_length = 8208 needs 513 blocks = 0.50 GiB" in message
    assert "0.5 x 1.00 GiB available / 1024.0 KiB per block of 16 tokens = 512 blocks = 8192 tokens" in message
    assert "lower max_total_sequence_length or raise gpu_memory_utilization" in message


def test_too_little_for_two_blocks_is_refused() -> None:
    with pytest.raises(InsufficientMemoryError, match="raise gpu_memory_utilization or lower kv_cache_page_size"):
        budget(available=BLOCK)


def test_what_graphs_will_take_is_taken_off() -> None:
    assert budget(graphs=GraphReserve(256 << 20, 92)) == 384
    assert budget(wanted=16 * 384, graphs=GraphReserve(256 << 20, 92)) == 384
    with pytest.raises(InsufficientMemoryError) as caught:
        budget(wanted=16 * 385, graphs=GraphReserve(256 << 20, 92))
    message = str(caught.value)
    assert "0.5 x (1.00 GiB available - 0.25 GiB for 92 CUDA graphs) / 1024.0 KiB per block" in message
    assert message.endswith("or lower max_num_sequence, so that there are fewer graphs")
    with pytest.raises(InsufficientMemoryError, match=r"= 0 blocks .* lower max_num_sequence"):
        budget(graphs=GraphReserve(2 * GIB, 92))


def test_free_memory_is_part_of_the_total() -> None:
    cpu = torch.device("cpu")
    assert 0 < free_bytes(cpu) <= total_bytes(cpu)
