"""Stage ``generate``: LLaVA-NeXT-7B answers, one prompt of 2,880 image tokens at a time and several at once."""

from __future__ import annotations

import contextlib
from typing import Any

from llava_pdrop.bench.generate import DROPPING
from llava_pdrop.bench.gpu.check import Check
from llava_pdrop.bench.run import GenerateSettings, run_generate
from llava_pdrop.report.units import GIB, time_text

BATCHES = (1, 4, 8)


def run(check: Check) -> None:
    """Measures all batch sizes in one bench; one that memory does not suffice for costs its own row."""
    shape, tokens, new, runs = ("tiny", 100, 4, 1) if check.rehearsal else ("llava-next-7b", 2880, 32, 3)
    asked = GenerateSettings(
        shape=shape, device=check.device.type, out=check.benchmarks, image_tokens=(tokens,), batch=BATCHES,
        new_tokens=new, runs=runs,
    )  # fmt: skip
    with contextlib.redirect_stdout(check.log(".log").open("a", encoding="utf-8")):
        report = run_generate(asked)
    for batch in BATCHES:
        row = answer_row(report, batch)
        check.put(**{f"batch_{batch}": row})
        check.note(f"batch {batch}: {said(row)}")


def answer_row(report: dict[str, Any], batch: int) -> dict[str, Any]:
    """The figures of one batch size; ``error``: why it has none."""
    found = {entry["method"]: entry for entry in report["results"] if entry["batch"] == batch}
    vanilla, dropping = found["vanilla"], found[DROPPING]
    if vanilla["out_of_memory"] or dropping["out_of_memory"]:
        return {"error": "out of memory"}
    both = {"vanilla": vanilla, "dropping": dropping}
    hooks = {own["batch"]: own["share"] for own in report["hooks"]}
    return {
        **{f"{arm}_{key}": own[key]["median"] for arm, own in both.items() for key in ("first_token_ms", "token_ms")},
        "tokens_per_s": {arm: own["tokens_per_s"]["median"] for arm, own in both.items()},
        "cache_gib": {arm: own["cache_bytes"] / GIB for arm, own in both.items()},
        "speedup": dropping["speedup"],
        "prefill_realised_over_predicted": dropping["prefill_realised_over_predicted"],
        "hooks_share": hooks.get(batch),
    }


def said(row: dict[str, Any]) -> str:
    """A row in words."""
    if "error" in row:
        return str(row["error"])
    first, token = (
        " -> ".join(time_text(row[f"{arm}_{key}"] / 1e3) for arm in ("vanilla", "dropping"))
        for key in ("first_token_ms", "token_ms")
    )
    hooks = "not measured" if row["hooks_share"] is None else f"{row['hooks_share']:.1%}"
    return (
        f"first token {first}, per token {token}, prefill {row['speedup']['prefill']:.2f}x (realised / predicted "
        f"{row['prefill_realised_over_predicted']:.3f}), hooks {hooks} of a token"
    )
