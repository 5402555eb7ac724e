"""The shape of the house: imports go one way, files stay small, nothing lies where it does not belong."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "llava_pdrop"
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))

TOP_LEVEL = {
    "llava_pdrop", "scripts", "configs", "data", "playground", "tests", "setup.py", "Makefile", "README.md", "LICENSE",
}  # fmt: skip
MADE_BY_RUNNING = {"checkpoints", "build", "dist", "runs", "wandb", "__pycache__"}

MAY_IMPORT = {
    "types": set(),
    "geometry": set(),
    "style": set(),
    "config": {"types", "geometry", "config", "model.schedule", "model.pyramid_drop"},
    "data": {"types", "geometry", "style", "config", "data"},
    "model": {"types", "geometry", "model"},
    "train": {"types", "geometry", "style", "config", "data", "model", "train"},
    "eval": {"types", "geometry", "style", "config", "data", "model", "train", "eval", "bench"},
    "bench": {"types", "geometry", "style", "config", "data", "model", "train", "bench", "eval.learn"},
    "ablate": {"types", "geometry", "style", "config", "data", "model", "train", "eval", "bench", "ablate"},
    "convert": {"types", "geometry", "model"},
    "doctor": {"types", "geometry", "config", "data", "model", "bench", "train"},
    "serve": {"types", "geometry", "config", "data", "model", "serve"},
}
"""First part of a module's name below llava_pdrop -> what it may import of llava_pdrop. ``__main__`` may all."""


def part(module: str) -> str:
    """``model.build`` -> ``model``; the files of the config are one part."""
    first = module.split(".")[0]
    return "config" if first.startswith("config") else first


def imported(path: Path) -> set[str]:
    """Names of all modules that a file imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            base = node.module or ""
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    own = path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".")
    if own in ("__init__", "__main__"):
        return
    allowed = MAY_IMPORT[part(own)]
    for name in imported(path):
        if not name.startswith("llava_pdrop."):
            continue
        target = name.removeprefix("llava_pdrop.")
        if target == "__version__":
            continue
        fits = part(target) in allowed or any(target == module or target.startswith(f"{module}.") for module in allowed)
        assert fits, f"{own} imports {name}"


def test_the_algorithm_needs_torch_only() -> None:
    outside = {name.split(".")[0] for name in imported(PACKAGE / "model" / "pyramid_drop.py")} - {"torch"}
    assert outside <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_stay_small(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 300
    assert path.stem != "utils"


def test_every_package_is_one() -> None:
    for directory in {path.parent for path in MODULES}:
        assert (directory / "__init__.py").is_file(), f"{directory} has no __init__.py"


def test_nothing_else_at_the_top() -> None:
    found = {entry.name for entry in ROOT.iterdir() if not entry.name.startswith(".")}
    found = {name for name in found if not name.endswith(".egg-info")}
    assert found <= TOP_LEVEL | MADE_BY_RUNNING


def test_no_large_file_in_the_repository() -> None:
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listing.returncode:
        pytest.skip("not a git checkout")
    for name in listing.stdout.decode().split("\0"):
        path = ROOT / name
        if name and path.is_file() and not name.startswith(("data/tiny/", "tests/golden/reference/")):
            assert path.stat().st_size <= 2**20, f"{name} is larger than 1 MiB"
