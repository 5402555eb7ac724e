"""What a GPU machine must have installed for benches, training, evaluation and tests/gpu: `NEEDED`, and nothing else.

The programs run in Pythons of their own, for which every other installed package is hidden (tests/bare).
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement

from llava_pdrop.train.metrics import METRICS_FILE, read_metrics

ROOT = Path(__file__).parents[2]

NEEDED = (
    "torch", "transformers", "numpy", "pillow", "accelerate", "peft", "safetensors", "omegaconf", "rich", "matplotlib",
    "psutil", "scikit-learn",
)  # fmt: skip
NOT_NEEDED = {
    "datasets", "deepspeed", "wandb", "bitsandbytes", "tensorboard", "easy_vqa", "dill", "multiprocess", "hjson",
    "sentencepiece", "pandas", "pyarrow", "protobuf", "xdist",
}  # fmt: skip
"""Hidden by name, whether installed or not: a package that `NEEDED` comes to ask for would otherwise pass unseen."""


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def with_their_own(names: tuple[str, ...]) -> set[str]:
    """Distributions ``names`` and what they ask for, without extras, as far as installed."""
    found: set[str] = set()
    left = list(names)
    while left:
        name = canonical(left.pop())
        if name in found:
            continue
        found.add(name)
        try:
            asked = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform
        wanted = map(Requirement, asked)
        left += [entry.name for entry in wanted if entry.marker is None or entry.marker.evaluate({"extra": ""})]
    return found


def hidden(needed: tuple[str, ...]) -> str:
    """All installed packages but ``needed`` and what those ask for, as `tests.bare` takes them."""
    kept = with_their_own(needed) | {"llava-pdrop"}
    modules = {
        module
        for module, owners in importlib.metadata.packages_distributions().items()
        if not kept & {canonical(owner) for owner in owners}
    }
    modules -= sys.stdlib_module_names | {entry.name for entry in ROOT.iterdir()}  # some bring a "test" or a "tests"
    installed = {canonical(entry.metadata["Name"]) for entry in importlib.metadata.distributions()}
    return ",".join(sorted(NOT_NEEDED | modules | installed - kept))


def bare(code: str, *needed: str) -> subprocess.CompletedProcess[str]:
    """``code`` in a Python that has `NEEDED` and ``needed`` alone."""
    paths = os.pathsep.join([str(ROOT / "tests" / "bare"), str(ROOT)])
    env = {**os.environ, "PYTHONPATH": paths, "HIDDEN_PACKAGES": hidden((*NEEDED, *needed)), "OMP_NUM_THREADS": "1"}
    for name in [name for name in env if name.startswith(("PYTEST_", "COV_"))]:
        del env[name]
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=False)


IS_BARE = """
import importlib.metadata, importlib.util
for name in ("datasets", "deepspeed", "wandb", "tensorboard", "easy_vqa", "pyarrow", "pandas", "sentencepiece", "dill"):
    assert importlib.util.find_spec(name) is None, name
    try:
        __import__(name)
    except ModuleNotFoundError as error:
        assert error.name == name
    else:
        raise SystemExit(f"{name} can be imported")
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        continue
    raise SystemExit(f"{name} has a version")
from transformers.utils import is_datasets_available, is_sentencepiece_available
from transformers.integrations import is_wandb_available
from accelerate.utils import is_deepspeed_available
assert not (is_datasets_available() or is_sentencepiece_available() or is_wandb_available() or is_deepspeed_available())
"""
"""Fails if the packages are not hidden: then the tests below would show nothing."""

PROGRAMS = """
from pathlib import Path
from llava_pdrop.__main__ import main
from llava_pdrop.config.load import load_config
import llava_pdrop.train.run

out = Path({out!r})
for file in ("configs/llava_next_7b/finetune_pdrop.yaml", "configs/tiny/finetune_pdrop.yaml"):
    assert load_config(file).schedule.layers
few = ["--device", "cpu", "--out", str(out / "bench")]
assert main(["bench", "train", "--shape", "tiny", "--steps", "1", "--warmup", "0", *few]) == 0
prompts = ["--batch", "1", "--image-tokens", "576", "--new-tokens", "2", "--runs", "1"]
assert main(["bench", "prefill", "--shape", "tiny", *prompts, *few]) == 0
pages = f"[data/prepare/forms.py,--out,{{out}}/forms,--pretrain,'1',--train,'8',--eval,'4']"
run = [
    "pretrain=null", "model.projector=data/tiny/projector/model.safetensors",
    f"data.prepare={{pages}}", f"data.train={{out}}/forms/train.json",
    f"data.eval={{out}}/forms/eval.json", f"data.image_root={{out}}/forms", "data.samples_per_batch=2",
    "train.max_steps=2", "train.save_strategy=steps", "train.save_steps=1",
]
for name in ("finetune_pdrop", "finetune_lora_pdrop"):
    assert main(["train", f"configs/tiny/{{name}}.yaml", *run, f"output_dir={{out}}/{{name}}"]) == 0
    assert main(["eval", f"{{out}}/{{name}}"]) == 0
"""


def test_what_is_hidden_looks_as_if_it_were_not_installed() -> None:
    done = bare(IS_BARE)
    assert done.returncode == 0, done.stderr


def test_benches_training_and_evaluation_need_nothing_else(tmp_path: Path) -> None:
    done = bare(PROGRAMS.format(out=str(tmp_path)))
    assert done.returncode == 0, done.stderr
    assert {file.suffix for file in (tmp_path / "bench").iterdir()} == {".json", ".md", ".png"}
    for run in (tmp_path / "finetune_pdrop", tmp_path / "finetune_lora_pdrop"):
        assert len([row["loss"] for row in read_metrics(run / METRICS_FILE) if "loss" in row]) == 2
        assert (run / "training.md").is_file() and (run / "evaluation.json").is_file()


def test_the_gpu_tests_need_pytest_and_nothing_else() -> None:
    code = "import sys, pytest; sys.exit(pytest.main(['--collect-only', '-q', '-p', 'no:cacheprovider', 'tests/gpu']))"
    done = bare(code, "pytest")
    assert done.returncode == 0, done.stdout + done.stderr
    count = re.search(r"(\d+) tests collected", done.stdout)
    assert count is not None and int(count[1]) > 100, done.stdout


GPU_CHECK = """
import json, sys
from pathlib import Path
from llava_pdrop.bench.gpu.__main__ import main
out = Path(sys.argv[1])
assert main(["--device", "cpu", "--stages", "env", "--out", str(out)]) == 0
record = json.loads((out / "gpu_check.json").read_text())["stages"]
assert record["env"]["result"]["deepspeed"] is None, "it is hidden"
for module in ("inside", "learning", "measured", "ranks", "suite"):
    __import__(f"llava_pdrop.bench.gpu.{module}")
"""


def test_the_gpu_check_needs_no_more(tmp_path: Path) -> None:
    done = bare(GPU_CHECK.replace("sys.argv[1]", repr(str(tmp_path))))
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
