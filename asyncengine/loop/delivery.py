"""The two pieces of the loop's side that run once per token: handing tokens to branches, and reading them.

They exist twice. `deliver_tokens` and `RequestStream.__anext__` in Python always work. `delivery.c` does the same on
the same objects; it is compiled on first use, when a model is loaded, and serves all engines of the process from then.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import sysconfig
import threading
from asyncio import InvalidStateError
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import ModuleType
from typing import Protocol

from asyncengine.builds import BuildError, Recipe, build, find_compiler
from asyncengine.loop.branch import Branch
from asyncengine.outputs import RequestOutput

SOURCE = Path(__file__).with_name("delivery.c")


class Deltas(Protocol):
    """What ``async for`` over a stream iterates with: the stream itself, or the compiled reader of it."""

    def __aiter__(self) -> Deltas: ...

    def __anext__(self) -> Awaitable[RequestOutput]: ...

    async def aclose(self) -> None:
        """As `RequestStream.aclose`."""
        ...


_MAC = ("-undefined", "dynamic_lookup") if sys.platform == "darwin" else ()
_loading = threading.Lock()
_module: ModuleType | None = None


def deliver_tokens_in_python(branches: list[Branch], token_ids: list[int]) -> None:
    """Gives each branch its token and wakes whoever waits for it."""
    for branch, token_id in zip(branches, token_ids, strict=True):
        branch.ids.append(token_id)
        waiter = branch.waiter
        if waiter is not None:
            branch.waiter = None
            try:
                waiter.set_result(None)
            except InvalidStateError:
                pass  # another branch was first, or it is being cancelled


deliver_tokens: Callable[[list[Branch], list[int]], None] = deliver_tokens_in_python
"""The one that is used."""
reader_type: Callable[..., Deltas] | None = None
"""What ``async for`` over a stream iterates with; None is the stream itself."""


def use_python() -> None:
    """Goes back to Python. Streams that are being read go on as they are."""
    global deliver_tokens, reader_type
    deliver_tokens, reader_type = deliver_tokens_in_python, None


def use_compiled() -> None:
    """Delivers by compiled code from now on. Safe from any thread; blocks while it is compiled, the first time.

    Raises:
        BuildError: It cannot be compiled or loaded here; all goes on in Python.
    """
    global deliver_tokens, reader_type, _module
    with _loading:
        if _module is None:
            module = _load(_compile())
            module.know(Branch, RequestOutput, InvalidStateError)
            _module = module
        deliver_tokens, reader_type = _module.deliver_tokens, _module.Reader


def compile_ahead() -> None:
    """Compiles the code, the first time, without using it: so that `use_compiled` returns soon."""
    with contextlib.suppress(BuildError):
        _compile()


def _compile() -> Path:
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        raise BuildError("the compiled delivery relies on the GIL")
    headers = sysconfig.get_path("include")
    if not Path(headers, "Python.h").exists():
        raise BuildError(f"the compiled delivery needs Python.h, which is not in {headers}")
    before = ("-O2", "-fPIC", "-shared", *_MAC, f"-I{headers}")
    recipe = Recipe("the compiled delivery", "delivery", (SOURCE,), before)
    return build(recipe, find_compiler("CC", ("cc", "gcc", "clang")))


def _load(library: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("delivery", library)
    assert spec is not None and spec.loader is not None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise BuildError(f"cannot load the compiled delivery {library}: {error}") from error
    return module
