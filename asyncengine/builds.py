"""Code that the system's compiler makes on this machine, on first use, and the cache where it is kept.

A build lies in a directory of its own, named by a hash of everything that it depends on, beside a digest of its bytes.
The directory appears by one rename, so processes that build at the same time cannot see each other's halves. Of those
that want the same, one compiles and the others wait for it.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_DIGEST = "sha256"
_COMPILE_SECONDS = 300


class BuildError(Exception):
    """There is no compiler, or it failed; the message says which."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """One library and how it is compiled.

    Attributes:
        what: What it is, in messages.
        name: Of the library's file, without ending; the build's directory begins with it.
        sources: The first is compiled; the others are included by it.
        before: Arguments of the compiler before the source.
        targets: Arguments that say for which processor, the best first: not every compiler knows all of them.
        after: Arguments after the source.
    """

    what: str
    name: str
    sources: tuple[Path, ...]
    before: tuple[str, ...]
    targets: tuple[tuple[str, ...], ...] = ((),)
    after: tuple[str, ...] = ()

    @property
    def library(self) -> str:
        """The name of the library's file."""
        return f"{self.name}.so"


def build(recipe: Recipe, compiler: Sequence[str], progress: Callable[[str], None] | None = None) -> Path:
    """Returns the path of the compiled library, compiling it in a subprocess if the cache has none that fits.

    Safe to call from several threads and processes at once. Waiting for the compiler does not hold the GIL.

    Args:
        recipe: What to compile.
        compiler: Of `find_compiler`.
        progress: Called with a sentence before something slow happens.

    Raises:
        BuildError: The compiler failed, or there is no place for what it makes.
    """
    try:
        return _build(recipe, compiler, progress)
    except OSError as error:
        raise BuildError(f"{recipe.what} could not be compiled: {error}") from error


def _build(recipe: Recipe, compiler: Sequence[str], progress: Callable[[str], None] | None) -> Path:
    name = f"{recipe.name}-{_key(recipe, compiler)}"
    try:
        home = cache_directory() / name
    except RuntimeError:  # this user has no home directory, as in a container
        home = Path(os.devnull, name)
    if _is_intact(home, recipe):
        return home / recipe.library
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        workspace = Path(tempfile.mkdtemp(prefix="building-", dir=home.parent))
    except OSError:  # no cache to write to: build for this process alone
        workspace = Path(tempfile.mkdtemp(prefix="asyncengine-"))
        atexit.register(shutil.rmtree, workspace, ignore_errors=True)
        return _compile(recipe, compiler, workspace, progress)
    try:
        with _alone(home, recipe.what, progress):
            if _is_intact(home, recipe):
                return home / recipe.library
            library = _compile(recipe, compiler, workspace, progress)
            (workspace / _DIGEST).write_text(_digest(library))
            return _publish(recipe, workspace, home) / recipe.library
    finally:
        shutil.rmtree(workspace, ignore_errors=True)


@contextlib.contextmanager
def _alone(home: Path, what: str, progress: Callable[[str], None] | None) -> Iterator[None]:
    """Within the block no other process or thread compiles the same, unless files cannot be locked there, or one has
    been at it for longer than a compiler may take.
    """
    from filelock import FileLock, Timeout  # comes with torch

    lock = FileLock(home.with_name(f"{home.name}.lock"), fallback_to_soft=False)
    try:
        try:
            lock.acquire(blocking=False)
        except Timeout:
            if progress is not None:
                progress(f"waiting for another process that compiles {what}")
            lock.acquire(timeout=_COMPILE_SECONDS)
    except Timeout:
        pass
    except (OSError, NotImplementedError):  # on some network drives; then each compiles for itself
        with contextlib.suppress(OSError):
            os.unlink(lock.lock_file)
    try:
        yield
    finally:
        if lock.is_locked:
            with contextlib.suppress(OSError):
                os.unlink(lock.lock_file)  # who waits has the file open; who comes later finds the build
            lock.release()


def find_compiler(variable: str = "CXX", names: Sequence[str] = ("c++", "g++", "clang++")) -> list[str]:
    """The command that compiles C++, or with other arguments C.

    Args:
        variable: Of the environment, by which the user may choose.
        names: Of compilers, to be looked for on the PATH.

    Raises:
        BuildError: There is none.
    """
    wanted = os.environ.get(variable)
    if wanted:
        try:
            name, *arguments = shlex.split(wanted)  # as in "ccache g++"
        except ValueError as error:
            raise BuildError(f"${variable} is {wanted!r}, which is not a command: {error}") from error
        if found := shutil.which(name):
            return [found, *arguments]
        raise BuildError(f"${variable} is {wanted!r}, which cannot be run")
    for name in names:
        if found := shutil.which(name):
            return [found]
    raise BuildError(f"none of {', '.join(names)} is on the PATH")


def cache_directory() -> Path:
    """Where builds are kept; it need not exist."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home and os.path.isabs(home) else Path.home() / ".cache") / "asyncengine"


def _key(recipe: Recipe, compiler: Sequence[str]) -> str:
    # Size and time stand for the compiler's version: to ask it would cost a process on every load.
    executable = Path(compiler[0]).resolve()
    status = executable.stat()
    identity = (
        str(executable),
        tuple(compiler[1:]),
        status.st_size,
        status.st_mtime_ns,
        recipe.before,
        recipe.targets,
        recipe.after,
    )
    seed = f"{identity}{platform.machine()}{sys.platform}{processor()}".encode()
    return hashlib.sha256(seed + b"".join(source.read_bytes() for source in recipe.sources)).hexdigest()[:32]


@cache
def processor() -> str:
    """What the system says of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    described = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return "".join(sorted({line for line in lines if line.startswith(described)}))


def _compile(recipe: Recipe, compiler: Sequence[str], workspace: Path, progress: Callable[[str], None] | None) -> Path:
    if progress is not None:
        progress(f"compiling the {recipe.name} with {shlex.join(compiler)}")
    library = workspace / recipe.library
    said = ""
    for target in recipe.targets:
        source = str(recipe.sources[0])
        command = [*compiler, *recipe.before, *target, source, "-o", str(library), *recipe.after]
        try:
            finished = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_COMPILE_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise BuildError(f"{recipe.what} could not be compiled: {error}") from error
        if finished.returncode == 0:
            return library
        said = finished.stderr.strip() or f"exit status {finished.returncode}"
    raise BuildError(f"{recipe.what} could not be compiled with {shlex.join(compiler)}:\n{said[-2000:]}")


def _publish(recipe: Recipe, workspace: Path, home: Path) -> Path:
    """Moves a finished build to its place and returns where it is; another process may have been faster."""
    for _ in range(3):
        try:
            workspace.rename(home)
            return home
        except OSError:
            if _is_intact(home, recipe):
                return home
            shutil.rmtree(home, ignore_errors=True)  # damaged
    kept = Path(tempfile.mkdtemp(prefix="asyncengine-"))
    atexit.register(shutil.rmtree, kept, ignore_errors=True)
    shutil.copyfile(workspace / recipe.library, kept / recipe.library)
    return kept


def _is_intact(home: Path, recipe: Recipe) -> bool:
    try:
        return (home / _DIGEST).read_text() == _digest(home / recipe.library)
    except OSError:
        return False


def _digest(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()
