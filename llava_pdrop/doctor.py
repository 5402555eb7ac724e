"""Arguments of ``llava-pdrop doctor``: is this data set fit to train on, and what will that cost?

Exit status: 0 training would start and use every record; 1 there are records that it refuses; 2 a user's error.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llava_pdrop.config import Config
    from llava_pdrop.data.doctor import Findings
    from llava_pdrop.data.tokens import Encoder
    from llava_pdrop.geometry import ImageGeometry

REPORT, TEXT, INDEX = "doctor.json", "doctor.md", "clean_index.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    parser.add_argument("config", metavar="CONFIG", help="YAML file, or the directory of a run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the config")
    parser.add_argument("--eval", action="store_true", help="check data.eval too")
    parser.add_argument("--out", metavar="DIR", help="where the report goes (default: OUTPUT_DIR/doctor)")
    parser.add_argument("--decode", action="store_true", help="read images in full, not only their headers")
    parser.add_argument("--no-tokens", action="store_true", help="do not count tokens, so that no tokenizer is needed")
    parser.add_argument("--tokenizer", metavar="DIR", help="tokenizer to count with (default: that of the model)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: number of CPUs, at most 16)")
    parser.add_argument(
        "--listed", type=int, default=1000, metavar="N", help="problems listed per kind (default: 1000)"
    )
    rate = parser.add_mutually_exclusive_group()
    rate.add_argument("--measured", metavar="PATH", help="run directory or bench JSON that hours are predicted from")
    rate.add_argument("--tflops-per-second", type=float, metavar="X", help="or the operations per second of a GPU")


def run(args: argparse.Namespace) -> None:
    """Runs the command.

    Raises:
        SystemExit: with status 1, after the report is written, if training would refuse a record.
    """
    from llava_pdrop.bench.data_cost import predict
    from llava_pdrop.config import RUN_FILE, load_config
    from llava_pdrop.data.clean_index import CleanIndex
    from llava_pdrop.data.conversation import TEMPLATES
    from llava_pdrop.data.doctor_report import describe, draw, to_markdown
    from llava_pdrop.data.mixture import read_data
    from llava_pdrop.data.records import read_records
    from llava_pdrop.train.checks import check_name

    path = Path(args.config)
    config = load_config(path / RUN_FILE if path.is_dir() else path, args.overrides)
    check_name(config, "model.template", config.model.template, TEMPLATES)
    out = Path(args.out) if args.out else Path(config.output_dir) / "doctor"
    encoder = None if args.no_tokens else make_encoder(config, args.tokenizer)
    geometry = encoder.geometry if encoder else geometry_of_config(config, needed=False)
    workers = min(os.cpu_count() or 1, 16) if args.workers is None else args.workers
    if workers < 0 or args.listed < 0:
        raise ValueError("--workers and --listed count something: give 0 or more")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: the report needs a directory, and this is a file; give another --out")

    section = config.data
    if section.prepare is not None:
        from llava_pdrop.train.run import prepare_data

        prepare_data(config)
    sets = {"train": read_data(section.train, section.image_root, section.format, config.seed)}
    if args.eval:
        if section.eval is None:
            raise ValueError(f"{config.file}: data.eval names nothing to check; leave --eval out")
        sets["eval"] = read_records(section.eval, section.image_root, check=False)  # no mixture, as in evaluation
    out.mkdir(parents=True, exist_ok=True)
    found = {name: _examine(config, name, records, encoder, args, workers) for name, records in sets.items()}
    data: dict[str, Any] = {}
    for name, findings in found.items():
        limit = section.max_length if name == "train" else None
        data[name] = describe(findings, getattr(section, name), limit)
        data[name]["figures"] = draw(findings, name, limit, out)
    CleanIndex.of(section.train, sets["train"], found["train"].clean).write(out / INDEX)
    training = _training(config, data["train"])
    measured = Path(args.measured) if args.measured else None
    report = {
        "name": config.name,
        "config": config.file,
        "verdict": _verdict(data, training, args.no_tokens, out / INDEX),
        "training": training,
        "clean_index": INDEX,
        "data": data,
        "cost": predict(config, found["train"], encoder, geometry, measured, args.tflops_per_second),
    }
    (out / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (out / TEXT).write_text(to_markdown(report), encoding="utf-8", errors="backslashreplace")
    _show(report, out)
    if any(entry["usable"] < entry["records"] for entry in data.values()):
        raise SystemExit(1)


def make_encoder(config: Config, tokenizer: str | None = None) -> Encoder:
    """How the records of ``config`` become tokens, without its model's weights.

    Args:
        tokenizer: directory of a tokenizer; None: that of the model.

    Raises:
        ConfigError: no tokenizer on this machine, or nothing says how many tokens a picture has.
    """
    from transformers import AutoTokenizer

    from llava_pdrop.bench.nominal import model_home
    from llava_pdrop.config import ConfigError
    from llava_pdrop.data.conversation import TEMPLATES
    from llava_pdrop.data.tokens import Encoder
    from llava_pdrop.model.vocabulary import add_special_tokens

    model = config.model
    names = [tokenizer] if tokenizer else [name for name in (model.path, model.language_model) if name is not None]
    for name in names:
        directory = model_home(name)
        if any(directory.glob("tokenizer*")):
            break
    else:
        raise ConfigError(
            f"{config.file}: no tokenizer on this machine in {' or '.join(names)}: give --tokenizer DIR, or --no-tokens"
        )
    try:
        loaded = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{directory}: not readable as a tokenizer: {' '.join(str(error).split())}") from None
    geometry = geometry_of_config(config)
    assert geometry is not None
    image_token_id = add_special_tokens(loaded, len(loaded))
    section = config.data
    template = TEMPLATES[config.model.template]
    return Encoder(template, loaded, image_token_id, geometry, section.max_length, section.truncation)


def geometry_of_config(config: Config, needed: bool = True) -> ImageGeometry | None:
    """The rules for the pictures of ``config``: a whole model's own, else those of the config.

    Args:
        needed: False: None where nothing on this machine tells.

    Raises:
        ConfigError: nothing on this machine tells.
    """
    from llava_pdrop.bench.nominal import model_of
    from llava_pdrop.config import ConfigError

    try:
        return model_of(config).geometry
    except ConfigError:
        if needed:
            raise
        return None


def _examine(
    config: Config, name: str, records: Any, encoder: Encoder | None, args: argparse.Namespace, workers: int
) -> Findings:
    """Evaluation never shortens, so its data have no limit, and it needs the answer to the last question."""
    from dataclasses import replace

    from llava_pdrop.data.conversation import TEMPLATES
    from llava_pdrop.data.doctor import examine
    from llava_pdrop.data.doctor_checks import Checks

    budget = config.data.tokens_per_batch
    if name == "eval" and encoder is not None:
        encoder, budget = replace(encoder, max_length=None), None
    template = TEMPLATES[config.model.template]
    checks = Checks(template, encoder, config.data.truncation, args.decode, budget, scored=name == "eval")
    return examine(records, checks, workers, args.listed)


def _training(config: Config, train: dict[str, Any]) -> dict[str, Any]:
    """What training would do with ``data.train``. It skips what is over the budget of a micro-batch in no case."""
    left_out = train["records"] - train["usable"]
    share = left_out / train["records"]
    skips = config.data.on_invalid == "skip" and share <= config.data.max_invalid and train["usable"] > 0
    skips = skips and "over_budget" not in train["problems"]
    return {
        "on_invalid": config.data.on_invalid,
        "max_invalid": config.data.max_invalid,
        "refused_records": left_out,
        "refused_share": share,
        "would_start": not left_out or skips,
        "would_use_every_record": not left_out,
    }


def _verdict(data: dict[str, Any], training: dict[str, Any], no_tokens: bool, index: Path) -> str:
    known = " (tokens were not counted, so records may still be too long)" if no_tokens else ""
    train, lines = data["train"], []
    if training["would_use_every_record"]:
        lines.append(f"Training would start and use every record{known}.")
    else:
        setting = f"data.on_invalid: {training['on_invalid']}"
        if training["on_invalid"] == "skip":
            setting += f", data.max_invalid: {training['max_invalid']:g}"
        starts = "would start without them" if training["would_start"] else "would not start"
        rest = f"; data.index={index} trains on the other {train['usable']:,}" if train["usable"] else ""
        lines.append(
            f"{training['refused_records']:,} of {train['records']:,} records cannot be used{known}. "
            f"Training ({setting}) {starts}{rest}."
        )
    if "eval" in data and (left_out := data["eval"]["records"] - data["eval"]["usable"]):
        lines.append(f"{left_out:,} of {data['eval']['records']:,} records of data.eval cannot be used.")
    return " ".join(lines)


def _show(report: dict[str, Any], out: Path) -> None:
    """The gist, for the terminal."""
    for name, found in report["data"].items():
        print(f"data.{name}: {found['usable']:,} of {found['records']:,} records can be used")
        for entry in found["problems"].values():
            print(f"  {entry['records']:>9,}  {entry['summary']}" + ("" if entry["refused"] else " (taken)"))
    print(report["verdict"])
    print(f"report: {out / TEXT}, {out / REPORT}, {out / INDEX}")
