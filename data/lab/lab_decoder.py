"""The laboratory's decoder: 16 layers that learn, from text alone, to follow a path of two hops at chosen depths."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import forms
import numpy as np
import torch
import torch.nn.functional as F
from base_text import encode
from base_training import Log, descend, half_cosine, set_lr
from lab_text import PathText, PathTexts
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

LAYERS, WIDTH, HEADS, HEAD_WIDTH = 16, 48, 4, 16

FIRST_HOP, SECOND_HOP = (4, 5), (8, 9)
"""Layers whose head 0 is taught to look from the end of a question at the tile that the hop reads."""

INK, FIELDS = (0, 1, 2), (3, 4, 5, 6, 7, 8)
"""Layers whose last head is taught to look from there at everything written, and at everything written in fields."""

PAPER = {4: 0.5, 8: 0.25, 12: 0.125}
"""Layer -> share of the page's words that stay from there on: the paper's schedule at 16 layers."""


def new_decoder(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """An untrained decoder. Heads are 16 wide, and rotary angles fall off so fast (theta 1e8) that five of their eight
    pairs hardly turn within a page: with these a head compares contents wherever the two words stand."""
    decoder = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=80,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            head_dim=HEAD_WIDTH,
            max_position_embeddings=2048,
            initializer_range=WIDTH**-0.5,
            rope_parameters={"rope_type": "default", "rope_theta": 1e8},
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    for name, parameter in decoder.named_parameters():
        if "embed_tokens" in name:
            nn.init.normal_(parameter, std=0.5)
        elif parameter.ndim == 2:  # layers begin by adding little: there are many of them
            scale = 0.5 if "o_proj" in name or "down_proj" in name else 1.0
            nn.init.normal_(parameter, std=scale * parameter.shape[1] ** -0.5)
    return decoder


@dataclass(frozen=True)
class Reading:
    """What `read` saw, for B texts of V words with Q questions.

    ``logits`` (B, 2 Q, vocabulary) at ``text.targets``; ``looks`` per layer (B, heads, Q, V) log attention from the
    ends of the questions to the page; ``beside`` (B, V - 1, 1) log attention of head 0 of layer 0 from every word but
    the first to the one before it; ``hidden`` per layer (B, N, D), its output.
    """

    logits: Tensor
    looks: list[Tensor]
    beside: Tensor
    hidden: list[Tensor]


def read(
    decoder: LlamaForCausalLM, text: PathText, noise: float = 0.0, drop: dict[int, float] | None = None,
    by_chance: bool = False,
) -> Reading:  # fmt: skip
    """Runs the decoder, keeping the attention.

    Args:
        noise: largest standard deviation of the noise on the page's embeddings, drawn per text.
        drop: layer -> share of the page's words that stay from there on, by the attention of the question's last token
            in that layer (one question only), or ``by_chance``.
    """
    x_BND = decoder.model.embed_tokens(text.ids)
    (texts, length), words = text.ids.shape, text.words.shape[1]
    if noise:
        spread_BVD = noise * torch.rand(texts, 1, 1) * torch.randn(texts, words, WIDTH)
        x_BND = x_BND + F.pad(spread_BVD, (0, 0, 1, length - words - 1))
    places = torch.arange(length)
    angles = decoder.model.rotary_emb(x_BND, places[None])
    alive_BN = torch.ones(texts, length, dtype=torch.bool)
    looks, hidden, beside = [], [], x_BND.new_zeros(())
    for number, layer in enumerate(decoder.model.layers):
        attention, normed_BND = layer.self_attn, layer.input_layernorm(x_BND)
        query, key, value = (
            project(normed_BND).unflatten(-1, (HEADS, HEAD_WIDTH)).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *angles)

        def log_attention(rows: Tensor, heads: slice, query: Tensor = query, key: Tensor = key) -> Tensor:
            score = query[:, heads, rows] @ key[:, heads].transpose(-1, -2) * HEAD_WIDTH**-0.5
            hidden_BHQN = (places > rows[:, None])[None, None] | ~alive_BN[:, None, None]
            return score.masked_fill(hidden_BHQN, -1e9).log_softmax(-1)

        looks.append(log_attention(torch.tensor(text.queries), slice(None))[..., 1 : 1 + words])
        if number == 0:
            rows = places[2 : 1 + words]
            beside = log_attention(rows, slice(1))[:, 0].gather(-1, (rows - 1)[None, :, None].expand(texts, -1, 1))
        if drop and number in drop:
            score_BV = looks[-1].exp().mean((1, 2))
            score_BV = torch.rand_like(score_BV) if by_chance else score_BV
            score_BV = score_BV.masked_fill(~alive_BN[:, 1 : 1 + words], -1)
            kept_BK = score_BV.topk(int(words * drop[number])).indices
            alive_BN[:, 1 : 1 + words] = torch.zeros_like(score_BV, dtype=torch.bool).scatter(1, kept_BK, True)
        if drop:  # a word that is gone looks at itself only, and nobody looks at it
            mask = (places <= places[:, None]) & (alive_BN[:, None, None] | torch.eye(length, dtype=torch.bool))
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        else:
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x_BND = x_BND + attention.o_proj(mixed.transpose(1, 2).flatten(2))
        x_BND = x_BND + layer.mlp(layer.post_attention_layernorm(x_BND))
        hidden.append(x_BND)
    return Reading(decoder.lm_head(decoder.model.norm(x_BND[:, text.targets])), looks, beside, hidden)


class Teacher(nn.Module):
    """The loss: right answers, and at which depth what is to be known and looked at. Its two linear probes are thrown
    away later."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.middle = (nn.Linear(WIDTH, len(forms.WORDS)) for _ in range(2))

    def forward(self, text: PathText, reading: Reading) -> dict[str, Tensor]:
        """The parts of the loss, all of them means; `WEIGHTS` says how much each counts."""
        words_BV, looks = text.words, reading.looks
        letter_BV = (words_BV >= forms.FIRST_LETTER) & (words_BV < forms.MARK)
        digit_BV = (words_BV >= forms.FIRST_DIGIT) & (words_BV < forms.FIRST_LETTER)
        beside_letter_BV = F.pad(letter_BV[:, :-1], (1, 0))
        hops = [(layer, text.firsts) for layer in FIRST_HOP] + [(layer, text.seconds) for layer in SECOND_HOP]
        wide = [(layer, letter_BV | digit_BV) for layer in INK]
        wide += [(layer, letter_BV | digit_BV & beside_letter_BV) for layer in FIELDS]
        left_BVW = self.left(reading.hidden[0][:, 2 : 1 + words_BV.shape[1]])
        middle_BQW = self.middle(reading.hidden[FIRST_HOP[-1]][:, text.queries])
        return {
            "answers": F.cross_entropy(reading.logits.flatten(0, 1), text.next_ids.flatten()),
            "beside": -reading.beside.mean(),
            "left": F.cross_entropy(left_BVW.flatten(0, 1), words_BV[:, :-1].flatten()),
            "middle": F.cross_entropy(middle_BQW.flatten(0, 1), text.middles.flatten()),
            "hops": torch.stack([-looks[layer][:, 0].gather(2, at[..., None]).mean() for layer, at in hops]).mean(),
            "wide": torch.stack([-_mean_over(looks[layer][:, -1], at) for layer, at in wide]).mean(),
        }


WEIGHTS = {"answers": 2.0, "beside": 0.3, "left": 0.5, "middle": 0.5, "hops": 1.2, "wide": 0.2}


def _mean_over(looks_BQV: Tensor, tiles_BV: Tensor) -> Tensor:
    share_BV = tiles_BV / tiles_BV.sum(-1, keepdim=True)
    return (looks_BQV * share_BV[:, None]).sum(-1).mean()


def train_decoder(
    tokenizer: PreTrainedTokenizerBase, seed: int, log: Log, steps: int = 480, lr: float = 2e-3
) -> LlamaForCausalLM:
    """Teaches a decoder to follow paths on pages of text: half of the time on 8 x 8 tiles with 3 to 5 keys, then on
    12 x 12 tiles with 12 keys, with noise on their words."""
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 40])
    texts = PathTexts(tokenizer, rng)
    decoder, teacher = new_decoder(tokenizer), Teacher()
    parameters = [*decoder.parameters(), *teacher.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.02)
    for step in range(steps):
        done, short = step / steps, bool(rng.random() < 0.6)
        set_lr(optimizer, lr * min(1, (step + 1) / 30) * (half_cosine((done - 0.6) / 0.4) if done > 0.6 else 1))
        if done < 0.5:
            pairs = int(3 + 6 * done)
            text = texts.draw(16, 8, pairs, done, pairs, short)
        else:
            text = texts.draw(16, 12, 12, float(rng.uniform(0.2, 0.6)), 8, short)
        reading = read(decoder, text, noise=0.1 + 0.3 * min(1, 2 * done))
        parts = teacher(text, reading)
        descend(optimizer, parameters, torch.stack([WEIGHTS[name] * part for name, part in parts.items()]).sum())
        if step % 40 == 0 or step == steps - 1:
            log(f"decoder step {step}: " + ", ".join(f"{name} {part.item():.3f}" for name, part in parts.items()))
    return decoder


@torch.no_grad()
def test_decoder(decoder: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, log: Log) -> None:
    """Logs how many of 240 questions are answered on full pages of text, and after dropping words of the page: by the
    paper's schedule, and once before each layer."""

    def rate(drop: dict[int, float] | None = None, by_chance: bool = False) -> float:
        torch.manual_seed(0)
        texts, right = PathTexts(tokenizer, np.random.default_rng(7)), []
        for _ in range(6):
            text = texts.draw(40, 12, 12, 0.5, 1)
            logits = read(decoder, text, 0.0, drop, by_chance).logits[:, :1]
            right.append((logits.argmax(-1) == text.answers).float().mean())
        return torch.stack(right).mean().item()

    log(f"decoder, text of 144 words: {rate():.1%} right; paper's schedule: by attention {rate(PAPER):.1%}, "
        f"at random {rate(PAPER, True):.1%}")  # fmt: skip
    for layer in (0, 2, 4, 6, 8, 10):
        found = [f"{share}: {rate({layer: share}):.1%}, {rate({layer: share}, True):.1%}" for share in (0.5, 0.25)]
        log(f"decoder, words dropped once before layer {layer}, by attention and at random, " + "; ".join(found))


def save_decoder(decoder: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Writes decoder and tokenizer; generation ends at the line break behind an answer, or at ``</s>``."""
    decoder.generation_config.eos_token_id = [tokenizer.eos_token_id, *encode(tokenizer, "\n")]
    decoder.to(torch.bfloat16).save_pretrained(path)
    tokenizer.save_pretrained(path)
