"""What ``llava-pdrop plan CONFIG --gpus 8x80`` says besides, as a table and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from llava_pdrop.bench.plan import RESERVE
from llava_pdrop.bench.plan_advice import PEAKS, Advice, overrides, what_lacks
from llava_pdrop.bench.workload import FULL_TEXT_TOKENS
from llava_pdrop.config import Config
from llava_pdrop.model.memory import GIB

NOT_MEASURED = "Arithmetic on counted bytes and operations: nothing here has been measured on a GPU."


def advice_json(config: Config, advice: Advice) -> dict[str, Any]:
    """The advice for machines: bytes, operations, seconds."""
    arms = {}
    for arm in advice.arms:
        arms[arm.name] = {
            "setting": arm.setting and asdict(arm.setting),
            "overrides": overrides(config, arm) or None,
            "why_not": None if arm.setting else what_lacks(advice, arm, config),
            "missing_bytes": 0.0 if arm.setting else arm.least.total - advice.room,
            "flop_per_sample": arm.flops,
            "seconds_per_1000_samples": {name: advice.seconds(arm, peak, 1000) for name, peak in PEAKS.items()},
            "hours": advice.length.samples
            and {name: advice.seconds(arm, peak, advice.length.samples) / 3600 for name, peak in PEAKS.items()},
        }
        if arm.setting is None:
            arms[arm.name] |= {"seconds_per_1000_samples": None, "hours": None}
    return {
        "gpus": advice.gpus,
        "gib": advice.gib,
        "reserve": RESERVE,
        "global_batch": advice.batch,
        "mfu": advice.mfu,
        "peak_flops": PEAKS,
        "run": asdict(advice.length),
        "note": NOT_MEASURED,
        "arms": arms,
    }


def show_advice(console: Console, config: Config, advice: Advice) -> None:
    """Prints the advice."""
    whole = advice.length.samples
    unit = "s/1,000" if whole is None else "hours"
    table = Table(title=f"Advice for {_gpus(advice)}", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for title in ("", "engine"):
        table.add_column(title, no_wrap=True)
    heads = ("samples", "accumulated", "recomputed", "GiB per GPU", "GiB of CPUs")
    for title in (*heads, *(f"{unit}, {name}" for name in PEAKS)):
        table.add_column(title, justify="right")
    for arm in advice.arms:
        setting = arm.setting
        if setting is None:
            table.add_row(arm.name, "none fits")
            continue
        seconds = [advice.seconds(arm, peak, 1000 if whole is None else whole) for peak in PEAKS.values()]
        table.add_row(
            arm.name,
            setting.engine,
            *map(str, (setting.samples, setting.accumulation, setting.recomputed)),
            f"{setting.total / GIB:.1f}",
            f"{setting.cpu * advice.gpus / GIB:.0f}" if setting.cpu else "-",
            *(f"{taken if whole is None else taken / 3600:.3g}" for taken in seconds),
        )
    console.print(table)
    for arm in advice.arms:
        line = f"{arm.name}: {overrides(config, arm)}" if arm.setting else what_lacks(advice, arm, config)
        console.print(line, highlight=False, soft_wrap=True)
    console.print(
        f"Global batch {advice.batch}: {advice.told}. {RESERVE:.0%} of the memory stays free. Preferred: the engine "
        "whose GPUs wait least for each other, then the fewest recomputed layers, then the largest micro-batch "
        "(llava_pdrop/bench/plan_advice.py).",
        highlight=False,
    )
    run = (
        f"{whole:,.0f} samples"
        if whole is not None
        else "Seconds per 1,000 samples, since the length of the run is not known"
    )
    rates = ", ".join(f"{name}: {peak / 1e12:g}" for name, peak in PEAKS.items())
    console.print(
        f"{run}: {advice.length.source}. Each is taken for a full picture and {FULL_TEXT_TOKENS} text tokens. Time is "
        f"that of {_gpus(advice)} at an assumed MFU of {advice.mfu:g} (--mfu) of their peak in TFLOP/s ({rates}). "
        "Recomputed operations come on top at the same rate; communication and waiting for data are not in it.",
        highlight=False,
    )
    console.print(NOT_MEASURED, highlight=False)


def _gpus(advice: Advice) -> str:
    return f"{advice.gpus} GPU{'s' if advice.gpus > 1 else ''} of {advice.gib:g} GiB"
