"""Peak device memory of one training step, predicted from the layout of its batch.

What a layer leaves for its backward was read off the modules of transformers 5 and checked against the storages that
torch keeps alive in a traced step (tests/unit/cost/test_memory.py). With T tokens in the layer's stage, D hidden size,
M intermediate size, H heads and G key/value heads of E numbers, b bytes a number (2 in bfloat16):

    RMSNorm, two of them       4TD float32 input + bTD normalised + bTD scaled + 4T rsqrt
    attention                  bTHE query + 2bTGE key, value + bTHE output + 4TH logsumexp (no T x T matrix)
    gated MLP                  4bTM: gate, its activation, up, their product
    a recomputed layer         bTD, its input; while it is recomputed all of the above besides
    backward of a layer        2bTM more (the gradients of product, gate and up replace the product) + bTD
    CLIP layer, W wide         a token: 8bW (norms, query, key, value, output) + 3b x MLP width (QuickGELU)
    projector, F feature rows  bF(W + 2D)
    with fused kernels         a norm keeps bTD input + 4T, the MLP 3bTM: gate, up, product (no float32, no activation)
    head, L labels             12LV: float32 log-probabilities and two gradients of them; final norm 4TD + bTD
    rotary cos and sin         2bTE a stage

A layer whose weights are frozen keeps no inputs of its products. The step is then walked through backwards: at every
block live what the blocks before it hold, its own peak and, where they are not there from the start, the gradients made
so far. The optimizer step holds a float32 copy of the gradients besides, but no activations. Where weights, gradients
and optimizer live, and in which precision, is the engine's matter: `cost.states`.

Under autocast (DDP, one GPU) weights and the stream between layers are float32: what a norm returns before its weight
and a layer's input then take 4TD, and each of q, k, v, gate and up keeps its own cast of the scaled norm, 10TD in all
instead of 2bTD. Casts of weights that learn stay to the end of the forward, which is a moment of its own; a layer that
is not recomputed keeps those of its weights, frozen ones too, for its backward.

NOT in it: the CUDA context and cuBLAS workspaces, fragmentation, NCCL and DeepSpeed's reduce buckets, temporary copies
of an AdamW that is not fused, workspaces of attention kernels, the ranking (a few TD in forward, far from the peak),
what fused kernels save under autocast.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from llava_pdrop.cost.elementwise import KERNELS
from llava_pdrop.cost.flops import CountedStep, head_size, key_value_heads
from llava_pdrop.cost.states import FLOAT, GATHERED, States
from llava_pdrop.errors import check_name
from llava_pdrop.model.stream import layout_of_layers
from llava_pdrop.model.vision import used_tower_layers


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
class MemoryBlock:
    """A piece of the step in the order of the forward: bytes it ``held`` from its forward to its backward, the most
    that live of it during its backward (``peak``), how many of its parameters learn, and the bytes of their ``casts``
    that autocast keeps to the end of the forward, besides what is held."""

    held: float
    peak: float
    learning: int
    casts: float = 0.0


def predicted_peak(step: CountedStep, states: States = States(), adapters: int = 0, kernels: str = "eager") -> Memory:
    """The peak of forward, backward and a fused optimizer step on one GPU.

    Args:
        adapters: parameters of LoRA adapters, which learn instead of the decoder's own. What they keep for their
            backward, besides the inputs that full training keeps too, is not in it.
        kernels: of norms, rotary embedding and gated product in the decoder, one of `elementwise.KERNELS`.

    Raises:
        UserError: unknown kernels.
    """
    check_name("--kernels", kernels, KERNELS)
    config, learns = step.config, "language_model" in step.trainable
    counts, layers = Parameters.of(config), config.text_config.num_hidden_layers
    decoder = replace(counts, embedding=0, layer=adapters // layers, head=0) if adapters else counts
    blocks = [
        *_tower_blocks(step, counts, states),
        _projector_block(step, counts, states),
        *_decoder_blocks(step, decoder, states, kernels),
    ]
    total, learning = counts.total(config) + adapters, sum(block.learning for block in blocks)
    fixed = dict(
        weights=_stored_weights(counts, total, learning, states, bool(adapters)),
        optimizer=0.0 if states.offloaded else states.optimizer * learning / states.shards,
        gathered=_gathered(config, counts, total, learns and not adapters, states),
    )
    held = sum(block.held for block in blocks)
    before = _gradients(states, learning, 0)
    moments = [Memory(**fixed, gradients=before, activations=held + sum(block.casts for block in blocks))]
    done = 0
    for block in reversed(blocks):
        held -= block.held
        gradients = _gradients(states, learning, done)
        moments.append(Memory(**fixed, gradients=gradients, activations=held + block.peak))
        done += block.learning
    whole = _gradients(states, learning, learning) + states.gradient_copy * learning / states.shards
    moments.append(Memory(**fixed, gradients=0.0 if states.offloaded else whole, activations=0.0))
    return max(moments, key=lambda moment: moment.total)


def cpu_memory(config: Any, trainable: Collection[str], states: States, adapters: int = 0) -> float:
    """Bytes in the memory of the CPU that an engine with offloading needs for each GPU; the arguments are those of
    `Step` and `predicted_peak`."""
    total = Parameters.of(config).total(config) + adapters
    return states.cpu_bytes(total, learning_parameters(config, trainable, adapters))


def learning_parameters(config: Any, trainable: Collection[str], adapters: int = 0) -> int:
    """How many parameters learn; the arguments are those of `Step` and `predicted_peak`."""
    counts, used = Parameters.of(config), used_tower_layers(config)
    decoder = counts.embedding + config.text_config.num_hidden_layers * counts.layer + counts.head
    learning = adapters or decoder * ("language_model" in trainable)
    learning += counts.projector * ("projector" in trainable)
    return learning + (counts.tower_stem + used * counts.tower_layer) * ("vision_tower" in trainable)


def _stored_weights(counts: Parameters, total: int, learning: int, states: States, adapted: bool) -> float:
    """On one GPU. Beside adapters, frozen linear maps are stored as autocast would cast them; all but the embedding
    are such maps."""
    if "weights" in states.offloaded:
        return 0.0
    whole = states.stored * total
    if adapted and states.autocast:
        whole -= (states.stored - states.bytes) * (total - learning - counts.embedding)
    return whole / (states.gpus if states.zero == 3 else 1)


def _gathered(config: Any, counts: Parameters, total: int, learns: bool, states: States) -> float:
    """Weights that are whole on a GPU at the same time though they are stored in pieces. FSDP2: those outside of the
    layers, of the layer that runs and of the one fetched meanwhile, and the gradients of a layer until reduced."""
    if states.zero != 3:
        return 0.0
    if not states.layerwise:
        return float(states.bytes * min(total, GATHERED))
    decoder, tower = config.text_config.num_hidden_layers, config.vision_config.num_hidden_layers
    outside = total - decoder * counts.layer - tower * counts.tower_layer
    return float(states.bytes * (outside + (2 + learns) * counts.layer))


def _gradients(states: States, learning: int, done: int) -> float:
    """On one GPU, where ``done`` of the ``learning`` parameters have had their backward."""
    if states.offloaded:
        return 0.0
    if states.layerwise:  # shards are made as whole gradients go; these are there before only while accumulating
        whole = states.bytes * (learning - done) * states.accumulate
        return whole + states.stored * done / states.shards
    present = learning if states.zero or states.accumulate else done
    return states.stored * present / states.shards + states.buckets * learning


def _decoder_blocks(step: CountedStep, counts: Parameters, states: States, kernels: str) -> list[MemoryBlock]:
    """Embedding, layers, last norm with the head and the loss."""
    text, layouts, schedule, trainable = step.config.text_config, step.layouts, step.schedule, step.trainable
    recomputed = range(text.num_hidden_layers)[: step.recomputed.layers]
    hidden, learns, size, stream = text.hidden_size, "language_model" in trainable, states.bytes, states.stream
    whole = stream * layouts[0].tokens * hidden
    blocks = [MemoryBlock(0.0, whole, counts.embedding * learns)]
    casts = size * counts.layer * states.autocast
    for layer, layout in enumerate(layout_of_layers(layouts, schedule, text.num_hidden_layers)):
        tokens = layout.tokens
        rotary = 2 * stream * tokens * head_size(text) if layer in (0, schedule.inject, *schedule.layers) else 0
        kept, extra = _layer_bytes(text, tokens, learns, states, kernels == "fused")
        kept, again = kept + casts, layer in recomputed
        source = stream * tokens * hidden if again else 0
        held, peak = (source or kept) + rotary, source + kept + extra + rotary
        blocks.append(MemoryBlock(held, peak, counts.layer * learns, casts * again * learns))
    rows, last = len(layouts[0].label_positions), layouts[-1].tokens * hidden
    kept = (FLOAT + stream * learns) * last + size * rows * hidden * learns
    kept += size * hidden * text.vocab_size * states.autocast * bool(counts.head)
    logits = FLOAT * rows * text.vocab_size
    # the loss holds the most with its two gradients, the norm with six float32 tensors of the stream
    blocks.append(MemoryBlock(kept + logits, max(kept + 3 * logits, 6 * FLOAT * last), counts.head * learns))
    return blocks


def _layer_bytes(text: Any, tokens: int, learns: bool, states: States, fused: bool) -> tuple[float, float]:
    """Of a decoder layer: bytes kept for backward, and what comes on top while its backward runs."""
    hidden, mlp, heads, size = text.hidden_size, text.intermediate_size, text.num_attention_heads, states.bytes
    fused = fused and not states.autocast
    norms = 2 * ((size if fused else FLOAT + states.stream * learns) * hidden + FLOAT)
    inputs = size * hidden * learns * (5 if states.autocast else 2)  # autocast casts for each of q, k, v, gate and up
    attention = 2 * size * (heads + key_value_heads(text)) * head_size(text) + FLOAT * heads
    gated = size * mlp * ((2 if fused else 3) + learns)
    extra = size * mlp * (2 + (not learns)) + states.stream * hidden
    return tokens * (norms + inputs + attention + gated), tokens * extra


def _tower_blocks(step: CountedStep, counts: Parameters, states: States) -> list[MemoryBlock]:
    """Nothing of a frozen tower stays. Of a trained one only the layers below ``vision_feature_layer`` learn."""
    vision, size, recompute = step.config.vision_config, states.bytes, step.recomputed.tower
    width, mlp = vision.hidden_size, vision.intermediate_size
    pixels = step.tiles * 3 * vision.image_size**2
    if "vision_tower" not in step.trainable:
        return [MemoryBlock(FLOAT * pixels, FLOAT * pixels, 0)]
    tokens = step.tiles * ((vision.image_size // vision.patch_size) ** 2 + 1)
    source = states.stream * tokens * width
    stem = (FLOAT + size) * pixels + source
    casts = size * counts.tower_layer * states.autocast
    norms = (2 * FLOAT + 4 * size if states.autocast else 4 * size) * width  # with what the products keep of them
    kept = tokens * (norms + size * (4 * width + 3 * mlp) + FLOAT * (vision.num_attention_heads + 4)) + casts
    extra = tokens * (size * 2 * mlp + states.stream * width)
    held, peak = (source if recompute else kept), kept + extra + source * recompute
    layer = MemoryBlock(held, peak, counts.tower_layer, casts * recompute)
    learning = counts.tower_stem - 2 * width  # the norm behind the layers is never used, so it does not learn
    return [MemoryBlock(stem, stem + 2 * source, learning), *[layer] * used_tower_layers(step.config)]


def _projector_block(step: CountedStep, counts: Parameters, states: States) -> MemoryBlock:
    width, hidden = step.config.vision_config.hidden_size, step.config.text_config.hidden_size
    rows, size, learns = step.features, states.bytes, "projector" in step.trainable
    inner = size * rows * hidden * (learns or "vision_tower" in step.trainable)
    held = inner + size * rows * (width + hidden) * learns
    return MemoryBlock(held, held + 2 * states.stream * rows * hidden, counts.projector * learns)
