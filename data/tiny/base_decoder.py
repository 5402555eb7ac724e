"""The decoder of the embedded default: a small LLaMA that learns, from text alone, to look things up on a page."""

from __future__ import annotations

import math
from pathlib import Path

import forms
import numpy as np
import torch
import torch.nn.functional as F
from base_text import VOCABULARY, Text, TextPages, encode, next_ids
from base_training import HIDDEN, Log, descend, half_cosine, set_lr
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


def new_decoder(
    tokenizer: PreTrainedTokenizerBase, width: int = HIDDEN, inner: int = 384, tied: bool = False
) -> LlamaForCausalLM:
    """An untrained decoder of 4 layers. Its weights start at the scale 1/sqrt(inputs): with LLaMA's 0.02, right for
    wide models, nothing is learnt at this width. The scale stands in the config, so that a new projector starts with
    it too."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        initializer_range=width**-0.5,
        tie_word_embeddings=tied,
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


def save_decoder(decoder: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Writes decoder and tokenizer; generation ends at the line break behind an answer, or at ``</s>``."""
    decoder.generation_config.eos_token_id = [tokenizer.eos_token_id, *encode(tokenizer, "\n")]
    decoder.to(torch.bfloat16).save_pretrained(path)
    tokenizer.save_pretrained(path)
