"""What a data set costs to train on: image tokens per stage, and operations and hours on batches of its own records.

No weights are read: operations come from the layout of the batches (`llava_pdrop.cost.flops`), hours from a measured
or stated rate.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from llava_pdrop.config.load import RUN_FILE, load_config
from llava_pdrop.config.schema import Config
from llava_pdrop.cost.flops import CountedStep, step_flops
from llava_pdrop.cost.lora import adapter_flops, learning
from llava_pdrop.cost.nominal import NominalModel, model_of, recomputed_by
from llava_pdrop.data.packing import BatchPlan
from llava_pdrop.data.survey import ImageSizes
from llava_pdrop.data.tokens import Encoder
from llava_pdrop.doctor.examine import Findings
from llava_pdrop.errors import ConfigError, MissingFileError, UserError, first_line
from llava_pdrop.geometry import ImageGeometry
from llava_pdrop.schedule import Schedule
from llava_pdrop.train.metrics import METRICS_FILE, read_metrics
from llava_pdrop.types import ImageInput, PackedBatch, Sample

BATCHES = 32
"""Micro-batches of the sample that operations are counted on."""

DEFAULT_TFLOPS = 125.0
"""Assumed rate where nothing was measured: 40 % of the 312 TFLOP/s that an A100 reaches in bfloat16."""


@dataclass(frozen=True)
class Rate:
    """Operations per second of training without and with dropping, and where they are from.

    ``unit``: what an hour at this rate is an hour of.
    """

    vanilla: float
    dropping: float
    source: str
    unit: str


@dataclass(frozen=True)
class Cost:
    """Operations of training one record (forward, backward, recomputation), averaged over ``records`` records in
    ``batches`` micro-batches, without and with the schedule; ``reduction``: the share saved, which is the prediction
    for the time of a step."""

    batches: int
    records: int
    vanilla: float
    dropping: float
    reduction: float

    def hours(self, rate: Rate) -> tuple[float, float]:
        """Of (vanilla, dropping) for 1,000 records."""
        return 1000 * self.vanilla / rate.vanilla / 3600, 1000 * self.dropping / rate.dropping / 3600


def stage_tokens(sizes: np.ndarray, times: np.ndarray, geometry: ImageGeometry, schedule: Schedule) -> dict[str, Any]:
    """Image tokens before any drop and after each one, of pictures of ``sizes`` (m, 2), (width, height), each shown
    ``times`` (m,) times: how many images that are, the total of all, and the mean."""
    keys, which = np.unique(sizes[:, 0].astype(np.int64) << 32 | sizes[:, 1], return_inverse=True)
    shown = np.bincount(which, weights=times, minlength=len(keys)).astype(np.int64).tolist()
    counts = [geometry.num_tokens((key >> 32, key & 0xFFFFFFFF), schedule.downsample) for key in keys.tolist()]
    total = [sum(n * many for n, many in zip(counts, shown))]
    for stage in range(len(schedule.layers)):
        total.append(sum(schedule.kept(n, stage) * many for n, many in zip(counts, shown)))
    images = sum(shown)
    return {"images": images, "total": total, "mean_per_image": [round(n / max(1, images), 2) for n in total]}


def sampled_batches(config: Config, lengths: Sequence[int]) -> list[list[int]]:
    """`BATCHES` micro-batches of the run, or fewer where there are not so many records: places in ``lengths``."""
    section = config.data
    if section.samples_per_batch is not None:
        wanted = BATCHES * section.samples_per_batch
    else:
        assert section.tokens_per_batch is not None
        wanted = max(1, int(BATCHES * section.tokens_per_batch / max(1.0, float(np.mean(lengths)))))
    chosen = np.random.default_rng(config.seed).permutation(len(lengths))[:wanted].tolist()
    plan = BatchPlan(
        [lengths[i] for i in chosen],
        seed=config.seed,
        samples_per_batch=section.samples_per_batch,
        tokens_per_batch=section.tokens_per_batch,
    )
    return [[chosen[i] for i in batch] for batch in plan.micro_batches(0)]


def cost_of(config: Config, model: NominalModel, geometry: ImageGeometry, batches: Sequence[Sequence[Sample]]) -> Cost:
    """The cost of training ``config`` on ``batches`` of samples, whose images need no pixels."""
    packed = [PackedBatch.pack(list(samples)) for samples in batches]
    learns, again = learning(config), recomputed_by(config, model.layers)

    def operations(schedule: Schedule) -> float:
        steps = [CountedStep(model.config, batch, schedule, geometry, learns, again) for batch in packed]
        return sum(step_flops(step).total + adapter_flops(step, config.lora) for step in steps)

    vanilla, dropping = operations(Schedule()), operations(config.schedule.check(model.layers))
    records = sum(len(batch.seq_lens) for batch in packed)
    return Cost(len(packed), records, vanilla / records, dropping / records, 1 - dropping / vanilla)


def rate_of(config: Config, cost: Cost, measured: Path | None, tflops: float | None) -> Rate:
    """The rate to predict hours with: measured where something was, else ``tflops`` or `DEFAULT_TFLOPS`.

    Args:
        measured: a run directory, or the JSON of ``llava-pdrop bench train``; None: the run directory of ``config``
            if it holds a run (unless ``tflops`` is given).

    Raises:
        UserError: ``measured`` holds no measurement.
    """
    why_not = ""
    if measured is None and tflops is None and (Path(config.output_dir) / METRICS_FILE).is_file():
        try:
            return _rate_of_run(Path(config.output_dir), cost)
        except (ValueError, OSError, LookupError, TypeError, AttributeError, ZeroDivisionError) as error:
            why_not = f"; not measured: {first_line(error)}"  # a run that died: nobody has asked for its speed
    if measured is None:
        assumed = " (assumed: 40 % of an A100's 312 in bfloat16)" if tflops is None else " (--tflops-per-second)"
        assumed += why_not
        rate = DEFAULT_TFLOPS if tflops is None else tflops
        return Rate(rate * 1e12, rate * 1e12, f"operations at {rate:g} TFLOP/s{assumed}", "GPU hours")
    return _rate_of_run(measured, cost) if measured.is_dir() else _rate_of_bench(measured, config)


def _rate_of_run(directory: Path, cost: Cost) -> Rate:
    """From the steps of a run on this data; the first ones are left out, while everything warms up."""
    file = directory / METRICS_FILE
    if not file.is_file():
        raise UserError(f"{directory}: holds no {METRICS_FILE}; name the directory of a run, or a bench JSON")
    rows = [row for row in read_metrics(file) if row.get("samples") and row.get("step_seconds")]
    if not rows:
        raise UserError(f"{file}: holds no timed step")
    if not all(0 < row["step_seconds"] < math.inf and row["samples"] > 0 for row in rows):
        raise UserError(f"{file}: holds a step of no time: it is not a file that a run has written")
    seconds = median(row["step_seconds"] / row["samples"] for row in rows[min(2, len(rows) - 1) :])
    saved = directory / RUN_FILE
    dropped = saved.is_file() and not load_config(saved).schedule.vanilla
    rate = (cost.dropping if dropped else cost.vanilla) / seconds
    how = "with" if dropped else "without"
    source = f"measured: {len(rows)} log lines of {directory} ({how} dropping), {1 / seconds:.3g} records/s"
    return Rate(rate, rate, source, "hours on the devices of that run")


def _rate_of_bench(file: Path, config: Config) -> Rate:
    """From the hardware utilisation of a bench: operations with recomputation, by time."""
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        peak = report["peak_flops"]["per_second"]
        runs = [run for run in report["runs"] if run.get("hfu")]
        vanilla = [run for run in runs if Schedule.from_dict(run["schedule"]).vanilla]
        dropping = [run for run in runs if run not in vanilla]
    except FileNotFoundError:
        raise MissingFileError(f"{file}: no such bench JSON or run directory") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not a JSON of llava-pdrop bench train ({type(error).__name__}: {error})") from None
    if not runs:
        raise UserError(f"{file}: holds no measured run")
    dropping.sort(key=lambda run: run["schedule"] != config.schedule.to_dict())  # this very schedule first
    first, second = (vanilla or dropping)[0], (dropping or vanilla)[0]
    source = f"measured: {file} on {report['environment']['device']}, shape {report['shape']['name']}"
    return Rate(first["hfu"] * peak, second["hfu"] * peak, source, "GPU hours")


def predict(
    config: Config,
    findings: Findings,
    encoder: Encoder | None,
    geometry: ImageGeometry | None,
    measured: Path | None = None,
    tflops: float | None = None,
) -> dict[str, Any]:
    """What training ``config`` on the usable records of a checked data set costs, ready for JSON; what is not known is
    None, and ``why_not`` says why.

    Args:
        encoder, geometry: of the model; None where they are not known.
        measured, tflops: as `rate_of`.
    """
    report: dict[str, Any] = dict.fromkeys(("image_tokens_per_stage", "step", "hours_per_1000_records", "why_not"))
    if geometry is None:
        return report | {"why_not": "Not known: the model's config.json is not on this machine."}
    times = np.bincount(findings.which, minlength=len(findings.records)) * findings.usable
    known = findings.shown[:, 0] > 0
    shown = np.repeat(times, findings.counts)
    report["image_tokens_per_stage"] = stage_tokens(findings.shown[known], shown[known], geometry, config.schedule)
    clean = findings.which[findings.clean]
    if encoder is None or not len(clean):
        return report | {"why_not": "Operations and hours are not known: no tokens were counted."}
    try:
        model = model_of(config)
    except ConfigError as error:
        return report | {"why_not": f"Operations and hours are not known: {error}"}
    batches = sampled_batches(config, findings.lengths[clean, 1].tolist())
    cost = cost_of(config, model, geometry, [_samples(findings, encoder, clean[batch]) for batch in batches])
    rate = rate_of(config, cost, measured, tflops)
    vanilla, dropping = cost.hours(rate)
    report["step"] = {
        "batches": cost.batches,
        "records": cost.records,
        "tflop_per_record": {"vanilla": cost.vanilla / 1e12, "dropping": cost.dropping / 1e12},
        "predicted_reduction": cost.reduction,
    }
    report["hours_per_1000_records"] = {
        "vanilla": vanilla, "dropping": dropping, "unit": rate.unit, "source": rate.source
    }  # fmt: skip
    return report


def _samples(findings: Findings, encoder: Encoder, numbers: np.ndarray) -> list[Sample]:
    """Records as training makes them, without pixels."""
    sizes = ImageSizes(np.cumsum(findings.counts), findings.shown)
    return [
        encoder.train(findings.records[number], [ImageInput(torch.empty(0), size) for size in sizes.of(number)])
        for number in numbers.tolist()
    ]
