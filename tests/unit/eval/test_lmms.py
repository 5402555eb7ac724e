"""lmms-eval is no requirement: who may import it. What it does with our models is in tests/lmms."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import llava_pdrop

PACKAGE = Path(llava_pdrop.__file__).parent
HOME = PACKAGE / "eval" / "lmms"


def importers(*names: str) -> set[Path]:
    """Files that import a module that begins so."""
    found = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found |= {file for module in modules if module.startswith(names)}
    return found


def test_only_the_model_and_its_manifest_import_lmms_eval():
    assert importers("lmms_eval") == {HOME / "__init__.py", HOME / "model.py"}
    assert importers("llava_pdrop.eval.lmms.model") == set()


def test_what_lmms_eval_loads_at_every_start_is_light():
    code = (
        "import llava_pdrop.eval.lmms, sys; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
