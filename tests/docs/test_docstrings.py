"""What docstrings name is there: arguments, all of them, and attributes."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import asyncengine

ROOT = Path(asyncengine.__file__).parent


Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@cache
def documented() -> list[tuple[str, Documented]]:
    """All functions and classes that have a docstring with sections, and where they are."""
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, Documented) and "\n" in (ast.get_docstring(node) or ""):
                found.append((f"{path.relative_to(ROOT)}:{node.lineno}", node))
    return found


def named(docstring: str | None, section: str) -> set[str]:
    """What a section of a docstring has entries for."""
    found = re.search(rf"^{section}:\n((?: {{4}}.*\n|\n)+)", f"{docstring or ''}\n", re.MULTILINE)
    return set() if found is None else set(re.findall(r"^ {4}\*{0,2}(\w+):", found[1], re.MULTILINE))


def test_arguments_are_described_all_or_none() -> None:
    wrong = {}
    for place, node in documented():
        if not isinstance(node, ast.ClassDef):
            given = node.args
            more = [each for each in (given.vararg, given.kwarg) if each is not None]
            names = {each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs, *more)}
            described = named(ast.get_docstring(node), "Args")
            if described and described != names - {"self", "cls"}:
                wrong[place] = described ^ (names - {"self", "cls"})
    assert not wrong


def test_attributes_that_are_described_are_there() -> None:
    wrong = {}
    for place, node in documented():
        if isinstance(node, ast.ClassDef) and not node.bases:  # others may have it from those
            inner = list(ast.walk(node))
            there = {each.attr for each in inner if isinstance(each, ast.Attribute)}
            there |= {each.id for each in inner if isinstance(each, ast.Name)}
            if missing := named(ast.get_docstring(node), "Attributes") - there:
                wrong[place] = missing
    assert not wrong
