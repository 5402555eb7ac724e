"""Tiny random models of many vision-language families, and prompts as their processors lay them out.

A prompt is described by pieces: a number is so many text tokens, a pair of numbers a picture (in the units of
`Family.sizes`), a `Clip` a video. `make_row` draws it, `collate` pads rows on the left into the model's inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

LAYERS, HIDDEN, VOCABULARY = 6, 32, 128
TEXT = range(10, 100)
SPECIAL = [*range(10), *range(100, VOCABULARY)]
PAD, BOS, NEWLINE = 0, 1, 3
IMAGE, VIDEO, START, END, BREAK, NEWLINES, GLOBAL, ROW_COLUMN = 120, 121, 122, 123, 124, 125, 126, 100

Size = tuple[int, int]


@dataclass(frozen=True)
class Clip:
    """A video of so many frames (Qwen: pairs of frames), each of a size."""

    frames: int
    size: Size


Piece = int | Size | Clip


@dataclass
class Shown:
    """A picture in a prompt: its ids with all markers, the offsets of its own tokens among them, the inputs it adds.

    ``inputs`` are joined over the pictures of a batch along dimension 0; ``kind`` is 1 for an image, 2 for a video.
    """

    ids: list[int]
    tokens: list[int]
    inputs: dict[str, Tensor]
    kind: int = 1

    @staticmethod
    def of(ids: Sequence[int], own: int | Sequence[int], inputs: dict[str, Tensor], kind: int = 1) -> Shown:
        """``own``: the ids that stand for features."""
        own = (own,) if isinstance(own, int) else own
        return Shown(list(ids), [offset for offset, token in enumerate(ids) if token in own], inputs, kind)


@dataclass
class Row:
    """One prompt: ids, types of its tokens (1 image, 2 video, 0 else) and the columns of every picture."""

    ids: list[int]
    types: list[int]
    pictures: list[list[int]]
    shown: list[Shown]
    prompt: int = 0

    def extended(self, answer: Sequence[int]) -> Row:
        """The row with an answer behind its prompt (``prompt`` columns stay those of the prompt)."""
        return Row(
            self.ids + list(answer), self.types + [0] * len(answer), self.pictures, self.shown, self.prompt
        )  # fmt: skip


Collate = Callable[["Family", Sequence[Row]], dict[str, Tensor]]


@dataclass(frozen=True)
class Family:
    """A class of models.

    Attributes:
        build: text decoder, options of its config -> model.
        show: model, picture or clip, generator -> the picture as it stands in a prompt.
        sizes: picture sizes to try; where there are tiles they have different numbers of them.
        clip: a video, None for a family without.
        decoders: text decoders to build it with, the first is the default.
        types: name of the input with the types of tokens; "suffix" for token_type_ids that are 1 behind the prompt.
        flat: whether positions are 1-D, so that they can be renumbered.
        collate: joins the inputs of the pictures, default: along dimension 0.
        first: the first layer that may drop.
        bos: where BOS stands, "first" or "behind" the last picture.
    """

    build: Callable[..., nn.Module]
    show: Callable[[Any, Size | Clip, torch.Generator], Shown]
    sizes: tuple[Size, ...]
    clip: Clip | None = None
    decoders: tuple[str, ...] = ("own",)
    types: str | None = None
    flat: bool = True
    collate: Collate | None = None
    first: int = 1
    bos: str = "first"
    options: dict[str, Any] = field(default_factory=dict)

    def make(self, decoder: str | None = None, implementation: str = "sdpa", **options: Any) -> Any:
        """A model with wide random weights, so that attention is far from uniform."""
        torch.manual_seed(0)
        model = self.build(decoder or self.decoders[0], **{**self.options, **options})
        widen(model)
        eager_only = not all(part._supports_sdpa for part in model.modules() if isinstance(part, hf.PreTrainedModel))
        model.set_attn_implementation("eager" if eager_only else implementation)
        return model.float().eval()


def widen(model: nn.Module, seed: int = 0) -> None:
    """Draws the weights of a model anew: matrices N(0, 0.2), biases, norms and sinks off their start by N(0, 0.1)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.2 * noise if parameter.ndim > 1 else parameter + 0.1 * noise)
    for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
        setattr(model.generation_config, name, PAD if name == "pad_token_id" else None)


def make_row(family: Family, model: Any, *pieces: Piece, seed: int = 0) -> Row:
    """Draws a prompt."""
    generator = torch.Generator().manual_seed(seed)
    row = Row([], [], [], [])
    last = max((index for index, piece in enumerate(pieces) if not isinstance(piece, int)), default=-1)
    opening = last + 1 if family.bos == "behind" else 0
    for piece in [*pieces[:opening], None, *pieces[opening:]]:
        if piece is None:
            row.ids, row.types = [*row.ids, BOS], [*row.types, 0]
            continue
        if isinstance(piece, int):
            row.ids += torch.randint(TEXT.start, TEXT.stop, (piece,), generator=generator).tolist()
            row.types += [0] * piece
            continue
        shown = family.show(model, piece, generator)
        row.pictures.append([len(row.ids) + offset for offset in shown.tokens])
        row.types += [shown.kind if offset in shown.tokens else 0 for offset in range(len(shown.ids))]
        row.ids += shown.ids
        row.shown.append(shown)
    row.prompt = len(row.ids)
    return row


def collate(family: Family, *rows: Row) -> dict[str, Tensor]:
    """Rows -> keyword arguments of the model, padded on the left."""
    longest = max(len(row.ids) for row in rows)
    ids, mask, types = torch.zeros(3, len(rows), longest, dtype=torch.long)
    for index, row in enumerate(rows):
        start = longest - len(row.ids)
        ids[index, start:], types[index, start:] = torch.tensor(row.ids), torch.tensor(row.types)
        mask[index, start:] = 1
        if family.types == "suffix":
            types[index] = 0
            types[index, start + row.prompt :] = 1
    batch = {"input_ids": ids, "attention_mask": mask}
    if family.types:
        batch["token_type_ids" if family.types == "suffix" else family.types] = types
    return {**batch, **(family.collate or join)(family, rows)}


def join(family: Family, rows: Sequence[Row]) -> dict[str, Tensor]:
    """The inputs of all pictures, one behind the other."""
    return _cat([shown.inputs for row in rows for shown in row.shown])


def _cat(inputs: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    names = dict.fromkeys(name for each in inputs for name in each)
    return {name: torch.cat([each[name] for each in inputs if name in each]) for name in names}


# ---- text decoders that a class may be built with

COMMON = dict(
    vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=1024, bos_token_id=1, eos_token_id=None, pad_token_id=PAD,
    tie_word_embeddings=False,
)  # fmt: skip
DECODERS: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (hf.LlamaConfig, {}),
    "mistral": (hf.MistralConfig, {"sliding_window": None}),
    "qwen2": (hf.Qwen2Config, {}),
    "qwen3": (hf.Qwen3Config, {"head_dim": 8}),
}
ANY = ("llama", "mistral", "qwen2", "qwen3")


def text_config(decoder: str, **options: Any) -> Any:
    kind, own = DECODERS[decoder]
    return kind(**{**COMMON, **own, **options})


def clip_tower() -> Any:
    return hf.CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7
    )


def siglip_tower(image_size: int = 28, **options: Any) -> Any:
    return hf.SiglipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=image_size,
        patch_size=7, vision_use_head=False, **options,
    )  # fmt: skip


def pixels(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


# ---- llava, llava_next


def _llava(decoder: str, **options: Any) -> nn.Module:
    config = hf.LlavaConfig(
        text_config=text_config(decoder, **options), vision_config=clip_tower(), image_token_id=IMAGE,
        image_seq_length=16, tie_word_embeddings=False,
    )  # fmt: skip
    return hf.LlavaForConditionalGeneration(config)


def _show_llava(model: Any, size: Size, generator: torch.Generator) -> Shown:
    return Shown.of([IMAGE] * 16, IMAGE, {"pixel_values": pixels(generator, 1, 3, 28, 28)})


PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]


def _llava_next(decoder: str, **options: Any) -> nn.Module:
    config = hf.LlavaNextConfig(
        text_config=text_config(decoder, **options), vision_config=clip_tower(), image_token_id=IMAGE,
        image_grid_pinpoints=PINPOINTS, tie_word_embeddings=False,
    )  # fmt: skip
    return hf.LlavaNextForConditionalGeneration(config)


def _show_anyres(model: Any, size: Size, generator: torch.Generator) -> Shown:
    """A (height, width) picture, cut into the tiles of the pinpoint that fits it best, behind one of the whole."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    sizes = torch.tensor([size])
    tiles = image_size_to_num_patches(size, PINPOINTS, 28)
    inputs = {"pixel_values": pixels(generator, 1, tiles, 3, 28, 28), "image_sizes": sizes}
    with torch.no_grad():
        count = len(model.get_image_features(**inputs).pooler_output[0])
    return Shown.of([IMAGE] * count, IMAGE, inputs)


def pad_tiles(family: Family, rows: Sequence[Row]) -> dict[str, Tensor]:
    """Pictures with fewer tiles than the largest get tiles of zeros behind."""
    inputs = [dict(shown.inputs) for row in rows for shown in row.shown]
    most = max((len(each["pixel_values"][0]) for each in inputs if "pixel_values" in each), default=0)
    for each in inputs:
        if "pixel_values" in each:
            tiles = each["pixel_values"]
            each["pixel_values"] = nn.functional.pad(tiles, (0, 0) * 3 + (0, most - tiles.shape[1]))
    return _cat(inputs)


# ---- qwen2_vl


def _qwen2_vl(decoder: str, **options: Any) -> nn.Module:
    vision = dict(
        depth=2, embed_dim=16, hidden_size=HIDDEN, num_heads=2, patch_size=4, spatial_merge_size=2,
        temporal_patch_size=2, mlp_ratio=2,
    )  # fmt: skip
    text = {**COMMON, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 2, 1]}}
    config = hf.Qwen2VLConfig(
        text_config={**text, **options}, vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO,
        vision_start_token_id=START, vision_end_token_id=END, tie_word_embeddings=False,
    )  # fmt: skip
    return hf.Qwen2VLForConditionalGeneration(config)


def _show_qwen(model: Any, piece: Size | Clip, generator: torch.Generator) -> Shown:
    """A grid of (height, width) patches, merged 2 by 2; a clip repeats it for every pair of frames."""
    frames, (height, width) = (piece.frames, piece.size) if isinstance(piece, Clip) else (1, piece)
    patch = model.config.vision_config.patch_size
    values = pixels(generator, frames * height * width, 3 * 2 * patch * patch)
    grid, count = torch.tensor([[frames, height, width]]), frames * height * width // 4
    if isinstance(piece, Clip):
        inputs = {"pixel_values_videos": values, "video_grid_thw": grid}
        return Shown.of([START, *[VIDEO] * count, END], VIDEO, inputs, kind=2)
    return Shown.of([START, *[IMAGE] * count, END], IMAGE, {"pixel_values": values, "image_grid_thw": grid})


# ---- internvl


def _internvl(decoder: str, **options: Any) -> nn.Module:
    vision = dict(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=[24, 24],
        patch_size=[4, 4], layer_scale_init_value=1.0,
    )  # fmt: skip
    config = hf.InternVLConfig(
        text_config=text_config(decoder, **options), vision_config=vision, image_token_id=IMAGE, image_seq_length=9,
        tie_word_embeddings=False,
    )  # fmt: skip
    return hf.InternVLForConditionalGeneration(config)


def _show_internvl(model: Any, piece: Size | Clip, generator: torch.Generator) -> Shown:
    """(rows, columns) of tiles and, if there are several, a thumbnail; a clip is a line per frame, one tile each."""
    if isinstance(piece, Clip):
        ids: list[int] = []
        for frame in range(piece.frames):
            ids += [*[NEWLINE] * bool(frame), 50, 51 + frame, START, *[IMAGE] * 9, END]
        return Shown.of(ids, IMAGE, {"pixel_values": pixels(generator, piece.frames, 3, 24, 24)})
    tiles = piece[0] * piece[1] + (piece != (1, 1))
    return Shown.of([START, *[IMAGE] * 9 * tiles, END], IMAGE, {"pixel_values": pixels(generator, tiles, 3, 24, 24)})


# ---- gemma3, paligemma


def _gemma3(decoder: str, **options: Any) -> nn.Module:
    text = {**COMMON, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 12, "sliding_window_pattern": 3}
    config = hf.Gemma3Config(
        text_config={**text, **options}, vision_config=siglip_tower(), image_token_index=IMAGE, boi_token_index=START,
        eoi_token_index=END, mm_tokens_per_image=16, tie_word_embeddings=False,
    )  # fmt: skip
    return hf.Gemma3ForConditionalGeneration(config)


def _show_gemma3(model: Any, size: Size, generator: torch.Generator) -> Shown:
    ids = [NEWLINES, START, *[IMAGE] * 16, END, NEWLINES]
    return Shown.of(ids, IMAGE, {"pixel_values": pixels(generator, 1, 3, 28, 28)})


def _paligemma(decoder: str, **options: Any) -> nn.Module:
    config = hf.PaliGemmaConfig(
        text_config=text_config(decoder, **options), vision_config=siglip_tower(), image_token_index=IMAGE,
        vocab_size=VOCABULARY, projection_dim=HIDDEN, hidden_size=HIDDEN, tie_word_embeddings=False,
    )  # fmt: skip
    return hf.PaliGemmaForConditionalGeneration(config)


DECODERS["gemma"] = (hf.GemmaConfig, {"head_dim": 8})
DECODERS["gemma2"] = (hf.Gemma2Config, {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 12})

ONE_SIZE = ((1, 1),)
GRIDS = ((8, 8), (4, 12))
FAMILIES: dict[str, Family] = {
    "llava": Family(_llava, _show_llava, ONE_SIZE, decoders=ANY),
    "llava_next": Family(_llava_next, _show_anyres, ((30, 50), (80, 28)), decoders=ANY, collate=pad_tiles),
    "qwen2_vl": Family(
        _qwen2_vl, _show_qwen, GRIDS, Clip(2, (4, 8)), types="mm_token_type_ids", flat=False
    ),
    "internvl": Family(_internvl, _show_internvl, ((1, 1), (1, 2)), Clip(3, (1, 1)), decoders=ANY),
    "gemma3": Family(_gemma3, _show_gemma3, ONE_SIZE, types="token_type_ids"),
    "paligemma": Family(_paligemma, _show_llava, ONE_SIZE, decoders=("gemma", "gemma2"), types="suffix", bos="behind"),
}  # fmt: skip
