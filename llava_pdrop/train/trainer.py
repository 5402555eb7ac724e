"""Hugging Face's Trainer for packed batches: loops, DeepSpeed, FSDP, mixed precision, checkpoints and resuming are its
job. What differs is in this file: where batches come from, how the loss is normalised, and what is saved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_pt_utils import nested_gather

from llava_pdrop.config import RUN_FILE
from llava_pdrop.data.dataset import ConversationDataset, collate
from llava_pdrop.data.packing import BatchPlan, PlanSampler
from llava_pdrop.model.checkpoint import save_pretrained, save_projector
from llava_pdrop.model.flops import step_flops
from llava_pdrop.model.vlm import Output, PyramidLlava
from llava_pdrop.train.metrics import MetricsFile, Progress, StepMeter
from llava_pdrop.train.optim import parameter_groups, part_of
from llava_pdrop.types import PackedBatch


def recomputes_activations(args: TrainingArguments) -> bool:
    """Whether the backward pass computes activations anew; transformers 5.23 renamed the argument."""
    return bool(getattr(args, "activation_checkpointing", False) or getattr(args, "gradient_checkpointing", False))


class PlanLoader(DataLoader):
    """A `DataLoader` over a rank's own `BatchPlan`. Not to be prepared by accelerate, which would shard it again."""

    def set_epoch(self, epoch: int) -> None:
        """The Trainer calls this before every epoch."""
        self.batch_sampler.set_epoch(epoch)


class PyramidTrainer(Trainer):
    """Trains a `PyramidLlava` on the micro-batches of a `BatchPlan`.

    Args:
        plan: micro-batches of every rank; its world size and accumulation must be those of ``args``.
        learning_rates: part of the model (see `optim.PARTS`) -> peak learning rate.
        processor: Hugging Face processor saved with every checkpoint.
        config_yaml: resolved configuration, saved with every checkpoint.

    Raises:
        ValueError: the plan was made for another number of ranks or accumulation steps.
    """

    optimizer: torch.optim.Optimizer | None
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
    ) -> None:
        if (plan.world_size, plan.gradient_accumulation) != (args.world_size, args.gradient_accumulation_steps):
            raise ValueError(
                f"the batch plan is for {plan.world_size} ranks x {plan.gradient_accumulation} micro-batches, "
                f"the run has {args.world_size} x {args.gradient_accumulation_steps}"
            )
        self.plan = plan
        self.learning_rates = learning_rates
        self.processor = processor
        self.config_yaml = config_yaml
        self.meter = StepMeter(args.device)
        self.trainable = {part_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
        super().__init__(model=model, args=args, train_dataset=train_dataset, data_collator=collate)
        self.add_callback(self.meter)
        self.add_callback(MetricsFile(Path(args.output_dir)))
        self.remove_callback(PrinterCallback if args.disable_tqdm else ProgressCallback)
        if not args.disable_tqdm:
            self.add_callback(Progress())

    # ---- data ----

    def get_train_dataloader(self) -> DataLoader:
        """The rank's own micro-batches, in the order of the plan."""
        workers = self.args.dataloader_num_workers
        return PlanLoader(
            self.train_dataset,
            batch_sampler=PlanSampler(self.plan, self.args.process_index),
            collate_fn=self.data_collator,
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
            persistent_workers=self.args.dataloader_persistent_workers and workers > 0,
            prefetch_factor=self.args.dataloader_prefetch_factor if workers else None,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[PackedBatch], num_batches: int, device: torch.device
    ) -> tuple[list[PackedBatch], int | Tensor]:
        """The micro-batches of one optimizer step, and its label tokens on all ranks."""
        with self.meter.fetching():
            batches = list(islice(epoch_iterator, num_batches))
        labels = sum(len(batch.label_positions) for batch in batches)
        if self.accelerator.num_processes == 1:
            return batches, max(1, labels)
        count = torch.tensor(labels, device=device)
        return batches, self.accelerator.reduce(count, "sum").clamp(min=1)

    def _prepare_inputs(self, inputs: PackedBatch) -> PackedBatch:
        return inputs.to(self.args.device, non_blocking=True)

    # ---- loss and optimizer ----

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
        output: Output = model(inputs)
        if num_items_in_batch is None:
            num_items_in_batch = max(1, output.labels)
        loss = output.loss * (self.accelerator.num_processes / num_items_in_batch)
        if model.training:
            self.meter.count(len(inputs.seq_lens), output)
        return (loss, output) if return_outputs else loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer that ``optim`` names, over the groups of `parameter_groups`."""
        if self.optimizer is None:
            model = self.model if model is None else model
            groups = parameter_groups(model, self.learning_rates, self.args.weight_decay)
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = kind(groups, **options)
        return self.optimizer

    # ---- metrics ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds time, tokens and memory to the log line of a step. Every rank comes here."""
        if "loss" in logs:
            logs = {**logs, **self.meter.drain(self._total)}
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: PackedBatch) -> float:
        """Operations of one micro-batch, forward and backward: the Trainer adds them up as ``total_flos``."""
        model = self.accelerator.unwrap_model(self.model)
        return step_flops(
            model.host.config,
            inputs,
            model.schedule,
            model.geometry,
            self.trainable,
            recomputes_activations(self.args),
        ).total

    def _total(self, numbers: list[float]) -> list[float]:
        if self.accelerator.num_processes == 1:
            return numbers
        mine = torch.tensor([numbers], dtype=torch.float64, device=self.args.device)
        return nested_gather(mine, self.args.parallel_mode).sum(0).tolist()

    # ---- checkpoints ----

    def _save(self, output_dir: str | None = None, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Writes an ordinary Hugging Face LLaVA directory, the projector alone, and the resolved configuration.

        Args:
            state_dict: gathered weights under the names of `PyramidLlava` (DeepSpeed, FSDP).
        """
        if not self.args.should_save:
            return
        directory = Path(output_dir or self.args.output_dir)
        if state_dict is not None:
            state_dict = {name.removeprefix("host."): tensor for name, tensor in state_dict.items()}
        save_pretrained(self._host(), self.processor, directory, state_dict)
        save_projector(self._host(), directory, state_dict)
        if self.config_yaml:
            (directory / RUN_FILE).write_text(self.config_yaml)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Reads the weights back. The Trainer's own way would look for `PyramidLlava`'s names, find none of them in a
        Hugging Face LLaVA directory, and only warn."""
        if self.is_fsdp_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        host = self._host()
        saved = type(host).from_pretrained(resume_from_checkpoint, dtype=host.dtype)
        host.load_state_dict(saved.state_dict())

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _host(self) -> Any:
        return self.accelerator.unwrap_model(self.model).host
