"""``--model_args`` of lmms-eval -> the config by which `llava-pdrop eval` would evaluate the same model.

pretrained=DIR,layers=8-16-24,ratios=0.5-0.25-0.125        its own words: commas separate them, dashes list entries
pretrained=DIR,schedule=hidrop,ranker=random               a file in configs/schedules, or `own`: the checkpoint's
pretrained=DIR,train.bf16=true,model.template=v1           words with a dot are keys of the config
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llava_pdrop.checkpoint.lora import config_directory
from llava_pdrop.config.presets import CHECKOUT, KEY
from llava_pdrop.config.schema import Config
from llava_pdrop.errors import UserError, check_name, clip, did_you_mean
from llava_pdrop.eval.evaluate import AnswerSettings, finished, respondent_in
from llava_pdrop.eval.respondent import Respondent
from llava_pdrop.eval.subject import subject_config
from llava_pdrop.files import read_json
from llava_pdrop.generate.families import ATTACHABLE
from llava_pdrop.schedule import Schedule
from llava_pdrop.world import number_of_processes

LISTS = ("layers", "ratios", "keep")
"""Keys of a schedule whose entries are written with dashes between them."""

OWN = "own"
"""As ``schedule``: the one in the checkpoint."""

SET_ELSEWHERE, UNREAD = ("data", "eval", "compare"), "eval.max_unread"
"""Sections of a config that are about questions, which lmms-eval brings along; the one key that holds for these too."""

SEPARATOR = re.compile(r",(?![^\[{]*[\]}])")
"""A comma that is in no list."""


@dataclass(frozen=True)
class Subject:
    """A model that is ready to be asked, by its config and on its device."""

    config: Config
    respondent: Respondent
    settings: AnswerSettings


def words_of(line: str) -> dict[str, str]:
    """``a=1,b=2`` as a mapping. Values stay as they are written: lmms-eval would make the number 7 of ``007``.

    Raises:
        UserError: a word without ``=``, or one that is there twice.
    """
    found: dict[str, str] = {}
    for word in filter(None, (part.strip() for part in SEPARATOR.split(line))):
        name, equals, value = word.partition("=")
        if not equals or not value:
            raise UserError(
                f"model_args: {clip(word)!r} must have the form key=value; the entries of a list have dashes between "
                "them, such as layers=8-16-24"
            )
        if name in found:
            raise UserError(f"model_args: {name} is given twice, as {found[name]} and {value}")
        found[name] = value
    return found


def open_subject(words: Mapping[str, Any]) -> Subject:
    """The model that ``words`` of ``--model_args`` name, and ``device`` and ``batch_size``, which lmms-eval adds.

    Raises:
        UserError: an unknown or missing word, or what `config_for` and `respondent_in` say.
    """
    given = {name: _text(value) for name, value in words.items() if value is not None}
    if "max_batch_size" in given:
        raise UserError("--max_batch_size belongs to --batch_size auto, which is not offered: give --batch_size N")
    device, size = given.pop("device", None), given.pop("batch_size", "1")
    if not size.isascii() or not size.isdigit() or size == "0":
        raise UserError(f"--batch_size must be a whole number from 1, got {clip(size)}")
    if device is not None:
        _check_device(device)
    if device == "cpu":
        given["train.use_cpu"] = "true"
    config = config_for(given)
    settings = replace(AnswerSettings.of(config), batch_size=int(size))
    if device is not None:
        settings = replace(settings, device=torch.device(device))
    respondent = respondent_in(finished(config, writes=False), config)
    respondent.hf.to(settings.device)
    return Subject(config, respondent, settings)


def config_for(given: Mapping[str, str]) -> Config:
    """The config that ``given`` words stand for. Without ``schedule``, ``layers`` or ``downsample`` nothing is dropped,
    whatever the checkpoint says.

    Raises:
        UserError: an unknown or missing word, a schedule that cannot be or does not fit, or as `subject_config`.
    """
    known = ("pretrained", "schedule", *Schedule.__dataclass_fields__)
    for name in given:
        if "." not in name and name not in known:
            raise UserError(
                f"model_args: unknown key {clip(name)!r}{did_you_mean(name, known)}: the keys are {', '.join(known)}, "
                "and those of a config, with a dot"
            )
        if name.split(".")[0] in SET_ELSEWHERE and name != UNREAD:
            raise UserError(
                f"model_args: {clip(name)} would change nothing: lmms-eval has --tasks, --limit, --batch_size and "
                "--gen_kwargs max_new_tokens=N"
            )
        if name.split(".")[0] == KEY:
            raise UserError(f"model_args: {clip(name)}: is written without {KEY}: {name.partition('.')[2]}=VALUE")
    if "pretrained" not in given:
        raise UserError("model_args: pretrained is missing: --model_args pretrained=DIR")
    directory = Path(given["pretrained"]).expanduser()
    if not directory.is_dir():
        raise UserError(
            f"model_args: pretrained={clip(directory)} is no directory: name a run, or download the model first "
            "(hf download NAME --local-dir DIR)"
        )
    others = [f"{name}={value}" for name, value in given.items() if "." in name]
    section = {name: value for name, value in given.items() if name in Schedule.__dataclass_fields__}
    config = subject_config(directory, [*_schedule_words(directory, given.get("schedule"), section), *others], False)
    return replace(config, paper=None)


def _schedule_words(directory: Path, named: str | None, section: Mapping[str, str]) -> list[str]:
    """Overrides of a config for the schedule that is ``named``, or that the ``section``'s keys are."""
    if named == OWN:
        if section:
            raise UserError(f"model_args: schedule={OWN} is the checkpoint's as it is: leave out {', '.join(section)}")
        return []
    if named is None and not section.keys() & {"layers", "downsample"}:
        if section:
            raise UserError(f"model_args: {', '.join(section)} without layers or schedule: nothing would be dropped")
        return [f"{KEY}=null"]
    words = dict(section)
    for name, value in section.items():
        if name in LISTS or (name == "ranker" and "-" in value):  # as 8-16-24 or [8,16,24]
            words[name] = f"[{value.strip('[]').replace('-', ',')}]"
    if "positions" not in words and _has_several_axes(directory):
        words["positions"] = "keep"
    if named is not None:
        return [f"{KEY}={_preset(named)}", *(f"{KEY}.{name}={value}" for name, value in words.items())]
    whole = {name: str(value) if name not in LISTS else "[]" for name, value in vars(Schedule()).items()}
    return [f"{KEY}.{name}={value}" for name, value in {**whole, "depth": "null", **words}.items()]


def _preset(name: str) -> Path:
    """The file of that name in configs/schedules, or the YAML file that it names itself."""
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    files = {file.stem: file for file in sorted((CHECKOUT / "configs" / "schedules").glob("*.yaml"))}
    check_name("model_args: schedule", name, [*files, OWN])
    return files[name]


def _has_several_axes(directory: Path) -> bool:
    """Whether the positions of this model's family have several axes, so that they can only be kept."""
    home = config_directory(directory)
    kind = read_json(home / "config.json").get("model_type") if (home / "config.json").is_file() else None
    return kind in ATTACHABLE and ATTACHABLE[kind].positions == "keep"


def _text(value: Any) -> str:
    """As it would stand on the command line."""
    if isinstance(value, list | tuple):
        return "-".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {clip(name)} is none: give cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: there is no CUDA device here: give cpu")
    if device.index is not None and number_of_processes() > 1:
        raise UserError(f"--device {name} would put all {number_of_processes()} processes on one device: leave it out")
