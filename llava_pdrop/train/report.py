"""``training.md`` and ``training.png``, which a run leaves: what ``metrics.jsonl`` says, for people."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from llava_pdrop.errors import first_line
from llava_pdrop.report.page import Page, Picture, Table
from llava_pdrop.report.pictures import subplots
from llava_pdrop.report.units import column, digits, time_text, time_unit
from llava_pdrop.train.bad_samples import BAD_SAMPLES_FILE
from llava_pdrop.train.metrics import METRICS_FILE, stages, step_rows, steps_of

TRAINING_FILE, TRAINING_PICTURE = "training.md", "training.png"

TITLES = {
    "tower": ("vision tower, forward", "#3E5C76"),
    "decoder": ("decoder, forward", "#6B7C8F"),
    "ranking": ("ranking and dropping", "#D7263D"),
    "other_forward": ("rest of the forward", "#748CAB"),
    "backward": ("backward, gradient exchange", "#E2703A"),
    "optimizer": ("optimizer", "#8AB17D"),
    "data": ("waiting for data", "#F2B134"),
    "rest": ("other ranks, clipping, logging, saving", "#C3CAD2"),
}
"""Part of the time -> what it is called and its colour. Together they are the time that passed."""


def forget_report(directory: Path) -> None:
    """Removes the report of an earlier, shorter run in ``directory``."""
    for name in (TRAINING_FILE, TRAINING_PICTURE):
        with suppress(OSError):
            (directory / name).unlink()


def leave_report(directory: Path, name: str, say: Callable[[str], None]) -> None:
    """Writes the report of a run that is finished. What fails is said in one line: the run is complete without."""
    try:
        write_report(directory, name)
    except Exception as error:  # noqa: BLE001  no mistake in here is worth a training run
        what = f"{type(error).__name__}: {first_line(error)}"
        say(f"{directory / TRAINING_FILE} is not written ({what}); the run is complete: the same command writes it")


def write_report(directory: Path, name: str) -> Path | None:
    """Writes both files from the metrics in ``directory``; None where these have no step."""
    rows = step_rows(directory / METRICS_FILE)
    return _page(rows, name, directory).write(directory, TRAINING_FILE)[0] if rows else None


def time_split(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Mean seconds a step of every part that was measured; with waiting for data and the rest it is all of the time.
    ``rows``: all log lines of a run, in each of which are means over its steps."""
    split, steps = {}, steps_of(rows)
    for part in TITLES:
        values = [(row[f"{part}_seconds"], count) for row, count in zip(rows, steps) if f"{part}_seconds" in row]
        if values:
            split[part] = statistics.fmean(*zip(*values))
    return split


def per_sample(rows: Sequence[dict[str, Any]], key: str) -> float:
    """Mean of a number per sample over all samples of a run; its log lines can have different numbers of them."""
    samples = [row.get("samples", 1.0) * steps for row, steps in zip(rows, steps_of(rows))]
    return sum(row[key] * count for row, count in zip(rows, samples)) / sum(samples)


def _page(rows: Sequence[dict[str, Any]], name: str, directory: Path) -> Page:
    counts = [
        [f"{per_sample(rows, f'{kind}_{number}'):,.1f}" for kind in ("tokens", "image_tokens")]
        for number in range(len(stages(rows[-1], "tokens")))
    ]
    stage_head = ("stage", "tokens per sample", "of these image tokens")
    return Page(
        f"Training of {name}",
        [
            Picture(TRAINING_PICTURE, "loss, throughput, tokens, time", lambda: figure_of(rows)),
            Table(("", ""), _facts(rows, directory)),
            Table(stage_head, [(str(number), *cells) for number, cells in enumerate(counts)]),
            *_times(time_split(rows)),
            f"Every logged step: `{METRICS_FILE}`. Stage 0 is before any drop.",
        ],
    )


def _facts(rows: Sequence[dict[str, Any]], directory: Path) -> list[tuple[str, str]]:
    def median(key: str) -> float:
        return statistics.median(row[key] for row in rows if key in row)

    tenth = max(1, len(rows) // 10)
    losses = (f"{statistics.fmean(row['loss'] for row in part):.4f}" for part in (rows[:tenth], rows[-tenth:]))
    facts = [
        ("steps", f"{rows[-1]['step']:,}"),
        ("loss, first and last tenth", " and ".join(losses)),
        ("tokens per second before any drop, all ranks, median", digits(median("tokens_per_second"))),
        ("time of a step, median", time_text(median("step_seconds"))),
    ]
    if "mfu" in rows[-1]:
        facts.append(("MFU, median", f"{median('mfu'):.1%}"))
    for key, title in (("peak_cuda_mib", "peak GPU memory"), ("peak_rss_mib", "peak resident memory")):
        if key in rows[-1]:
            facts.append((f"{title}, first rank", f"{digits(max(row[key] for row in rows) / 1024)} GiB"))
    bad = directory / BAD_SAMPLES_FILE
    if bad.is_file():
        replaced = len(bad.read_text(encoding="utf-8").splitlines())
        facts.append(("samples replaced", f"{replaced:,}, listed in `{bad.name}`"))
    return facts


def _times(split: dict[str, float]) -> list[Table]:
    """Of a step; none where nothing was measured."""
    if not split:
        return []
    whole = sum(split.values())
    head, cells = column("mean over steps and ranks", [*split.values(), whole])
    parts = [*(TITLES[part][0] for part in split), "together"]
    shares = [f"{value / whole:.1%}" for value in (*split.values(), whole)]
    return [Table(("time of a step", head, "share"), list(zip(parts, cells, shares)))]


def figure_of(rows: Sequence[dict[str, Any]]) -> Any:
    """Loss, throughput, tokens by stage and where the time goes, of all log lines of a run."""
    steps = [row["step"] for row in rows]
    figure, ((loss, rate), (tokens, split)) = subplots(2, 2, figsize=(10, 6.4))
    figure.subplots_adjust(left=0.06, right=0.98, top=0.95, bottom=0.08, hspace=0.35)
    line = {"linewidth": 1, "marker": "o" if len(rows) == 1 else None}
    loss.plot(steps, [row["loss"] for row in rows], color="#22303C", **line)
    loss.set(title="loss", xlabel="step")
    rate.plot(steps, [row["tokens_per_second"] for row in rows], color="#3E5C76", **line)
    rate.set(title="tokens per second", xlabel="step", ylim=(0, None))
    for axes in (loss, rate):
        axes.locator_params(axis="x", integer=True)
    means = {
        kind: [per_sample(rows, f"{kind}_{k}") for k in range(len(stages(rows[-1], kind)))]
        for kind in ("tokens", "image_tokens")
    }
    places = range(len(means["tokens"]))
    tokens.bar(places, means["tokens"], color="#DDE3E8", label="text")
    tokens.bar(places, means["image_tokens"], color="#E2703A", label="image")
    tokens.set(title="tokens per sample in every stage", xlabel="stage", xticks=list(places))
    tokens.legend()
    times, left = time_split(rows), 0.0
    unit = time_unit([sum(times.values())])
    for part, seconds in times.items():
        label, colour = TITLES[part]
        split.barh(0, seconds / unit.size, left=left, color=colour, label=label)
        left += seconds / unit.size
    split.set(title="time of a step, mean over steps and ranks", xlabel=unit.name, yticks=[], ylim=(-2.2, 0.6))
    split.grid(visible=False)
    if split.patches:
        split.legend(loc="lower left", ncols=2, fontsize=8, columnspacing=1.0, handlelength=1.2)
    return figure
