"""The tiny models with grids of patches: the Qwen-VL and GLM families (3-D positions) and VideoLLaMA 3 (1-D)."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from tests.family_prompts import (
    ANY,
    COMMON,
    END,
    GLOBAL,
    HIDDEN,
    IMAGE,
    NO_TIE,
    START,
    TOWER,
    VIDEO,
    VIDEO_START,
    Clip,
    Family,
    Shown,
    Size,
    draw,
    text_config,
)  # fmt: skip

# ---- grids with 3-D positions: the Qwen-VL families, glm4v


def _qwen(config: type, model: type, sections: list[int], vision: dict, text: dict, **more: Any) -> nn.Module:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}
    vision = dict(depth=2, num_heads=2, patch_size=4, spatial_merge_size=2, temporal_patch_size=2, **vision)
    common = dict(image_token_id=IMAGE, video_token_id=VIDEO, **NO_TIE, **more)
    return model(config(text_config={**COMMON, "rope_parameters": rope, **text}, vision_config=vision, **common))


QWEN_MARKERS: dict[str, Any] = dict(vision_start_token_id=START, vision_end_token_id=END)


def _qwen2_vl(decoder: str, **options: Any) -> nn.Module:
    vision = dict(embed_dim=16, hidden_size=HIDDEN, mlp_ratio=2)
    kinds = (hf.Qwen2VLConfig, hf.Qwen2VLForConditionalGeneration)
    return _qwen(*kinds, [1, 2, 1], vision, options, **QWEN_MARKERS)


def _qwen2_5_vl(decoder: str, **options: Any) -> nn.Module:
    vision = dict(hidden_size=16, intermediate_size=32, out_hidden_size=HIDDEN, window_size=16)
    kinds = (hf.Qwen2_5_VLConfig, hf.Qwen2_5_VLForConditionalGeneration)
    return _qwen(*kinds, [1, 2, 1], {**vision, "fullatt_block_indexes": [1]}, options, **QWEN_MARKERS)


QWEN3_VISION = dict(hidden_size=16, intermediate_size=32, out_hidden_size=HIDDEN, num_position_embeddings=64)
DEEPSTACK = {"deepstack_visual_indexes": [0, 1]}


def _qwen3_vl(decoder: str, **options: Any) -> nn.Module:
    kinds = (hf.Qwen3VLConfig, hf.Qwen3VLForConditionalGeneration)
    return _qwen(*kinds, [2, 1, 1], QWEN3_VISION | DEEPSTACK, {"head_dim": 8, **options}, **QWEN_MARKERS)


def _qwen3_vl_moe(decoder: str, **options: Any) -> nn.Module:
    experts = {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    kinds = (hf.Qwen3VLMoeConfig, hf.Qwen3VLMoeForConditionalGeneration)
    return _qwen(*kinds, [2, 1, 1], QWEN3_VISION | DEEPSTACK, experts | options, **QWEN_MARKERS)


GLM_VISION = dict(hidden_size=16, intermediate_size=32, out_hidden_size=HIDDEN, image_size=32)
GLM_MARKERS: dict[str, Any] = dict(
    image_start_token_id=START, image_end_token_id=END, video_start_token_id=VIDEO_START, video_end_token_id=GLOBAL
)


def _glm4v(decoder: str, **options: Any) -> nn.Module:
    return _qwen(hf.Glm4vConfig, hf.Glm4vForConditionalGeneration, [1, 2, 1], GLM_VISION, options, **GLM_MARKERS)


def _glm46v(decoder: str, **options: Any) -> nn.Module:
    vision, text = {"model_type": "glm4v_vision", **GLM_VISION}, {"model_type": "glm4v_text", **options}
    return _qwen(hf.Glm46VConfig, hf.Glm46VForConditionalGeneration, [1, 2, 1], vision, text, **GLM_MARKERS)


def _glm4v_moe(decoder: str, **options: Any) -> nn.Module:
    experts = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, n_group=1, topk_group=1)
    text = {**experts, "first_k_dense_replace": 1, "head_dim": 16, **options}
    kinds = (hf.Glm4vMoeConfig, hf.Glm4vMoeForConditionalGeneration)
    return _qwen(*kinds, [1, 2, 1], GLM_VISION, text, **GLM_MARKERS)


def _glm_ocr(decoder: str, **options: Any) -> nn.Module:
    text = {"head_dim": 8, **options}
    return _qwen(hf.GlmOcrConfig, hf.GlmOcrForConditionalGeneration, [1, 2, 1], GLM_VISION, text, **GLM_MARKERS)


def _video_llama_3(decoder: str, **options: Any) -> nn.Module:
    vision = {"model_type": "video_llama_3_vision", **TOWER, "patch_size": 4}
    common = dict(image_token_id=IMAGE, video_token_id=VIDEO, **NO_TIE)
    config = hf.VideoLlama3Config(text_config=text_config(decoder, **options), vision_config=vision, **common)
    return hf.VideoLlama3ForConditionalGeneration(config)


def _patches(model: Any, piece: Size | Clip, generator: torch.Generator) -> tuple[dict[str, Tensor], int, int]:
    """The inputs of a grid, (height, width) in patches that are merged 2 by 2; its frames and tokens per frame."""
    frames, (height, width) = (piece.frames, piece.size) if isinstance(piece, Clip) else (1, piece)
    patch = model.config.vision_config.patch_size
    values = draw(generator, frames * height * width, 3 * 2 * patch * patch)
    grid = torch.tensor([[frames, height, width]])
    names = ("pixel_values_videos", "video_grid_thw") if isinstance(piece, Clip) else ("pixel_values", "image_grid_thw")
    return dict(zip(names, (values, grid))), frames, height * width // 4


def _show_qwen2(model: Any, piece: Size | Clip, generator: torch.Generator) -> Shown:
    inputs, frames, tokens = _patches(model, piece, generator)
    kind, own = (2, VIDEO) if isinstance(piece, Clip) else (1, IMAGE)
    return Shown.of([START, *[own] * frames * tokens, END], own, inputs, kind)


def _show_qwen2_5(model: Any, piece: Size | Clip, generator: torch.Generator) -> Shown:
    shown = _show_qwen2(model, piece, generator)
    shown.inputs |= {"second_per_grid_ts": torch.tensor([0.5])} if isinstance(piece, Clip) else {}
    return shown


def _show_qwen3(model: Any, piece: Size | Clip, generator: torch.Generator) -> Shown:
    """The frames of a clip stand apart, each behind its time."""
    inputs, frames, tokens = _patches(model, piece, generator)
    if not isinstance(piece, Clip):
        return Shown.of([START, *[IMAGE] * tokens, END], IMAGE, inputs)
    ids = [token for frame in range(frames) for token in (50, 51 + frame, START, *[VIDEO] * tokens, END)]
    return Shown.of(ids, VIDEO, inputs, kind=2)


def _show_glm4v(model: Any, piece: Size | Clip, generator: torch.Generator) -> Shown:
    """The frames of a clip are made of image tokens, between the marks of a video."""
    inputs, frames, tokens = _patches(model, piece, generator)
    picture = [START, *[IMAGE] * tokens, END]
    if not isinstance(piece, Clip):
        return Shown.of(picture, IMAGE, inputs)
    ids = [VIDEO_START, *(token for frame in range(frames) for token in (*picture, 51 + frame)), GLOBAL]
    return Shown.of(ids, IMAGE, inputs, kind=2)


def _show_video_llama_3(model: Any, piece: Size | Clip, generator: torch.Generator) -> Shown:
    """No marks around a picture; the frames of a clip stand apart, each behind its time."""
    frames, (height, width) = (piece.frames, piece.size) if isinstance(piece, Clip) else (1, piece)
    values, tokens = draw(generator, frames * height * width, 3 * 4 * 4), height * width // 4
    grid, merge = torch.tensor([[frames, height, width]]), torch.tensor([2])
    if not isinstance(piece, Clip):
        inputs = {"pixel_values": values, "image_grid_thw": grid, "image_merge_sizes": merge}
        return Shown.of([IMAGE] * tokens, IMAGE, inputs)
    inputs = {"pixel_values_videos": values, "video_grid_thw": grid, "video_merge_sizes": merge}
    inputs |= {"video_compression_mask": torch.ones(frames * tokens, dtype=torch.bool)}
    ids = [token for frame in range(frames) for token in (50, 51 + frame, *[VIDEO] * tokens)]
    return Shown.of(ids, VIDEO, inputs, kind=2)


SIZES: dict[str, Any] = {"sizes": ((8, 8), (4, 12)), "clip": Clip(2, (4, 8))}
GRIDS: dict[str, Any] = {**SIZES, "types": "mm_token_type_ids", "flat": False}
GRID_FAMILIES: dict[str, Family] = {
    "qwen2_vl": Family(_qwen2_vl, _show_qwen2, **GRIDS),
    "qwen2_5_vl": Family(_qwen2_5_vl, _show_qwen2_5, **GRIDS),
    "qwen3_vl": Family(_qwen3_vl, _show_qwen3, **GRIDS, first=2),
    "qwen3_vl_moe": Family(_qwen3_vl_moe, _show_qwen3, **GRIDS, first=2),
    "glm4v": Family(_glm4v, _show_glm4v, **GRIDS),
    "glm4v_moe": Family(_glm4v_moe, _show_glm4v, **GRIDS),
    "glm46v": Family(_glm46v, _show_glm4v, **GRIDS),
    "glm_ocr": Family(_glm_ocr, _show_glm4v, **GRIDS),
    "video_llama_3": Family(_video_llama_3, _show_video_llama_3, **SIZES, decoders=ANY),
}
