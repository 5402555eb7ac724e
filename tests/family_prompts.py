"""What the tiny models of many families share: prompts as their processors lay them out, and text decoders.

A prompt is described by pieces: a number is so many text tokens, a pair of numbers a picture (in the units of
`Family.sizes`), a `Clip` a video. `make_row` draws it, `collate` pads rows on the left into the model's inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

LAYERS, HIDDEN, VOCABULARY = 6, 32, 128
TEXT = range(10, 100)
SPECIAL = [*range(10), *range(100, VOCABULARY)]
PAD, BOS, NEWLINE = 0, 1, 3
ROW_COLUMN = 100  # and the ones behind: 4 * row + column
IMAGE, VIDEO, START, END, BREAK, NEWLINES, GLOBAL, VIDEO_START = range(120, 128)

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
    ``pictures`` is one list, or one per frame of a clip that the model's inputs do not tell from single pictures.
    """

    ids: list[int]
    pictures: list[list[int]]
    inputs: dict[str, Tensor]
    kind: int = 1

    @staticmethod
    def of(ids: Sequence[int], own: int, inputs: dict[str, Tensor], kind: int = 1) -> Shown:
        """``own``: the id that stands for features."""
        return Shown(list(ids), [[offset for offset, token in enumerate(ids) if token == own]], inputs, kind)

    def frame_by_frame(self) -> Shown:
        """The same with every run of its tokens as a picture of its own."""
        (tokens,) = self.pictures
        starts = [index for index, token in enumerate(tokens) if token - 1 not in tokens]
        return replace(self, pictures=[tokens[a:b] for a, b in zip(starts, [*starts[1:], len(tokens)])])


@dataclass
class Row:
    """One prompt: ids, types of its tokens (1 image, 2 video, 0 else) and the columns of every picture.

    ``prompt`` is the number of its tokens before an answer.
    """

    ids: list[int]
    types: list[int]
    pictures: list[list[int]]
    shown: list[Shown]
    prompt: int = 0

    def extended(self, answer: Sequence[int]) -> Row:
        """The row with an answer behind its prompt."""
        return replace(self, ids=self.ids + list(answer), types=self.types + [0] * len(answer))


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
        collate: the rows' inputs beside ids, mask and types; default: joined along dimension 0.
        first: the first layer that may drop.
        bos: where BOS stands, "first" or "behind" the last picture.
        counts: whether a picture looks different in company: ``show`` is told with ``alone``.
    """

    build: Callable[..., nn.Module]
    show: Callable[..., Shown]
    sizes: tuple[Size, ...] = ((1, 1),)
    clip: Clip | None = None
    decoders: tuple[str, ...] = ("own",)
    types: str | None = None
    flat: bool = True
    collate: Callable[[Sequence[Row]], dict[str, Tensor]] | None = None
    first: int = 1
    bos: str = "first"
    counts: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def make(self, decoder: str | None = None, implementation: str = "sdpa", **options: Any) -> Any:
        """A model with wide random weights, so that attention is far from uniform."""
        torch.manual_seed(0)
        model = self.build(decoder or self.decoders[0], **{**self.options, **options})
        widen(model)
        eager_only = not all(part._supports_sdpa for part in model.modules() if isinstance(part, hf.PreTrainedModel))
        model.set_attn_implementation("eager" if eager_only else implementation)
        return model.float().eval()


def widen(model: Any, seed: int = 0) -> None:
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
    visual = [index for index, piece in enumerate(pieces) if not isinstance(piece, int)]
    opening = visual[-1] + 1 if visual and family.bos == "behind" else 0
    alone = {"alone": sum(isinstance(piece, tuple) for piece in pieces) == 1} if family.counts else {}
    for piece in [*pieces[:opening], None, *pieces[opening:]]:
        if piece is None:
            row.ids, row.types = [*row.ids, BOS], [*row.types, 0]
        elif isinstance(piece, int):
            row.ids += torch.randint(TEXT.start, TEXT.stop, (piece,), generator=generator).tolist()
            row.types += [0] * piece
        else:
            shown = family.show(model, piece, generator, **alone)
            own = {offset for picture in shown.pictures for offset in picture}
            row.pictures += [[len(row.ids) + offset for offset in picture] for picture in shown.pictures]
            row.types += [shown.kind if offset in own else 0 for offset in range(len(shown.ids))]
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
    return batch | (family.collate or join)(rows)


def join(rows: Sequence[Row]) -> dict[str, Tensor]:
    """The inputs of all pictures, one behind the other."""
    return _cat([shown.inputs for row in rows for shown in row.shown])


def pad_shapes(rows: Sequence[Row]) -> dict[str, Tensor]:
    """The same where pictures differ in tiles or pixels: zeros behind, up to the largest."""
    inputs = [dict(shown.inputs) for row in rows for shown in row.shown]
    for name in {name for each in inputs for name in each if name.startswith("pixel")}:
        given = [each for each in inputs if name in each]
        shape = [max(sizes) for sizes in zip(*(each[name].shape[1:] for each in given))]
        for each in given:
            missing = [wanted - has for wanted, has in zip(shape, each[name].shape[1:])]
            each[name] = nn.functional.pad(each[name], [n for size in reversed(missing) for n in (0, size)])
    return _cat(inputs)


def pad_rows(rows: Sequence[Row]) -> dict[str, Tensor]:
    """One line of tiles per row of the batch, zeros behind; nothing where no row has a picture."""
    tiles = [[tile for shown in row.shown for tile in shown.inputs["pixel_values"]] for row in rows]
    most = max(map(len, tiles))
    if not most:
        return {}
    blank = torch.zeros_like(next(tile for line in tiles for tile in line))
    pixels = torch.stack([torch.stack(line + [blank] * (most - len(line))) for line in tiles])
    mask = torch.tensor([[1] * len(line) + [0] * (most - len(line)) for line in tiles])
    mask = mask[..., None, None].expand(*mask.shape, *blank.shape[1:]).clone()
    return {"pixel_values": pixels, "pixel_attention_mask": mask}


def _cat(inputs: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    names = dict.fromkeys(name for each in inputs for name in each)
    return {name: torch.cat([each[name] for each in inputs if name in each]) for name in names}


COMMON = dict(
    vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=1024, bos_token_id=1, eos_token_id=None, pad_token_id=PAD,
    tie_word_embeddings=False,
)  # fmt: skip
_EXPERTS = {"num_experts_per_tok": 2, "intermediate_size": 24}
_WINDOW = {"sliding_window": 12}
_HALF = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
DECODERS: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (hf.LlamaConfig, {}),
    "mistral": (hf.MistralConfig, {"sliding_window": None}),
    "qwen2": (hf.Qwen2Config, {}),
    "qwen3": (hf.Qwen3Config, {"head_dim": 8}),
    "mistral_window": (hf.MistralConfig, _WINDOW),
    "qwen2_window": (hf.Qwen2Config, {**_WINDOW, "use_sliding_window": True, "max_window_layers": 3}),
    "cohere": (hf.CohereConfig, {"logit_scale": 1.0, "use_qk_norm": True}),
    "cohere2": (hf.Cohere2Config, {**_WINDOW, "logit_scale": 1.0}),
    "gemma": (hf.GemmaConfig, {"head_dim": 8}),
    "gemma2": (hf.Gemma2Config, {**_WINDOW, "head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0}),
    "glm": (hf.GlmConfig, {"head_dim": 8, "rope_parameters": _HALF}),
    "glm4": (hf.Glm4Config, {"head_dim": 8, "rope_parameters": _HALF}),
    "granite": (
        hf.GraniteConfig,
        {"attention_multiplier": 0.5, "residual_multiplier": 0.7, "embedding_multiplier": 1.5, "logits_scaling": 1.3},
    ),
    "olmo2": (hf.Olmo2Config, {}),
    "phi3": (hf.Phi3Config, {}),
    "smollm3": (hf.SmolLM3Config, {"no_rope_layer_interval": 3}),
    "stablelm": (hf.StableLmConfig, {"rope_parameters": _HALF, "use_qkv_bias": True, "qk_layernorm": True}),
    "starcoder2": (hf.Starcoder2Config, {}),
    "nemotron": (hf.NemotronConfig, {"rope_parameters": _HALF}),
    "olmoe": (hf.OlmoeConfig, {**_EXPERTS, "num_experts": 4}),
    "gpt_oss": (
        hf.GptOssConfig,
        {
            **_EXPERTS,
            **_WINDOW,
            "num_local_experts": 4,
            "head_dim": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
}
ANY = ("llama", "mistral", "qwen2", "qwen3")
EVERY = tuple(DECODERS)


def text_config(decoder: str, **options: Any) -> Any:
    kind, own = DECODERS[decoder]
    return kind(**{**COMMON, **own, **options})


# Vision towers
TOWER = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
NO_TIE = {"tie_word_embeddings": False}


def clip_tower() -> Any:
    return hf.CLIPVisionConfig(**TOWER, image_size=28, patch_size=7)


def siglip_tower(image_size: int = 28) -> Any:
    return hf.SiglipVisionConfig(**TOWER, image_size=image_size, patch_size=7, vision_use_head=False)


def draw(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)
