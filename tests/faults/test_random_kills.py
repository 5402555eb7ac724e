"""Killed at random moments again and again, a run ends with the bits of the run that never stopped: losses in
``metrics.jsonl``, final weights, on CPU with one thread; whatever the engine.

Without more words one kill per engine; ``make test-faults`` makes 20 in longer runs, ``LLAVA_PDROP_FAULTS=5
LLAVA_PDROP_FAULTS_SEED=3 pytest tests/faults`` 5 at other moments. The seed stands in the name of every test.
"""

from __future__ import annotations

import os
import random
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava_pdrop.checkpoint.load import PROJECTOR_FILE
from llava_pdrop.checkpoint.lora import ADAPTER
from llava_pdrop.config.load import load_config
from llava_pdrop.train.checkpoints import newest_whole, step_of
from llava_pdrop.train.history import FINISHED_FILE
from llava_pdrop.train.metrics import METRICS_FILE, read_metrics
from tests.engines import FSDP2, deepspeed_arguments, needs_deepspeed
from tests.faults.processes import Fault, run_ranks
from tests.messages import says

KILLS = int(os.environ.get("LLAVA_PDROP_FAULTS", "1"))
SEED = int(os.environ.get("LLAVA_PDROP_FAULTS_SEED", "0"))
STEPS, SAVE_STEPS, LOGGING_STEPS, FIRST_STEP = (30, 3, 2, 1) if KILLS > 1 else (4, 1, 1, 2)
"""With one kill it comes when there is a checkpoint."""
KINDS = ("kill_forward", "kill_forward", "kill_writing", "kill_renaming", "kill_logging")
LORA = {"r": 4, "alpha": 8, "dropout": 0.1}  # the dropout draws random numbers
ENGINES = [
    pytest.param(1, None, False, id=f"1_process-seed{SEED}"),
    pytest.param(2, None, False, id=f"2_processes-seed{SEED}"),
    pytest.param(2, "fsdp2", False, id=f"fsdp2-seed{SEED}"),
    pytest.param(2, "zero2", False, id=f"zero2-seed{SEED}", marks=needs_deepspeed),
    pytest.param(2, "zero3", False, id=f"zero3-seed{SEED}", marks=needs_deepspeed),
    pytest.param(2, "fsdp2", True, id=f"fsdp2_lora-seed{SEED}"),
    pytest.param(2, "zero2", True, id=f"zero2_lora-seed{SEED}", marks=needs_deepspeed),
    pytest.param(2, "zero3", True, id=f"zero3_lora-seed{SEED}", marks=needs_deepspeed),
]


@pytest.fixture
def write_run(tiny_config, tmp_path):
    def write(name: str, ranks: int, engine: str | None, lora: bool) -> Path:
        train = {
            "max_steps": STEPS, "save_steps": SAVE_STEPS, "save_strategy": "steps", "save_total_limit": 2,
            "gradient_accumulation_steps": 2 // ranks, "learning_rate": 1e-2, "logging_steps": LOGGING_STEPS,
            "use_cpu": True, "disable_tqdm": True,
        }  # fmt: skip
        if engine is not None:
            train |= FSDP2 if engine == "fsdp2" else deepspeed_arguments(engine, tmp_path)
        drop = {"layers": [1, 2, 3], "ratios": [0.5, 0.25, 0.125], "ranker": "random"}
        return tiny_config(name, train=train, pyramid_drop=drop, **({"lora": LORA} if lora else {}))

    return write


@pytest.mark.parametrize(("ranks", "engine", "lora"), ENGINES)
def test_random_kills_change_nothing(write_run, ranks, engine, lora):
    chance = random.Random(f"{SEED} {ranks} {engine} {lora}")
    whole, cut = write_run("whole", ranks, engine, lora), write_run("cut", ranks, engine, lora)
    ended = run_ranks(whole, ranks=ranks, limit=600)
    assert ended.codes == [0] * ranks, ended.texts

    def to_the_end() -> None:
        ended = run_ranks(cut, ranks=ranks, limit=600)
        assert ended.codes == [0] * ranks, ended.texts
        assert_same_end(whole, cut)

    done, words = 0, ()
    for _ in range(KILLS):
        if done >= STEPS - SAVE_STEPS:  # little is left to kill: once more from the start
            to_the_end()
            (output_of(cut) / FINISHED_FILE).unlink()
            done, words = 0, ("train.resume=never",)
        fault = draw(chance, done, ranks)
        ended = run_ranks(cut, *words, ranks=ranks, fault=fault, limit=600)
        assert ended.codes[fault.rank] == -9, f"{fault}: {ended.codes}\n" + "\n".join(ended.texts)
        newest = newest_whole(output_of(cut), print)
        done, words = step_of(newest) if newest else 0, ()
    to_the_end()


def draw(chance: random.Random, done: int, ranks: int) -> Fault:
    """A fault that will happen to a run whose newest checkpoint is that of step ``done``."""
    kind = chance.choice(KINDS)
    every = {"kill_forward": 1, "kill_logging": LOGGING_STEPS}.get(kind, SAVE_STEPS)
    steps = [step for step in range(max(done + 1, FIRST_STEP), STEPS + 1) if step % every == 0]
    rank = chance.randrange(ranks) if kind in ("kill_forward", "kill_writing") else 0  # the first rank does the others
    return Fault(kind, chance.choice(steps), rank)


@pytest.mark.parametrize(("engine", "rank"), [
    pytest.param("fsdp2", 0),
    pytest.param("zero2", 1, marks=needs_deepspeed),
    pytest.param("zero3", 0, marks=needs_deepspeed),
])  # fmt: skip
def test_a_disk_that_is_full_for_one_rank_ends_sharded_runs_too(write_run, engine, rank):
    """The other rank waits for it inside DeepSpeed or accelerate, and is ended by the launcher."""
    config = write_run("run", 2, engine, False)
    ended = run_ranks(config, ranks=2, fault=Fault("full", 2 * SAVE_STEPS, rank=rank))
    assert ended.codes[rank] == 2, ended.texts
    first, second = (f"{output_of(config)}/checkpoint-{n * SAVE_STEPS}" for n in (1, 2))
    assert re.search(re.escape(f"[rank {rank}] error: {second} ") + says("GiB", "free", first), ended.texts[rank])
    assert ended.codes[1 - rank] != 0
    assert [path.name for path in output_of(config).glob("checkpoint-*")] == [f"checkpoint-{SAVE_STEPS}"]


@pytest.mark.parametrize(
    "engine", ["fsdp2", *(pytest.param(name, marks=needs_deepspeed) for name in ("zero2", "zero3"))]
)
def test_sharded_checkpoints_of_adapters_are_without_the_base(write_run, engine):
    """What they hold is enough to go on: see the kills above."""
    config = write_run("run", 2, engine, True)
    ended = run_ranks(config, f"train.max_steps={SAVE_STEPS}", ranks=2)
    assert ended.codes == [0, 0], ended.texts
    checkpoint = newest_whole(output_of(config), print)
    if engine == "fsdp2":
        states = [torch.load(checkpoint / "pytorch_model_fsdp.bin", weights_only=True)]
    else:
        files = sorted(checkpoint.glob("global_step*/*model_states.pt"))
        loaded = [torch.load(file, weights_only=False) for file in files]
        assert len(files) == (2 if engine == "zero3" else 1)  # under ZeRO-3 of each rank
        assert all(state["frozen_param_fragments"] is None for state in loaded)
        states = [state["module"] for state in loaded]
    learning = {f"host.{name}" for name in load_file(checkpoint / PROJECTOR_FILE)}
    for state in states:
        assert {name for name in state if not ADAPTER.search(name)} == learning
        assert sum(ADAPTER.search(name) is not None for name in state) == 2 * 7 * 4  # A and B, modules, layers
    assert not any("unknown inputs or outputs" in text for text in ended.texts)  # ZeRO-3 knows what the model returns


def output_of(config: Path) -> Path:
    return Path(load_config(config).output_dir)


def losses(config: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in read_metrics(output_of(config) / METRICS_FILE) if "loss" in r]


def assert_same_end(one: Path, two: Path) -> None:
    assert losses(one) == losses(two)
    a, b = learnt(one), learnt(two)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def learnt(config: Path) -> dict[str, torch.Tensor]:
    """All weights a run has left: the model's, or of a LoRA run adapters and projector."""
    return {k: t for file in sorted(output_of(config).glob("*.safetensors")) for k, t in load_file(file).items()}
