"""The decoder of the easy-vqa runs: a small LLaMA that learns, from text alone, to answer about described pictures."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from base_decoder import new_decoder
from base_training import Log, descend, half_cosine, set_lr
from easy_vqa_text import KINDS, Described, DescribedPictures
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

WIDTH, INNER = 64, 160


def read(decoder: LlamaForCausalLM, text: Described, noise: float = 0.0) -> Tensor:
    """Logits (B, 2 Q, vocabulary) at ``text.targets``.

    Args:
        noise: largest standard deviation of the noise on the embeddings of a picture, drawn per text.
    """
    embed = decoder.model.embed_tokens
    x_BND = embed(text.ids)
    stop = 1 + text.shown.shape[1]
    picture_BVD = torch.where(text.shown[..., None], embed(text.words).sum(1, keepdim=True), x_BND[:, 1:stop])
    if noise:
        picture_BVD = picture_BVD + noise * torch.rand(len(x_BND), 1, 1) * torch.randn_like(picture_BVD)
    x_BND = torch.cat([x_BND[:, :1], picture_BVD, x_BND[:, stop:]], 1)
    h_BND = decoder.model(inputs_embeds=x_BND, use_cache=False).last_hidden_state
    return decoder.lm_head(h_BND.gather(1, text.targets[..., None].expand(-1, -1, h_BND.shape[-1])))


def train_decoder(
    tokenizer: PreTrainedTokenizerBase, forms: list[str], seed: int, log: Log, steps: int = 800, lr: float = 3e-3
) -> LlamaForCausalLM:
    """Teaches a decoder to answer questions of these forms, in three lessons:

    1. ``affirmed``, 0.3 of the steps: no question has "no" or "not", so that a yes says that the word is there;
    2. ``negated``, to 0.85: all questions;
    3. ``full``: pictures of 144 places, as many as there will be image tokens.

    Comparison and negation together from the first step on stay at chance for 300 steps, and take 600 to be learnt.
    """
    torch.manual_seed(seed)
    pictures = DescribedPictures(tokenizer, forms, np.random.default_rng([seed, 60]))
    decoder = new_decoder(tokenizer, WIDTH, INNER, tied=True)
    parameters = list(decoder.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.02)
    for step in range(steps):
        done = step / steps
        set_lr(optimizer, lr * min(1, (step + 1) / 30) * (half_cosine((done - 0.6) / 0.4) if done > 0.6 else 1))
        places = 144 if done >= 0.85 else 24
        text = pictures.draw(64 if places == 24 else 16, places, turns=3, negation=done >= 0.3)
        logits = read(decoder, text, noise=0.4)
        loss = F.cross_entropy(logits.flatten(0, 1), text.next_ids.flatten())
        descend(optimizer, parameters, loss)
        if step % 50 == 0 or step == steps - 1:
            log(f"decoder step {step}: loss {loss.item():.3f}, right: {_rates(logits, text)}")
    return decoder


@torch.no_grad()
def test_decoder(decoder: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, forms: list[str], log: Log) -> None:
    """Logs how many of 500 questions are answered, one about each picture of 144 places, without noise."""
    text = DescribedPictures(tokenizer, forms, np.random.default_rng(7)).draw(500, 144, turns=1)
    log(f"decoder, described pictures of 144 places, right: {_rates(read(decoder, text), text)}")


def _rates(logits: Tensor, text: Described) -> str:
    right = (logits.argmax(-1) == text.next_ids)[:, ::2]
    those = [(kind, right[text.kinds == number]) for number, kind in enumerate(KINDS)]
    return ", ".join(f"{kind} {float(part.float().mean()):.1%}" for kind, part in those)
