"""The site builds without a warning, has every page in its navigation and every public name in its reference."""

from __future__ import annotations

import html
import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml

import asyncengine
from tests.docs.pages import ROOT, name

SOURCES = sorted((ROOT / "docs").rglob("*.md"))
PUBLIC = ("asyncengine", "asyncengine.testing", "asyncengine.server")


def navigation() -> list[str]:
    def leaves(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        children = entry.values() if isinstance(entry, dict) else entry
        return [leaf for child in children for leaf in leaves(child)]  # type: ignore[attr-defined]

    return leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))["nav"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("zensical")
    pytest.importorskip("mkdocstrings_handlers.python")
    root = tmp_path_factory.mktemp("project")
    for part in (Path(asyncengine.__file__).parent, ROOT / "docs"):
        shutil.copytree(part, root / part.name, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    (root / "mkdocs.yml").write_text((ROOT / "mkdocs.yml").read_text("utf-8"), "utf-8")
    build = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict"],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    output = build.stdout + build.stderr
    assert build.returncode == 0, output
    assert "No issues found" in output, output
    return root / "build/site"


def anchors(page: str) -> set[str]:
    return {html.unescape(anchor) for anchor in re.findall(r'\bid="?([^"\s>]+)', page)}


def test_every_page_is_in_the_navigation_once() -> None:
    assert sorted(navigation()) == [path.relative_to(ROOT / "docs").as_posix() for path in SOURCES]


@pytest.mark.long  # the whole site is built
def test_every_page_is_built(site: Path) -> None:
    missing = [
        name(path) for path in SOURCES if not (site / path.relative_to(ROOT / "docs")).with_suffix(".html").exists()
    ]
    assert not missing


@pytest.mark.long  # the whole site is built
def test_every_link_and_anchor_of_the_site_leads_somewhere(site: Path) -> None:
    pages = {path: path.read_text("utf-8") for path in site.rglob("*.html") if path.name != "404.html"}
    known = {path: anchors(text) for path, text in pages.items()}
    dead = []
    links = 0
    for path, text in pages.items():
        for link in re.findall(r'<a\b[^>]*?\bhref="?([^"\s>]+)', text):
            if re.match(r"[a-z]+:", link):
                continue
            links += 1
            target, _, anchor = unquote(html.unescape(link)).partition("#")
            file = (path.parent / target).resolve() if target else path
            file = file / "index.html" if file.is_dir() else file
            if not file.exists() or (anchor and anchor not in known.get(file, {anchor})):
                dead.append(f"{path.relative_to(site)}: {link}")
    assert links > 100
    assert not dead


@pytest.mark.long  # the whole site is built
def test_every_picture_script_and_style_of_the_site_is_there(site: Path) -> None:
    found = {}
    for path in site.rglob("*.html"):
        if path.name != "404.html":  # its addresses are those of the web site
            text = path.read_text("utf-8")
            sources = re.findall(r'<(?:img|script|source)\b[^>]*?\bsrc="?([^"\s>]+)', text)
            sources += re.findall(r'<link\b[^>]*?\brel="?stylesheet[^>]*?\bhref="?([^"\s>]+)', text)
            for source in sources:
                found[source] = source.startswith("data:") or (path.parent / unquote(html.unescape(source))).exists()
    assert any(source.endswith(".svg") for source in found) and any(source.endswith("tables.css") for source in found)
    assert not [source for source, there in found.items() if not there]


@pytest.mark.long  # the whole site is built
def test_every_public_name_is_in_the_reference(site: Path) -> None:
    shown = set().union(*(anchors(path.read_text("utf-8")) for path in (site / "reference").glob("*.html")))
    public = {f"{module}.{known}" for module in PUBLIC for known in importlib.import_module(module).__all__}
    assert len(public) > 50
    assert not public - shown


@pytest.mark.long  # the whole site is built
def test_the_reference_is_made_from_the_docstrings(site: Path) -> None:
    assert "Replaces weights in place between two steps" in (site / "reference/engine.html").read_text("utf-8")
    assert "Replaces weights in place" not in "".join(
        p.read_text("utf-8") for p in (ROOT / "docs/reference").glob("*.md")
    )
