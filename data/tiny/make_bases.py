"""Makes the pretrained bases of the embedded default: decoder, vision tower, projector (README.md beside this file).

LLaVA starts from CLIP and Vicuna; this miniature starts from ``tower/`` and ``language_model/``: a decoder pretrained
on text alone and a tower pretrained on pictures alone. ``projector/`` joins them roughly, tile by tile, as CLIP's own
alignment with text would; stage 1 trains it through the decoder.

    python data/tiny/make_bases.py [--out data/tiny] [--seed 0] [--threads 2]

Everything is drawn from ``--seed``. Progress goes to the terminal and to ``bases.log`` in the output directory.
"""

from __future__ import annotations

import argparse
import math
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from sklearn import datasets
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "prepare"))
import forms

HERE = Path(__file__).resolve().parent
VOCABULARY = 768
HIDDEN = 128
IMAGE_MEAN, IMAGE_STD = 0.85, 0.2
"""Brightness of the pages and its spread, the same for all colours."""

SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("red", "green", "blue", "black", "gray", "teal", "brown", "yellow")
SHAPE_TEXTS = (
    "what is the {} shape? {}",
    "what color is the {}? {}",
    "what is the color of the {}? {}",
    "is there a {} shape in the image? {}",
    "is there not a {} in the image? {}",
    "does the image contain a {}? {}",
    "does the image not contain a {} shape? {}",
    "is a {} shape present? {}",
    "is no {} present? {}",
    "what shape is in the image? {} {}",
)


class Log:
    """Prints lines with the CPU time used so far and keeps them in a file."""

    def __init__(self, path: Path, append: bool) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("a" if append else "w", encoding="utf-8")

    def __call__(self, text: str) -> None:
        line = f"[{time.process_time():6.1f} s cpu] {text}"
        print(line, flush=True)
        print(line, file=self.file, flush=True)


# Tokenizer


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (any text can be written with it) that knows the words of both data sets as one token
    each. Its ordinary English comes from the descriptions of scikit-learn's data sets."""
    words = " " + " ".join((*forms.WORDS, *forms.LETTERS, *forms.LETTERS))
    questions = [f"{text.format(letter)} {digit}" for text in (forms.QUESTION, forms.SHORT_QUESTION)
                 for letter in forms.LETTERS for digit in range(10)]  # fmt: skip
    shapes = [text.format(word, answer) for text in SHAPE_TEXTS for word in (*SHAPES, *COLORS)
              for answer in ("yes", "no", *SHAPES, *COLORS)]  # fmt: skip
    loaders = (
        datasets.load_iris,
        datasets.load_wine,
        datasets.load_digits,
        datasets.load_diabetes,
        datasets.load_linnerud,
    )
    english = [loader().DESCR for loader in loaders]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<pad>", "<s>", "</s>", "<image>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([words] * 2000 + questions + shapes + english, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    for word in (*forms.WORDS, *SHAPES, *COLORS, "yes", "no"):
        if len(encode(fast, f" {word}")) != 1:
            raise RuntimeError(f"the tokenizer splits {word!r}; give it more weight in the training text")
    return fast


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids without ``<s>``."""
    return tokenizer.encode(text, add_special_tokens=False)


# Vision tower


def new_tower() -> CLIPVisionModel:
    """An untrained tower. LLaVA reads the last hidden layer but one, so the last layer is dead weight kept for form.

    Position embeddings are zero and stay so: a tile looks the same wherever it lies, and the table can be resized to
    any number of tiles. Attention starts as doing nothing, because neighbours do not help to read a tile.
    """
    tower = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=HIDDEN,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=4,
            patch_size=forms.TILE,
            image_size=16 * forms.TILE,
            projection_dim=HIDDEN,
        )
    )
    for name, parameter in tower.named_parameters():
        if "position_embedding" in name:
            nn.init.zeros_(parameter).requires_grad_(False)
        elif "patch_embedding" in name:
            nn.init.normal_(parameter, std=(3 * forms.TILE**2) ** -0.5)
        elif parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.0 if "out_proj" in name else parameter.shape[1] ** -0.5)
    return tower


def tile_features(tower: CLIPVisionModel, pixels: Tensor) -> Tensor:
    """(pictures, 3, height, width) -> (pictures, tiles, HIDDEN): what LLaVA takes from a tower."""
    return tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]


def tower_batch(
    rng: np.random.Generator, split: str, pages: int, clutter: float | None = None
) -> tuple[Tensor, Tensor]:
    """Pixels (pages, 3, 192, 192) and words (pages, 256) of random pages, dense unless ``clutter`` is given."""
    plans = [forms.plan_page(rng, 16, split, clutter=clutter or float(rng.uniform(0.4, 1))) for _ in range(pages)]
    pictures = np.stack([forms.draw_page(plan, rng) for plan in plans])
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    return (pixels - IMAGE_MEAN) / IMAGE_STD, torch.from_numpy(np.stack([plan.words for plan in plans]))


def train_tower(seed: int, log: Log, steps: int = 800, pages: int = 4, lr: float = 1e-3) -> CLIPVisionModel:
    """Teaches a tower to name what each tile shows, with a linear head that is thrown away. Training scans only."""
    torch.manual_seed(seed)
    rng, eval_rng = np.random.default_rng([seed, 10]), np.random.default_rng([seed, 11])
    tower, head = new_tower(), nn.Linear(HIDDEN, len(forms.WORDS))
    parameters = [p for p in (*tower.parameters(), *head.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
    for step in range(steps):
        set_lr(optimizer, lr * min(1, (step + 1) / 50) * half_cosine(step / steps))
        pixels, words = tower_batch(rng, "train", pages)
        loss = F.cross_entropy(head(tile_features(tower, pixels)).flatten(0, 1), words.flatten())
        descend(optimizer, parameters, loss)
        if step % 100 == 0:
            log(f"tower step {step}: loss {loss.item():.4f}")
    with torch.no_grad():
        pixels, words = tower_batch(eval_rng, "eval", 40, clutter=0.5)
        right = torch.cat([head(tile_features(tower, part)).argmax(-1) for part in pixels.split(10)]) == words
    for name, first, last in (("digit", forms.FIRST_DIGIT, forms.FIRST_LETTER - 1),
                              ("letter", forms.FIRST_LETTER, forms.MARK - 1), ("tile", 0, forms.MARK)):  # fmt: skip
        here = (words >= first) & (words <= last)
        log(f"tower: {right[here].float().mean():.1%} of {int(here.sum())} held-out {name}s named correctly")
    return tower


def train_projector(
    tower: CLIPVisionModel, words_VD: Tensor, seed: int, log: Log, steps: int = 200, lr: float = 3e-3
) -> LlavaMultiModalProjector:
    """Maps what the tower says of a tile to the decoder's embedding of its word, ``words_VD`` (words, HIDDEN).

    This stands in for CLIP's alignment with text, and stops early: the rest is for stage 1 to learn. No page is read
    and no question answered here, because the decoder does not take part, only its embedding table.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 30])
    projector = LlavaMultiModalProjector(
        LlavaConfig(
            vision_config=tower.config, text_config=LlamaConfig(hidden_size=HIDDEN), projector_hidden_act="gelu"
        )
    )
    for layer in (projector.linear_1, projector.linear_2):
        nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        nn.init.zeros_(layer.bias)
    parameters = list(projector.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.02)
    scale = words_VD.square().mean()
    for step in range(steps):
        set_lr(optimizer, lr * half_cosine(step / steps))
        pixels, words = tower_batch(rng, "train", 2)
        with torch.no_grad():
            features = tile_features(tower, pixels)
        projected = projector(features).flatten(0, 1)
        error = F.mse_loss(projected, words_VD[words.flatten()]) / scale
        descend(optimizer, parameters, error + 0.1 * F.cross_entropy(projected @ words_VD.T, words.flatten()))
        if step % 50 == 0 or step == steps - 1:
            log(f"projector step {step}: {error.item():.3f} of the embeddings' variance unexplained")
    return projector


def save_projector(projector: LlavaMultiModalProjector, path: Path) -> None:
    """Writes the projector under the names it has inside a LLaVA."""
    path.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"model.multi_modal_projector.{name}": tensor.to(torch.bfloat16).contiguous()
        for name, tensor in projector.state_dict().items()
    }
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def save_tower(tower: CLIPVisionModel, path: Path) -> None:
    """Writes the tower and an image processor for square pictures."""
    size = tower.config.image_size
    tower.to(torch.bfloat16).save_pretrained(path)
    CLIPImageProcessorPil(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=[IMAGE_MEAN] * 3,
        image_std=[IMAGE_STD] * 3,
    ).save_pretrained(path)


# Decoder


@dataclass(frozen=True)
class Text:
    """A batch of pages written as text, each followed by questions and answers, all of one length.

    ``ids`` (B, N); ``page`` the span of the page's words; ``queries`` positions of the letters that end a question (the
    answer is the next token); ``targets`` positions whose next token is learnt: the answer and the line break after it.
    """

    ids: Tensor
    page: tuple[int, int]
    queries: list[int]
    targets: list[int]


class TextPages:
    """Draws `Text`: the same pages as the pictures show, every tile being one word."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rng: np.random.Generator) -> None:
        self.tokenizer, self.rng = tokenizer, rng
        self.word_ids = torch.tensor([encode(tokenizer, f" {word}")[0] for word in forms.WORDS])
        (self.newline,) = encode(tokenizer, "\n")

    def draw(
        self, texts: int, grid: int, fields: int, clutter: float, question: str, turns: int, split: str = "train"
    ) -> Text:
        """``<s>`` page, line break, then ``turns`` times question, answer, line break."""
        rows, queries, targets = [], [], []
        for _ in range(texts):
            page = forms.plan_page(self.rng, grid, split, fields, clutter)
            ids = [self.tokenizer.bos_token_id, *self.word_ids[page.words].tolist(), self.newline]
            queries, targets = [], []
            for letter in self.rng.permutation(sorted(page.fields))[:turns].tolist():
                ids += encode(self.tokenizer, question.format(letter))
                queries.append(len(ids) - 1)
                targets += [len(ids) - 1, len(ids)]
                ids += [int(self.word_ids[forms.FIRST_DIGIT + int(page.fields[letter])]), self.newline]
            rows.append(ids)
        return Text(torch.tensor(rows), (1, 1 + grid * grid), queries, targets)


def new_decoder(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """An untrained decoder. Its weights start at the scale 1/sqrt(inputs): with LLaMA's 0.02, right for wide models,
    nothing is learnt at this width. The scale stands in the config, so that a new projector starts with it too."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        initializer_range=HIDDEN**-0.5,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    decoder = LlamaForCausalLM(config)
    for name, parameter in decoder.named_parameters():
        if "embed_tokens" in name:
            nn.init.normal_(parameter, std=0.5)
        elif parameter.ndim == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return decoder


def read(
    decoder: LlamaForCausalLM, text: Text, alpha: float = 0.0, noise: float = 0.0, drop: str | None = None
) -> tuple[Tensor, Tensor]:
    """Logits (B, targets, vocabulary) at ``text.targets`` and the page's hidden states (B, V, D) after layer 0.

    Args:
        alpha: every word of the page also carries its left neighbour, times alpha.
        noise: largest standard deviation of the noise on the page's embeddings, drawn per text.
        drop: drop page words before layers 1, 2, 3, keeping 1/2, 1/4, 1/8: ``attention`` (PyramidDrop) or ``random``.
    """
    x_BND = decoder.model.embed_tokens(text.ids)
    start, stop = text.page
    page_BVD = x_BND[:, start:stop]
    if noise:
        page_BVD = page_BVD + noise * torch.rand(len(x_BND), 1, 1) * torch.randn_like(page_BVD)
    if alpha:
        page_BVD = torch.cat([page_BVD[:, :1], page_BVD[:, 1:] + alpha * page_BVD[:, :-1]], 1)
    x_BND = torch.cat([x_BND[:, :start], page_BVD, x_BND[:, stop:]], 1)
    length, words = x_BND.shape[1], stop - start
    first_BVD = page_BVD
    for number, layer in enumerate(decoder.model.layers):
        if drop and number:
            gone = length - x_BND.shape[1]
            x_BND = drop_words(
                decoder, number, x_BND, [q - gone for q in text.queries], start, stop - gone, words, drop
            )
        places = torch.arange(x_BND.shape[1])[None]
        x_BND = layer(x_BND, attention_mask=None, position_embeddings=decoder.model.rotary_emb(x_BND, places))
        if number == 0:
            first_BVD = x_BND[:, start:stop]
    gone = length - x_BND.shape[1]
    at = [target - gone for target in text.targets]
    return decoder.lm_head(decoder.model.norm(x_BND[:, at])), first_BVD


@torch.no_grad()
def drop_words(
    decoder: LlamaForCausalLM,
    number: int,
    x_BND: Tensor,
    queries: list[int],
    start: int,
    stop: int,
    words: int,
    how: str,
) -> Tensor:
    """The drop before layer ``number`` on texts of one length (the framework has the general one)."""
    if how == "random":
        score_BV = torch.rand(len(x_BND), stop - start)
    else:
        layer, length = decoder.model.layers[number], x_BND.shape[1]
        normed = layer.input_layernorm(x_BND)
        cos, sin = decoder.model.rotary_emb(x_BND, torch.arange(length)[None])
        query = layer.self_attn.q_proj(normed).unflatten(-1, (-1, layer.self_attn.head_dim)).transpose(1, 2)
        key = layer.self_attn.k_proj(normed).unflatten(-1, (-1, layer.self_attn.head_dim)).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        weight_BHQN = query[:, :, queries] @ key.transpose(-1, -2) * layer.self_attn.scaling
        future_QN = torch.arange(length) > torch.tensor(queries)[:, None]
        score_BV = weight_BHQN.masked_fill(future_QN, -math.inf).softmax(-1).mean((1, 2))[:, start:stop]
    keep_BK = score_BV.topk(words >> number).indices.sort().values + start
    before = torch.arange(start).expand(len(x_BND), -1)
    behind = torch.arange(stop, x_BND.shape[1]).expand(len(x_BND), -1)
    index = torch.cat([before, keep_BK, behind], 1)[..., None].expand(-1, -1, x_BND.shape[2])
    return x_BND.gather(1, index)


def train_decoder(
    tokenizer: PreTrainedTokenizerBase, seed: int, log: Log, full_steps: int = 200, lr: float = 1.5e-3
) -> LlamaForCausalLM:
    """Teaches a decoder to look things up on pages of text.

    Looking up takes two hops: the digit learns which letter stands to its left, then the question's letter finds that
    digit. Learnt at once from nothing they stay at chance for many minutes, so there are four lessons:

    1. ``beside``: every word carries its left neighbour, which leaves one hop; 2 to 8 fields on 8 x 8 tiles;
    2. ``fading``: that help fades out while the answers stay right;
    3. ``alone``: without it, up to 16 fields and more clutter;
    4. ``full``: pages as large and as full as those of the pictures and larger, with more noise on their words.

    In lessons 1 to 3 a linear probe, thrown away later, reads the left neighbour from the output of layer 0.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 20])
    pages = TextPages(tokenizer, rng)
    decoder, probe = new_decoder(tokenizer), nn.Linear(HIDDEN, len(forms.WORDS))
    parameters = [*decoder.parameters(), *probe.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.02)
    word_of = torch.zeros(VOCABULARY, dtype=torch.int64)
    word_of[pages.word_ids] = torch.arange(len(forms.WORDS))
    lesson, alpha, average, step, begun = "beside", 1.0, 2.5, 0, 0
    while lesson != "full" or step - begun < full_steps:
        short = rng.random() < (0.5 if lesson == "full" else 0.7)
        texts, grid, clutter, fields, rate = 16, 8, 0.25, 8, lr * min(1, (step + 1) / 30)
        if lesson == "beside":
            fields, clutter = int(min(8, 2 + step / 25)), 0.25 * (step >= 50)
        elif lesson == "alone":
            fields, clutter = min(16, 8 + (step - begun) // 6), 0.5
        elif lesson == "full":
            done = step - begun
            texts, grid = (4, 24) if done % 20 == 19 else (8, int(rng.choice([11, 13, 16, 16])))
            fields, clutter, rate = (
                int(rng.integers(16, 27)),
                float(rng.uniform(0, 0.6)),
                lr * half_cosine(done / full_steps),
            )
        set_lr(optimizer, rate)
        question, turns = (forms.SHORT_QUESTION, fields) if short else (forms.QUESTION, min(8, fields))
        text = pages.draw(texts, grid, fields, clutter, question, turns)
        logits, first = read(decoder, text, alpha, noise=0.2 if lesson == "full" else 0.1)
        losses = F.cross_entropy(logits.flatten(0, 1), next_ids(text).flatten(), reduction="none").view(texts, -1)
        loss, answer_loss = losses.mean(), losses[:, ::2].mean().item()
        if lesson != "full":
            start, stop = text.page
            left = word_of[text.ids[:, start : stop - 1]]
            loss = loss + 0.5 * F.cross_entropy(probe(first[:, 1:]).flatten(0, 1), left.flatten())
        descend(optimizer, parameters, loss)
        average = 0.95 * average + 0.05 * answer_loss
        if step % 50 == 0:
            log(f"decoder step {step} ({lesson}): alpha {alpha:.2f}, loss of the answers {average:.3f}")
        step += 1
        if lesson == "beside" and step > 150 and average < 0.6:
            lesson = "fading"
        elif lesson == "fading" and average < 0.8:
            alpha = alpha * 0.97 if alpha > 0.02 else 0.0
            if not alpha:
                lesson, begun = "alone", step
        elif lesson == "alone" and step - begun == 60:
            lesson, begun = "full", step
        if step > 3000:
            raise RuntimeError(f"seed {seed} does not learn (lesson {lesson!r} after {step} steps); take another one")
    return decoder


@torch.no_grad()
def test_decoder(
    decoder: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, log: Log, grids: tuple[int, ...]
) -> None:
    """Logs how many questions are answered on full pages of text, and after dropping words of the page."""
    for grid in grids:
        rates = []
        for how in (None, "attention", "random"):
            torch.manual_seed(0)
            pages = TextPages(tokenizer, np.random.default_rng(7))
            right = [_right(decoder, pages.draw(32, grid, 26, 0.5, forms.QUESTION, 1), how) for _ in range(8)]
            rates.append(sum(right) / len(right))
        whole, pyramid, chance = rates
        log(f"decoder, text of {grid * grid} words: {whole:.1%} right, dropping by attention {pyramid:.1%}, "
            f"at random {chance:.1%}")  # fmt: skip


def _right(decoder: LlamaForCausalLM, text: Text, how: str | None) -> float:
    logits, _ = read(decoder, text, drop=how)
    return (logits.argmax(-1) == next_ids(text))[:, ::2].float().mean().item()


def next_ids(text: Text) -> Tensor:
    """The tokens behind ``text.targets``."""
    return text.ids[:, [target + 1 for target in text.targets]]


def save_decoder(decoder: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Writes decoder and tokenizer; generation ends at the line break behind an answer, or at ``</s>``."""
    decoder.generation_config.eos_token_id = [tokenizer.eos_token_id, *encode(tokenizer, "\n")]
    decoder.to(torch.bfloat16).save_pretrained(path)
    tokenizer.save_pretrained(path)


# Optimisation


def half_cosine(done: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * done))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def descend(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def main(arguments: list[str] | None = None) -> None:
    """Command line: see the top of the file."""
    parser = argparse.ArgumentParser(description="Makes the pretrained bases of the embedded default.")
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="more are faster, but round differently")
    parser.add_argument("--keep-decoder", action="store_true", help="use the decoder in --out, remake the rest")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    log = Log(args.out / "bases.log", append=args.keep_decoder)
    log(
        f"seed {args.seed}, {args.threads} threads, Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )
    if args.keep_decoder:
        decoder = LlamaForCausalLM.from_pretrained(args.out / "language_model", dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(args.out / "language_model")
    else:
        tokenizer = make_tokenizer()
        log(f"tokenizer: {len(tokenizer)} tokens")
        decoder = train_decoder(tokenizer, args.seed, log)
        test_decoder(decoder, tokenizer, log, grids=(12, 16, 24))
        save_decoder(decoder, tokenizer, args.out / "language_model")
    tower = train_tower(args.seed, log)
    words_VD = decoder.model.embed_tokens.weight.detach().float()[
        TextPages(tokenizer, np.random.default_rng()).word_ids
    ]
    projector = train_projector(tower, words_VD, args.seed, log)
    save_tower(tower, args.out / "tower")
    save_projector(projector, args.out / "projector")
    for name, model in (("decoder", decoder), ("tower", tower), ("projector", projector)):
        size = sum(parameter.numel() for parameter in model.parameters())
        log(f"{name}: {size / 1e6:.2f} M parameters, {2 * size / 1e6:.2f} MB in bfloat16")


if __name__ == "__main__":
    main()
