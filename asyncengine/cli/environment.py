"""``asyncengine env``: what there is on this machine, for a report of a problem."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

_PACKAGES = (
    "torch", "transformers", "tokenizers", "safetensors", "huggingface-hub", "numpy", "anyio", "uvloop", "triton",
    "flashinfer-python", "flash-attn-3", "starlette", "uvicorn", "msgspec", "prometheus-client", "httpx", "typer",
    "rich",
)  # fmt: skip


def environment() -> None:
    """Show versions, cores, devices, the compiler and the kernel cache."""
    rows = list(_rows())
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:{width}}  {value}")


def _rows() -> Iterator[tuple[str, str]]:
    from importlib import metadata  # brings the email package

    from asyncengine._version import __version__

    yield "asyncengine", __version__
    yield "Python", f"{platform.python_version()} ({sys.implementation.name}), {platform.platform()}"
    for package in _PACKAGES:
        try:
            yield package, metadata.version(package)
        except metadata.PackageNotFoundError:
            yield package, "not installed"
    yield from _machine()
    yield from _compiler()


def _machine() -> Iterator[tuple[str, str]]:
    import torch

    from asyncengine.model.memory import GIB, free_bytes, total_bytes

    cpu = torch.device("cpu")
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield "cores", f"{usable} usable of {os.cpu_count()}, {torch.get_num_threads()} threads in torch"
    yield "instructions", torch.backends.cpu.get_cpu_capability()
    yield "memory", f"{free_bytes(cpu) / GIB:.1f} GiB free of {total_bytes(cpu) / GIB:.1f} GiB"
    if not torch.cuda.is_available():
        yield "CUDA", "no device" + ("" if torch.version.cuda else "; this torch is built without it")
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        free, total = free_bytes(device) / GIB, total_bytes(device) / GIB
        yield f"cuda:{index}", f"{torch.cuda.get_device_name(device)}, {free:.1f} GiB free of {total:.1f} GiB"


def _compiler() -> Iterator[tuple[str, str]]:
    import shlex

    from asyncengine.builds import BuildError, cache_directory, find_compiler

    try:
        yield "compiler", shlex.join(find_compiler())
    except BuildError as error:
        yield "compiler", str(error)
    try:
        home = cache_directory()
    except RuntimeError as error:
        yield "kernel cache", f"none: {error} XDG_CACHE_HOME may name a directory"
        return
    builds = [build for build in sorted(home.iterdir()) if build.is_dir()] if home.is_dir() else []
    size = sum(file.stat().st_size for build in builds for file in build.iterdir())
    yield "kernel cache", f"{_short(home)}, {len(builds)} builds, {size / 1e6:.1f} MB"


def _short(path: Path) -> str:
    try:
        home = Path.home()
    except RuntimeError:  # this user has none, as in a container
        return str(path)
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)
