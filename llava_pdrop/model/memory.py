"""Peak device memory of one training step, predicted from the layout of its batch.

What a layer leaves for its backward was read off the modules of transformers 5 and checked against the storages that
torch keeps alive in a traced step (tests/unit/model/test_memory.py). With T tokens in the layer's stage, D hidden size,
M intermediate size, H heads and G key/value heads of E numbers, b bytes a number (2 in bfloat16):

    RMSNorm, two of them       4TD float32 input + bTD normalised + bTD scaled + 4T rsqrt
    attention                  bTHE query + 2bTGE key, value + bTHE output + 4TH logsumexp (no T x T matrix)
    gated MLP                  4bTM: gate, its activation, up, their product
    a recomputed layer         bTD, its input; while it is recomputed all of the above besides
    backward of a layer        2bTM more (the gradients of product, gate and up replace the product) + bTD
    CLIP layer, W wide         a token: 8bW (norms, query, key, value, output) + 3b x MLP width (QuickGELU)
    projector, F feature rows  bF(W + 2D)
    head, L labels             12LV: float32 log-probabilities and two gradients of them; final norm 4TD + bTD
    rotary cos and sin         2bTE a stage

A layer whose weights are frozen keeps no inputs of its products. The step is then walked through backwards: at every
block live what the blocks before it hold, its own peak and, where they are not there from the start, the gradients made
so far. Parameters under DeepSpeed take 16 bytes: bfloat16 weight and gradient, float32 master weight and two moments
(Rajbhandari et al., ZeRO, arXiv 1910.02054, section 3.1); ZeRO-2 shards gradients and optimizer, ZeRO-3 weights too.
The optimizer step holds a float32 copy of the gradients besides, but no activations.

NOT in it: the CUDA context and cuBLAS workspaces, fragmentation, NCCL and DeepSpeed's reduce buckets, temporary copies
of an AdamW that is not fused, workspaces of attention kernels, the ranking (a few TD in forward, far from the peak),
weights cast by autocast, what `regions.compile_regions` saves.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llava_pdrop.geometry import ImageGeometry
from llava_pdrop.model.flops import head_size, key_value_heads, tiles_of
from llava_pdrop.model.schedule import Schedule
from llava_pdrop.model.stream import Layout, layouts_of
from llava_pdrop.model.vision import used_tower_layers
from llava_pdrop.types import PackedBatch

FLOAT = 4
GIB = 2**30

GATHERED = 10**9
"""Parameters that ZeRO-3 holds gathered at most: ``stage3_max_live_parameters`` of configs/deepspeed/zero3.json."""


@dataclass(frozen=True)
class States:
    """Where parameters, their gradients and the optimizer live.

    Attributes:
        zero: DeepSpeed's ZeRO stage: 0 (nothing is sharded), 2 or 3.
        gpus: over how many GPUs is sharded.
        bytes: of a weight, a gradient and an activation: 2 (bfloat16) or 4 (float32).
        optimizer: bytes of optimizer state for each trainable parameter, before sharding.
        accumulate: gradients of an earlier micro-batch are there from the start of the step.

    Raises:
        ValueError: another ZeRO stage, or no GPU.
    """

    zero: int = 0
    gpus: int = 1
    bytes: int = 2
    optimizer: float = 12.0
    accumulate: bool = False

    @property
    def gradient_copy(self) -> float:
        """Bytes a parameter for the gradient that the step of a mixed-precision optimizer makes in float32: as many as
        for the master weight, which is one of its three numbers."""
        return self.optimizer / 3 if self.bytes < FLOAT else 0.0

    def __post_init__(self) -> None:
        if self.zero not in (0, 2, 3):
            raise ValueError(f"ZeRO stage {self.zero} is not modelled: choose 0, 2 or 3")
        if self.gpus < 1:
            raise ValueError(f"memory is predicted for at least 1 GPU, got {self.gpus}")


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the peak of a step. ``gathered``: weights that ZeRO-3 has fetched from other GPUs."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    gathered: float = 0.0

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.gathered


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters: of the embedding table, one decoder layer, the last norm with the head, the projector
    (with the newline), and of the tower outside its layers and in one of them."""

    embedding: int
    layer: int
    head: int
    projector: int
    tower_stem: int
    tower_layer: int

    @staticmethod
    def of(config: Any) -> Parameters:
        """Counted from a Hugging Face LLaVA config (LLaMA-like decoder, CLIP tower)."""
        text, vision = config.text_config, config.vision_config
        hidden, width, mlp = text.hidden_size, vision.hidden_size, vision.intermediate_size
        table = text.vocab_size * hidden
        heads, groups = text.num_attention_heads, key_value_heads(text)
        attention = 2 * (heads + groups) * head_size(text) * hidden
        positions = (vision.image_size // vision.patch_size) ** 2 + 1
        newline = hidden if config.model_type == "llava_next" else 0
        return Parameters(
            embedding=table,
            layer=attention + 3 * hidden * text.intermediate_size + 2 * hidden,
            head=hidden + (0 if text.tie_word_embeddings else table),
            projector=(width + 1) * hidden + (hidden + 1) * hidden + newline,
            tower_stem=(3 * vision.patch_size**2 + 1 + positions + 4) * width,  # two norms around the layers
            tower_layer=4 * (width + 1) * width + 2 * width * mlp + mlp + width + 4 * width,
        )

    def total(self, config: Any) -> int:
        """All parameters of the model."""
        decoder = self.embedding + config.text_config.num_hidden_layers * self.layer + self.head
        return decoder + self.projector + self.tower_stem + config.vision_config.num_hidden_layers * self.tower_layer


@dataclass(frozen=True)
class Block:
    """A piece of the step in the order of the forward: bytes it ``held`` from its forward to its backward, the most
    that live of it during its backward (``peak``), and how many of its parameters learn."""

    held: float
    peak: float
    learning: int


def predicted_peak(
    config: Any,
    batch: PackedBatch,
    schedule: Schedule,
    geometry: ImageGeometry,
    trainable: Collection[str] = ("projector", "language_model"),
    checkpointing: bool = False,
    recompute_layers: int | None = None,
    states: States = States(),
    adapters: int = 0,
) -> Memory:
    """The peak of forward, backward and a fused optimizer step of one micro-batch on one GPU.

    Args:
        config: of the Hugging Face LLaVA.
        trainable: which of projector, language_model and vision_tower learn.
        checkpointing: activation checkpointing, of the decoder's layers and those of a trainable tower.
        recompute_layers: of the decoder's layers only so many first ones (None: all of them), as in `step_flops`.
        adapters: parameters of LoRA adapters, which learn instead of the decoder's own. What they keep for their
            backward, besides the inputs that full training keeps too, is not in it.
    """
    counts, layers = Parameters.of(config), config.text_config.num_hidden_layers
    decoder = replace(counts, embedding=0, layer=adapters // layers, head=0) if adapters else counts
    layouts = layouts_of(batch, schedule)
    recomputed = range(config.text_config.num_hidden_layers)[:recompute_layers] if checkpointing else range(0)
    tiles = tiles_of(batch, geometry)
    blocks = [
        *_tower_blocks(config, counts, tiles, "vision_tower" in trainable, checkpointing, states.bytes),
        _projector_block(config, counts, tiles * geometry.patches, trainable, states.bytes),
        *_decoder_blocks(config.text_config, decoder, layouts, schedule, trainable, recomputed, states.bytes),
    ]
    shards = states.gpus if states.zero else 1
    total, learning = counts.total(config) + adapters, sum(block.learning for block in blocks)
    fixed = dict(
        weights=states.bytes * total / (states.gpus if states.zero == 3 else 1),
        optimizer=states.optimizer * learning / shards,
        gathered=states.bytes * min(total, GATHERED) if states.zero == 3 else 0.0,
    )
    moments, held, done = [], sum(block.held for block in blocks), 0
    for block in reversed(blocks):
        held -= block.held
        present = learning if states.zero or states.accumulate else done
        moments.append(Memory(**fixed, gradients=states.bytes * present / shards, activations=held + block.peak))
        done += block.learning
    step = (states.bytes + states.gradient_copy) * learning / shards
    moments.append(Memory(**fixed, gradients=step, activations=0.0))
    return max(moments, key=lambda moment: moment.total)


def _decoder_blocks(
    text: Any,
    counts: Parameters,
    layouts: Sequence[Layout],
    schedule: Schedule,
    trainable: Collection[str],
    recomputed: Collection[int],
    size: int,
) -> list[Block]:
    """Embedding, layers, last norm with the head and the loss."""
    hidden, learns = text.hidden_size, "language_model" in trainable
    blocks = [Block(0.0, size * layouts[0].tokens * hidden, counts.embedding * learns)]
    stage = 0
    for layer in range(text.num_hidden_layers):
        stage += layer in schedule.layers
        tokens = layouts[stage].tokens
        rotary = 2 * size * tokens * head_size(text) if layer in (0, *schedule.layers) else 0
        kept, extra = _layer_bytes(text, tokens, learns, size)
        source = size * tokens * hidden if layer in recomputed else 0
        blocks.append(Block((source or kept) + rotary, source + kept + extra + rotary, counts.layer * learns))
    rows, last = len(layouts[0].label_positions), layouts[-1].tokens * hidden
    kept = (FLOAT + size * learns) * last + size * rows * hidden * learns
    logits = FLOAT * rows * text.vocab_size
    # the loss holds the most with its two gradients, the norm with six float32 tensors of the stream
    blocks.append(Block(kept + logits, max(kept + 3 * logits, 6 * FLOAT * last), counts.head * learns))
    return blocks


def _layer_bytes(text: Any, tokens: int, learns: bool, size: int) -> tuple[float, float]:
    """Of a decoder layer: bytes kept for backward, and what comes on top while its backward runs."""
    hidden, mlp, heads = text.hidden_size, text.intermediate_size, text.num_attention_heads
    norms = 2 * ((FLOAT + 2 * size * learns) * hidden + FLOAT)
    attention = 2 * size * (heads + key_value_heads(text)) * head_size(text) + FLOAT * heads
    gated = size * mlp * (3 + learns)
    extra = size * (mlp * (2 + (not learns)) + hidden)
    return tokens * (norms + attention + gated), tokens * extra


def _tower_blocks(config: Any, counts: Parameters, tiles: int, learns: bool, recompute: bool, size: int) -> list[Block]:
    """Nothing of a frozen tower stays. Of a trained one only the layers below ``vision_feature_layer`` learn."""
    vision = config.vision_config
    width, mlp = vision.hidden_size, vision.intermediate_size
    pixels = tiles * 3 * vision.image_size**2
    if not learns:
        return [Block(FLOAT * pixels, FLOAT * pixels, 0)]
    tokens = tiles * ((vision.image_size // vision.patch_size) ** 2 + 1)
    stem = (FLOAT + size) * pixels + size * tokens * width
    source = size * tokens * width
    kept = tokens * (size * (8 * width + 3 * mlp) + FLOAT * (vision.num_attention_heads + 4))
    extra = tokens * size * (2 * mlp + width)
    layer = Block(source if recompute else kept, kept + extra + source * recompute, counts.tower_layer)
    norm_behind = 2 * width  # never used, so it does not learn
    return [Block(stem, stem + 2 * source, counts.tower_stem - norm_behind), *[layer] * used_tower_layers(config)]


def _projector_block(config: Any, counts: Parameters, rows: int, trainable: Collection[str], size: int) -> Block:
    width, hidden = config.vision_config.hidden_size, config.text_config.hidden_size
    learns = "projector" in trainable
    inner = size * rows * hidden * (learns or "vision_tower" in trainable)
    held = inner + size * rows * (width + hidden) * learns
    return Block(held, held + 2 * size * rows * hidden, counts.projector * learns)
