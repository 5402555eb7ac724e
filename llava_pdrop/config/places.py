"""Every path in a config, in one place: written out once, when it is read, so that whoever uses it later means the same
directory; made absolute in what a run leaves, so that it is found from anywhere.

A path may begin with ``~`` and hold environment variables (``$HOME/x``). A relative one is relative to where the
program is started (the checkout: the scripts go there), that of ``base`` to the file it stands in. Hub ids stay.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llava_pdrop.errors import Problem

MODELS = ("model.path", "model.language_model", "model.vision_tower")
"""Keys that name a directory, or a model on the hub."""

PATHS = (
    "output_dir", *MODELS, "model.projector", "data.train", "data.eval", "data.image_root", "data.index", "data.cache",
    "eval.root", "train.resume", "train.deepspeed", "train.fsdp_config", "train.accelerator_config", "train.engine",
)  # fmt: skip
"""Keys whose value is a path. ``pretrain`` and ``data.prepare`` hold some among other words."""

WORDS = {"train.resume": ("auto", "never")}
"""Values of `PATHS` that are none."""

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")


def expanded(key: str, path: str) -> str:
    """``path``, the value of ``key``, with ``~`` and environment variables written out.

    Raises:
        Problem: a variable that is not set, a home that nobody has, or nothing at all.
    """
    if not path.strip():
        raise Problem(key, f"{key} is an empty path: name a file or directory, or leave the key out")
    for match in VARIABLE.finditer(path):
        if not os.environ.get(name := match[1] or match[2]):
            raise Problem(key, f"{key}: {path}: the environment variable {name} is not set")
    path = os.path.expanduser(VARIABLE.sub(lambda match: os.environ[match[1] or match[2]], path))
    if path.startswith("~"):
        raise Problem(key, f"{key}: {path}: there is no such home directory: write the path out")
    return path


def absolute(key: str, path: str) -> str:
    """``path`` as it is found from anywhere."""
    return path if key in MODELS and is_hub_id(path) else os.path.abspath(path)


def is_hub_id(entry: str) -> bool:
    """Whether ``entry`` reads as organisation/name and not as a path below an existing directory."""
    return bool(HUB_ID.fullmatch(entry)) and not Path(entry.split("/")[0]).exists()


def relative_to_run(values: Mapping[str, Any]) -> dict[str, Any]:
    """A config whose paths are absolute, with all of them relative to its ``output_dir``: two that are alike are one
    run in two places."""
    home = values.get("output_dir") or os.curdir
    return mapped(values, lambda key, path: os.path.relpath(path, home) if os.path.isabs(path) else path)


def mapped(values: Mapping[str, Any], change: Callable[[str, str], str]) -> dict[str, Any]:
    """The ``values`` of a config, sections within it, with every path that they hold put through ``change(key, path)``.
    What is no text there is left for others to refuse."""
    new = {name: dict(part) if isinstance(part, Mapping) else part for name, part in values.items()}
    for key in PATHS:
        *section, name = key.split(".")
        part = new.get(section[0]) if section else new
        if not isinstance(part, dict) or not isinstance(part.get(name), str):
            continue
        if _is_path(key, part[name]):
            part[name] = change(key, part[name])
    data = new.get("data")
    if isinstance(data, dict) and isinstance(data.get("prepare"), list | tuple):
        data["prepare"] = [_in_command(n, word, change) for n, word in enumerate(data["prepare"])]
    pretrain = new.get("pretrain")
    if isinstance(pretrain, str):
        new["pretrain"] = _in_words(pretrain, change)
    return new


def _is_path(key: str, value: str) -> bool:
    """Settings for DeepSpeed may be named by a word, for accelerate be written out as JSON."""
    if key == "train.engine":
        return value.endswith(".json")
    return value not in WORDS.get(key, ()) and not value.lstrip().startswith("{")


def _in_command(number: int, word: Any, change: Callable[[str, str], str]) -> Any:
    """The script of ``data.prepare``, and those of its arguments that are written as paths of this machine."""
    if not isinstance(word, str):
        return word
    is_path = number == 0 or word.startswith(("~", "$")) or ("/" in word and os.path.exists(word))
    return change("data.prepare", word) if is_path else word


def _in_words(text: str, change: Callable[[str, str], str]) -> str:
    """``pretrain``: the config of stage 1, then overrides, some of which are paths."""
    try:
        words = shlex.split(text)
    except ValueError:
        return text  # said by `llava_pdrop.config.paths.pretrain_words`
    changed = []
    for number, word in enumerate(words):
        key, equals, value = word.partition("=")
        if number == 0:
            word = change("pretrain", word)
        elif equals and value and key in PATHS and _is_path(key, value) and value != "null":
            word = f"{key}={change(key, value)}"
        changed.append(word)
    return text if changed == words else shlex.join(changed)
