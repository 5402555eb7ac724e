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
    NO_TIE,
    ROW_COLUMN,
    SPECIAL,
    START,
    TOWER,
    VIDEO,
    VOCABULARY,
    Clip,
    Family,
    Row,
    Shown,
    Size,
    clip_tower,
    collate,
    draw,
    make_row,
    pad_rows,
    pad_shapes,
    siglip_tower,
    text_config,
)  # fmt: skip
from tests.grid_families import GRID_FAMILIES

__all__ = ["FAMILIES", "LAYERS", "SPECIAL", "Clip", "Family", "Row", "collate", "make_row"]

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
    text = {"model_type": "aria_text", **COMMON, "intermediate_size": 24}
    text |= {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}
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
    tiles = tiles_of(piece)
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


def _pixtral(decoder: str, **options: Any) -> nn.Module:
    vision = dict(model_type="pixtral", **TOWER, head_dim=8, image_size=64, patch_size=8)
    config = hf.LlavaConfig(
        text_config=text_config(decoder, **options), vision_config=vision, image_token_id=IMAGE,
        vision_feature_layer=-1, vision_feature_select_strategy="full", **NO_TIE,
    )  # fmt: skip
    return hf.LlavaForConditionalGeneration(config)


def _show_pixtral(model: Any, size: Size, generator: torch.Generator) -> Shown:
    """A (height, width) picture: a token per 8 x 8 pixels, a break behind every row, an end behind the last."""
    line = [*[IMAGE] * (size[1] // 8), BREAK]
    ids = [*(line * (size[0] // 8))[:-1], END]
    return Shown.of(ids, IMAGE, {"pixel_values": draw(generator, 1, 3, *size), "image_sizes": torch.tensor([size])})


def tiles_of(piece: Size) -> int:
    """(rows, columns) of tiles, and the whole picture beside several."""
    return piece[0] * piece[1] + (piece != (1, 1))


def _got_ocr2(decoder: str, **options: Any) -> nn.Module:
    vision = dict(
        hidden_size=16, output_channels=8, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=4,
        window_size=4, global_attn_indexes=[1], mlp_dim=32,
    )  # fmt: skip
    text = text_config(decoder, **options)
    config = hf.GotOcr2Config(text_config=text, vision_config=vision, image_token_index=IMAGE, **NO_TIE)
    return hf.GotOcr2ForConditionalGeneration(config)


def _show_got_ocr2(model: Any, size: Size, generator: torch.Generator) -> Shown:
    tiles = tiles_of(size)
    return Shown.of([START, *[IMAGE] * 16 * tiles, END], IMAGE, {"pixel_values": draw(generator, tiles, 3, 64, 64)})


def _deepseek_vl(decoder: str, **options: Any) -> nn.Module:
    config = hf.DeepseekVLConfig(
        text_config=text_config(decoder, **options), vision_config=siglip_tower(), image_token_id=IMAGE, **NO_TIE
    )
    return hf.DeepseekVLForConditionalGeneration(config)


def _janus(decoder: str, **options: Any) -> nn.Module:
    vision = dict(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7, mlp_ratio=2.0,
        projection_dim=HIDDEN, num_image_tokens=16,
    )  # fmt: skip
    codes = dict(embed_dim=4, num_embeddings=8, latent_channels=32, base_channels=32, channel_multiplier=[1],
                 num_res_blocks=1, num_patches=4, projection_dim=HIDDEN, image_token_embed_dim=HIDDEN)  # fmt: skip
    text = text_config(decoder, **options)
    config = hf.JanusConfig(text_config=text, vision_config=vision, vq_config=codes, image_token_id=IMAGE, **NO_TIE)
    return hf.JanusForConditionalGeneration(config)


def _show_janus(model: Any, size: Size, generator: torch.Generator) -> Shown:
    return Shown.of([START, *[IMAGE] * 16, END], IMAGE, {"pixel_values": draw(generator, 1, 3, 28, 28)})


WIDE_TALL, TILES = ((30, 50), (80, 28)), ((1, 1), (1, 2))
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
    "internvl": Family(_internvl, _show_internvl, TILES, Clip(3, (1, 1)), decoders=ANY),
    "smolvlm": Family(_smolvlm, _show_idefics, ((0, 0), (2, 1)), Clip(3, (1, 1)), decoders=ANY, collate=pad_rows),
    "idefics3": Family(_idefics3, _show_idefics, ((0, 0), (2, 1)), decoders=ANY, collate=pad_rows),
    "mistral3": Family(_mistral3, _show_pixtral, ((24, 32), (16, 40)), decoders=ANY, collate=pad_shapes),
    "pixtral": Family(_pixtral, _show_pixtral, ((24, 32), (16, 40)), decoders=("mistral",), collate=pad_shapes),
    "got_ocr2": Family(_got_ocr2, _show_got_ocr2, TILES, decoders=("qwen2",)),
    "deepseek_vl": Family(_deepseek_vl, _show_plain, decoders=("llama",)),
    "janus": Family(_janus, _show_janus, decoders=("llama",)),
    **GRID_FAMILIES,
}
