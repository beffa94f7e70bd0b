"""The pretended device holds against a program what a device would, so that its tests can fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from asyncengine.model.graph_recorder import CudaRecorder
from tests.model.cuda.pretended import Pretended, pretended


@pytest.fixture
def device() -> Iterator[Pretended]:
    with pretended() as device, torch.inference_mode():
        yield device


def test_computes_in_its_own_memory(device: Pretended) -> None:
    there = torch.arange(6.0).view(2, 3).to("cuda")
    there[1] += 1
    assert there.is_cuda and device.allocated == 24
    assert (there @ there.T).cpu().tolist() == [[5, 17], [17, 77]]
    del there
    assert device.allocated == 0


@pytest.mark.parametrize(
    "mixed",
    [
        lambda there: there + torch.ones(4),
        lambda there: there[torch.tensor([0, 1])],
        lambda there: torch.where(torch.ones(4, dtype=torch.bool), there, there),
        lambda there: there.int().view(1, 4) @ there.int().view(4, 1),  # CUDA has no such product
        lambda there: there.numpy(),
    ],
)
def test_takes_no_tensors_of_the_host(mixed: Callable[[torch.Tensor], object], device: Pretended) -> None:
    there = torch.ones(4, device="cuda")
    with pytest.raises((RuntimeError, TypeError)):
        mixed(there)
    assert (there + torch.tensor(1.0)).cpu().tolist() == [2.0] * 4  # a number of the host is no tensor


@pytest.mark.parametrize(
    "waiting",
    [
        lambda there: there.item(),
        lambda there: there.cpu(),
        lambda there: there.tolist(),
        lambda there: there.nonzero(),
        lambda there: there[there > 0],
        lambda there: bool((there > 0).all()),
        lambda there: there.copy_(torch.ones(1), non_blocking=True),
        lambda there: torch.cuda.synchronize(),
    ],
)
def test_knows_who_waits_for_it(waiting: Callable[[torch.Tensor], object], device: Pretended) -> None:
    there = torch.ones(1, device="cuda")
    with device.no_waits():
        there.copy_(torch.zeros(1).pin_memory(), non_blocking=True)
        with pytest.raises(AssertionError, match="waits"):
            waiting(there)
    with pytest.raises(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph()):
        waiting(there)


def test_a_copy_to_the_host_is_there_when_it_was_waited_for(device: Pretended) -> None:
    there, here = torch.ones(2, device="cuda"), torch.empty(2, pin_memory=True)
    here.copy_(there, non_blocking=True)
    done = torch.cuda.Event()
    done.record()
    assert here.isnan().all()
    done.synchronize()
    assert here.tolist() == [1, 1]


def test_pinned_memory_is_not_written_while_it_is_read(device: Pretended) -> None:
    here = torch.zeros(2, pin_memory=True).zero_()
    torch.empty(2, device="cuda").copy_(here, non_blocking=True)
    here[0] = 1
    with pytest.raises(AssertionError, match="written while"):
        torch.cuda.synchronize()


def test_streams_wait_for_each_other(device: Pretended) -> None:
    there, side = torch.ones(2, device="cuda"), torch.cuda.Stream()
    with torch.cuda.stream(side), pytest.raises(AssertionError, match="may yet write"):
        there + 1
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        there + 1
    with pytest.raises(AssertionError, match="may yet read"):
        there.zero_()
    torch.cuda.current_stream().wait_stream(side)
    there.zero_()


def test_a_graph_computes_when_it_is_replayed_and_keeps_what_is_held(device: Pretended) -> None:
    given = torch.ones(2, device="cuda")
    inner: list[torch.Tensor] = []

    def function() -> tuple[torch.Tensor, ...]:
        between = given * 2
        inner.append(between.data_ptr())  # type: ignore[arg-type]
        given.add_(1)
        return (between + 1,)

    replay, (result,) = CudaRecorder(torch.device("cuda", 0)).record(function)
    assert given.cpu().tolist() == [3, 3]  # two warm-ups
    assert result.cpu().isnan().all()
    replay()
    assert result.cpu().tolist() == [7, 7] and given.cpu().tolist() == [4, 4]
    replay()
    assert result.cpu().tolist() == [9, 9] and device.replays == 2


def test_what_is_held_of_a_graph_that_is_gone_keeps_nobody_from_a_capture(device: Pretended) -> None:
    given, made = torch.ones(2, device="cuda"), list[torch.Tensor]()
    recorder = CudaRecorder(torch.device("cuda", 0))

    def function() -> tuple[torch.Tensor, ...]:
        made[:] = [given + 1]
        return (made[0] * 2,)

    recorder.record(function)
    replay, (result,) = recorder.record(lambda: (given + 2,))
    replay()
    assert result.cpu().tolist() == [3, 3] and len(made) == 1


def test_a_recorder_captures_where_one_that_is_gone_did(device: Pretended) -> None:
    """Each stream on which products are made costs memory that is never given back."""
    given = torch.ones(2, 2, device="cuda")
    for _ in range(3):
        CudaRecorder(torch.device("cuda", 0)).record(lambda: (given @ given,))
        assert len(device.multiplied) == 1
    replay, _ = CudaRecorder(torch.device("cuda", 0)).record(lambda: (given @ given,))
    CudaRecorder(torch.device("cuda", 0)).record(lambda: (given @ given,))
    assert len(device.multiplied) == 2  # the first may yet be replayed
    replay()


def test_a_capture_that_breaks_off_holds_nobody_up(device: Pretended) -> None:
    """As torch leaves it, the thread would stay on its stream, and everybody's random numbers would be refused."""
    recorder, stream = CudaRecorder(torch.device("cuda", 0)), torch.cuda.current_stream()
    given = torch.ones(2, device="cuda")
    runs: list[None] = []

    def fails() -> tuple[torch.Tensor, ...]:
        runs.append(None)
        if len(runs) == 3:  # after the warm-ups
            given.cpu()
        return (given + 1,)

    with pytest.raises(RuntimeError, match="between host and device during a capture"):
        recorder.record(fails)
    assert torch.cuda.current_stream() is stream and device.captures_underway == 0
    torch.empty(2, device="cuda").normal_()
    replay, (result,) = recorder.record(lambda: (given + 1,))
    replay()
    assert result.cpu().tolist() == [2, 2]


@pytest.mark.parametrize("ends", [True, False])
def test_a_capture_that_fails_says_what_its_function_said(ends: bool, device: Pretended) -> None:
    given = torch.ones(2, device="cuda")

    def fails() -> tuple[torch.Tensor, ...]:
        try:
            if torch.cuda.is_current_stream_capturing():
                if not ends:  # then the end of the capture fails as well
                    given.cpu()
                raise KeyError("tile")
        except (KeyError, RuntimeError) as error:
            raise MemoryError("of the function") from error
        return (given + 1,)

    with pytest.raises(MemoryError, match="of the function") as raised:
        CudaRecorder(torch.device("cuda", 0)).record(fails)
    assert isinstance(raised.value.__cause__, KeyError if ends else RuntimeError)
