"""Tiny random models of the families of vision-language models that `attach` knows: `FAMILIES`.

Each has its class's own text decoder or one of `family_prompts.DECODERS`, the smallest vision tower that the class
takes, and the layout of its processor. Left out because nothing in the inputs tells them apart: the tiles of Aria.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from tests.family_prompts import (
    ANY,
    BREAK,
    COMMON,
    END,
    EVERY,
    GLOBAL,
    HIDDEN,
    IMAGE,
    LAYERS,
    NEWLINE,
    NEWLINES,
    ROW_COLUMN,
    SPECIAL,
    START,
    VIDEO,
    VIDEO_START,
    VOCABULARY,
    Clip,
    Family,
    Row,
    Shown,
    Size,
    collate,
    make_row,
    pad_rows,
    pad_shapes,
    text_config,
)  # fmt: skip

__all__ = ["FAMILIES", "LAYERS", "SPECIAL", "Clip", "Family", "Row", "collate", "make_row"]

TOWER = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
NO_TIE = {"tie_word_embeddings": False}


def clip_tower() -> Any:
    return hf.CLIPVisionConfig(**TOWER, image_size=28, patch_size=7)


def siglip_tower() -> Any:
    return hf.SiglipVisionConfig(**TOWER, image_size=28, patch_size=7, vision_use_head=False)


def draw(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


# ---- one picture, so many tokens: llava, vipllava, video_llava, aria, paligemma, gemma3


def _llava(decoder: str, **options: Any) -> nn.Module:
    config = hf.LlavaConfig(
        text_config=text_config(decoder, **options), vision_config=clip_tower(), image_token_id=IMAGE, **NO_TIE
    )
    return hf.LlavaForConditionalGeneration(config)


def _vipllava(decoder: str, **options: Any) -> nn.Module:
    config = hf.VipLlavaConfig(
        text_config=text_config(decoder, **options), vision_config=clip_tower(), image_token_index=IMAGE,
        vision_feature_layer=[-2, -1], **NO_TIE,
    )  # fmt: skip
    return hf.VipLlavaForConditionalGeneration(config)


def _video_llava(decoder: str, **options: Any) -> nn.Module:
    config = hf.VideoLlavaConfig(
        text_config=text_config(decoder, **options), vision_config=clip_tower(), image_token_index=IMAGE,
        video_token_index=VIDEO, **NO_TIE,
    )  # fmt: skip
    return hf.VideoLlavaForConditionalGeneration(config)


def _paligemma(decoder: str, **options: Any) -> nn.Module:
    config = hf.PaliGemmaConfig(
        text_config=text_config(decoder, **options), vision_config=siglip_tower(), image_token_index=IMAGE,
        vocab_size=VOCABULARY, projection_dim=HIDDEN, hidden_size=HIDDEN, **NO_TIE,
    )  # fmt: skip
    return hf.PaliGemmaForConditionalGeneration(config)


def _gemma3(decoder: str, **options: Any) -> nn.Module:
    text = {**COMMON, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 12, "sliding_window_pattern": 3}
    config = hf.Gemma3Config(
        text_config={**text, **options}, vision_config=siglip_tower(), image_token_index=IMAGE, boi_token_index=START,
        eoi_token_index=END, mm_tokens_per_image=16, **NO_TIE,
    )  # fmt: skip
    return hf.Gemma3ForConditionalGeneration(config)


def _aria(decoder: str, **options: Any) -> nn.Module:
    text = {**COMMON, "intermediate_size": 24, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}
    config = hf.AriaConfig(
        text_config={**text, **options}, image_token_index=IMAGE, projector_patch_to_query_dict={16: 12},
        vision_config={"model_type": "idefics3_vision", **TOWER, "image_size": 28, "patch_size": 7}, **NO_TIE,
    )  # fmt: skip
    return hf.AriaForConditionalGeneration(config)


def _show_plain(model: Any, size: Size, generator: torch.Generator) -> Shown:
    return Shown.of([IMAGE] * 16, IMAGE, {"pixel_values": draw(generator, 1, 3, 28, 28)})


def _show_aria(model: Any, size: Size, generator: torch.Generator) -> Shown:
    inputs = {"pixel_values": draw(generator, 1, 3, 28, 28), "pixel_mask": torch.ones(1, 28, 28).bool()}
    return Shown.of([IMAGE] * 12, IMAGE, inputs)


def _show_gemma3(model: Any, size: Size, generator: torch.Generator) -> Shown:
    ids = [NEWLINES, START, *[IMAGE] * 16, END, NEWLINES]
    return Shown.of(ids, IMAGE, {"pixel_values": draw(generator, 1, 3, 28, 28)})


def _show_video_llava(model: Any, piece: Size | Clip, generator: torch.Generator) -> Shown:
    """Frames keep the class token of the tower, pictures do not."""
    if not isinstance(piece, Clip):
        return _show_plain(model, piece, generator)
    inputs = {"pixel_values_videos": draw(generator, 1, piece.frames, 3, 28, 28)}
    return Shown.of([VIDEO] * 17 * piece.frames, VIDEO, inputs, kind=2)


# ---- tiles by picture size: llava_next, llava_next_video, llava_onevision

PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]


def _anyres(config: type, model: type, decoder: str, tower: Any, options: dict, **more: Any) -> nn.Module:
    text = text_config(decoder, **options)
    common = dict(image_token_index=IMAGE, image_grid_pinpoints=PINPOINTS, **NO_TIE)
    return model(config(text_config=text, vision_config=tower, **common, **more))


def _llava_next(decoder: str, **options: Any) -> nn.Module:
    return _anyres(hf.LlavaNextConfig, hf.LlavaNextForConditionalGeneration, decoder, clip_tower(), options)


def _llava_next_video(decoder: str, **options: Any) -> nn.Module:
    kinds = (hf.LlavaNextVideoConfig, hf.LlavaNextVideoForConditionalGeneration)
    return _anyres(*kinds, decoder, clip_tower(), options, video_token_index=VIDEO)


def _llava_onevision(decoder: str, **options: Any) -> nn.Module:
    kinds = (hf.LlavaOnevisionConfig, hf.LlavaOnevisionForConditionalGeneration)
    return _anyres(
        *kinds, decoder, siglip_tower(), options, video_token_index=VIDEO, vision_aspect_ratio="anyres_max_4"
    )


def _show_anyres(model: Any, piece: Size | Clip, generator: torch.Generator, alone: bool = True) -> Shown:
    """A (height, width) picture: the whole, then the tiles of the pinpoint that fits it best. A clip: its frames.

    OneVision cuts only a picture that is ``alone`` in its row.
    """
    if isinstance(piece, Clip):
        frames = {"pixel_values_videos": draw(generator, 1, piece.frames, 3, 28, 28)}
        with torch.no_grad():
            count = model.get_video_features(**frames).pooler_output[0].reshape(-1, HIDDEN).shape[0]
        return Shown.of([VIDEO] * count, VIDEO, frames, kind=2)
    tiles = image_size_to_num_patches(piece, PINPOINTS, 28) if alone else 1
    inputs = {"pixel_values": draw(generator, 1, tiles, 3, 28, 28), "image_sizes": torch.tensor([piece])}
    with torch.no_grad():
        company = {} if alone else {"batch_num_images": torch.tensor([2])}
        count = len(model.get_image_features(**inputs, **company).pooler_output[0])
    return Shown.of([IMAGE] * count, IMAGE, inputs)


def _collate_onevision(rows: Any) -> dict[str, Tensor]:
    images = [sum(shown.kind == 1 for shown in row.shown) for row in rows]
    return pad_shapes(rows) | ({"batch_num_images": torch.tensor(images)} if any(images) else {})


# ---- markers between tiles or rows: internvl, smolvlm, idefics3, mistral3


def _internvl(decoder: str, **options: Any) -> nn.Module:
    vision = dict(**TOWER, image_size=[24, 24], patch_size=[4, 4], layer_scale_init_value=1.0)
    config = hf.InternVLConfig(
        text_config=text_config(decoder, **options), vision_config=vision, image_token_id=IMAGE, image_seq_length=9,
        **NO_TIE,
    )  # fmt: skip
    return hf.InternVLForConditionalGeneration(config)


def _show_internvl(model: Any, piece: Size | Clip, generator: torch.Generator) -> Shown:
    """(rows, columns) of tiles and, if there are several, a thumbnail; a clip is a line per frame, one tile each."""
    if isinstance(piece, Clip):
        ids: list[int] = []
        for frame in range(piece.frames):
            ids += [*[NEWLINE] * bool(frame), 50, 51 + frame, START, *[IMAGE] * 9, END]
        return Shown.of(ids, IMAGE, {"pixel_values": draw(generator, piece.frames, 3, 24, 24)}).frame_by_frame()
    tiles = piece[0] * piece[1] + (piece != (1, 1))
    return Shown.of([START, *[IMAGE] * 9 * tiles, END], IMAGE, {"pixel_values": draw(generator, tiles, 3, 24, 24)})


def _idefics3(decoder: str, **options: Any) -> nn.Module:
    return hf.Idefics3ForConditionalGeneration(hf.Idefics3Config(**_idefics_parts(decoder, options)))


def _smolvlm(decoder: str, **options: Any) -> nn.Module:
    return hf.SmolVLMForConditionalGeneration(hf.SmolVLMConfig(**_idefics_parts(decoder, options)))


def _idefics_parts(decoder: str, options: dict) -> dict[str, Any]:
    vision = dict(**TOWER, image_size=24, patch_size=4)
    text = text_config(decoder, **options)
    return dict(text_config=text, vision_config=vision, image_token_id=IMAGE, scale_factor=2, **NO_TIE)


def _show_idefics(model: Any, piece: Size | Clip, generator: torch.Generator) -> Shown:
    """(rows, columns) of marked tiles and the whole at the end; (0, 0): the whole alone. A clip: timestamped frames."""
    whole = [START, GLOBAL, *[IMAGE] * 9, START]
    if isinstance(piece, Clip):
        ids = [60, 61, *(token for frame in range(piece.frames) for token in (NEWLINE, 50, 51 + frame, *whole)), 62]
        return Shown.of(ids, IMAGE, {"pixel_values": draw(generator, piece.frames, 3, 24, 24)}).frame_by_frame()
    ids = []
    for row in range(piece[0]):
        for column in range(piece[1]):
            ids += [START, ROW_COLUMN + 4 * row + column, *[IMAGE] * 9]
        ids += [NEWLINE] if row + 1 < piece[0] else [NEWLINES]
    return Shown.of(ids + whole, IMAGE, {"pixel_values": draw(generator, piece[0] * piece[1] + 1, 3, 24, 24)})


def _mistral3(decoder: str, **options: Any) -> nn.Module:
    vision = dict(model_type="pixtral", **TOWER, head_dim=8, image_size=64, patch_size=4)
    config = hf.Mistral3Config(
        text_config=text_config(decoder, **options), vision_config=vision, image_token_index=IMAGE,
        spatial_merge_size=2, **NO_TIE,
    )  # fmt: skip
    return hf.Mistral3ForConditionalGeneration(config)


def _show_mistral3(model: Any, size: Size, generator: torch.Generator) -> Shown:
    """A (height, width) picture: a token per 8 x 8 pixels, a break behind every row, an end behind the last."""
    line = [*[IMAGE] * (size[1] // 8), BREAK]
    ids = [*(line * (size[0] // 8))[:-1], END]
    return Shown.of(ids, IMAGE, {"pixel_values": draw(generator, 1, 3, *size), "image_sizes": torch.tensor([size])})


# ---- grids with 3-D positions: the Qwen-VL families, glm4v


def _qwen(config: type, model: type, sections: list[int], vision: dict, text: dict, **more: Any) -> nn.Module:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}
    vision = dict(depth=2, num_heads=2, patch_size=4, spatial_merge_size=2, temporal_patch_size=2, **vision)
    common = dict(image_token_id=IMAGE, video_token_id=VIDEO, **NO_TIE, **more)
    return model(config(text_config={**COMMON, "rope_parameters": rope, **text}, vision_config=vision, **common))


QWEN_MARKERS = dict(vision_start_token_id=START, vision_end_token_id=END)


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


def _glm4v(decoder: str, **options: Any) -> nn.Module:
    vision = dict(hidden_size=16, intermediate_size=32, out_hidden_size=HIDDEN, image_size=32)
    markers = dict(image_start_token_id=START, image_end_token_id=END)
    markers |= dict(video_start_token_id=VIDEO_START, video_end_token_id=GLOBAL)
    return _qwen(hf.Glm4vConfig, hf.Glm4vForConditionalGeneration, [1, 2, 1], vision, options, **markers)


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


WIDE_TALL = ((30, 50), (80, 28))
GRIDS = {"sizes": ((8, 8), (4, 12)), "clip": Clip(2, (4, 8)), "types": "mm_token_type_ids", "flat": False}
FAMILIES: dict[str, Family] = {
    "llava": Family(_llava, _show_plain, decoders=EVERY),
    "vipllava": Family(_vipllava, _show_plain, decoders=ANY),
    "video_llava": Family(_video_llava, _show_video_llava, clip=Clip(2, (1, 1)), decoders=ANY),
    "aria": Family(_aria, _show_aria),
    "paligemma": Family(_paligemma, _show_plain, decoders=("gemma", "gemma2"), types="suffix", bos="behind"),
    "gemma3": Family(_gemma3, _show_gemma3, types="token_type_ids"),
    "llava_next": Family(_llava_next, _show_anyres, WIDE_TALL, decoders=ANY, collate=pad_shapes),
    "llava_next_video": Family(
        _llava_next_video, _show_anyres, WIDE_TALL, Clip(3, (1, 1)), decoders=ANY, collate=pad_shapes
    ),
    "llava_onevision": Family(
        _llava_onevision, _show_anyres, WIDE_TALL, Clip(3, (1, 1)), ANY, collate=_collate_onevision, counts=True
    ),
    "internvl": Family(_internvl, _show_internvl, ((1, 1), (1, 2)), Clip(3, (1, 1)), decoders=ANY),
    "smolvlm": Family(_smolvlm, _show_idefics, ((0, 0), (2, 1)), Clip(3, (1, 1)), decoders=ANY, collate=pad_rows),
    "idefics3": Family(_idefics3, _show_idefics, ((0, 0), (2, 1)), decoders=ANY, collate=pad_rows),
    "mistral3": Family(_mistral3, _show_mistral3, ((24, 32), (16, 40)), decoders=ANY, collate=pad_shapes),
    "qwen2_vl": Family(_qwen2_vl, _show_qwen2, **GRIDS),
    "qwen2_5_vl": Family(_qwen2_5_vl, _show_qwen2_5, **GRIDS),
    "qwen3_vl": Family(_qwen3_vl, _show_qwen3, **GRIDS, first=2),
    "qwen3_vl_moe": Family(_qwen3_vl_moe, _show_qwen3, **GRIDS, first=2),
    "glm4v": Family(_glm4v, _show_glm4v, **GRIDS),
}
