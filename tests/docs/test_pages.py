"""What the documentation names is there: links, modules, attributes, tests, scripts, errors, states."""

from __future__ import annotations

import importlib
import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

import asyncengine
from asyncengine import AsyncEngine, AsyncEngineError, EngineConfig
from tests.docs import feature_table
from tests.docs.pages import PAGES, ROOT, blocks, name, prose
from tests.docs.state_table import table

NAMED = [*PAGES, ROOT / "CHANGELOG.md"]
TESTS = {
    found for path in (ROOT / "tests").rglob("*.py") for found in re.findall(r"def (test_\w+)", path.read_text("utf-8"))
}


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def has(dotted: str) -> bool:
    """Whether ``asyncengine.a.b`` is a module or something in one."""
    parts = dotted.split(".")
    found: object = asyncengine
    for at, part in enumerate(parts[1:], start=2):
        if hasattr(found, part):
            found = getattr(found, part)
            continue
        try:
            found = importlib.import_module(".".join(parts[:at]))
        except ImportError:
            return False
    return True


@pytest.mark.parametrize("page", NAMED, ids=name)
def test_every_dotted_name_exists(page: Path) -> None:
    missing = {dotted for dotted in re.findall(r"\basyncengine(?:\.\w+)+", text(page)) if not has(dotted)}
    assert not missing


@pytest.mark.parametrize("page", NAMED, ids=name)
def test_every_attribute_of_an_engine_exists(page: Path) -> None:
    attributes = set(re.findall(r"\bengine\.([a-z]\w*)", re.sub(r"\basyncengine\.", "", text(page)))) - {
        "observer",
        "trace",
        "py",
        "md",
    }
    missing = {attribute for attribute in attributes if not hasattr(AsyncEngine, attribute)}
    assert not missing
    fields = set(re.findall(r"\bEngineConfig\.(\w+)", text(page)))
    assert not {field for field in fields if not hasattr(EngineConfig, field)}


@pytest.mark.parametrize("page", NAMED, ids=name)
def test_every_class_in_code_quotes_is_public(page: Path) -> None:
    words = set(re.findall(r"`([A-Z][a-z]+(?:[A-Z][a-z]+)+)\b", prose(page)))
    elsewhere = {"ThreadedEngine", "ValueError", "TimeoutError", "AssertionError", "CancelledError"}
    elsewhere |= {"ContinuousBatchingManager"}  # of transformers
    public = [asyncengine, *(importlib.import_module(f"asyncengine.{name}") for name in ("testing", "server"))]
    assert not {word for word in words - elsewhere if not any(hasattr(module, word) for module in public)}


@pytest.mark.parametrize("page", NAMED, ids=name)
def test_every_test_that_is_named_exists(page: Path) -> None:
    named = set(re.findall(r"`(test_\w+)`", prose(page)))
    assert not named - TESTS


def test_every_way_to_leave_names_its_test() -> None:
    rows = [line for line in text(ROOT / "docs/cancellation.md").splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row.endswith("| test |")]
    assert len(rows) > 20
    assert not [row for row in rows if "`test_" not in row]


def test_every_promise_names_its_tests() -> None:
    rows = re.findall(r"^\| (\d+) \| (.+) \| (.+) \|$", text(ROOT / "docs/promises.md"), re.MULTILINE)
    assert [int(number) for number, _, _ in rows] == list(range(1, 35))
    assert not [number for number, _, tests in rows if "`test" not in tests and "cancellation.md" not in tests]


@pytest.mark.parametrize("page", NAMED, ids=name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = page if not path else page.parent / path
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", text(file), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in slugs, target


@pytest.mark.parametrize("page", NAMED, ids=name)
def test_every_file_in_code_quotes_exists(page: Path) -> None:
    for path in re.findall(r"`((?:asyncengine|benchmarks|docs|scripts|tests)/[\w./]*)`", prose(page)):
        installed = Path(asyncengine.__file__).parents[1]  # elsewhere than the pages, where a wheel is tested
        assert ((installed if path.startswith("asyncengine/") else ROOT) / path).exists(), path


def test_every_shell_block_names_what_there_is() -> None:
    extras = tomllib.loads(text(ROOT / "pyproject.toml"))["project"]["optional-dependencies"]
    lines = [
        line for page in PAGES for block in blocks(page) if block.language == "sh" for line in block.code.splitlines()
    ]
    assert lines
    for line in lines:
        command, *arguments = line.rpartition(" | ")[2].split()
        if command.startswith("./"):
            assert (ROOT / command).stat().st_mode & 0o111, line
        elif command == "pip":
            assert arguments[0] == "install"
            assert arguments[-1].partition("[")[2].strip("]'") in {"", *extras}, line
        elif command == "python":
            assert arguments[0] == "-m" and importlib.util.find_spec(arguments[1]), line
        else:
            assert importlib.util.find_spec(command), line


def test_the_table_of_states_is_the_code_s() -> None:
    assert table() in text(ROOT / "docs/reload.md"), f"the table is now\n{table()}"


def test_every_error_has_its_row() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (yes|no) \|", text(ROOT / "docs/errors.md"), re.MULTILINE)
    public = [getattr(asyncengine, known) for known in asyncengine.__all__]
    classes = [value for value in public if isinstance(value, type)]
    errors = {c.__name__: c for c in classes if issubclass(c, AsyncEngineError) and c is not AsyncEngineError}
    assert dict(rows) == {known: "yes" if error.retryable else "no" for known, error in errors.items()}
    assert not [known for known in errors if f"`{known}`" not in text(ROOT / "README.md")]


def test_every_method_of_an_engine_has_its_row_in_the_readme() -> None:
    methods = {known for known, value in vars(AsyncEngine).items() if callable(value) and not known.startswith("_")}
    rare = {"reload_nowait", "shutdown_nowait", "debug_call_func_on_all_workers"}  # docs/threads.md, docs/testing.md
    named = set(re.findall(r"engine\.(\w+)\(", prose(ROOT / "README.md")))
    assert not methods - rare - named


def test_nothing_speaks_of_this_machine() -> None:
    for page in NAMED:
        assert not re.search(r"/(?:home|root|work)/|localhost:\d|pypi\.|index-url", text(page)), page


def test_the_table_of_features_is_what_the_tests_of_combinations_draw() -> None:
    page = text(ROOT / "docs/features.md")
    assert feature_table.table() in page, f"the table is now\n{feature_table.table()}"
    assert set(re.findall(r"^\* \*\*(\w)\*\*", page, re.MULTILINE)) == set(feature_table.REMARKS.values())


def test_every_further_feature_names_its_test() -> None:
    rows = text(ROOT / "docs/features.md").partition("## What else there is")[2].splitlines()
    rows = [row for row in rows if row.startswith("| ") and not row.endswith("| test |")]
    assert len(rows) > 8
    assert not [row for row in rows if "`test_" not in row.rpartition(" | ")[2]]
