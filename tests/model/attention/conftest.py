import functools
from collections.abc import Iterator

import pytest
import torch
from triton_device import TritonOnDevice, require_triton

from asyncengine.model.attention.cpu import CpuAttention
from asyncengine.model.attention.protocol import AttentionBackend, BackendUnavailableError
from asyncengine.model.attention.reference import TorchAttention


@functools.cache
def _cpu_attention() -> CpuAttention:
    return CpuAttention()


@pytest.fixture(scope="session")
def cpu_backend() -> CpuAttention:
    try:
        return _cpu_attention()
    except BackendUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def triton_backend() -> TritonOnDevice:
    require_triton()
    return TritonOnDevice(programs=12, parts_bytes=1 << 19)


@pytest.fixture(scope="session", params=["torch", "cpu", "triton"])
def backend(request: pytest.FixtureRequest) -> AttentionBackend:
    return TorchAttention() if request.param == "torch" else request.getfixturevalue(f"{request.param}_backend")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors on a shared machine: threads would mostly wait for each other. Tests of threads ask for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
