"""The front door: what can be imported from the package itself, what that costs, and where old paths lead."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import llava_pdrop
from llava_pdrop.__main__ import COMMANDS
from llava_pdrop.generate import plugin
from llava_pdrop.schedule import Schedule
from tests.messages import says

FOLDER = Path(llava_pdrop.__file__).parent / "config"
CONFIG = ", ".join(
    ["llava_pdrop.config", *(f"llava_pdrop.config.{file.stem}" for file in sorted(FOLDER.glob("[a-z]*.py")))]
)


def test_the_front_door() -> None:
    assert llava_pdrop.attach is plugin.attach and llava_pdrop.detach is plugin.detach
    assert llava_pdrop.Schedule is Schedule
    assert set(llava_pdrop.__all__) <= set(dir(llava_pdrop))
    with pytest.raises(AttributeError, match=says("'llava_pdrop'", "'atach'")):
        llava_pdrop.atach  # noqa: B018


@pytest.mark.parametrize(
    "code",
    [
        "import llava_pdrop",
        "from llava_pdrop import Schedule",
        "import llava_pdrop.errors",
        f"import {CONFIG}",
        *(f"from llava_pdrop.__main__ import _parser; _parser({verb!r}).format_help()" for verb in (None, *COMMANDS)),
    ],
)
def test_torch_is_imported_when_it_is_needed(code: str) -> None:
    code += "; import sys; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("old", "names"),
    [("llava_pdrop.model.plugin", ("attach", "detach")), ("llava_pdrop.model.schedule", ("Schedule",))],
)
def test_paths_that_the_readme_showed_lead_on_and_warn(
    old: str, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, old, raising=False)
    with pytest.warns(DeprecationWarning, match=says(old, f"from llava_pdrop import {', '.join(names)}")):
        module = importlib.import_module(old)
    for name in names:
        assert getattr(module, name) is getattr(llava_pdrop, name)
