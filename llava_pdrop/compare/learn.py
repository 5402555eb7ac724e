"""Does it learn? The embedded task from a decoder that is grown on the spot, every schedule trained and evaluated.

Nothing is downloaded: the decoder of ``data/tiny`` becomes a larger one (`checkpoint.grow`), and the pages are drawn.
What is left to learn: pages longer than that decoder has seen, pictures it has never read, and the noise it got.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaForCausalLM, TrainerCallback

from llava_pdrop.checkpoint.grow import grow_decoder, grow_projector
from llava_pdrop.compare.candidates import Candidate, asked, exam_of, subrun
from llava_pdrop.compare.rows import VariantRow
from llava_pdrop.config.load import load_config
from llava_pdrop.config.schema import Config
from llava_pdrop.errors import ConfigError, MissingFileError, UserError
from llava_pdrop.eval.evaluate import DROPPING, VANILLA, AnswerSettings, answer, respondent_of
from llava_pdrop.eval.team import ALONE
from llava_pdrop.files import write_json
from llava_pdrop.report.console import say
from llava_pdrop.report.environment import environment
from llava_pdrop.runtime.device import release_memory
from llava_pdrop.runtime.preemption import Preempted
from llava_pdrop.schedule import Schedule
from llava_pdrop.train.checkpoints import newest_whole
from llava_pdrop.train.checks import checked
from llava_pdrop.train.metrics import METRICS_FILE, read_metrics
from llava_pdrop.train.run import load_parts, prepare_data, train_checked

SHIPPED = Path("data/tiny")
"""Where the small decoder and projector lie, below the checkout, in which the program is started."""

NOISE = 0.3
"""Of the grown matrices, relative to their standard deviation."""

LEARN_FILE = "learn.json"

START_QUESTIONS = 100
"""Questions that are answered before the training."""

TRAINING_SHARE = 0.8
"""Of an arm's time; the rest is for loading and evaluating."""


class Deadline(TrainerCallback):
    """Ends a training behind the step that passes a time (of `time.monotonic`), and has it saved."""

    def __init__(self, at: float) -> None:
        self.at, self.passed = at, False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if time.monotonic() > self.at and state.global_step < state.max_steps:
            self.passed = control.should_save = control.should_training_stop = True


def learn(out: Path, device: str, config: Path, seconds: float, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Trains vanilla, PyramidDrop and every schedule of ``compare.training_free`` from the same start on the same
    batches, and evaluates each as it was trained.

    Args:
        out: directory for everything that is made; ``learn.json`` in it is written anew after every arm.
        device: ``cuda`` or ``cpu``.
        config: the YAML; its ``model.reference_shape`` says how large the decoder gets.
        seconds: for everything together. An arm that would take more than its share ends early, and the later ones make
            as many steps as it has made.
        overrides: ``section.key=value`` as on the command line.

    Returns:
        What is in ``learn.json``: ``config``, ``device``, ``seconds`` (taken), ``environment`` (versions, device name),
        ``decoder_parameters``, and ``arms``: name -> ``schedule``, ``start_accuracy``, ``accuracy``, ``chance``,
        ``questions``, ``standard_error`` (of the accuracy), ``image_tokens`` (per stage), ``steps``,
        ``seconds_per_step`` (median; CUDA events, or CPU seconds), ``wall_seconds_per_step``, ``peak_mib``, ``losses``
        (per step), ``stopped_early``, ``train_seconds``, ``eval_seconds``. Of an arm that failed: ``error``.

    Raises:
        ConfigError, UserError, MissingFileError: the config cannot be run, or there is no such device.
    """
    began = time.monotonic()
    if device not in ("cpu", "cuda"):
        raise UserError(f"device must be cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda: this machine has no CUDA GPU: take cpu")
    base = out / "base"
    places = [f"output_dir={out}", f"model.language_model={base}/language_model"]
    places += [f"model.projector={base}/projector.safetensors", f"train.use_cpu={str(device == 'cpu').lower()}"]
    run = load_config(config, [*overrides, *places])
    grow_base(run, base)
    prepare_data(run)
    arms = arms_of(run)
    found: dict[str, Any] = {
        "config": str(config),
        "device": device,
        "environment": environment(torch.device(device), run.seed),
        "decoder_parameters": sum(t.numel() for t in load_file(base / "language_model/model.safetensors").values()),
        "arms": {},
    }
    for done, (name, arm) in enumerate(arms.items()):
        share = (seconds - (time.monotonic() - began)) / (len(arms) - done)
        try:
            found["arms"][name] = entry = train_arm(arm, share)
            if entry["stopped_early"]:
                arms.update({key: with_steps(other, entry["steps"]) for key, other in arms.items()})
        except Exception as error:  # noqa: BLE001  whatever it is, it must not take the other arms with it
            found["arms"][name] = {"error": f"{type(error).__name__}: {error}"}
        release_memory()
        found["seconds"] = time.monotonic() - began
        write_json(out / LEARN_FILE, found)
    return found


def grow_base(run: Config, base: Path) -> None:
    """Writes decoder and projector that all arms start from."""
    if run.model.reference_shape is None:
        raise ConfigError(f"{run.file}: model.reference_shape is not set: it says how large the decoder gets")
    if not (SHIPPED / "language_model").is_dir():
        raise MissingFileError(f"{SHIPPED}/language_model does not exist here: start in the checkout")
    shape = run.model.reference_shape.language_model
    small = LlamaForCausalLM.from_pretrained(SHIPPED / "language_model", dtype=torch.float32)
    try:
        decoder = grow_decoder(small, shape["num_hidden_layers"], shape["hidden_size"], NOISE, run.seed)
    except UserError as error:
        raise ConfigError(f"{run.file}: model.reference_shape.language_model: {error}") from None
    decoder.save_pretrained(base / "language_model")
    AutoTokenizer.from_pretrained(SHIPPED / "language_model").save_pretrained(base / "language_model")
    ways = shape["hidden_size"] // small.config.hidden_size
    projector = grow_projector(load_file(SHIPPED / "projector/model.safetensors"), ways)
    save_file(projector, base / "projector.safetensors", metadata={"format": "pt"})


def arms_of(run: Config) -> dict[str, Config]:
    """Name -> run: vanilla (unless ``compare.vanilla`` is false), the schedule of ``run``, and those of
    ``compare.training_free``."""
    assert run.model.reference_shape is not None
    layers = run.model.reference_shape.language_model["num_hidden_layers"]
    schedules: dict[str, Schedule | None] = {VANILLA: None} if run.compare.vanilla else {}
    schedules |= {DROPPING: run.pyramid_drop, **run.training_free(layers)}
    once = replace(run, train=replace(run.train, resume="never"))
    return {name: replace(subrun(once, name), pyramid_drop=schedule) for name, schedule in schedules.items()}


def with_steps(run: Config, steps: int) -> Config:
    """``run`` with another number of steps."""
    return replace(run, train=replace(run.train, arguments={**run.train.arguments, "max_steps": steps}))


def train_arm(run: Config, seconds: float) -> dict[str, Any]:
    """Trains and evaluates one arm within about ``seconds``."""
    began, directory = time.monotonic(), Path(run.output_dir)
    exam = exam_of(run)
    few = exam[0][:START_QUESTIONS]
    start = answer(AnswerSettings.of(run), respondent_of(load_parts(run), run), few, run.schedule, None)
    release_memory()
    deadline, trained = Deadline(began + TRAINING_SHARE * seconds), time.monotonic()
    whole, weights = checked(run), None
    try:
        train_checked(whole, [deadline])
    except Preempted:
        weights = newest_whole(directory, say) if deadline.passed else None
        if weights is None:
            raise
    trained, evaluated = time.monotonic() - trained, time.monotonic()
    release_memory()
    (row,) = asked(Candidate((VariantRow(directory.name, run),), whole), exam, ALONE, directory.parent, weights)
    assert row.timing is not None and row.evaluation is not None, "every step is logged, and there are questions"
    accuracy, count = row.evaluation["accuracy"], row.evaluation["questions"]
    return {
        "schedule": run.schedule.to_dict(),
        "start_accuracy": start.accuracy,
        "accuracy": accuracy,
        "chance": row.evaluation["chance"],
        "questions": count,
        "standard_error": math.sqrt(accuracy * (1 - accuracy) / count),
        "image_tokens": row.evaluation["image_tokens"],
        "steps": row.timing.steps,
        "seconds_per_step": row.timing.seconds,
        "wall_seconds_per_step": row.timing.wall,
        "peak_mib": row.timing.peak_mib,
        "losses": [line["loss"] for line in read_metrics(directory / METRICS_FILE) if "loss" in line],
        "stopped_early": deadline.passed,
        "train_seconds": trained,
        "eval_seconds": time.monotonic() - evaluated,
    }
