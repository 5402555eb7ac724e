"""What the decoder of the embedded default is pretrained on: a tokenizer, and pages written as text."""

from __future__ import annotations

from dataclasses import dataclass

import forms
import numpy as np
import torch
from sklearn import datasets
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

VOCABULARY = 768
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


def next_ids(text: Text) -> Tensor:
    """The tokens behind ``text.targets``."""
    return text.ids[:, [target + 1 for target in text.targets]]
