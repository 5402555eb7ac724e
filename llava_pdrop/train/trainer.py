"""Hugging Face's Trainer for packed batches: loops, DeepSpeed, FSDP, mixed precision, checkpoints and resuming are its
job. What differs is in this file: where batches come from, how the loss is normalised, and what is saved; and in
`saving.py`: how."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from llava_pdrop.checkpoint.layouts import HF_TO_MEMORY, in_memory, rename
from llava_pdrop.checkpoint.load import load_strictly, save_pretrained, save_projector
from llava_pdrop.checkpoint.lora import ADAPTER_CONFIG
from llava_pdrop.checkpoint.shards import open_tensors
from llava_pdrop.checkpoint.zero3 import own_tensors
from llava_pdrop.config.load import RUN_FILE
from llava_pdrop.cost.flops import CountedStep, Recomputed, step_flops
from llava_pdrop.cost.nominal import recomputes
from llava_pdrop.data.dataset import ConversationDataset
from llava_pdrop.data.packing import BatchPlan, PlanSampler
from llava_pdrop.errors import UserError, clip
from llava_pdrop.model.stream import Layout
from llava_pdrop.model.vlm import MODULE, Output, PyramidLlava
from llava_pdrop.runtime.clock import StepClock
from llava_pdrop.runtime.preemption import Preemption, outlive_signals
from llava_pdrop.runtime.ranks import from_every_rank, number_of_ranks
from llava_pdrop.runtime.watchdog import Watchdog
from llava_pdrop.train.adapters import fingerprint_of_base, is_adapted, load_adapters, save_adapters
from llava_pdrop.train.arguments import peak_of
from llava_pdrop.train.bad_samples import BAD_SAMPLES_FILE, BadSample, CheckedSamples, collate_checked
from llava_pdrop.train.checkpoints import read_manifest
from llava_pdrop.train.metrics import MetricsFile, Progress, StepMeter
from llava_pdrop.train.optim import parameter_groups, part_of
from llava_pdrop.train.saving import SavingTrainer
from llava_pdrop.types import PackedBatch


class PlanLoader(DataLoader):
    """A `DataLoader` over a rank's own `BatchPlan`. Not to be prepared by accelerate, which would shard it again."""

    def set_epoch(self, epoch: int) -> None:
        """The Trainer calls this before every epoch."""
        self.batch_sampler.set_epoch(epoch)


class PyramidTrainer(SavingTrainer):
    """Trains a `PyramidLlava` on the micro-batches of a `BatchPlan`. One optimizer step::

        fetch      get_batch_samples     its micro-batches, from get_train_dataloader
        count      get_batch_samples     their label tokens, summed over all ranks
        each micro-batch:
          upload   _prepare_inputs       to the device, without waiting
          forward  compute_loss          the sum over its labels / the count
          guard    StepGuard.check       before the last backward: is every loss finite, does any rank have to stop?
          backward training_step         gradients add up
          flops    floating_point_ops    how many operations that was
        clip       _get_grad_norm        (`SavingTrainer`)
        optimizer  create_optimizer      made before the first step; the Trainer steps it and the learning rates
        log        log                   with time, tokens and memory by `StepMeter`
        save       _save_checkpoint      (`SavingTrainer`) calls _save; _load_from_checkpoint reads it back

    The methods below stand in this order.

    Args:
        plan: micro-batches of every rank; its world size and accumulation must be those of ``args``.
        learning_rates: part of the model (see `optim.MODEL_PARTS`) -> peak learning rate.
        processor: Hugging Face processor saved with every checkpoint.
        config_yaml: resolved configuration, saved with every checkpoint.
        skip_bad_samples: whether up to ``max_bad_samples`` samples that cannot be loaded are replaced
            (`bad_samples.CheckedSamples`), instead of ending the run.
        watchdog: is told where this rank is; it runs already. Default: nobody watches.

    Raises:
        UserError: the plan was made for another number of ranks or accumulation steps.
    """

    loss_is_scaled_for_ga = True  # by `compute_loss`: the Trainer must not divide by the accumulation steps

    def __init__(
        self,
        model: PyramidLlava,
        args: TrainingArguments,
        train_dataset: ConversationDataset,
        plan: BatchPlan,
        learning_rates: Mapping[str, float],
        processor: Any = None,
        config_yaml: str = "",
        skip_bad_samples: bool = False,
        max_bad_samples: int = 0,
        watchdog: Watchdog | None = None,
    ) -> None:
        if (plan.world_size, plan.gradient_accumulation) != (args.world_size, args.gradient_accumulation_steps):
            raise UserError(
                f"the batch plan is for {plan.world_size} ranks x {plan.gradient_accumulation} micro-batches, "
                f"the run has {args.world_size} x {args.gradient_accumulation_steps}"
            )
        self.plan = plan
        self.learning_rates = learning_rates
        self.processor = processor
        self.config_yaml = config_yaml
        self.clock = StepClock(model, args.device)
        self.meter = StepMeter(args.device, self.clock, peak_of(args))
        self._planned: tuple[list[int] | None, list[Layout]] = None, []  # seq_lens of a batch, and its layouts
        self.trainable = {part_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
        output = Path(args.output_dir)
        super().__init__(model=model, args=args, train_dataset=train_dataset, data_collator=collate_checked)
        self.model_accepts_loss_kwargs = True  # says the same to a Trainer that does not know `loss_is_scaled_for_ga`
        self.samples = CheckedSamples(train_dataset, skip_bad_samples, max_bad_samples, output / BAD_SAMPLES_FILE)
        self.preemption = Preemption(output)
        self.guard = StepGuard(args.device, args.process_index, self.preemption)
        self.watchdog = watchdog or Watchdog(output, args.process_index, args.world_size, args.ddp_timeout)
        self.facts = {
            "world_size": args.world_size,
            "gradient_accumulation": args.gradient_accumulation_steps,
            "sharded": self.is_deepspeed_enabled or self.is_fsdp_enabled,
            "data_order": plan.fingerprint(),
            "base": fingerprint_of_base(model) if is_adapted(model.hf) else None,
        }
        for callback in (self.meter, MetricsFile(output), self.preemption):
            self.add_callback(callback)
        self.remove_callback(PrinterCallback if args.disable_tqdm else ProgressCallback)
        if not args.disable_tqdm:
            self.add_callback(Progress())

    def train(self, resume_from_checkpoint: str | None = None, **options: Any) -> Any:
        """Trains to the end, or until a signal says stop (`preemption`).

        Raises:
            UserError: the checkpoint was written over other data, so its position in them means nothing; or on another
                base of adapters.
        """
        manifest = read_manifest(Path(resume_from_checkpoint)) if resume_from_checkpoint else None
        manifest = {**self.facts, **(manifest or {})}
        if manifest["base"] != self.facts["base"]:
            raise UserError(
                f"{resume_from_checkpoint} has adapters for other weights: the files of the base model have changed "
                "since; give them back, choose another output_dir, or start over with train.resume=never"
            )
        if manifest["data_order"] != self.facts["data_order"]:
            raise UserError(
                f"{resume_from_checkpoint} is a position in another order of batches: data, seed or batch sizes have "
                "changed since; give them back, choose another output_dir, or start over with train.resume=never"
            )
        self.watchdog.at("preparing the training")
        with self.preemption.listening():
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **options)

    # ---- fetch and count ----

    def get_train_dataloader(self) -> DataLoader:
        """The rank's own micro-batches, in the order of the plan."""
        workers = self.args.dataloader_num_workers
        return PlanLoader(
            self.samples,
            batch_sampler=PlanSampler(self.plan, self.args.process_index),
            collate_fn=self.data_collator,
            num_workers=workers,
            worker_init_fn=outlive_signals,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
            persistent_workers=self.args.dataloader_persistent_workers and workers > 0,
            prefetch_factor=self.args.dataloader_prefetch_factor if workers else None,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[PackedBatch], num_batches: int, device: torch.device
    ) -> tuple[list[PackedBatch], int | Tensor]:
        """The micro-batches of one optimizer step, and its label tokens on all ranks.

        Raises:
            UserError: a sample cannot be loaded.
        """
        step = self.state.global_step + 1
        self.watchdog.at(f"fetching the batches of step {step}")
        with self.meter.fetching():
            batches = list(islice(epoch_iterator, num_batches))
        bad = next((batch for batch in batches if isinstance(batch, BadSample)), None)
        if bad is not None:
            raise UserError(bad.message)
        self.watchdog.at(f"counting the labels of step {step}")
        labels = sum(len(batch.label_positions) for batch in batches)
        if self.accelerator.num_processes == 1:
            return batches, max(1, labels)
        count = torch.full((), labels, device=device)  # filled there: a copy of a number would wait for the device
        return batches, self.accelerator.reduce(count, "sum").clamp(min=1)

    def _prepare_inputs(self, inputs: PackedBatch) -> PackedBatch:
        return inputs.to(self.args.device, non_blocking=True)

    # ---- forward, backward, optimizer ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: PackedBatch,
        return_outputs: bool = False,
        num_items_in_batch: int | Tensor | None = None,
    ) -> Any:
        """This micro-batch's share of the step's loss: the sum over its labels by the labels of the whole step.

        Gradients of micro-batches are added up; those of ranks are averaged (by DDP, FSDP and DeepSpeed alike), which
        the number of ranks undoes.
        """
        step = self.state.global_step + 1
        self.watchdog.at(f"forward pass of step {step}")
        with self.clock.region("forward"):
            output: Output = model(inputs)
        self._planned = inputs.seq_lens, self.accelerator.unwrap_model(model).layouts
        if num_items_in_batch is None:
            num_items_in_batch = max(1, output.labels)
        loss = output.loss * (self.accelerator.num_processes / num_items_in_batch)
        if model.training:
            self.meter.count(len(inputs.seq_lens), output)
            self.guard.watch(output.loss, inputs.sample_ids)
            if self.accelerator.sync_gradients:  # the last micro-batch of the step
                self.watchdog.at(f"comparing the losses of step {step}")
                self.guard.check(step)
            self.watchdog.at(f"backward pass of step {step}")
            self.clock.start("backward")
        return (loss, output) if return_outputs else loss

    def training_step(self, *args: Any, **options: Any) -> Tensor:
        """Forward and backward of one micro-batch."""
        loss = super().training_step(*args, **options)
        self.clock.stop("backward")
        return loss

    def floating_point_ops(self, inputs: PackedBatch) -> float:
        """Operations of one micro-batch, forward and backward: the Trainer adds them up as ``total_flos``. What is done
        twice to save memory counts there, and not for the MFU. The layouts are those of this micro-batch's forward, if
        it was the last one."""
        of, planned = self._planned
        layouts = planned if of is inputs.seq_lens else None
        self.meter.flops += self._operations(inputs, False, layouts)
        return self._operations(inputs, recomputes(vars(self.args)), layouts)

    def _operations(self, inputs: PackedBatch, recomputing: bool, layouts: list[Layout] | None) -> float:
        model = self.accelerator.unwrap_model(self.model)
        trainable = self.trainable
        if is_adapted(model.hf):  # the gradient passes through the decoder as to a projector, not into its weights
            trainable = trainable - {"language_model"} | {"projector"}
        recomputed = Recomputed(model.recompute_layers, True) if recomputing else Recomputed()
        step = CountedStep(model.hf.config, inputs, model.schedule, model.geometry, trainable, recomputed, layouts)
        return step_flops(step).total

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer that ``optim`` names, over the groups of `parameter_groups`."""
        if self.optimizer is None:
            model = self.model if model is None else model
            groups = parameter_groups(model, self.learning_rates, self.args.weight_decay)
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = kind(groups, **options)
        return self.optimizer

    # ---- log ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds time, tokens and memory to the log line of a step. Every rank comes here."""
        if "loss" in logs:
            logs = {**logs, **self.meter.drain(self._total, self.accelerator.num_processes)}
        super().log(logs, start_time)

    def _total(self, numbers: list[float]) -> list[float]:
        if self.accelerator.num_processes == 1:
            return numbers
        mine = torch.tensor(numbers, dtype=torch.float64, device=self.args.device)
        return self.accelerator.reduce(mine, "sum").tolist()

    # ---- checkpoints ----

    def _save(self, output_dir: str | None = None, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Writes an ordinary Hugging Face LLaVA directory (of a LoRA run its adapters instead of the weights), the
        projector alone, and the resolved configuration.

        Args:
            state_dict: gathered weights under the names of `PyramidLlava` (DeepSpeed, FSDP).
        """
        if not self.args.should_save:
            return
        directory = Path(output_dir or self.args.output_dir)
        if state_dict is not None:
            state_dict = {name.removeprefix(f"{MODULE}."): tensor for name, tensor in state_dict.items()}
        hf = self._hf()
        if is_adapted(hf):
            save_adapters(hf, self.processor, directory, "vision_tower" in self.trainable, state_dict)
        else:
            (directory / ADAPTER_CONFIG).unlink(missing_ok=True)  # of an earlier run in the same directory
            save_pretrained(hf, self.processor, directory, state_dict)
        save_projector(hf, directory, state_dict)
        if self.config_yaml:
            (directory / RUN_FILE).write_text(self.config_yaml, encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Reads the weights back. The Trainer's own way would look for `PyramidLlava`'s names, find none of them in a
        Hugging Face LLaVA directory, and only warn. (FSDP and DeepSpeed have files of their own; the latter does not
        come here.)"""
        if self.is_fsdp_enabled:
            with self._without_base():
                return super()._load_from_checkpoint(resume_from_checkpoint, model)
        hf, directory = self._hf(), Path(resume_from_checkpoint)
        if is_adapted(hf):
            return load_adapters(hf, directory)
        tensors = rename(open_tensors(directory), HF_TO_MEMORY)
        load_strictly(hf, in_memory(tensors, own_tensors(hf)), resume_from_checkpoint)


# What is looked at once in every optimizer step, before its last backward pass: is every loss a number, and was any
# rank told to stop?
#
# The answer needs one all-reduce of a few numbers and makes the host wait for the device once per optimizer step,
# between the last forward and the last backward. It cannot come later: DeepSpeed takes its optimizer step within the
# last backward. Micro-batches before the last one are never waited for. The wait costs what the host could have queued
# ahead, the first kernels of one backward pass; a run that logs every step (the default) waits at its end anyway.


class NotFiniteError(UserError):
    """A loss is NaN or infinite."""


class StepGuard:
    """Collects the losses of a step's micro-batches on the device, and looks at them together.

    Args:
        device: of the losses.
        rank: of this process.
        preemption: is told what the ranks agree on.
    """

    def __init__(self, device: torch.device, rank: int, preemption: Preemption) -> None:
        self.device, self.rank, self.preemption = device, rank, preemption
        self._watched: list[tuple[Tensor, list[str]]] = []

    def watch(self, loss: Tensor, sample_ids: list[str]) -> None:
        """Notes the loss (scalar) of a micro-batch; waits for nothing."""
        self._watched.append((loss.detach().float(), sample_ids))

    def check(self, step: int) -> None:
        """Looks at all losses since the last call, on all ranks together.

        Args:
            step: number of the optimizer step that is about to be made, from 1.

        Raises:
            NotFiniteError: some loss is no number; on every rank, naming rank, micro-batch and samples.
        """
        ranks = number_of_ranks()
        flags = torch.zeros(ranks + 1, device=self.device)
        flags[self.rank] = (~torch.stack([loss for loss, _ in self._watched]).isfinite()).any()
        flags[ranks] = float(self.preemption.received is not None)
        if ranks > 1:
            distributed.all_reduce(flags)
        *failed, signals = flags.tolist()
        self.preemption.agreed = signals > 0
        watched, self._watched = self._watched, []
        if any(failed):
            lines = from_every_rank(self._describe(watched))
            raise NotFiniteError(
                f"step {step} is not made, its loss is not a number: {'; '.join(line for line in lines if line)}; look "
                "at these samples, lower train.learning_rate, or give train.max_grad_norm; the last checkpoint is sound"
            )

    def _describe(self, watched: list[tuple[Tensor, list[str]]]) -> str:
        found = [
            f"rank {self.rank}, micro-batch {number} of {len(watched)}, loss {loss:g}, samples "
            + ", ".join(map(clip, ids))
            for number, (loss, ids) in enumerate(watched, 1)
            if not loss.isfinite()
        ]
        return "; ".join(found)
