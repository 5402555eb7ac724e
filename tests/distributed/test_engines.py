"""Every engine trains the same model, or the same adapters: one process = DDP = ZeRO-2 = ZeRO-3 (with and without
activation checkpointing and offload) = FSDP2, on gloo with 2 CPU processes, one picture, many or none in a micro-batch,
dropping on. Most tests read what one launch has left, because a launch takes seconds."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from llava_pdrop.checkpoint.build import build_parts
from llava_pdrop.checkpoint.load import PROJECTOR_FILE
from llava_pdrop.config.load import load_config
from llava_pdrop.train.metrics import METRICS_FILE, read_metrics
from llava_pdrop.train.run import train
from tests.distributed.program import visits_of
from tests.engines import FSDP2, HAS_DEEPSPEED, deepspeed_arguments, needs_deepspeed
from tests.faults.processes import run_ranks
from tests.restarts import once_more

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed"),
    pytest.mark.xdist_group("distributed"),  # one worker has the launch
]

PICTURES = [(), (48, 30, 44), (48,), (20, 48), (), (48, 40, 32), (), (36,), (48, 20), (48, 24, 36), (), (42, 42)]
"""Heights of the pictures, 48 wide, in every record."""
STEPS = 3
TRAIN = {
    "num_train_epochs": 1,
    "use_cpu": True,
    "save_strategy": "no",
    "disable_tqdm": True,
    "optim": "adamw_torch",
    "learning_rate": 0.02,
    "lr_scheduler_type": "constant",
    "adam_epsilon": 1e-2,  # of the size of gradients, so that weights show a gradient of the wrong size
    "weight_decay": 0.1,
    "max_grad_norm": 5.0,  # clips the first step and not the others
}
ALL = ["projector", "language_model", "vision_tower"]
CHECKPOINTING = {"gradient_checkpointing": True}
BF16 = {"bf16": True}
OFFLOAD = ("zero2_offload", "zero3_offload")
DROP = {"layers": [1, 2, 3], "ratios": [0.5, 0.25, 0.125]}
OTHERS = {  # what else modules can be made to do: pool, the final norm early, a layer that waits for its pictures
    "layers": [1, 2, 3], "keep": [0.75, 6, 2], "ranker": ["cdpruner", "dart", "salient_text"], "inject": 1,
    "merge": "nearest", "downsample": 9,
}  # fmt: skip
ADAPTERS = {"r": 4, "alpha": 8, "dropout": 0.0}  # two ranks would draw other dropout than one process


@dataclass(frozen=True)
class Run:
    """What a finished run has left."""

    file: Path

    @property
    def output(self) -> Path:
        return Path(load_config(self.file).output_dir)

    @property
    def rows(self) -> list[dict]:
        return [row for row in read_metrics(self.output / METRICS_FILE) if "loss" in row]

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """Of a LoRA run adapters, projector and tower."""
        return {k: t for file in sorted(self.output.glob("*.safetensors")) for k, t in load_file(file).items()}

    def visits(self, rank: int) -> dict:
        return json.loads(visits_of(self.file, rank).read_text())


@pytest.fixture(scope="module")
def write_run(tiny_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes the configuration of a run over `PICTURES`, one record in every micro-batch."""
    root = tmp_path_factory.mktemp("engines")
    records = []
    for number, heights in enumerate(PICTURES):
        names = [f"{number}_{i}.png" for i in range(len(heights))]
        for i, (name, height) in enumerate(zip(names, heights)):
            Image.effect_noise((48, height), 80).convert("RGB").point(lambda v, i=i: v // (1 + i)).save(root / name)
        question = "<image>\n" * len(names) + "Which colour is it"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "red and blue"[: 3 + number % 9]}]
        records.append({"id": str(number), "conversations": turns} | ({"image": names} if names else {}))
    (root / "data.json").write_text(json.dumps(records))

    def write(
        name: str,
        accumulation: int,
        trainable: list[str] = ALL,
        lora: dict | None = None,
        drop: dict = DROP,
        **arguments: object,
    ) -> Path:
        content = {
            "name": name,
            "output_dir": str(root / name),
            "seed": 3,
            "model": {
                "language_model": str(tiny_files / "llm"),
                "vision_tower": str(tiny_files / "tower"),
                "template": "qa",
                "trainable": trainable,
                "kernels": "torch",  # eager ones run under every engine in tests/unit/test_resume.py
            },
            "data": {
                "train": str(root / "data.json"), "image_root": str(root), "max_length": 256, "samples_per_batch": 1,
                "cache": None,
            },
            "pyramid_drop": drop,
            "train": {**TRAIN, "gradient_accumulation_steps": accumulation, **arguments},
            "lora": lora,
        }  # fmt: skip
        file = root / f"{name}.yaml"
        file.write_text(json.dumps(content))
        return file

    return write


SIGNAL_11 = "Signal 11 (SIGSEGV) received by PID"
"""What torchrun says of a process that ended so."""


def launch(files: list[Path]) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "tests.distributed.program", *map(str, files)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1"}

    def start() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False
        )

    def start_over() -> None:
        for file in files:
            shutil.rmtree(load_config(file).output_dir, ignore_errors=True)

    done = once_more(start, lambda done: SIGNAL_11 in done.stdout + done.stderr, lambda done: done.stderr, start_over)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-8000:]


@pytest.fixture(scope="module")
def runs(write_run: Callable[..., Path]) -> dict[str, Run]:
    """All runs of 2 processes, in one launch; and those of a single process."""
    files = [
        write_run("ddp", 2),
        write_run("ddp_blind", 2, trainable=["language_model"]),
        write_run("ddp_bf16", 2, **BF16),
        write_run("ddp_lora", 2, lora=ADAPTERS),
        write_run("ddp_others", 2, drop=OTHERS),
        write_run("fsdp2", 2, **FSDP2),
        write_run("fsdp2_bf16", 2, **FSDP2, **BF16),
        write_run("fsdp2_lora", 2, lora=ADAPTERS, **FSDP2),
        write_run("fsdp2_others", 2, drop=OTHERS, **FSDP2),
    ]
    if HAS_DEEPSPEED:
        zero2, zero3 = (deepspeed_arguments(name, files[0].parent) for name in ("zero2", "zero3"))
        files += [
            write_run("zero2", 2, **zero2),
            write_run("zero3", 2, **zero3),
            write_run("zero3_others", 2, drop=OTHERS, **zero3),
            write_run("zero3_checkpointing", 2, **zero3, **CHECKPOINTING),
            write_run("zero2_bf16", 2, **zero2, **BF16),
            write_run("zero3_bf16", 2, **zero3, **BF16),
            write_run("zero2_lora", 2, lora=ADAPTERS, **zero2),
            write_run("zero3_lora", 2, lora=ADAPTERS, **zero3),
            *(write_run(name, 2, **deepspeed_arguments(name, files[0].parent)) for name in OFFLOAD),
        ]
    launch(files)
    alone = [
        write_run("alone", 4),
        write_run("alone_lora", 4, lora=ADAPTERS),
        write_run("alone_others", 4, drop=OTHERS),
    ]
    for file in alone:
        train(load_config(file))
    return {file.stem: Run(file) for file in (*alone, *files)}


def like(run: str, engine: str) -> str:
    """The ``run`` whose settings are those of ``engine``."""
    return next((f"{run}_{kind}" for kind in ("lora", "others") if kind in engine), run)


ZERO3 = [pytest.param(name, marks=needs_deepspeed) for name in ("zero3", "zero3_bf16", "zero3_lora", "zero3_offload")]


@pytest.mark.parametrize("engine", ["fsdp2", "fsdp2_bf16", "fsdp2_lora", *ZERO3])
def test_weights_are_cut_up(runs, engine):
    """So that the tests below say something of ZeRO-3 and FSDP: with all parameters whole they would say nothing."""
    assert not any(runs[engine].visits(0)["whole"])
    assert all(runs["ddp"].visits(0)["whole"])


ENGINE = [
    "ddp",
    "ddp_lora",
    "ddp_others",
    "fsdp2",
    "fsdp2_lora",
    "fsdp2_others",
    *(
        pytest.param(name, marks=needs_deepspeed)
        for name in ("zero2", "zero3", "zero3_others", "zero3_checkpointing", *OFFLOAD, "zero2_lora", "zero3_lora")
    ),
]


@pytest.mark.parametrize("engine", ENGINE)
def test_two_ranks_equal_one_process(runs, engine):
    """Not bit by bit: two ranks add up the gradients of 4 micro-batches in pairs, one process in a row, so the float32
    sums differ in their last bits (2**-24 = 6e-8 of each). Measured are 1e-7 in weights of up to 1; gradients of half
    their size end 2e-2 away."""
    alone, run = runs[like("alone", engine)], runs[engine]
    assert len(run.rows) == STEPS
    for one, other in zip(alone.rows, run.rows):
        for key in ("loss", "grad_norm", "samples", "tokens_0"):
            assert other[key] == pytest.approx(one[key], rel=1e-5), key
        assert [other[f"image_tokens_{i}"] for i in range(4)] == [one[f"image_tokens_{i}"] for i in range(4)]
    weights = run.weights
    assert weights.keys() == alone.weights.keys()
    for name, tensor in alone.weights.items():
        assert torch.allclose(weights[name], tensor, rtol=0, atol=2e-6), name


@pytest.mark.parametrize("engine", ENGINE[3:])
def test_engines_equal_ddp_bit_by_bit_in_the_first_loss(runs, engine):
    """The first loss is a forward of the same weights over the same batches: sharding only moves numbers about."""
    assert runs[engine].rows[0]["loss"] == runs[like("ddp", engine)].rows[0]["loss"]


@needs_deepspeed
def test_activation_checkpointing_changes_no_bit(runs):
    """What is computed anew is computed from the same numbers by the same operations."""
    plain, again = runs["zero3"], runs["zero3_checkpointing"]
    assert [(r["loss"], r["grad_norm"]) for r in plain.rows] == [(r["loss"], r["grad_norm"]) for r in again.rows]
    assert all(torch.equal(tensor, again.weights[name]) for name, tensor in plain.weights.items())
    assert len(again.visits(0)["modules"][0]) > len(plain.visits(0)["modules"][0]), "nothing was recomputed"


BFLOAT16 = [
    "ddp_bf16",
    "fsdp2_bf16",
    pytest.param("zero2_bf16", marks=needs_deepspeed),
    pytest.param("zero3_bf16", marks=needs_deepspeed),
]


@pytest.mark.parametrize("engine", BFLOAT16)
def test_bfloat16_stays_near_float32(runs, engine):
    """bfloat16 has 8 bits, so a number is off by up to 2**-9 = 0.2%; the losses, means of many, by less. Single weights
    may be further off, as a score that is rounded can drop another token, but not the bulk of them: measured are 3e-4
    under ZeRO, and 5e-3 for the run without the tower, which is another training."""
    alone, run = runs["alone"], runs[engine]
    losses = [row["loss"] for row in run.rows]
    assert losses == pytest.approx([row["loss"] for row in alone.rows], rel=2e-3)
    assert losses[0] == pytest.approx(alone.rows[0]["loss"], rel=1e-4), "the sum over the labels was rounded too"
    assert losses != [row["loss"] for row in alone.rows], "this was float32"
    assert distance(run.weights, alone.weights) < 1e-3


@needs_deepspeed
def test_bfloat16_engines_that_round_alike_agree(runs):
    """All but DDP, which computes by autocast from float32 weights, have bfloat16 weights. FSDP2 adds up gradients in
    another order than ZeRO, and in bfloat16, so it agrees until there are some."""
    one, other = runs["zero2_bf16"], runs["zero3_bf16"]
    losses = [[row["loss"] for row in run.rows] for run in (one, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert distance(one.weights, other.weights) < 1e-5
    assert runs["fsdp2_bf16"].rows[0]["loss"] == pytest.approx(losses[0][0], rel=1e-6)


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Root mean square of the differences of all weights."""
    assert one.keys() == other.keys()
    differences = torch.cat([(tensor.float() - other[name].float()).flatten() for name, tensor in one.items()])
    return differences.square().mean().sqrt().item()


@pytest.mark.parametrize("engine", [*ENGINE, *BFLOAT16])
def test_ranks_run_the_same_modules(runs, engine):
    """ZeRO-3 and FSDP gather weights when a module is called. Two ranks that call different ones wait for each other
    for ever, on GPUs without a word."""
    one, two = (runs[engine].visits(rank) for rank in (0, 1))
    assert (0, 3) in {tuple(sorted(pair)) for pair in zip(one["pictures"], two["pictures"])}, "the hard case is missing"
    assert first_difference(one, two) is None


def test_different_modules_are_noticed(runs):
    """The same comparison, when a text-only batch leaves the tower out."""
    one, two = (runs["ddp_blind"].visits(rank) for rank in (0, 1))
    difference = first_difference(one, two)
    assert difference is not None
    assert "vision_tower" in difference


def first_difference(one: dict, two: dict) -> str | None:
    """Where two ranks part: micro-batch and the modules they called."""
    for number, (a, b) in enumerate(zip(one["modules"], two["modules"], strict=True)):
        for left, right in zip_longest(a, b):
            if left != right:
                return f"micro-batch {number}: {left} and {right}"
    return None


def test_ranks_and_accumulation_are_the_same(runs, write_run):
    """1 x 4 = 2 x 2 = 4 x 1: the loss of a step is divided by the label tokens of all its micro-batches on all ranks.
    The answers have 3 to 11 letters, so a mean of means would be another number."""
    four = Run(write_run("four", 1))
    ended = run_ranks(four.file, ranks=4)
    assert ended.codes == [0] * 4, ended.texts
    alone = runs["alone"]
    for run in (runs["ddp"], four):
        for one, other in zip(alone.rows, run.rows, strict=True):
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
            assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
        for name, tensor in alone.weights.items():
            assert torch.allclose(run.weights[name], tensor, rtol=0, atol=2e-6), name


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", pytest.param("zero3", marks=needs_deepspeed)])
def test_what_is_saved_is_a_whole_llava(runs, engine):
    """Gathered from all ranks, and read by this project's strict loader and by transformers."""
    run = runs[engine]
    hf = build_parts(path=str(run.output)).hf
    saved = load_file(run.output / "model.safetensors")
    other = LlavaForConditionalGeneration.from_pretrained(run.output)
    for (name, own), theirs in zip(hf.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(own, theirs), name
    assert sum(tensor.numel() for tensor in saved.values()) == sum(p.numel() for p in hf.parameters())
    projector = load_file(run.output / PROJECTOR_FILE)
    assert projector and all(torch.equal(hf.state_dict()[name], tensor) for name, tensor in projector.items())
