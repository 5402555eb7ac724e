"""What the documents name exists: paths, links, sections. And the front door is one page."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

LONGEST_README = 120
"""Lines: what a newcomer reads before he turns back."""

FOLDERS = ("llava_pdrop", "configs", "scripts", "data", "playground", "tests", ".github")
MADE_BY_RUNNING = ("data/tiny/prepared", "data/lab/prepared", "playground/data", "playground/benchmarks")
"""Places whose contents are not in the repository, or not for sure."""

HISTORY = ("playground/LOG.md",)
"""Dated entries: their paths are those of their day."""


def listed(pattern: str) -> list[Path]:
    folders = [ROOT, *(ROOT / name for name in FOLDERS)]
    found = {path for folder in folders for path in (folder.glob(pattern) if folder == ROOT else folder.rglob(pattern))}
    return sorted(path for path in found if not in_words(path).startswith((*HISTORY, *MADE_BY_RUNNING)))


def in_words(path: Path) -> str:
    return str(path.relative_to(ROOT))


DOCUMENTS = listed("*.md")
OTHERS = [
    *listed("*.yaml"), *listed("*.yml"), *listed("*.sh"), *listed("*.sbatch"), *listed("*.def"), *listed("*.txt"),
    *listed("Makefile"),
]  # fmt: skip

WORD = re.compile(rf"(?<![\w./~<>-])(?:{'|'.join(map(re.escape, FOLDERS))})/[\w./*{{}},-]+")
"""A path from the root, wherever it stands: in prose, in a command, in a comment."""

CODE = re.compile(r"`([^`\s]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
STANDS_FOR = re.compile(r"(^|/)[A-Z][A-Z_]+\b(?!\.md)|[<>$=:]")
"""OUTPUT_DIR/..., scripts/ANOTHER.sh, key=value: no path of the repository."""


def exists(place: Path, path: str) -> bool:
    """Whether ``path``, which may be a pattern, names something below ``place``."""
    path = path.rstrip("/.,;:")
    return any(place.glob(path)) if set(path) & set("*[") else (place / path).exists()


def paths_from_the_root(text: str) -> Iterator[str]:
    for match in WORD.finditer(text):
        path = match[0].rstrip("/.,;:")
        if not path.startswith(MADE_BY_RUNNING) and "..." not in path and not STANDS_FOR.search(path):
            yield path


def anchors(file: Path) -> set[str]:
    """Names of the sections of a document, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_readme_is_one_page() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= LONGEST_README, f"README.md has {len(lines)} lines: put details beside what they document"


@pytest.mark.parametrize("file", [*DOCUMENTS, *OTHERS], ids=in_words)
def test_paths_from_the_root_exist(file: Path) -> None:
    missing = [path for path in paths_from_the_root(file.read_text(encoding="utf-8")) if not exists(ROOT, path)]
    assert not missing


@pytest.mark.parametrize("file", DOCUMENTS, ids=in_words)
def test_paths_in_backticks_exist(file: Path) -> None:
    """Those that begin with a folder or file beside the document; others are names of something else."""
    missing = []
    for match in CODE.finditer(file.read_text(encoding="utf-8")):
        first = match[1].split("/")[0]
        is_path = "/" in match[1] and (first == ".." or (file.parent / first).is_dir())
        inside = in_words(file.parent / match[1]) if is_path and first != ".." else match[1].removeprefix("../")
        if is_path and not STANDS_FOR.search(match[1]) and not inside.startswith(MADE_BY_RUNNING):
            missing += [match[1]] if not exists(file.parent, match[1]) else []
    assert not missing


def ignored_by_git(path: Path) -> bool:
    """False as well where there is no git or no repository: an archive has only what was committed."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        return False
    return subprocess.run(["git", "check-ignore", "-q", str(path)], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("file", DOCUMENTS, ids=in_words)
def test_links_lead_somewhere(file: Path) -> None:
    for match in LINK.finditer(file.read_text(encoding="utf-8")):
        if re.match(r"\w+:", match[1]):
            continue
        path, _, section = match[1].partition("#")
        target = file.parent / path if path else file
        assert target.exists(), f"{match[0]}: there is no {path}"
        assert not ignored_by_git(target), f"{match[0]}: git ignores {path}, so a clone does not have it"
        assert not section or section in anchors(target), f"{match[0]}: no such section"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("see `llava_pdrop/model/vlm.py`.", ["llava_pdrop/model/vlm.py"]),
        ("    bash scripts/eval.sh RUN", ["scripts/eval.sh"]),
        ("(`configs/README.md`)", ["configs/README.md"]),
        ("configs/llava*/*.yaml, data/prepare/", ["configs/llava*/*.yaml", "data/prepare"]),
        ("playground/data/coco, playground/benchmarks/NAME, scripts/ANOTHER.sh", []),
        ("my/data/x.json, ../data/x.json, checkpoints/tiny/x", []),
    ],
)
def test_what_counts_as_a_path(text: str, found: list[str]) -> None:
    assert list(paths_from_the_root(text)) == found


def test_the_figure_is_what_its_script_draws() -> None:
    """Mend: python playground/figures/idea.py"""
    folder = ROOT / "playground" / "figures"
    assert runpy.run_path(str(folder / "idea.py"))["draw"]() == (folder / "idea.svg").read_text(encoding="utf-8")
