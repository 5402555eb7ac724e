"""Which tests start a process, and which train: found by what they, their fixtures and their helpers can call.

`pytest --fast` leaves these out (and those marked ``slow``), and fails any other test that does either all the same.
What cannot be seen in the code (a command chosen by its name, a compiler that PyTorch starts) is marked by hand, with
``@pytest.mark.process`` or ``@pytest.mark.trains``.
"""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from types import CodeType, FunctionType, ModuleType
from typing import Any
from unittest.mock import patch

import pytest
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import Trainer

OURS = ("llava_pdrop", "tests")
STARTERS = {
    "subprocess": {"run", "Popen", "call", "check_call", "check_output"},
    "multiprocessing": {"Process", "Pool", "get_context"},
}
"""Module -> its attributes by which a process is started."""


def mark(item: pytest.Item) -> None:
    """Marks a collected test ``process`` and ``trains`` where it can do so."""
    definitions = item._fixtureinfo.name2fixturedefs
    fixtures = [one.func for name in item.fixturenames for one in definitions.get(name, ())[-1:]]
    for kind in sorted(kinds_of(item.function, *fixtures)):
        item.add_marker(kind)


def kinds_of(*functions: Callable[..., Any]) -> set[str]:
    """``process`` and ``trains``, where one of ``functions`` can do so, itself or through code of this repository."""
    found: set[str] = set()
    waiting, seen = list(functions), set()
    while waiting:
        function = inspect.unwrap(waiting.pop())
        function = getattr(function, "__func__", function)
        if isinstance(function, FunctionType) and function not in seen:
            seen.add(function)
            kinds, called = _look(function)
            found |= kinds
            waiting += called
    return found


@cache
def _look(function: FunctionType) -> tuple[frozenset[str], tuple[FunctionType, ...]]:
    """What ``function`` does itself, and the functions of this repository whose names stand in it."""
    names = set(_names(function.__code__))
    values = [function.__globals__[name] for name in names if name in function.__globals__]
    values += [sys.modules[name] for name in names if name.startswith("llava_pdrop.") and name in sys.modules]
    modules = [value for value in values if isinstance(value, ModuleType)]
    values += [vars(module)[name] for module in modules for name in names if name in vars(module)]
    kinds = {"process" for module in modules if names & STARTERS.get(module.__name__, set())}
    kinds |= {"process" for value in values if isinstance(value, BaseContext)}  # starts processes
    if "step" in names and names & {"optimizer", "adamw"}:
        kinds.add("trains")
    called: list[FunctionType] = []
    for value in values:
        if not str(getattr(value, "__module__", "")).startswith(OURS):
            continue
        if isinstance(value, type) and issubclass(value, Trainer):
            kinds.add("trains")
        members = list(vars(value).values()) if isinstance(value, type) else [value]
        members = [getattr(member, "__func__", getattr(member, "fget", member)) for member in members]
        called += [inspect.unwrap(member) for member in members if isinstance(member, FunctionType)]
    return frozenset(kinds), tuple(called)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


@contextmanager
def neither_process_nor_training() -> Iterator[None]:
    """As long as it lasts, whoever starts a process or takes an optimizer step fails the test."""

    def no_process(*_: Any, **__: Any) -> None:
        pytest.fail("this test of the fast set starts a process: mark it with @pytest.mark.process")

    def no_step(*_: Any, **__: Any) -> None:
        pytest.fail("this test of the fast set trains: mark it with @pytest.mark.trains")

    with ExitStack() as stack:
        stack.enter_context(patch.object(subprocess.Popen, "__init__", no_process))
        stack.enter_context(patch.object(subprocess.Popen, "__del__", lambda self: None))
        stack.enter_context(patch.object(BaseProcess, "start", no_process))
        stack.callback(register_optimizer_step_pre_hook(no_step).remove)
        yield
