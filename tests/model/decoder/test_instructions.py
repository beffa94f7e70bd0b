"""How many instructions a step takes, counted by callgrind: the same on any machine and however busy that is."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from asyncengine import builds
from asyncengine.model.attention import kernel

# Valgrind knows no AVX-512. Where there is none, what other tests use is the same and is compiled already.
TARGET = ["-march=x86-64-v3"] if "avx512" in builds.processor() else None
VALGRIND = shutil.which("valgrind")
PRODUCTS = 2 * (256 * 512 + 256 * 256 + 3 * 256 * 512)
"""Multiply-adds for a token in the layers' products; the head's, which are as many in any step, are apart."""
HEAD = 512 * 256

pytestmark = pytest.mark.skipif(
    VALGRIND is None or platform.machine() != "x86_64" or "avx2" not in builds.processor(),
    reason="needs valgrind and a processor with AVX2",
)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("driver") / "driver"
    source = Path(__file__).with_name("instruction_driver.cpp")
    included = kernel.SOURCE.parent  # wherever the package is installed
    flags = ["-std=c++17", f"-I{included}", "-DPAGED_ATTENTION_SERIAL", "-DONE_KIND=9"]  # it computes nothing itself
    subprocess.run([*kernel.find_compiler(), *flags, str(source), "-o", str(program), "-ldl"], check=True)
    return program


def count(driver: Path, tokens: int, context: int) -> int:
    assert VALGRIND is not None
    library = kernel.build("float32", target=TARGET)
    command = [
        VALGRIND, "--tool=callgrind", "--callgrind-out-file=/dev/null", "--toggle-collect=decoder_step", str(driver),
        str(library), str(tokens), str(context),
    ]  # fmt: skip
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"Collected : (\d+)", finished.stderr)
    assert found is not None, finished.stderr
    return int(found[1])


@pytest.mark.parametrize(("tokens", "context", "bound"), [(1, 127, 4.3), (12, 0, 2.8)], ids=["decode", "prefill"])
def test_a_step_takes_no_more_instructions_than_it_did(tokens: int, context: int, bound: float, driver: Path) -> None:
    """Per eight multiply-adds, which is what one instruction of AVX2 does: 3.9 and 2.6 when this was written.

    Prefill costs less because a vector of weights that was loaded serves several tokens.
    """
    assert 1 < count(driver, tokens, context) / ((PRODUCTS * tokens + HEAD) / 8) < bound


def test_it_is_the_same_number_each_time(driver: Path) -> None:
    assert count(driver, 1, 0) == count(driver, 1, 0)
