"""The embedded task from a grown decoder: it learns, within its time, with the packages a bare GPU machine has."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llava_pdrop.compare import learn as module
from llava_pdrop.compare.learn import arms_of, learn
from llava_pdrop.config.load import load_config
from llava_pdrop.errors import ConfigError
from tests.messages import says

ROOT = Path(__file__).parents[3]
CPU = ROOT / "configs/gpu/learn_cpu.yaml"
KEYS = {
    "schedule", "start_accuracy", "accuracy", "chance", "questions", "standard_error", "image_tokens", "steps",
    "seconds_per_step", "wall_seconds_per_step", "peak_mib", "losses", "stopped_early", "train_seconds",
    "eval_seconds",
}  # fmt: skip
MISSING = (
    "datasets", "deepspeed", "wandb", "tensorboard", "bitsandbytes", "easy_vqa", "flash_attn", "pyarrow",
    "sentencepiece",
)  # fmt: skip


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


def pages(place: Path, train: int, evaluate: int) -> list[str]:
    """Words for a config with pages of its own."""
    counts = f'--pretrain,"0",--train,"{train}",--eval,"{evaluate}",--turns,"16"'
    words = [f"data.prepare=[data/prepare/forms.py,--out,{place},{counts}]", f"data.image_root={place}"]
    return [*words, f"data.train={place}/train.json", f"data.eval={place}/eval.json"]


def test_it_learns(tmp_path):
    """PyramidDrop, from a start that has something to learn, in so few steps that a test can afford them."""
    words = ["model.reference_shape.language_model.num_hidden_layers=4", "pyramid_drop.layers=[1,2,3]"]
    words += ["compare.vanilla=false", "compare.training_free=null", "train.max_steps=24", "data.samples_per_batch=8"]
    found = learn(tmp_path / "out", "cpu", CPU, 600, [*words, *pages(tmp_path / "pages", 192, 100)])
    assert json.loads((tmp_path / "out/learn.json").read_text()) == found
    assert found["environment"]["torch"] and found["decoder_parameters"] == 1_049_728
    (arm,) = found["arms"].values()
    assert arm.keys() == KEYS and arm["questions"] == 100 and arm["steps"] == len(arm["losses"]) == 24
    assert arm["image_tokens"] == [256, 128, 64, 32] and not arm["stopped_early"]
    assert arm["accuracy"] - 3 * arm["standard_error"] > max(arm["chance"], arm["start_accuracy"])
    assert sum(arm["losses"][-5:]) / 5 < 0.5 * arm["losses"][0]


def test_time_runs_out_and_packages_are_missing(tmp_path):
    """The first arm ends behind its first step, and the others make as many; nothing that is not there is imported."""
    words = [*pages(tmp_path / "pages", 8, 4), "data.samples_per_batch=2", "compare.training_free.fastv=null"]
    program = "\n".join(
        [
            "import sys",
            f"sys.modules.update(dict.fromkeys({MISSING!r}))",
            "from pathlib import Path",
            "from llava_pdrop.compare.learn import learn",
            f"learn(Path({str(tmp_path / 'out')!r}), 'cpu', Path({str(CPU)!r}), 0.0, {words!r})",
            "print('imported:', [name for name in sys.argv[1:] if sys.modules.get(name)])",
        ]
    )
    done = subprocess.run([sys.executable, "-c", program, *MISSING], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "imported: []" in done.stdout
    arms = json.loads((tmp_path / "out/learn.json").read_text())["arms"]
    assert list(arms) == ["vanilla", "pyramid_drop", "random"]
    assert [arm["steps"] for arm in arms.values()] == [1, 1, 1], arms
    assert [arm["stopped_early"] for arm in arms.values()] == [True, False, False]
    assert all(len(arm["losses"]) == 1 and 0 <= arm["accuracy"] <= 1 for arm in arms.values())


def test_an_arm_that_fails_is_reported_and_the_next_one_runs(tmp_path, monkeypatch):
    def train_arm(run, seconds):
        if run.schedule.ranker == "random":
            raise RuntimeError("CUDA error: out of luck")
        return {"steps": 3, "stopped_early": False}

    monkeypatch.setattr(module, "train_arm", train_arm)
    found = learn(tmp_path, "cpu", CPU, 10.0, pages(tmp_path / "pages", 2, 2))
    assert found["arms"]["random"] == {"error": "RuntimeError: CUDA error: out of luck"}
    assert [name for name, arm in found["arms"].items() if "steps" in arm] == ["vanilla", "pyramid_drop", "fastv"]


def test_arms_have_the_same_average_number_of_image_tokens():
    for name, layers in (("learn.yaml", 12), ("learn_cpu.yaml", 8)):
        run = load_config(ROOT / "configs/gpu" / name)
        arms = arms_of(run)
        assert list(arms) == ["vanilla", "pyramid_drop", "random", "fastv"]
        schedules = [arm.schedule for arm in list(arms.values())[1:]]
        assert [schedule.ranker for schedule in schedules] == ["last_instruction", "random", "fastv"]
        edges = [[0, *s.layers, layers] for s in schedules]
        means = [
            sum((stop - first) * ratio for first, stop, ratio in zip(edge, edge[1:], (1, *s.ratios))) / layers
            for edge, s in zip(edges, schedules)
        ]
        assert means == pytest.approx([0.46875] * 3)
        assert len({arm.output_dir for arm in arms.values()}) == 4


def test_what_cannot_be_is_one_line(tmp_path):
    with pytest.raises(ValueError, match=says("device", "cpu", "cuda", "'gpu'")):
        learn(tmp_path, "gpu", CPU, 1.0)
    with pytest.raises(ConfigError, match=says("learn_cpu.yaml", "model.reference_shape")):
        learn(tmp_path, "cpu", CPU, 1.0, ["model.reference_shape=null"])
    with pytest.raises(ConfigError, match=says("reference_shape.language_model", "num_hidden_layers 10", "multiple")):
        learn(tmp_path, "cpu", CPU, 1.0, ["model.reference_shape.language_model.num_hidden_layers=10"])
