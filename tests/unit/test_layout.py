"""The shape of the house: imports go one way, files have a sensible size, nothing lies where it does not belong."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "llava_pdrop"
UNIT = ROOT / "tests" / "unit"
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))

TOP_LEVEL = {
    "llava_pdrop", "scripts", "configs", "data", "playground", "tests", "setup.py", "Makefile", "README.md", "LICENSE",
}  # fmt: skip
MADE_BY_RUNNING = {"checkpoints", "build", "dist", "runs", "wandb", "__pycache__"}

PARTS = (
    "errors", "files", "world", "types", "geometry", "schedule",
    "report", "model", "config", "generate", "checkpoint", "runtime", "data", "cost", "train", "eval", "compare",
    "study", "doctor", "bench", "serve", "commands",
)  # fmt: skip
"""Files and folders of the package. Each may import those before it, and itself."""

PLANNED = set[str]()

LAZY = {
    "bench.gpu.__main__": "torch, in the process that only starts others",
    "config.schema": "torch, where a config is only looked at",
}
"""Modules that import some of the package inside functions -> what that puts off. (Commands all do: torch.)"""

SHIMS = {"model.plugin", "model.schedule"}
"""Old places of what the README showed there: they hand on, warn, and stand outside of these rules."""

LONGEST, SHORTEST = 400, 40
"""Lines of a file. Shorter ones hold no idea of their own, except entries of the folders below."""

ENTRIES = ("data.readers.", "eval.benchmarks.", "commands.")

OF_THE_WHOLE = {
    "data/test_random_records.py": "what makes samples of records, fed with random ones",
    "test_bare.py": "which packages a GPU machine must have",
    "test_configs_build.py": "the files in configs",
    "test_documents.py": "what the documents name",
    "test_easy_vqa.py": "what the easy-vqa runs start from: its recipe and the parts it ships",
    "test_encoding.py": "files and screens under other locales",
    "test_kinds.py": "tests/kinds.py: which tests start a process or train",
    "test_lab.py": "the laboratory: its pages, its recipe and the decoder it ships",
    "test_launch.py": "the launch scripts in every world",
    "test_layout.py": "this file",
    "test_package.py": "importing the package",
    "test_prepare.py": "the scripts in data/prepare",
    "test_prepare_llava.py": "the download script there",
    "test_restarts.py": "tests/restarts.py: ranks that end by signal 11",
    "test_resume.py": "runs that are killed and started again: launch, training, checkpoints and signals together",
    "test_scripts.py": "the other scripts",
}
"""Files of tests/unit that test no single module -> what they test."""


def name_of(path: Path) -> str:
    """``llava_pdrop/model/vlm.py`` -> ``model.vlm``, ``llava_pdrop/model/__init__.py`` -> ``model``."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


NAMES = {name_of(path) for path in MODULES}
CHECKED = [path for path in MODULES if name_of(path) not in {"", "__main__", *SHIMS}]


def in_words(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def in_unit(path: Path) -> str:
    return str(path.relative_to(UNIT))


def imported(path: Path, functions: bool = True) -> Iterator[str]:
    """Names of all modules that a file imports, with those of names in them; ``functions``: inside functions too."""

    def statements(node: ast.AST) -> Iterator[ast.AST]:
        yield node
        for child in ast.iter_child_nodes(node):
            if functions or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from statements(child)

    for node in statements(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(path: Path, functions: bool = True) -> Iterator[str]:
    """Modules of this package that a file imports, below ``llava_pdrop``: ``model.vlm``."""
    for name in imported(path, functions):
        if name.startswith("llava_pdrop."):
            target = name.removeprefix("llava_pdrop.")
            yield target if target in NAMES else target.rpartition(".")[0]


@pytest.mark.parametrize("path", CHECKED, ids=in_words)
def test_imports_go_one_way(path: Path) -> None:
    own = name_of(path)
    allowed = PARTS[: PARTS.index(own.split(".")[0]) + 1]
    for name in own_imports(path):
        assert name.split(".")[0] in allowed, f"{own} imports {name}"
        assert name not in SHIMS, f"{own} imports {name}, which has moved"


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Imports for type checkers count; those inside functions do not."""
    graph = {name_of(path): set(own_imports(path, functions=False)) for path in CHECKED}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def made_in(path: Path) -> set[str]:
    """Names that a module makes itself."""
    made = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            made.add(node.name)
        else:
            stored = (entry for entry in ast.walk(node) if isinstance(entry, ast.Name))
            made |= {entry.id for entry in stored if isinstance(entry.ctx, ast.Store)}
    return made


def test_a_name_is_imported_from_the_module_that_makes_it() -> None:
    made = {f"llava_pdrop.{name_of(path)}": made_in(path) for path in CHECKED}
    for path in CHECKED:
        for name in set(imported(path)):
            module, _, own = name.rpartition(".")
            if module in made and name not in made:
                assert own in made[module], f"{name_of(path)} imports {own} from {module}, which imports it itself"


def test_imports_stand_at_the_top() -> None:
    found = {name_of(path) for path in CHECKED if set(own_imports(path)) - set(own_imports(path, functions=False))}
    assert {name for name in found if not name.startswith("commands.")} <= set(LAZY)


def test_no_import_is_for_type_checkers_only() -> None:
    """Imports go one way, so none is a circle; what takes long is imported inside the functions that need it."""
    assert not [name_of(path) for path in CHECKED if "TYPE_CHECKING" in path.read_text(encoding="utf-8")]


def test_one_module_knows_the_screen_and_one_the_canvas() -> None:
    """All others hand a page, a table or a line to `llava_pdrop.report`, and draw on what its `pictures` gives."""
    homes = {"rich": "report.console", "matplotlib": "report.pictures"}
    for path in CHECKED:
        found = [name for name in imported(path) if homes.get(name.split(".")[0], name_of(path)) != name_of(path)]
        assert not found, f"{name_of(path)}: {found}"


def test_what_draws_asks_for_its_own_canvas() -> None:
    """`llava_pdrop.report.pictures` imports matplotlib, safely, when the first picture is drawn, and never the windows
    of whoever calls."""
    for path in CHECKED:
        assert not [name for name in imported(path) if name.startswith("matplotlib.pyplot")], path
        assert not [name for name in imported(path, functions=False) if name.startswith("matplotlib")], path


OPENING = ("open", "read_text", "write_text", "fdopen")


def without_encoding(path: Path) -> Iterator[ast.Call]:
    """Calls that open a text file in whatever encoding the machine has. A method ``open`` may be that of an archive: it
    counts where it is given a mode of text."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or any(word.arg == "encoding" for word in node.keywords):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        words = [word.value for word in (*node.args, *node.keywords) if isinstance(word, ast.Constant)]
        words += [word.value.value for word in node.keywords if isinstance(word.value, ast.Constant)]
        modes = [word for word in words if isinstance(word, str) and 0 < len(word) <= 3 and set(word) <= set("rwaxbt+")]
        is_text = not any("b" in mode for mode in modes)
        if name in OPENING and is_text and (modes or name != "open" or isinstance(node.func, ast.Name)):
            yield node


@pytest.mark.parametrize("path", [*MODULES, *sorted((ROOT / "data").glob("*/*.py"))], ids=lambda path: path.stem)
def test_text_files_are_utf_8_everywhere(path: Path) -> None:
    """Not what the locale says: a run begun under GBK or C is read under UTF-8, and the reverse."""
    assert [f"{path}:{node.lineno}" for node in without_encoding(path)] == []


def test_the_parts_are_those_listed() -> None:
    found = {name.split(".")[0] for name in NAMES} - {"", "__main__"}
    assert found | PLANNED == set(PARTS)


def test_the_algorithm_needs_torch_only() -> None:
    outside = {name.split(".")[0] for name in imported(PACKAGE / "model" / "pyramid_drop.py")} - {"torch"}
    assert outside <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", CHECKED, ids=in_words)
def test_a_file_has_a_sensible_size(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST
    assert lines >= SHORTEST or path.name == "__init__.py" or name_of(path).startswith(ENTRIES)
    assert path.stem != "utils"


def test_every_package_is_one() -> None:
    for directory in {path.parent for path in MODULES}:
        assert (directory / "__init__.py").is_file(), f"{directory} has no __init__.py"


def module_of(test: Path) -> Path:
    """``bench/gpu/test_stages.py`` -> ``bench/gpu/stages``, below the package and without its ending."""
    name = test.stem.removeprefix("test_")
    return PACKAGE / test.relative_to(UNIT).parent / ("__main__" if name == "main" else name)


def test_unit_tests_mirror_the_package() -> None:
    """``test_X.py`` lies in the folder of the module or folder X that it tests."""
    for test in UNIT.rglob("test_*.py"):
        module = module_of(test)
        assert module.is_dir() or module.with_suffix(".py").is_file() or in_unit(test) in OF_THE_WHOLE, in_unit(test)


def test_tests_of_the_whole_are_there_and_test_no_single_module() -> None:
    found = {in_unit(test): module_of(test) for test in UNIT.rglob("test_*.py")}
    assert set(OF_THE_WHOLE) <= set(found)
    assert not [name for name in OF_THE_WHOLE if found[name].with_suffix(".py").is_file()]


def test_every_folder_of_the_package_has_tests() -> None:
    tested = {test.relative_to(UNIT).parts[0] for test in UNIT.glob("*/**/test_*.py")}
    assert tested == {path.parent.name for path in PACKAGE.glob("*/__init__.py")}


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
