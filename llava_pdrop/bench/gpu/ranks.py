"""Stage ``ranks``: real training steps on all GPUs of the machine, engine by engine.

``python -m llava_pdrop.bench.gpu.ranks`` is what torchrun starts on every GPU.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from llava_pdrop.bench.gpu.check import Check
from llava_pdrop.bench.gpu.runner import end, stage_file
from llava_pdrop.bench.shapes import make_model, shape_named
from llava_pdrop.bench.workload import Workload
from llava_pdrop.config.load import load_config
from llava_pdrop.data.packing import BatchPlan
from llava_pdrop.files import read_json, write_json
from llava_pdrop.report.units import GIB, MIB
from llava_pdrop.runtime.ranks import engine_for_one_run
from llava_pdrop.train.arguments import learning_rates, training_arguments
from llava_pdrop.train.metrics import METRICS_FILE, read_metrics
from llava_pdrop.train.optim import freeze
from llava_pdrop.train.trainer import PyramidTrainer
from llava_pdrop.world import is_first

ENGINES = ("ddp", "zero2", "zero3", "fsdp2")
"""Engines in the order in which they are measured, see ``train.engine``."""

STEPS, WARMUP = 8, 3

ROOT = Path(__file__).resolve().parents[3]
CONFIG = "configs/llava_next_7b/finetune_pdrop.yaml"
"""The run whose training arguments are used; a rehearsal takes the embedded default's."""
REHEARSAL = "configs/tiny/finetune_pdrop.yaml"


def run(check: Check) -> None:
    """Seconds of a step and tokens a second of every engine, and how much of the single GPU's rate (stage ``next``, the
    same micro-batch) each GPU keeps. DDP holds the whole optimizer on every GPU, for which a 7B model is too large: it
    trains the projector alone, as stage 1 does, and has no scaling figure.

    On one GPU there is nothing to measure, which is reported. A rehearsal starts two processes on the CPU.

    Raises:
        RuntimeError: an engine could not be measured; why stands beside it in the result.
    """
    gpus = torch.cuda.device_count()
    check.put(gpus=gpus, engines={})
    if gpus < 2 and not check.rehearsal:
        check.note("one GPU: nothing to measure")
        return
    processes = 2 if check.rehearsal else gpus
    alone = _alone(check)
    # Every engine has a launch of its own, so that one that hangs costs one; the rehearsal saves the imports.
    launches: Sequence[Sequence[str]] = [ENGINES] if check.rehearsal else [[engine] for engine in ENGINES]
    for place, engines in enumerate(launches):
        limit = check.left / (len(launches) - place) - 2
        check.put(engines=check.result["engines"] | _launch(check, engines, processes, limit))
        for engine in engines:
            found = check.result["engines"][engine]
            if alone and "tokens_per_second" in found and engine != "ddp":
                found["scaling"] = found["tokens_per_second"] / (processes * alone)
            check.note(f"{engine}, {processes} processes: {found}")
        check.save()
    if failed := [engine for engine, found in check.result["engines"].items() if "error" in found]:
        raise RuntimeError(f"not measured: {', '.join(failed)}")


def _alone(check: Check) -> float | None:
    """Tokens a second of one GPU with dropping, of stage ``next`` of this check; None where it was not measured."""
    file = stage_file(check.work, "next")
    if not file.is_file():
        return None
    return read_json(file)["result"].get("dropping", {}).get("tokens_per_second")


def _launch(check: Check, engines: Sequence[str], processes: int, limit: float) -> dict[str, dict[str, Any]]:
    """Trains under ``engines`` on ``processes`` ranks; figures, or an ``error``, of each."""
    scratch = check.work / "scratch" / "-".join(engines)
    scratch.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["-m", "llava_pdrop.bench.gpu.ranks", str(scratch), *engines]
    command += ["--rehearsal"] if check.rehearsal else []
    reason = None
    with check.log(f"-{'-'.join(engines)}.log").open("w", encoding="utf-8") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            if status := process.wait(timeout=max(1.0, limit)):
                reason = f"exit status {status}, see {Path(log.name).name}"
        except subprocess.TimeoutExpired:
            reason = f"not finished after {limit:.0f} s"
        finally:
            end(process, signal.SIGTERM, 10.0)  # torchrun passes it on to its ranks
    found = {}
    for engine in engines:
        file = scratch / f"{engine}.json"
        found[engine] = read_json(file) if file.is_file() else {"error": reason or "no figures"}
    return found


def train(engine: str, out: Path, rehearsal: bool) -> dict[str, Any]:
    """Trains `STEPS` steps in this rank with our Trainer on synthetic batches; figures over all ranks."""
    shape = shape_named("tiny" if rehearsal else "llava-next-7b")
    if engine == "ddp" and not rehearsal:
        shape = replace(shape, trainable=("projector",))
    steps, warmup = (4, 1) if rehearsal else (STEPS, WARMUP)
    changes = [
        "train.gradient_accumulation_steps=1", f"train.max_steps={steps}", "train.logging_steps=1",
        'train.save_strategy="no"', "train.report_to=none", "train.dataloader_num_workers=0", "train.resume=never",
        f"train.engine={engine}", f"output_dir={out}",
    ]  # fmt: skip
    config = load_config(ROOT / (REHEARSAL if rehearsal else CONFIG), changes)
    # Before the engine: under ZeRO-3 transformers cuts up the models that it makes, and this one it does not load.
    device = torch.device("cpu") if rehearsal else torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    model = make_model(shape, device)
    model.schedule = shape.schedule
    freeze(model, shape.trainable)
    with engine_for_one_run():
        args = training_arguments(config)
        work = Workload(shape, "mixture" if rehearsal else "full")
        samples: Any = work.samples(shape.samples * args.world_size * STEPS)  # all ranks make the same ones
        plan = BatchPlan(
            [len(sample.input_ids) for sample in samples],
            world_size=args.world_size,
            samples_per_batch=shape.samples,
            shuffle=False,
        )
        trainer = PyramidTrainer(model.train(), args, samples, plan, learning_rates(config, args))
        trainer.train()
        rows = [row for row in read_metrics(out / METRICS_FILE) if "loss" in row][warmup:]
        trainer.accelerator.wait_for_everyone()
    tokens = sum(len(sample.input_ids) for sample in samples[: shape.samples * args.world_size])
    seconds = median(row["step_seconds"] for row in rows)
    memory = [row["peak_cuda_mib"] for row in rows if "peak_cuda_mib" in row]
    return {
        "processes": args.world_size,
        "trainable": list(shape.trainable),
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "peak_gib": max(memory) * MIB / GIB if memory else None,
        "losses": [row["loss"] for row in rows],
    }


def main() -> int:
    """A rank: every engine in turn; the first rank writes what was found."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("engines", nargs="+", choices=ENGINES)
    parser.add_argument("--rehearsal", action="store_true")
    args = parser.parse_args()
    failed = False
    for engine in args.engines:
        began = time.perf_counter()
        try:
            found = train(engine, args.out / engine, args.rehearsal)
        except (ValueError, ImportError, RuntimeError) as error:
            found, failed = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}, True
        if is_first():
            found["wall"] = round(time.perf_counter() - began, 1)
            write_json(args.out / f"{engine}.json", found)
        if failed:  # the ranks may no longer be at the same place
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
