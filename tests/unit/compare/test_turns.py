"""Steps that take turns: whose turn it is, on which batches, what they leave behind, what is made of their times."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch

from llava_pdrop.compare import turns
from llava_pdrop.compare.rows import VariantRow
from llava_pdrop.compare.turns import longest_step, saving, saving_of_pairs, take_turns
from llava_pdrop.config.load import RUN_FILE, load_config
from llava_pdrop.data.packing import BatchPlan
from llava_pdrop.model.vlm import PyramidLlava
from llava_pdrop.train.metrics import StepMeter, Timing
from llava_pdrop.train.run import train
from llava_pdrop.train.trainer import PyramidTrainer
from tests.messages import says

DROP = {"layers": [1, 2, 3], "ratios": [0.5, 0.25, 0.125]}
TRAIN = {
    "max_steps": 3,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-3,
    "optim": "adafactor",
    "gradient_checkpointing": True,
    "use_cpu": True,
    "save_strategy": "no",
    "disable_tqdm": True,
}
ADAPTERS = {"target": "attention", "r": 4, "alpha": 8, "dropout": 0.1}


@pytest.fixture
def run(tiny_config) -> Path:
    """The directory of a finished run: 3 steps of 2 micro-batches of 2 samples."""
    return train(load_config(tiny_config("run", pyramid_drop=DROP, train=TRAIN)))


@pytest.fixture
def watched(monkeypatch) -> dict[str, list]:
    """What the forward passes and the trainers of a test were."""
    seen: dict[str, list] = {"forward": [], "trainers": [], "clips": []}
    forward, begin, clip = PyramidLlava.forward, PyramidTrainer.__init__, torch.nn.utils.clip_grad_norm_

    def watched_forward(model, batch, trace=None):
        seen["forward"].append(
            {
                "drops": model.schedule.layers,
                "samples": tuple(batch.sample_ids),
                "pixels": batch.pixels.double().sum().item(),
                "threads": torch.get_num_threads(),
                "weights": _weights(model),
            }
        )
        return forward(model, batch, trace)

    def watched_init(trainer, *args, **options):
        begin(trainer, *args, **options)
        seen["trainers"].append(trainer)

    monkeypatch.setattr(PyramidLlava, "forward", watched_forward)
    monkeypatch.setattr(PyramidTrainer, "__init__", watched_init)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a, **k: seen["clips"].append(a[1]) or clip(*a, **k))
    return seen


def test_the_schedules_take_turns_on_the_same_batches(run, watched):
    found = take_turns(load_config(run / RUN_FILE), pairs=2, warmup=1)
    assert len(found.pairs) == 2 and found.steps == (0, 1) and 0 < found.predicted < 1
    passes = watched["forward"]
    steps = [passes[i : i + 2] for i in range(0, len(passes), 2)]  # of two micro-batches
    drops = [len(step[0]["drops"]) for step in steps]
    assert drops == [0, 3, 3, 0, 0, 3]  # warm-up, then the counted pairs; the first one changes
    assert all(len(first["drops"]) == len(second["drops"]) for first, second in steps)
    for left, right in zip(steps[::2], steps[1::2]):
        assert [(p["samples"], p["pixels"]) for p in left] == [(p["samples"], p["pixels"]) for p in right]
        assert all(p["pixels"] != 0 for p in left)

    config = load_config(run / RUN_FILE)
    (trainer,) = watched["trainers"]
    plan = BatchPlan(trainer.train_dataset.lengths(), config.seed, gradient_accumulation=2, samples_per_batch=2)
    records = trainer.train_dataset.records
    batches = [tuple(records[i].id for i in batch) for batch in plan.micro_batches(0)]
    counted = [p["samples"] for pair in steps[2::2] for p in pair]
    assert counted == batches[:4]


def test_weights_and_files_stay_as_they_are(run, watched):
    before = _files(run)
    take_turns(load_config(run / RUN_FILE), pairs=2, warmup=1)
    (trainer,) = watched["trainers"]
    weights = {p["weights"] for p in watched["forward"]} | {_weights(trainer.model)}
    assert len(weights) == 1  # before the first step and behind the last
    assert _files(run) == before and not Path(trainer.args.output_dir).exists()


def test_a_step_is_that_of_the_run(run, watched):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        take_turns(load_config(run / RUN_FILE), pairs=1, warmup=1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    (trainer,) = watched["trainers"]
    assert type(trainer.optimizer.optimizer).__name__ == "Adafactor" and trainer.optimizer.state
    assert trainer.trainable == {"projector", "language_model"}
    assert trainer.model.hf.model.language_model.layers[0].gradient_checkpointing
    assert {p["threads"] for p in watched["forward"]} == {1}
    assert watched["clips"] == [1.0] * 4  # every step of both schedules


def test_adapters_are_timed_as_adapters(tiny_config, watched):
    directory = train(load_config(tiny_config("lora", pyramid_drop=DROP, lora=ADAPTERS)))
    watched["trainers"].clear()
    take_turns(load_config(directory / RUN_FILE), pairs=1, warmup=0)
    (trainer,) = watched["trainers"]
    learning = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert any("lora_" in name for name in learning)
    assert all("lora_" in name or "multi_modal_projector" in name for name in learning)


def test_times_go_to_the_schedule_that_took_them(run, monkeypatch):
    """Vanilla steps of 1 s, 2 s, ... and steps with dropping of 60 % of that; warm-up counts for nothing."""
    drained, steps = StepMeter.drain, []

    def invented(meter, *args):
        metrics = drained(meter, *args)
        place, drops = len(steps), len(metrics_stages(metrics)) > 1
        steps.append(drops)
        pair = place // 2
        seconds = 1000.0 if pair < 2 else float(pair - 1)
        return {**metrics, "step_cpu_seconds": seconds * (0.6 if drops and pair >= 2 else 1)}

    def metrics_stages(metrics):
        return [name for name in metrics if name.startswith("image_tokens_")]

    monkeypatch.setattr(StepMeter, "drain", invented)
    found = take_turns(load_config(run / RUN_FILE), pairs=3, warmup=2)
    assert steps == [False, True, True, False] * 2 + [False, True]
    assert found.pairs == pytest.approx((0.4, 0.4, 0.4)) and found.quartiles == pytest.approx((0.4, 0.4))


def test_spread():
    found = saving_of_pairs([2.0, 1.0, 1.0, 4.0, 1.0], [1.0, 0.9, 0.8, 2.8, 0.6], range(5))
    assert found.pairs == pytest.approx((0.5, 0.1, 0.2, 0.3, 0.4))
    assert found.realised == pytest.approx(0.3) and found.quartiles == pytest.approx((0.2, 0.4))
    assert re.search(says("5 pairs", "quartile"), found.describe())


def trained(run: Path, device: str) -> VariantRow:
    timing = Timing(wall=1.0, cpu=1.0, peak_mib=1.0, device=device, steps=3)
    return VariantRow("run", load_config(run / RUN_FILE), timing=timing)


def test_where_turns_cannot_be_taken_the_runs_speak(run, monkeypatch, capsys):
    found = saving(trained(run, "cuda"), 2.0, 1.0)
    assert found.realised == 0.5 and found.quartiles is None and not found.steps
    assert re.search(says("trained on cuda", "cpu"), found.describe())

    def full(config):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB\nand more")

    monkeypatch.setattr(turns, "take_turns", full)
    found = saving(trained(run, "cpu"), 4.0, 3.0)
    assert found.realised == 0.25 and "and more" not in found.reason
    assert re.search(says("turns", "CUDA out of memory", "3 GiB"), found.reason)
    assert f"{found.reason}\n" in capsys.readouterr().out

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(turns, "take_turns", lambda config: pytest.fail("two processes"))
    assert re.search(says("had 1", "now 2"), saving(trained(run, "cpu"), 1.0, 0.5).describe())


def test_the_longest_step_warms_up():
    plan = BatchPlan([5, 1, 9, 1, 2, 2], gradient_accumulation=2, samples_per_batch=1, shuffle=False)
    assert longest_step(plan, (0, 1, 2)) == 1 and longest_step(plan, (0, 2)) == 0


def _weights(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _files(directory: Path) -> dict[str, str]:
    found = {str(f): hashlib.sha256(f.read_bytes()).hexdigest() for f in directory.rglob("*") if f.is_file()}
    assert json.loads((directory / "run.json").read_text())["steps"] == 3
    return found
