"""Training runs in processes of their own, to which something happens: killed, signalled, stuck.

The processes are forked from a server that has imported everything once, so that a run takes about a second.
"""

from __future__ import annotations

import errno
import faulthandler
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from tests.restarts import once_more

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["tests.faults.processes", "llava_pdrop.train.run", "llava_pdrop.eval.evaluate", "deepspeed"]
)

SIGNALS = {
    "kill_forward": signal.SIGKILL,
    "sigterm": signal.SIGTERM,
    "sigterm_all": signal.SIGTERM,
    "sigusr1": signal.SIGUSR1,
}


@dataclass(frozen=True)
class Fault:
    """What happens to one rank in step ``step`` (from 1).

    ``kind``: ``kill_forward``, ``kill_writing`` (in the middle of the checkpoint of that step), ``kill_renaming`` (just
    before it gets its name), ``kill_logging`` (in the middle of a line of metrics), ``sigterm``, ``sigusr1``,
    ``sigterm_all`` (data workers too), ``sleep`` (``seconds``, while the batch is fetched), ``full`` (the disk, while
    the checkpoint is written), ``nan`` (the loss of its last micro-batch), ``sleep_answering`` (before this rank's
    question number ``step`` of an evaluation). ``sleep_loading`` (the model), ``sleep_counting`` (tokens) and
    ``sleep_reporting`` are outside of any step.
    """

    kind: str
    step: int
    rank: int = 0
    seconds: float = 600


@dataclass(frozen=True)
class Ended:
    """How the processes ended: exit codes (negative: signal) and what each wrote."""

    codes: list[int]
    texts: list[str]


def run_ranks(
    config: Path,
    *overrides: str,
    ranks: int = 1,
    fault: Fault | None = None,
    limit: float = 120,
    command: str = "train",
) -> Ended:
    """Runs ``command`` with ``config`` in so many processes and waits for their end; a killed one takes the others with
    it, as a launcher does. Several to which nothing happens, one of which ends by signal 11, start once more
    (`tests.restarts`), from what was in the directory of ``config`` before."""
    arguments = (config, overrides, ranks, fault, limit, command)
    if fault is not None or ranks == 1:
        return _run_once(*arguments)
    with TemporaryDirectory() as saved:
        before = shutil.copytree(config.parent, Path(saved) / "before", symlinks=True)

        def restore() -> None:
            shutil.rmtree(config.parent)
            shutil.copytree(before, config.parent, symlinks=True)

        return once_more(
            lambda: _run_once(*arguments),
            lambda ended: -signal.SIGSEGV in ended.codes,
            lambda ended: ended.texts[ended.codes.index(-signal.SIGSEGV)],
            restore,
        )


def _run_once(
    config: Path, overrides: tuple[str, ...], ranks: int, fault: Fault | None, limit: float, command: str
) -> Ended:
    port = _free_port()
    outputs = [config.with_suffix(f".rank{rank}.txt") for rank in range(ranks)]
    processes = [
        CONTEXT.Process(target=_rank, args=(command, config, overrides, rank, ranks, port, fault, outputs[rank]))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + limit
    while any(process.is_alive() for process in processes):
        dead = any(process.exitcode not in (None, 0) for process in processes)
        if dead:
            deadline = min(deadline, time.monotonic() + 10)  # the others may want to say something
        if time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(0.02)
    for process in processes:
        process.join()
    return Ended([process.exitcode for process in processes], [output.read_text() for output in outputs])


def _rank(
    command: str,
    config: Path,
    overrides: tuple[str, ...],
    rank: int,
    ranks: int,
    port: int,
    fault: Fault | None,
    output: Path,
) -> None:
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    faulthandler.enable(sys.stderr)  # where all threads were, should it end by signal 11
    if ranks > 1:
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        os.environ.update({name: str(value) for name, value in world.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import torch

    from llava_pdrop.__main__ import main

    torch.set_num_threads(1)
    if fault is not None and fault.rank == rank:
        _arm(fault)
    code = main([command, str(config), *overrides])
    sys.stdout.flush()
    sys.exit(code)


def _arm(fault: Fault) -> None:
    """Lets ``fault`` happen in this process."""
    from llava_pdrop.eval import respondent
    from llava_pdrop.train import checkpoints, metrics, report, run, saving, trainer

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if fault.kind == "kill_writing":

        def save(content, file, *args, **kwargs):
            if f"checkpoint-{fault.step}" in str(file):
                Path(file).write_bytes(b"half of it")
                die()
            return original(content, file, *args, **kwargs)

        original, saving.torch.save = saving.torch.save, save
    elif fault.kind == "kill_renaming":

        def commit(staged, target, facts):
            if target.name == f"checkpoint-{fault.step}":
                Path.rename = lambda *args: die()
            return original_commit(staged, target, facts)

        original_commit, checkpoints.commit = checkpoints.commit, commit
    elif fault.kind == "kill_logging":

        def on_log(self, args, state, control, logs=None, **kwargs):
            if state.global_step == fault.step:
                with self.file.open("a") as lines:
                    lines.write('{"step": 1, "lo')
                    lines.flush()
                die()
            return original_log(self, args, state, control, logs=logs, **kwargs)

        original_log, metrics.MetricsFile.on_log = metrics.MetricsFile.on_log, on_log
    elif fault.kind == "full":

        def save_on_full_disk(content, file, *args, **kwargs):
            if f"checkpoint-{fault.step}" in str(file):
                raise OSError(errno.ENOSPC, "No space left on device")
            return original(content, file, *args, **kwargs)

        original, saving.torch.save = saving.torch.save, save_on_full_disk
    elif fault.kind == "nan":

        def watch(self, loss, sample_ids):
            watched.append(loss)
            return original_watch(self, loss * float("nan") if len(watched) == fault.step else loss, sample_ids)

        watched: list = []
        original_watch, trainer.StepGuard.watch = trainer.StepGuard.watch, watch
    elif fault.kind == "sleep":

        def sleep(iterator, count):
            nonlocal fetched
            fetched += 1
            if fetched == fault.step:
                time.sleep(fault.seconds)
            return original_islice(iterator, count)

        fetched, original_islice, trainer.islice = 0, trainer.islice, sleep
    elif fault.kind == "sleep_answering":

        def prepare(*args):
            asked.append(args)
            if len(asked) == fault.step:
                time.sleep(fault.seconds)
            return original_prepare(*args)

        asked: list = []
        llava = respondent.LlavaRespondent
        original_prepare, llava.prepare = llava.prepare, prepare
    elif fault.kind.startswith("sleep_"):
        room, name = {
            "sleep_loading": (run, "load_parts"),
            "sleep_counting": (run, "build_dataset"),
            "sleep_reporting": (report, "write_report"),
        }[fault.kind]
        setattr(room, name, lambda *args: time.sleep(fault.seconds))
    else:
        number = SIGNALS[fault.kind]

        def compute_loss(self, *args, **kwargs):
            if self.state.global_step + 1 == fault.step:
                workers = psutil.Process().children() if fault.kind == "sigterm_all" else []
                for process in (*workers, psutil.Process()):
                    process.send_signal(number)
            return original_loss(self, *args, **kwargs)

        original_loss = trainer.PyramidTrainer.compute_loss
        trainer.PyramidTrainer.compute_loss = compute_loss


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
