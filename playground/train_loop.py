"""The whole training of the embedded default in one flat file: no Trainer, no engine, no options.

    python playground/train_loop.py

It teaches how the modules fit together; `llava_pdrop/train` does the same with everything that a real run needs. Its
first losses are those of `configs/tiny/pretrain.yaml` and `configs/tiny/finetune_pdrop.yaml`, which
tests/parity/test_train_loop.py checks.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import get_cosine_schedule_with_warmup

from llava_pdrop.checkpoint.build import ModelParts, build_parts
from llava_pdrop.data.conversation import TEMPLATES
from llava_pdrop.data.dataset import ConversationDataset
from llava_pdrop.data.mixture import read_data
from llava_pdrop.data.packing import BatchPlan
from llava_pdrop.data.tokens import Encoder
from llava_pdrop.model.vlm import PyramidLlava
from llava_pdrop.schedule import Schedule
from llava_pdrop.types import PackedBatch

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "data" / "tiny"
PAGES = TINY / "prepared" / "forms"

SAMPLES, STEPS, WARMUP = 16, 60, 10  # samples of a batch, optimizer steps of a stage, those in which the rate grows
STAGE_1 = ("multi_modal_projector",)  # what learns, by parts of the parameters' names
STAGE_2 = ("multi_modal_projector", "language_model", "lm_head")
PYRAMID = Schedule(layers=(1, 2, 3), ratios=(0.5, 0.25, 0.125))  # of 4 layers: after each quarter, half of what is left


def main() -> None:
    """Stage 1: the projector alone, nothing dropped. Stage 2: projector and decoder, with PyramidDrop."""
    prepare_pages()
    parts = load_parts()
    model = PyramidLlava(parts.hf, Schedule(), parts.geometry).train()
    for step, loss in train(model, parts, "pretrain.json", STAGE_1, rate=3e-3):
        print(f"stage 1, step {step:2}: loss {loss:.4f}")
    model.schedule = PYRAMID
    for step, loss in train(model, parts, "train.json", STAGE_2, rate=3e-4):
        print(f"stage 2, step {step:2}: loss {loss:.4f}")


def prepare_pages() -> None:
    """Draws the pages, if that is not done yet."""
    command = [sys.executable, str(ROOT / "data" / "prepare" / "forms.py"), "--out", str(PAGES)]
    subprocess.run(command, check=True)


def load_parts(projector: Path = TINY / "projector" / "model.safetensors") -> ModelParts:
    """A Hugging Face LLaVA made of the shipped tower, decoder and projector, with its tokenizer and image processor."""
    return build_parts(
        language_model=str(TINY / "language_model"),
        vision_tower=str(TINY / "tower"),
        projector=str(projector),
        aspect="pad",
        merge="flat",
    )


def train(
    model: PyramidLlava, parts: ModelParts, file: str, learns: tuple[str, ...], rate: float, steps: int = STEPS
) -> Iterator[tuple[int, float]]:
    """One stage. Yields (step, loss per label token) after every optimizer step."""
    weights = choose(model, learns)
    decayed = [weight for weight in weights if weight.ndim > 1]
    others = [weight for weight in weights if weight.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.02}, {"params": others, "weight_decay": 0.0}], lr=rate, betas=(0.9, 0.98)
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, WARMUP, STEPS)
    for step, batch in enumerate(batches(parts, file), 1):
        output = model(batch)  # the loss is a sum over the label tokens
        loss = output.loss / output.labels
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield step, loss.item()
        if step == steps:
            return


def choose(model: PyramidLlava, learns: tuple[str, ...]) -> list[torch.nn.Parameter]:
    """The parameters of the parts that learn; all others are frozen."""
    for name, weight in model.named_parameters():
        weight.requires_grad_(any(part in name for part in learns))
    return [weight for weight in model.parameters() if weight.requires_grad]


def batches(parts: ModelParts, file: str) -> Iterator[PackedBatch]:
    """Packed batches without end. Records become samples (ids, labels, one placeholder per image token), samples become
    streams without padding, in the order of a plan that is a function of lengths and seed alone."""
    encoder = Encoder(TEMPLATES["qa"], parts.tokenizer, parts.hf.config.image_token_id, parts.geometry, max_length=2048)
    dataset = ConversationDataset(read_data(str(PAGES / file), str(PAGES)), encoder, parts.image_processor)
    plan = BatchPlan(dataset.lengths(), seed=0, samples_per_batch=SAMPLES)
    epoch = 0
    while True:
        for indices in plan.micro_batches(epoch):
            yield PackedBatch.pack([dataset[index] for index in indices])
        epoch += 1


if __name__ == "__main__":
    main()
