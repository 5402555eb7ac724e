"""Killed at random moments again and again, a run ends with the bits of the run that never stopped: losses in
``metrics.jsonl``, final weights, on CPU with one thread.

``make test-faults``; ``LLAVA_PDROP_FAULTS=5 LLAVA_PDROP_FAULTS_SEED=3 pytest tests/faults`` for fewer kills at other
moments. The seed stands in the name of every test.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava_pdrop.config import load_config
from llava_pdrop.train.metrics import METRICS_FILE, read_metrics
from tests.faults.processes import Fault, run_ranks

KILLS = int(os.environ.get("LLAVA_PDROP_FAULTS", "20"))
SEED = int(os.environ.get("LLAVA_PDROP_FAULTS_SEED", "0"))
STEPS = 30
KINDS = ("kill_forward", "kill_forward", "kill_writing", "kill_renaming", "kill_logging")
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed: pip install -e '.[train]'"
)


@pytest.fixture
def write_run(tiny_config, tmp_path):
    def write(name: str, ranks: int, zero: int | None) -> Path:
        train = {
            "max_steps": STEPS, "save_steps": 3, "save_strategy": "steps", "save_total_limit": 2, "use_cpu": True,
            "gradient_accumulation_steps": 2 // ranks, "disable_tqdm": True, "learning_rate": 1e-2, "logging_steps": 2,
        }  # fmt: skip
        if zero is not None:
            settings = tmp_path / f"zero{zero}.json"
            settings.write_text(json.dumps({
                "zero_optimization": {"stage": zero, "stage3_gather_16bit_weights_on_model_save": True},
                "train_micro_batch_size_per_gpu": "auto", "train_batch_size": "auto", "gradient_clipping": "auto",
                "gradient_accumulation_steps": "auto", "zero_allow_untested_optimizer": True,
            }))  # fmt: skip
            train["deepspeed"] = str(settings)
        drop = {"layers": [1, 2, 3], "ratios": [0.5, 0.25, 0.125], "ranker": "random"}
        return tiny_config(name, train=train, pyramid_drop=drop)

    return write


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "zero"),
    [
        pytest.param(1, None, id=f"1_process-seed{SEED}"),
        pytest.param(2, None, id=f"2_processes-seed{SEED}"),
        pytest.param(2, 2, id=f"zero2-seed{SEED}", marks=needs_deepspeed),
        pytest.param(2, 3, id=f"zero3-seed{SEED}", marks=needs_deepspeed),
    ],
)
def test_random_kills_change_nothing(write_run, ranks, zero):
    chance = random.Random(f"{SEED} {ranks} {zero}")
    whole, cut = write_run("whole", ranks, zero), write_run("cut", ranks, zero)
    ended = run_ranks(whole, ranks=ranks, limit=600)
    assert ended.codes == [0] * ranks, ended.texts
    killed = 0
    while killed < KILLS:
        fault = Fault(chance.choice(KINDS), step=chance.randint(1, STEPS), rank=chance.randrange(ranks))
        if fault.kind in ("kill_renaming", "kill_logging"):
            fault = Fault(fault.kind, fault.step)  # the first rank does that
        ended = run_ranks(cut, ranks=ranks, fault=fault, limit=600)
        if ended.codes[fault.rank] == -9:
            killed += 1
        elif ended.codes == [0] * ranks:  # its moment had passed: once more from the start, as nothing is left to kill
            assert_same_end(whole, cut)
            for path in (output_of(cut) / "run.json", output_of(cut) / "model.safetensors"):
                path.unlink()
            for path in output_of(cut).glob("checkpoint-*/manifest.json"):
                path.unlink()  # torn: none is gone on from
        else:
            pytest.fail(f"{fault}: {ended.codes}\n" + "\n".join(ended.texts))
    ended = run_ranks(cut, ranks=ranks, limit=600)
    assert ended.codes == [0] * ranks, ended.texts
    assert_same_end(whole, cut)


def output_of(config: Path) -> Path:
    return Path(load_config(config).output_dir)


def losses(config: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in read_metrics(output_of(config) / METRICS_FILE) if "loss" in r]


def assert_same_end(one: Path, two: Path) -> None:
    assert losses(one) == losses(two)
    a, b = (load_file(output_of(config) / "model.safetensors") for config in (one, two))
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
