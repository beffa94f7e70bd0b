"""The compiled code for the CPU, attention and a decoder's whole step: built with the system's compiler on first use.

A build is kept in the user's cache. It lies in a directory of its own, named by a hash of everything that it depends
on, beside a digest of its bytes. The directory appears by one rename, so processes that build at the same time cannot
see each other's halves.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from asyncengine.model.attention.protocol import BackendUnavailableError

SOURCE = Path(__file__).parents[1] / "decoder" / "decoder.cpp"
_INCLUDED = Path(__file__).with_name("paged_attention.cpp")

_LIBRARY, _DIGEST = "kernels.so", "sha256"
# Infinities and NaN keep their meaning: masks are made of the former, and a model's own NaN must not be hidden.
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
_POINTER, _INTEGER = ctypes.c_void_p, ctypes.c_int64
_FUNCTIONS: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "paged_attention": (ctypes.c_int, (_POINTER, _POINTER, _POINTER)),
    "paged_attention_advise": (None, (_POINTER, _INTEGER)),
    "decoder_lanes": (_INTEGER, ()),
    "decoder_pack": (
        None,
        (_INTEGER, _POINTER, _INTEGER, _INTEGER, _INTEGER, _POINTER, _INTEGER, _INTEGER, _POINTER, _INTEGER),
    ),
    "decoder_step": (ctypes.c_int, (_POINTER, _POINTER)),
}
# Not every compiler knows the first for every processor.
_TARGETS: tuple[tuple[str, ...], ...] = (("-march=native",), ("-mcpu=native",), ())
_COMPILE_SECONDS = 300


def build(progress: Callable[[str], None] | None = None, target: Sequence[str] | None = None) -> Path:
    """Returns the path of the compiled kernel, compiling it in a subprocess if the cache has none that fits.

    Safe to call from several threads and processes at once. Waiting for the compiler does not hold the GIL.

    Args:
        progress: Called with a sentence before something slow happens.
        target: The compiler's flags for the processor; None is this machine's own.

    Raises:
        BackendUnavailableError: There is no compiler, or it failed; the message says which.
    """
    compiler = find_compiler()
    openmp = _find_openmp()
    runtime = (str(openmp), f"-Wl,-rpath,{openmp.parent}") if openmp else ("-DPAGED_ATTENTION_SERIAL",)
    targets = _TARGETS if target is None else (tuple(target),)
    home = cache_directory() / f"kernels-{_key(compiler, runtime, targets)}"
    if _is_intact(home):
        return home / _LIBRARY
    if progress is not None:
        progress(f"compiling the kernels with {shlex.join(compiler)}")
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        workspace = Path(tempfile.mkdtemp(prefix="building-", dir=home.parent))
    except OSError:  # no cache to write to: build for this process alone
        workspace = Path(tempfile.mkdtemp(prefix="asyncengine-"))
        atexit.register(shutil.rmtree, workspace, ignore_errors=True)
        return _compile(compiler, runtime, targets, workspace)
    try:
        library = _compile(compiler, runtime, targets, workspace)
        (workspace / _DIGEST).write_text(_digest(library))
        return _publish(workspace, home) / _LIBRARY
    finally:
        shutil.rmtree(workspace, ignore_errors=True)


def load(library: Path) -> ctypes.CDLL:
    """Loads what `build` returned; calls through it release the GIL.

    Raises:
        BackendUnavailableError: The library cannot be loaded.
    """
    try:
        loaded = ctypes.CDLL(str(library))
    except OSError as error:
        raise BackendUnavailableError(f"cannot load the compiled attention kernel {library}: {error}") from error
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


def find_compiler() -> list[str]:
    """The command that compiles C++.

    Raises:
        BackendUnavailableError: There is none.
    """
    wanted = os.environ.get("CXX")
    if wanted:
        name, *arguments = shlex.split(wanted)  # as in "ccache g++"
        if found := shutil.which(name):
            return [found, *arguments]
        reason = f"$CXX is {wanted!r}, which cannot be run"
    else:
        names = ("c++", "g++", "clang++")
        for name in names:
            if found := shutil.which(name):
                return [found]
        reason = f"none of {', '.join(names)} is on the PATH"
    raise BackendUnavailableError(f"the cpu attention back end needs a C++ compiler: {reason}")


def _find_openmp() -> Path | None:
    """Finds the OpenMP runtime that torch uses: its own, or else the one that it made the process load."""
    own = sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*"))
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    loaded = [Path(line.split(maxsplit=5)[5]) for line in lines if "omp" in line and "/" in line]
    for candidates in (own, loaded):
        for stem in ("libgomp", "libiomp5", "libomp"):
            for candidate in candidates:
                if candidate.name.startswith((f"{stem}.", f"{stem}-")):
                    return candidate
    return None


def cache_directory() -> Path:
    """Where builds are kept; it need not exist."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home and os.path.isabs(home) else Path.home() / ".cache") / "asyncengine"


def _key(compiler: Sequence[str], runtime: Sequence[str], targets: Sequence[Sequence[str]]) -> str:
    # Size and time stand for the compiler's version: to ask it would cost a process on every load.
    executable = Path(compiler[0]).resolve()
    status = executable.stat()
    identity = (
        str(executable),
        tuple(compiler[1:]),
        status.st_size,
        status.st_mtime_ns,
        _FLAGS,
        tuple(runtime),
        tuple(map(tuple, targets)),
    )
    seed = f"{identity}{platform.machine()}{sys.platform}{_processor()}".encode()
    return hashlib.sha256(seed + SOURCE.read_bytes() + _INCLUDED.read_bytes()).hexdigest()[:32]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    described = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return "".join(sorted({line for line in lines if line.startswith(described)}))


def _compile(
    compiler: Sequence[str], runtime: Sequence[str], targets: Sequence[Sequence[str]], workspace: Path
) -> Path:
    library = workspace / _LIBRARY
    errors = ""
    for target in targets:
        command = [*compiler, *_FLAGS, *target, str(SOURCE), "-o", str(library), *runtime]
        try:
            finished = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_COMPILE_SECONDS, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise BackendUnavailableError(f"the cpu attention back end could not be compiled: {error}") from error
        if finished.returncode == 0:
            return library
        errors = finished.stderr
    raise BackendUnavailableError(
        f"the cpu attention back end could not be compiled with {compiler}:\n{errors[-2000:]}"
    )


def _publish(workspace: Path, home: Path) -> Path:
    """Moves a finished build to its place and returns where it is; another process may have been faster."""
    for _ in range(3):
        try:
            workspace.rename(home)
            return home
        except OSError:
            if _is_intact(home):
                return home
            shutil.rmtree(home, ignore_errors=True)  # damaged
    kept = Path(tempfile.mkdtemp(prefix="asyncengine-"))
    atexit.register(shutil.rmtree, kept, ignore_errors=True)
    shutil.copyfile(workspace / _LIBRARY, kept / _LIBRARY)
    return kept


def _is_intact(home: Path) -> bool:
    try:
        return (home / _DIGEST).read_text() == _digest(home / _LIBRARY)
    except OSError:
        return False


def _digest(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()
