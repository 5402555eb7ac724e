"""The Trainer's saving and resuming, made exact: checkpoints are whole or none (see `checkpoints.py`), all ranks know
whether one was written, and a resumed run goes on where the other stopped, to the number in the log."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer

from llava_pdrop.errors import FULL, first_line
from llava_pdrop.runtime.ranks import from_every_rank, number_of_ranks
from llava_pdrop.runtime.watchdog import Watchdog
from llava_pdrop.train import checkpoints
from llava_pdrop.train.adapters import base_left_out, is_adapted
from llava_pdrop.train.checkpoints import STAGING, CheckpointError

LOG_STATE = "log_state_{rank}.pt"
"""In a checkpoint: the loss a rank has summed up since the last line of the log."""

WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)
"""What a failed write raises: torch turns a full disk into a RuntimeError, safetensors into one of its own."""


class SavingTrainer(Trainer):
    """A Trainer whose checkpoints are whole.

    Attributes:
        watchdog: is told where the saving is.
        facts: what the manifest of every checkpoint says about the run that wrote it.
    """

    optimizer: torch.optim.Optimizer | None
    facts: dict[str, Any]
    watchdog: Watchdog
    _staging: Path | None = None
    _saved_step = -1
    _last_grad_norm: Any = None

    # ---- writing ----

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes a checkpoint aside and renames it once every rank has written its part. Every rank comes here.

        Raises:
            CheckpointError: it could not be written, on whatever rank; earlier ones are as they were.
        """
        step = self.state.global_step
        if step == self._saved_step:  # asked for twice: at the end of a step and of the epoch
            return
        output, name = Path(self.args.output_dir), f"checkpoint-{step}"
        self._refuse_broken_weights(output / name)
        staged = output / STAGING / name
        needed = self._bytes_needed(output)

        def preparing() -> None:
            shutil.rmtree(output / STAGING, ignore_errors=True)  # what an interrupted save left
            staged.mkdir(parents=True)
            checkpoints.check_space(output, needed, name)

        def writing() -> None:
            self._staging = staged.parent
            try:
                with self._without_base():
                    super(SavingTrainer, self)._save_checkpoint(model, trial)
            finally:
                self._staging = None

        def hashing() -> None:
            checkpoints.commit(staged, output / name, {"step": step, **self.facts})

        for action, everywhere in ((preparing, False), (writing, True), (hashing, False)):
            self._together(action, everywhere, output / name, needed)
        self._saved_step = step
        if self.args.should_save:
            shutil.rmtree(output / STAGING, ignore_errors=True)
            checkpoints.rotate(output, self.args.save_total_limit)

    def save_finished(self) -> None:
        """Writes the model of a run that is complete into ``output_dir`` itself. Every rank comes here.

        Raises:
            CheckpointError: it could not be written; the last checkpoint is as it was.
        """
        output = Path(self.args.output_dir)

        def saving() -> None:
            with self._without_base():
                self.save_model(str(output))

        self._together(saving, True, output, self._bytes_of_weights())

    def _together(self, action: Callable[[], None], everywhere: bool, target: Path, needed: int) -> None:
        """Does ``action`` on all ranks, or on those that write the model, and waits for all of them.

        Raises:
            CheckpointError: it failed somewhere; raised on every rank, so that none waits for another (but where it
                failed only, if the ranks gather what they write: DeepSpeed and FSDP).
        """
        failure: Exception | None = None
        text: str | None = None
        output = Path(self.args.output_dir)
        self.watchdog.at(f"{action.__name__} {target.name}")
        try:
            if everywhere or self.args.should_save:
                action()
        except CheckpointError as error:
            failure, text = error, str(error)
        except WRITE_ERRORS as error:
            failure, text = error, f"{target} could not be written: {first_line(error)}"
            if getattr(error, "errno", None) in FULL or checkpoints.free_bytes(output) < needed:
                text = f"{text}; {checkpoints.shortage(output, needed)}"
        if text is not None and everywhere and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            raise CheckpointError(text) from failure  # the others wait inside for this rank: the launcher ends them
        self.watchdog.at(f"the end of {action.__name__} {target.name}")
        problem = next((line for line in from_every_rank(text) if line), None)
        if problem is not None:
            if self.args.should_save:
                shutil.rmtree(output / STAGING, ignore_errors=True)
            raise CheckpointError(problem) from failure

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """DeepSpeed writes the shards of the model here too: of a LoRA run without the frozen weights, for which the
        Trainer asks only where the model is peft's own."""
        if self.is_deepspeed_enabled and is_adapted(self._hf()):
            engine = self.model_wrapped
            engine.save_checkpoint = partial(type(engine).save_checkpoint, engine, exclude_frozen_parameters=True)
        super()._save_optimizer_and_scheduler(output_dir)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or super()._get_output_dir(trial))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        self._last_grad_norm = super()._get_grad_norm(model, grad_norm)
        return self._last_grad_norm

    def _refuse_broken_weights(self, target: Path) -> None:
        """A finite loss may have gradients that are none; the step is made then, but not kept."""
        norm = self._last_grad_norm
        if norm is None or self.accelerator.optimizer_step_was_skipped:
            return
        if not torch.as_tensor(norm).isfinite().item():
            raise CheckpointError(
                f"{target} is not written: the gradient norm of its last step is {float(norm):g}, so the weights are "
                "of no use; start again from the checkpoint before with a lower train.learning_rate"
            )

    def _bytes_needed(self, output: Path) -> int:
        """Bytes of a checkpoint: those of the newest one there, else at least those of weights and optimizer (its
        shards under DeepSpeed and FSDP are not counted)."""
        newest = checkpoints.newest_whole(output, lambda line: None, content=False)
        if newest is not None:
            return checkpoints.size_of(newest)
        weights = self._bytes_of_weights()
        if self.is_deepspeed_enabled or self.is_fsdp_enabled or self.optimizer is None:
            return weights
        states = self.optimizer.state.values()
        return weights + sum(value.nbytes for state in states for value in state.values() if isinstance(value, Tensor))

    def _bytes_of_weights(self) -> int:
        """Of those whose values go into a checkpoint."""
        hf = self._hf()
        saved = [p for p in hf.parameters() if p.requires_grad or not is_adapted(hf)]
        return sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in saved)

    def _without_base(self) -> AbstractContextManager[None]:
        """As long as it lasts, the state of the model is what is saved of it."""
        return base_left_out(self.accelerator.unwrap_model(self.model)) if is_adapted(self._hf()) else nullcontext()

    def _hf(self) -> Any:
        return self.accelerator.unwrap_model(self.model).hf

    # ---- the log, across an interruption ----

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        log = {"loss": self._tr_loss.cpu(), "last_step": self._globalstep_last_logged}
        torch.save(log, Path(output_dir) / LOG_STATE.format(rank=self.args.process_index))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """The Trainer calls this when the first batches of a resumed run are there, before their forward."""
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        manifest = checkpoints.read_manifest(Path(checkpoint)) or {}
        ranks = manifest.get("world_size", 0)
        own = [self.args.process_index] if ranks == number_of_ranks() else range(ranks)
        files = [Path(checkpoint) / LOG_STATE.format(rank=rank) for rank in own]
        logs = [torch.load(file, weights_only=True) for file in files]
        if logs:  # the mean over the ranks is what is logged, so with other ranks each takes the mean
            self._tr_loss += torch.stack([log["loss"] for log in logs]).mean(0).to(self._tr_loss.device)
            self._globalstep_last_logged = logs[0]["last_step"]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Reads both back. The optimizer brings the learning rates along that were next under the schedule it was saved
        with; this run's may be longer (its end is not the old one's) or shorter, and its own rates are next here."""
        super()._load_optimizer_and_scheduler(checkpoint)
        scheduler = self.lr_scheduler
        if checkpoint is None or not isinstance(scheduler, LambdaLR):
            return
        factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
        rates = [rate * factor for rate, factor in zip(scheduler.base_lrs, factors)]
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        scheduler._last_lr = rates

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """A run that is resumed at its very last step makes no further one."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)
