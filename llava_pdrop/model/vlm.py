"""PyramidLlava, the training model. Read `forward` first: it is the whole program in one screen.

The weights live in an ordinary Hugging Face LLaVA (``hf``), whose own forward is not used: names, loading, saving and
``generate`` stay Hugging Face's, while this file decides what happens to the tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

from llava_pdrop.errors import UserError
from llava_pdrop.geometry import ImageGeometry
from llava_pdrop.model import attention
from llava_pdrop.model.decoder import Drop, check_decoder, run_decoder
from llava_pdrop.model.kernels import check_kernels
from llava_pdrop.model.rankers import check_rankers
from llava_pdrop.model.stream import Layout, StreamPlan
from llava_pdrop.model.vision import dummy_pixels, image_features
from llava_pdrop.schedule import Schedule
from llava_pdrop.types import PackedBatch

HfLlava: TypeAlias = LlavaForConditionalGeneration | LlavaNextForConditionalGeneration


MODULE = "host"
"""What `PyramidLlava.hf` is registered as, hence the first part of every name in its state dict. Checkpoints under
DeepSpeed and FSDP hold these names (weights and optimizer): older ones can be resumed only as long as it stays."""


class Output(NamedTuple):
    """``loss`` is the SUM over label tokens (scalar tensor); ``labels`` their number; ``seq_lens`` and ``image_tokens``
    the lengths of the samples and the image tokens of all of them, before any drop and after each one.

    A tuple, because engines look for the tensors that leave a module in these, not in classes they do not know."""

    loss: Tensor
    labels: int
    seq_lens: list[list[int]]
    image_tokens: list[int]

    @property
    def tokens(self) -> list[int]:
        """The length of the stream at every stage."""
        return [sum(lengths) for lengths in self.seq_lens]


class PyramidLlava(nn.Module):
    """A LLaVA whose decoder drops image tokens by ``schedule`` (empty: vanilla).

    Args:
        hf: a vanilla Hugging Face LLaVA or LLaVA-NeXT; the schedule is written to its config.
        schedule: when and how much to drop.
        geometry: how pictures become tokens; default: what the model's config says.
        backend: attention kernel of packed streams, one of `attention.BACKENDS`.
        recompute_layers: activation checkpointing, once enabled, holds for only so many first layers of the decoder,
            those with the longest streams (None: for all).
        kernels: norms, rotary embedding and gated product of the decoder, one of `kernels.CHOICES`.
        recompute_tower: activation checkpointing, once enabled, holds for the layers of a trainable tower too.

    Raises:
        UserError: the schedule or ``recompute_layers`` does not fit the decoder, an unknown ranker, or a backend or
            kernels that are not available here.
    """

    def __init__(
        self,
        hf: HfLlava,
        schedule: Schedule = Schedule(),
        geometry: ImageGeometry | None = None,
        backend: str = "auto",
        recompute_layers: int | None = None,
        kernels: str = "auto",
        recompute_tower: bool = True,
    ) -> None:
        super().__init__()
        depth = hf.config.text_config.num_hidden_layers
        if recompute_layers is not None and not 0 <= recompute_layers <= depth:
            raise UserError(
                f"train.recompute_layers must be from 0 to {depth}, the decoder's depth: {recompute_layers}"
            )
        check_rankers(schedule)
        attention.check_transformers()
        attention.check_backend(backend)
        check_kernels(kernels)
        check_decoder(hf.config.text_config, schedule)
        attention.register()
        hf.set_attn_implementation(attention.NAME)
        self.add_module(MODULE, hf)
        self.layouts: list[Layout] = []  # of the last forward
        self.schedule = schedule.check(depth).at("renumber")
        self.geometry = geometry or geometry_of(hf.config)
        self.backend = backend
        self.recompute_layers = recompute_layers
        self.kernels = kernels
        self.recompute_tower = recompute_tower
        hf.config.pyramid_drop = self.schedule.to_dict()

    def forward(self, batch: PackedBatch, trace: list[Drop] | None = None) -> Output:
        """Pixels and token ids of a packed batch -> loss.

        tower -> projector -> merge into the text -> decoder layers, dropping between them -> loss at the labels
        """
        plan = StreamPlan.build(batch, self.schedule, self.geometry, self.device, self.backend)
        x_TD = self.embed(batch, plan)
        x_TD = run_decoder(self.hf.model.language_model, x_TD, plan, self.schedule, trace, self.kernels)
        loss = label_loss(self.hf.lm_head, x_TD, plan.predict_row, plan.label_L)
        self.layouts = [stage.layout for stage in plan.stages]
        seq_lens = [layout.seq_lens for layout in self.layouts]
        return Output(loss, len(batch.label_positions), seq_lens, plan.image_tokens)

    def embed(self, batch: PackedBatch, plan: StreamPlan) -> Tensor:
        """The stream (T, D) that enters the decoder: text embeddings with image features at the placeholders."""
        x_TD = self.hf.get_input_embeddings()(plan.text_T)
        pixels = batch.pixels if len(batch.image_spans) else dummy_pixels(self.hf, x_TD.device)
        side = self.geometry.side(self.schedule.downsample) if self.schedule.downsample else None
        table_FD = image_features(self.hf, pixels, side)
        newline_D = getattr(self.hf.model, "image_newline", None)
        if newline_D is not None:
            table_FD = torch.cat([table_FD, newline_D[None].to(table_FD.dtype)])
        table_FD = table_FD.to(x_TD.dtype)
        if not len(batch.image_spans):
            return x_TD + table_FD[:0].sum()  # nothing of it, yet in the graph: 0 * x would be NaN where x is infinite
        return x_TD.index_copy(0, plan.image_row, table_FD.index_select(0, plan.feature_row))

    @torch.no_grad()
    def logits(self, batch: PackedBatch, trace: list[Drop] | None = None) -> Tensor:
        """Logits (T', vocabulary) of every token that survives all drops: for tests and for looking inside."""
        plan = StreamPlan.build(batch, self.schedule, self.geometry, self.device, self.backend)
        x_TD = self.embed(batch, plan)
        x_TD = run_decoder(self.hf.model.language_model, x_TD, plan, self.schedule, trace, self.kernels)
        return self.hf.lm_head(x_TD)

    @property
    def hf(self) -> HfLlava:
        """The Hugging Face model, which holds all weights."""
        return getattr(self, MODULE)

    @property
    def device(self) -> torch.device:
        return self.hf.lm_head.weight.device

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Recomputes in backward the layers of the decoder, and of a trainable tower, that ``recompute_layers`` and
        ``recompute_tower`` name; the Trainer calls this before it wraps."""
        if hasattr(self.hf, "activation_checkpointing_enable"):
            self.hf.activation_checkpointing_enable(activation_checkpointing_kwargs, **options)
        else:  # transformers before 5.20
            self.hf.gradient_checkpointing_enable(activation_checkpointing_kwargs, **options)
        if self.recompute_layers is not None:
            for layer in self.hf.model.language_model.layers[self.recompute_layers :]:
                layer.gradient_checkpointing = False
        if not self.recompute_tower:
            for module in self.hf.model.vision_tower.modules():
                if hasattr(module, "gradient_checkpointing"):
                    module.gradient_checkpointing = False

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """The same under the name older Trainers call."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)


def geometry_of(config: Any) -> ImageGeometry:
    """Tiling rules from a Hugging Face LLaVA or LLaVA-NeXT config (whose pinpoints are written (height, width))."""
    vision = config.vision_config
    if config.vision_feature_select_strategy != "default" or not isinstance(config.vision_feature_layer, int):
        raise UserError(
            "only one vision_feature_layer and vision_feature_select_strategy 'default' (patches) are supported, got "
            f"{config.vision_feature_layer} and {config.vision_feature_select_strategy!r}"
        )
    if config.model_type != "llava_next":
        return ImageGeometry(vision.image_size, vision.patch_size)
    return ImageGeometry(
        vision.image_size,
        vision.patch_size,
        aspect="anyres",
        merge=getattr(config, "mm_patch_merge_type", "spatial_unpad"),
        pinpoints=tuple((width, height) for height, width in config.image_grid_pinpoints),
        rounding=getattr(config, "image_rounding", "original"),
    )


# The language-model loss, computed where a label is and nowhere else.


def label_loss(lm_head: nn.Module, x_TD: Tensor, predict_row: Tensor, label_L: Tensor) -> Tensor:
    """Sum over the labels (L,) of the cross entropy, in float32, of the tokens before them (rows ``predict_row`` of
    ``x_TD``). Divide by the number of label tokens of the whole optimizer step: a mean here would weigh a token by the
    length of the micro-batch it happens to be in. No labels give 0 with a gradient of 0."""
    logits_LV = lm_head(x_TD.index_select(0, predict_row))
    return F.cross_entropy(logits_LV.float(), label_L, reduction="sum")
