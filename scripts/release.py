"""Checks of a release: before it is built, of what was built, and that every extra can be had.

python scripts/release.py [--before]
"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MOST_BYTES = 5_000_000
NEEDED = (
    "py.typed", "tiny/checkpoint/model.safetensors", "tiny/checkpoint/tokenizer.json", "server/page.html",
    "cli/timeline.html", "loop/delivery.c", "model/attention/paged_attention.cpp", "model/attention/tiles.h",
    "model/decoder/decoder.cpp",
    "tiny/draft/model.safetensors",
)  # fmt: skip
IN_SDIST = (
    "asyncengine", "tests", "benchmarks", "docs", "scripts", "README.md", "CHANGELOG.md", "LICENSE", "mkdocs.yml",
    "pyproject.toml", "PKG-INFO", ".gitignore",
)  # fmt: skip


def version_of(root: Path) -> str:
    """The version that would be released."""
    found = re.search(r'__version__ = "(.+)"', (root / "asyncengine/_version.py").read_text(encoding="utf-8"))
    if found is None:
        raise SystemExit("asyncengine/_version.py names no version")
    return found[1]


def check_before(root: Path) -> None:
    """What must be so before anything is built.

    Raises:
        SystemExit: It is not; the message says what.
    """
    changed = subprocess.run(
        ["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    if changed:
        raise SystemExit(
            f"the tree is not clean, {len(changed)} files differ from the last commit: {changed[0][3:]}, ..."
        )
    version = version_of(root)
    titles = re.findall(r"^## \[?([^\]\s]+)", (root / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    if version not in titles:
        raise SystemExit(
            f"CHANGELOG.md has no entry for version {version}; it has {', '.join(titles) or 'none'}. A release sets "
            "__version__ in asyncengine/_version.py, and names that version there"
        )


def check_wheel(wheel: Path) -> None:
    """What the wheel must and must not have in it.

    Raises:
        SystemExit: It is too large, lacks something, or has something else.
    """
    size = wheel.stat().st_size
    if size > MOST_BYTES:
        raise SystemExit(f"{wheel.name} has {size:,} bytes; allowed: {MOST_BYTES:,}")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    missing = [name for name in NEEDED if f"asyncengine/{name}" not in names]
    if missing:
        raise SystemExit(f"{wheel.name} lacks asyncengine/{missing[0]}")
    strange = [name for name in names if not name.startswith(("asyncengine/", "asyncengine-")) or "__pycache__" in name]
    if strange:
        raise SystemExit(f"{wheel.name} has {strange[0]}, which is not of the package")


def check_sdist(sdist: Path) -> None:
    """What the sdist must not have in it.

    Raises:
        SystemExit: It has something else than what the package and its tests need.
    """
    with tarfile.open(sdist) as archive:
        parts = [Path(name).parts for name in archive.getnames()]
    strange = ["/".join(part[1:]) for part in parts if len(part) > 1 and part[1] not in IN_SDIST]
    if strange:
        raise SystemExit(f"{sdist.name} has {strange[0]}, which nobody needs")


def check_extras(wheel: Path, root: Path) -> None:
    """Whether each extra can be installed, by asking for it without doing it.

    Raises:
        SystemExit: One cannot.
    """
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for extra in project["optional-dependencies"]:
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--disable-pip-version-check"]
        done = subprocess.run([*command, f"{wheel}[{extra}]"], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"the extra {extra!r} does not resolve: {done.stderr.strip()}")
        print(f"extra {extra}: resolves")


def main() -> None:
    """Runs the checks."""
    if "--before" in sys.argv[1:]:
        check_before(ROOT)
        return
    [wheel], [sdist] = (ROOT / "dist").glob("*.whl"), (ROOT / "dist").glob("*.tar.gz")
    check_wheel(wheel)
    check_sdist(sdist)
    print(
        f"{wheel.name}: {wheel.stat().st_size:,} bytes, {sdist.name}: {sdist.stat().st_size:,} bytes; nothing strange"
    )
    check_extras(wheel, ROOT)


if __name__ == "__main__":
    main()
