"""Arguments of ``llava-pdrop doctor``: is this data set fit for training, and what will training cost?

Exit status: 0 training would start and use every record; 1 it would refuse some; 2 a user's error.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from llava_pdrop.commands.arguments import a_path, a_place, add_config
from llava_pdrop.errors import UserError

DOCTOR_FILE, TEXT, INDEX = "doctor.json", "doctor.md", "clean_index.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    add_config(parser, "YAML file, or the directory of a run")
    parser.add_argument("--eval", action="store_true", help="check data.eval too")
    parser.add_argument(
        "--out", type=a_place, metavar="DIR", help="directory of the report (default: OUTPUT_DIR/doctor)"
    )
    parser.add_argument("--decode", action="store_true", help="read images in full, not only their headers")
    parser.add_argument("--no-tokens", action="store_true", help="do not count tokens; needs no tokenizer")
    parser.add_argument(
        "--tokenizer", type=a_path, metavar="DIR", help="tokenizer to count with (default: the model's)"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: number of CPUs, at most 16)")
    parser.add_argument(
        "--listed", type=int, default=1000, metavar="N", help="problems listed per kind (default: 1000)"
    )
    rate = parser.add_mutually_exclusive_group()
    rate.add_argument(
        "--measured", type=a_place, metavar="PATH", help="predict hours from this run directory or bench JSON"
    )
    rate.add_argument("--tflops-per-second", type=float, metavar="X", help="or from this speed of a GPU, in TFLOP/s")


def run(args: argparse.Namespace) -> None:
    """Runs the command.

    Raises:
        SystemExit: with status 1, after the report is written, if training would refuse a record.
    """
    from llava_pdrop.config.load import RUN_FILE, load_config
    from llava_pdrop.cost.nominal import geometry_of_config, make_encoder
    from llava_pdrop.data.clean_index import CleanIndex
    from llava_pdrop.data.conversation import template_of
    from llava_pdrop.data.mixture import read_data
    from llava_pdrop.data.records import read_records
    from llava_pdrop.doctor.cost import predict
    from llava_pdrop.doctor.examine import examine_set, training_start, verdict
    from llava_pdrop.doctor.report import describe, page, pictures
    from llava_pdrop.files import write_json
    from llava_pdrop.report.console import say
    from llava_pdrop.train.fit import check_templates

    config = load_config(args.config / RUN_FILE if args.config.is_dir() else args.config, args.overrides)
    template_of(config)
    out = args.out or Path(config.output_dir) / "doctor"
    encoder = None if args.no_tokens else make_encoder(config, args.tokenizer)
    geometry = encoder.geometry if encoder else geometry_of_config(config)
    workers = min(os.cpu_count() or 1, 16) if args.workers is None else args.workers
    for name, value in (("workers", workers), ("listed", args.listed)):
        if value < 0:
            raise UserError(f"--{name} must be at least 0, got {value}")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: the report needs a directory, and this is a file; give another --out")

    section = config.data
    if section.prepare is not None:
        from llava_pdrop.train.run import prepare_data

        prepare_data(config)
    sets = {"train": read_data(section.train, section.image_root, section.format, config.seed)}
    if args.eval:
        if section.eval is None:
            raise UserError(f"{config.file}: data.eval names nothing to check; leave --eval out")
        sets["eval"] = read_records(section.eval, section.image_root, check=False)  # no mixture, as in evaluation
    if encoder is not None:
        for line in check_templates(config, sets["train"], encoder.tokenizer):
            say(line)
    out.mkdir(parents=True, exist_ok=True)
    found = {
        name: examine_set(config, name, records, encoder, args.decode, workers, args.listed)
        for name, records in sets.items()
    }
    limits = {"train": section.max_length, "eval": None}
    data = {name: describe(findings, getattr(section, name), limits[name]) for name, findings in found.items()}
    CleanIndex.of(section.train, sets["train"], found["train"].clean).write(out / INDEX)

    training = training_start(config, found["train"])
    report: dict[str, Any] = {
        "name": config.name,
        "config": config.file,
        "verdict": verdict(training, found, out / INDEX),
        "training": training,
        "clean_index": INDEX,
        "data": data,
        "cost": predict(config, found["train"], encoder, geometry, args.measured, args.tflops_per_second),
    }
    drawn = {name: pictures(findings, name, limits[name]) for name, findings in found.items()}
    shown = page(report, drawn)
    files = shown.write(out, TEXT)
    for name, histograms in drawn.items():
        data[name]["figures"] = {what: p.file for what, p in histograms.items() if out / p.file in files}
    write_json(out / DOCTOR_FILE, report)
    shown.show()
    say(report["verdict"])
    say(f"report: {out / TEXT}, {out / DOCTOR_FILE}, {out / INDEX}")
    if not training.would_use_every_record or any(entry["usable"] < entry["records"] for entry in data.values()):
        raise SystemExit(1)
