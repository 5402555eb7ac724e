"""The report of ``llava-pdrop bench train`` as tables, in Markdown and on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llava_pdrop.bench.report import markdown_table

GIB = 1024
"""MiB in a GiB."""

TIMES = {
    "step": "step",
    "forward": "forward",
    "backward": "backward",
    "optimizer": "optimizer",
    "ranking": "ranking and dropping",
    "tower": "tower forward",
    "tower_backward": "tower backward",
}
"""Region (`timing.REGIONS`) -> its line in the table."""

NOTES = """\
- Times are medians over {steps} counted steps each, with their quartiles: {clock}. All runs took turns on the same
  batches.
- Ranking and dropping includes selecting the survivors; it lies in the forward.
- Tower backward goes from the gradient of its features to the end of the backward pass (that of the text embeddings
  comes last and is in it), and lies in the backward; the picture shows them apart.
- Tokens/s counts the samples before any drop. MFU: operations that the samples ask for, without recomputed layers, by
  time and peak; HFU: all operations. Both count the scores that fused attention computes once more in its backward.
- *Operations saved* is the prediction for these very batches (text, tower, projector, head, ranking and recomputation
  included; the optimizer has none). *Time saved* is what the steps saved at the median speed of each run (seconds per
  operation, since batches differ in length). The JSON has every step, and the saving of the plain totals.
- *Peak predicted* (GPUs only) is what `llava-pdrop plan` would say with this optimizer, for the largest counted batch.
"""


def tables(report: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, head, lines) of the runs and, where there are any, of the variants."""
    device = report["environment"]["device"]
    title = f"{report['shape']['name']} on {device}, {report['dtype']}"
    columns = [_column(run, report["optimizer"]["kind"]) for run in report["runs"]]
    lines = [[name, *(column[name] for column in columns)] for name in columns[0]]
    head = ["median [quartiles]", *(run["name"] for run in report["runs"])]
    found = [(title, head, [line for line in lines if any(line[1:])])]
    stages = [(run, *stage) for run in report["runs"] for stage in enumerate(run.get("stages", []))]
    lines = [
        [run["name"], str(k), f"{s['tokens']:,.0f}", _ms(s["seconds"]), f"{s['share_of_peak']:.1%}"]
        for run, k, s in stages
    ]
    found.append(("Decoder layers by stage, forward", ["run", "stage", "tokens", "ms", "share of peak"], lines))
    if report["compare"]:
        lines = [line for entry in report["compare"] for line in _variant_lines(entry)]
        found.append(("Variants", ["choice", "variant", "run", "step ms", "peak GiB", "tokens/s", "realised"], lines))
    return found


def markdown(report: dict[str, Any], picture: str) -> str:
    """The report as text; ``picture`` is the file name of its PNG."""
    machine, stock = report["environment"], report["workload"]
    steps = len(report["runs"][0]["steps"]["loss"])
    text = [f"# Training step: {report['shape']['name']}\n"]
    for title, head, lines in tables(report):
        text.append(f"## {title}\n\n{markdown_table(head, lines)}")
    text.append(NOTES.format(steps=steps, clock=report["times"]["seconds"]))
    text.append(f"![Where the time of a step goes]({picture})\n")
    size = machine["device_memory_gib"]
    host = f"{machine['device_count']} cores, {machine['threads']} used" if size is None else f"{size} GiB"
    settings = {
        "device": f"{machine['device']}, {host}",
        "versions": f"torch {machine['torch']}, CUDA {machine['cuda'] or 'none'}, transformers "
        f"{machine['transformers']}, Python {machine['python']}",
        "commit": str(machine["commit"]),
        "date": machine["date"],
        "command": f"`{machine['command']}`",
        "seed": str(machine["seed"]),
        "optimizer": report["optimizer"]["description"],
        "peak": f"{report['peak_flops']['per_second'] / 1e12:.4g} TFLOP/s, {report['peak_flops']['source']}",
        "batches": f"{stock['source']}: {stock['image_tokens']:.0f} image and {stock['text_tokens']:.0f} text "
        f"tokens, {stock['turns']:.1f} turns a sample, {stock['text_only_share']:.1%} without picture",
        **{run["name"]: _schedule(run["schedule"]) for run in report["runs"][1:]},
    }
    text.append(markdown_table(["setting", ""], [list(item) for item in settings.items()]))
    return "\n".join(text)


def show(report: dict[str, Any]) -> None:
    """Prints the tables, and what they come to."""
    console = Console()
    for title, head, lines in tables(report):
        shown = Table(title=escape(title), box=box.SIMPLE_HEAD, header_style="bold")
        for place, name in enumerate(head):
            shown.add_column(escape(name), justify="left" if place == 0 else "right")
        for line in lines:
            shown.add_row(*map(escape, line))
        console.print(shown)
    peak, kind = report["peak_flops"], report["optimizer"]
    console.print(f"Times: {report['times']['seconds']}.", style="dim", highlight=False)
    console.print(f"Optimizer: {kind['description']}. Peak: {peak['source']}.", style="dim", highlight=False)
    for run in report["runs"]:
        if "realised_reduction" in run:
            console.print(escape(_verdict(run)), highlight=False)


def _column(run: dict[str, Any], optimizer_kind: str) -> dict[str, str]:
    """Title of a line -> what it says of one run; nothing where there is nothing to say."""
    spread, foreseen, ratio = run["quartiles"], run["predicted_peak_mib"], run.get("realised_over_predicted")
    column = {f"{title}, ms": _spread(spread[name]) for name, title in TIMES.items()}
    if optimizer_kind == "none":
        column[f"{TIMES['optimizer']}, ms"] = "left out"
    return column | {
        "ranking and dropping, of the step": f"{run['ranking_share']:.1%}" if run["ranking_share"] else "-",
        "peak memory, GiB": f"{run['peak_mib'] / GIB:.2f}",
        "peak predicted, GiB": "" if foreseen is None else f"{foreseen / GIB:.2f}",
        "tokens/s": f"{run['tokens_per_second']:,.0f}",
        "MFU": f"{run['mfu']:.1%}",
        "HFU": f"{run['hfu']:.1%}",
        "operations saved (predicted)": _share(run.get("predicted_reduction")),
        "time saved (realised)": _share(run.get("realised_reduction")),
        "realised / predicted": "" if ratio is None else f"{ratio:.3f}",
    }


def _verdict(run: dict[str, Any]) -> str:
    ratio = run["realised_over_predicted"]
    share = "" if ratio is None else f": {ratio:.3f} of it"
    return (
        f"{run['name']}: a step takes {run['realised_reduction']:.1%} less time than vanilla; the operations predict "
        f"{run['predicted_reduction']:.1%}{share}."
    )


def _schedule(schedule: dict[str, Any]) -> str:
    layers, ratios = (", ".join(map(str, schedule[key])) for key in ("layers", "ratios"))
    return f"before layers {layers} keep {ratios} ({schedule['ranker']}, {schedule['positions']})"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _variant_lines(entry: dict[str, Any]) -> list[list[str]]:
    if entry["unavailable"]:
        return [[entry["group"], entry["name"], "", f"not available: {entry['unavailable']}", "", "", ""]]
    lines = []
    for run in entry["runs"]:
        numbers = [run["error"] or "", "", "", ""]
        if "quartiles" in run and run["error"] is None:
            step, rate = _spread(run["quartiles"]["step"]), f"{run['tokens_per_second']:,.0f}"
            numbers = [step, f"{run['peak_mib'] / GIB:.2f}", rate, _share(run.get("realised_reduction"))]
        lines.append([entry["group"], entry["name"], run["name"], *numbers])
    return lines


def _spread(values: Sequence[float]) -> str:
    first, middle, third = values
    if not any(values):
        return "-"
    return f"{_ms(middle)} [{_ms(first)}, {_ms(third)}]"


def _ms(seconds: float) -> str:
    """Milliseconds with three digits and no exponent."""
    value = 1000 * seconds
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
