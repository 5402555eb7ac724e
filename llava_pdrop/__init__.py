"""llava_pdrop: LLaVA training and inference whose decoder drops image tokens stage by stage (PyramidDrop)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llava_pdrop.generate.plugin import attach, detach
    from llava_pdrop.schedule import Schedule
    from llava_pdrop.study.show import show

__all__ = ["Schedule", "attach", "detach", "show"]

__version__ = "0.1.0"

HOMES = {
    "Schedule": "llava_pdrop.schedule",
    "attach": "llava_pdrop.generate.plugin",
    "detach": "llava_pdrop.generate.plugin",
    "show": "llava_pdrop.study.show",
}
"""Name -> the module it is imported from when it is asked for, since ``attach`` needs torch and transformers."""


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
