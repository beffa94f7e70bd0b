"""Compiling and caching. Most tests compile a stub instead of the kernel, which takes seconds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention_case import TOLERANCE, dense, layer, random_row, run_paged

from asyncengine.model.attention import kernel
from asyncengine.model.attention.cpu import CpuAttention
from asyncengine.model.attention.protocol import BackendUnavailableError
from tests.model.attention.targets import DECODERS, compile_attention_alone, optimise_less, require_target

STUB = f"""
extern "C" int paged_attention(void *, void *, void *) {{ return 42; }}
extern "C" void paged_attention_advise(void *, long) {{}}
{DECODERS}"""
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no compiler")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "asyncengine"


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    source = tmp_path / "stub.cpp"
    source.write_text(STUB)
    monkeypatch.setattr(kernel, "SOURCE", source)
    return source


@pytest.fixture
def compilations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that gets a line for each run of the compiler."""
    log, wrapper = tmp_path / "compilations", tmp_path / "c++"
    log.touch()
    wrapper.write_text(f'#!/bin/sh\necho run >> {log}\nexec {shutil.which("c++")} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", str(wrapper))
    return log


def runs(compilations: Path) -> int:
    return len(compilations.read_text().splitlines())


def works(library: Path) -> bool:
    return bool(kernel.load(library).paged_attention(None, None, None) == 42)


@needs_compiler
@pytest.mark.usefixtures("cache", "stub")
def test_second_build_runs_no_compiler(compilations: Path) -> None:
    said: list[str] = []
    first = kernel.build(progress=said.append)
    assert works(first)
    assert runs(compilations) == 1
    assert len(said) == 1
    assert kernel.build(progress=said.append) == first
    assert runs(compilations) == 1
    assert len(said) == 1


@needs_compiler
@pytest.mark.usefixtures("cache")
def test_changed_source_is_compiled_again(compilations: Path, stub: Path) -> None:
    first = kernel.build()
    stub.write_text(STUB + "// changed\n")
    assert kernel.build() != first
    assert runs(compilations) == 2


@needs_compiler
@pytest.mark.usefixtures("cache", "stub")
def test_other_target_is_compiled_again(compilations: Path) -> None:
    assert kernel.build() != kernel.build(target=())
    assert runs(compilations) == 2


@needs_compiler
@pytest.mark.usefixtures("cache", "stub")
def test_each_kind_is_compiled_apart(compilations: Path) -> None:
    assert len({kernel.build(kind) for kind in ("float32", "bfloat16", "float16", "int8", "int4")}) == 5
    assert kernel.build("int8") == kernel.build("int8")
    assert runs(compilations) == 5


@needs_compiler
@pytest.mark.usefixtures("cache", "stub")
def test_a_library_is_built_when_a_cache_wants_it(compilations: Path) -> None:
    backend, cpu = CpuAttention("int8"), torch.device("cpu")
    backend.allocate(layer(), 1, 16, torch.bfloat16, cpu)
    assert runs(compilations) == 1
    backend.allocate(layer(), 1, 16, torch.float16, cpu)
    backend.allocate(layer(), 1, 16, torch.float16, cpu)
    assert runs(compilations) == 2


@needs_compiler
@pytest.mark.parametrize("kind", kernel.NARROW)
def test_narrow_weights_attend_in_bfloat16(kind: kernel.Kind) -> None:
    backend, spec = CpuAttention(kind), layer(heads=2, kv_heads=1)
    row = random_row(spec, 20, 3, torch.bfloat16, 0)
    (output,) = run_paged(backend, spec, [row], 16, torch.bfloat16)
    tolerance = TOLERANCE[torch.bfloat16]
    torch.testing.assert_close(output.double(), dense(spec, row, None), rtol=tolerance, atol=tolerance)
    assert list(backend._libraries) == [kind]


@needs_compiler
@pytest.mark.usefixtures("cache", "stub")
def test_compiler_with_arguments(compilations: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", f"{os.environ['CXX']} -DANYTHING")
    assert works(kernel.build())
    assert runs(compilations) == 1


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux only")
@pytest.mark.usefixtures("cpu_backend")
def test_torch_and_the_kernel_share_one_openmp_runtime() -> None:
    lines = Path("/proc/self/maps").read_text().splitlines()
    runtimes = {line.split()[-1] for line in lines if "/libgomp" in line or "/libomp" in line or "/libiomp" in line}
    assert len(runtimes) == 1


@needs_compiler
@pytest.mark.usefixtures("stub")
def test_nothing_but_the_build_is_left_in_the_cache(cache: Path) -> None:
    library = kernel.build()
    assert [library.parent] == list(cache.iterdir())


@needs_compiler
@pytest.mark.usefixtures("cache", "stub")
@pytest.mark.parametrize("damage", ["truncated", "overwritten", "no digest", "no library"])
def test_damaged_cache_is_built_again(compilations: Path, damage: str) -> None:
    library = kernel.build()
    match damage:
        case "truncated":
            library.write_bytes(library.read_bytes()[:5000])
        case "overwritten":
            library.write_bytes(b"\0" * library.stat().st_size)
        case "no digest":
            (library.parent / "sha256").unlink()
        case "no library":
            library.unlink()
    assert works(kernel.build())
    assert runs(compilations) == 2


@needs_compiler
@pytest.mark.usefixtures("stub")
def test_cache_that_cannot_be_written(cache: Path, tmp_path: Path) -> None:
    cache.parent.write_text("a file where the directory should be")
    library = kernel.build()
    assert works(library)
    assert not library.is_relative_to(tmp_path)


@needs_compiler
@pytest.mark.usefixtures("cache", "stub")
def test_build_that_loses_the_race_takes_the_winners(monkeypatch: pytest.MonkeyPatch) -> None:
    winner: list[Path] = []
    rename = Path.rename

    def late(self: Path, target: Path) -> Path:
        if not winner:
            winner.append(target)
            rename(shutil.copytree(self, self.with_name("winner")), target)  # type: ignore[arg-type]
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", late)
    assert kernel.build() == winner[0] / "float32-kernels.so"


@needs_compiler
def test_processes_that_build_at_once(cache: Path, stub: Path, tmp_path: Path) -> None:
    """As `kernel.build` does it, but without torch, which takes longer to import than the stub to compile.

    Files cannot be locked there, and their compilers wait for each other: each process has begun before the other one
    has anything to show.
    """
    program = (
        "def refuse(*_): raise OSError(38, 'Function not implemented')\n"
        "import ctypes, fcntl, pathlib; fcntl.flock = refuse; from asyncengine import builds; "
        f"recipe = builds.Recipe('a stub', 'stub', (pathlib.Path({str(stub)!r}),), ('-shared', '-fPIC')); "
        "library = builds.build(recipe, builds.find_compiler()); "
        "assert ctypes.CDLL(str(library)).paged_attention(None, None, None) == 42"
    )
    begun, wrapper = tmp_path / "begun", tmp_path / "c++"
    begun.mkdir()
    wrapper.write_text(
        f"#!/bin/sh\ntouch {begun}/$$\n"
        f'for turn in $(seq 3000); do [ "$(ls {begun} | wc -l)" = 2 ] && break; sleep 0.01; done\n'
        f'exec {shutil.which("c++")} "$@"\n'
    )
    wrapper.chmod(0o755)
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache.parent), "CXX": str(wrapper)}
    processes = [
        subprocess.Popen([sys.executable, "-c", program], env=environment, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=110)
        assert process.returncode == 0, errors
    assert len(list(begun.iterdir())) == 2
    assert len(list(cache.iterdir())) == 1


@pytest.mark.usefixtures("cache")
def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(BackendUnavailableError, match="needs a C"):
        kernel.build()
    monkeypatch.setenv("CXX", "/nonexistent")
    with pytest.raises(BackendUnavailableError, match="/nonexistent"):
        kernel.build()


@needs_compiler
@pytest.mark.usefixtures("cache")
def test_compiler_that_fails(stub: Path) -> None:
    stub.write_text("#error not today\n")
    with pytest.raises(BackendUnavailableError, match="not today"):
        kernel.build()


def test_library_that_cannot_be_loaded(tmp_path: Path) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"nothing")
    with pytest.raises(BackendUnavailableError, match=r"broken\.so"):
        kernel.load(broken)


@needs_compiler
@pytest.mark.parametrize(
    ("target", "whole", "alone"),
    [
        # Each dtype takes the compiler seconds. Each of these targets converts half precision in its own way; vectors
        # of either width, and bfloat16 without instructions for it, are the same in all dtypes and on both targets.
        # What tests of a decoder compile whole is taken from there.
        ("-march=x86-64", [torch.bfloat16], [torch.float16]),
        ("-march=x86-64-v3", [torch.float32], [torch.float16]),
        # These differ from this machine's own code in bfloat16 alone.
        ("-march=x86-64-v4", [], [torch.bfloat16]),
        ("-march=native -mno-amx-tile", [], [torch.bfloat16]),
    ],
)
def test_older_processors(
    target: str,
    whole: list[torch.dtype],
    alone: list[torch.dtype],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The code for processors without tiles, bfloat16 products, AVX-512, and half-precision conversions."""
    require_target(target)
    for dtype in whole:
        with pytest.MonkeyPatch.context() as patch:
            if dtype is not torch.float32:
                optimise_less(patch)
            assert_attends(target, dtype)
    compile_attention_alone(tmp_path, monkeypatch)
    for dtype in alone:
        assert_attends(target, dtype)


def assert_attends(target: str, dtype: torch.dtype) -> None:
    backend = CpuAttention(kernel.kind_of(dtype), target=target.split())
    spec = layer(heads=4, kv_heads=2, key_dim=23, value_dim=40, soft_cap=8.0, sliding_window=90)
    rows = [random_row(spec, context, new, dtype, new) for context, new in [(70, 1), (200, 33), (0, 2)]]
    for page_size in (7, 16):
        for row, output in zip(rows, run_paged(backend, spec, rows, page_size, dtype), strict=True):
            torch.testing.assert_close(
                output.double(), dense(spec, row, None), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
            )
            (alone,) = run_paged(backend, spec, [row], 32, dtype, seed=1)
            assert torch.equal(alone, output)


@needs_compiler
@pytest.mark.parametrize("target", ["-march=x86-64", "-march=x86-64-v3"])
def test_half_precision_extremes_on_older_processors(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_target(target)
    compile_attention_alone(tmp_path, monkeypatch)
    backend, spec = CpuAttention("float16", target=[target]), layer(heads=1, kv_heads=1, key_dim=8, value_dim=16)
    row = random_row(spec, 0, 1, torch.float16, 0)
    row.values[0, 0] = torch.tensor([0.0, 6e-8, -6e-5, 65504, -65504, torch.inf, -torch.inf, 1e-7] * 2)
    (output,) = run_paged(backend, spec, [row], 16, torch.float16)
    assert torch.equal(output[0, 0], row.values[0, 0])
