"""Who answers questions: a LLaVA of ours by its conversation template or its own chat template, or any other family
that `attach` knows by its own processor. All a question needs is prepared here; `answering.py` generates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from jinja2 import TemplateError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llava_pdrop.checkpoint.build import ModelParts
from llava_pdrop.checkpoint.ends import ids_of
from llava_pdrop.checkpoint.hf_files import reading
from llava_pdrop.checkpoint.lora import is_lora
from llava_pdrop.data.conversation import Piece, Template
from llava_pdrop.data.images import image_size, load_image, preprocess
from llava_pdrop.data.labels import encode_pieces, expand_slots, refuse_halves
from llava_pdrop.data.marks import end_ids
from llava_pdrop.data.tokens import Encoder
from llava_pdrop.errors import UserError, clip, first_line
from llava_pdrop.eval.questions import Question, ask
from llava_pdrop.eval.sharing import shared_features
from llava_pdrop.schedule import Schedule
from llava_pdrop.types import IMAGE_MARKER, ImageInput, Sample

PIXELS_PER_TOKEN = 28 * 28
"""Where only a processor knows a picture's tokens: enough to tell long prompts from short ones."""


class Respondent(Protocol):
    """A model with all that is needed to ask it."""

    @property
    def hf(self) -> Any:
        """The Hugging Face model."""

    @property
    def tokenizer(self) -> Any:
        """Of its text."""

    @property
    def schedule(self) -> Schedule | None:
        """The one in its checkpoint, if any."""

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer."""

    @property
    def ends(self) -> list[int]:
        """Tokens that end an answer."""

    def length(self, question: Question) -> int:
        """About the tokens of its prompt (what a picture's marker takes aside): prompts of one length share a batch.

        Raises:
            UserError: a picture cannot be read.
        """

    def text(self, question: Question) -> str:
        """The prompt, with a marker in the place of every picture."""

    def prepare(self, question: Question) -> Any:
        """The prompt with its pictures.

        Raises:
            UserError: a picture cannot be read, or the question cannot be put in this format.
        """

    def inputs(self, prepared: Sequence[Any], schedule: Schedule) -> tuple[dict[str, Tensor], list[list[int]]]:
        """What ``generate`` is given, padded on the left, and of every picture of every question the tokens that enter
        the decoder under ``schedule``."""

    def sharing(self, prepared: Sequence[Any]) -> AbstractContextManager[None]:
        """In its block pictures that several of the questions show are encoded once."""


@dataclass(frozen=True)
class LlavaRespondent:
    """A LLaVA that is asked as it was trained.

    ``template``: its conversation format; None: the chat template of its tokenizer.
    """

    parts: ModelParts
    template: Template | None

    @property
    def hf(self) -> Any:
        return self.parts.hf

    @property
    def tokenizer(self) -> Any:
        return self.parts.tokenizer

    @property
    def schedule(self) -> Schedule | None:
        return self.parts.schedule

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.template.stop,) if self.template else ()

    @cached_property
    def ends(self) -> list[int]:
        own = end_ids(self.template, self.tokenizer) if self.template else []
        return _ends(self.hf, self.tokenizer, own)

    def length(self, question: Question) -> int:
        geometry, shown = self.parts.geometry, question.record.images
        words = _words(self.tokenizer, question, self.text(question))
        if geometry.aspect != "anyres":
            return words + len(shown) * geometry.num_tokens((1, 1))
        return words + sum(geometry.num_tokens(image_size(picture)) for picture in shown)

    def text(self, question: Question) -> str:
        if self.template is None:
            return _rendered(self.tokenizer, question, IMAGE_MARKER)
        template = self.template.with_system(question.record.system)
        return "".join(p.text for p in template.generation_prompt(template.rounds(question.record.turns)))

    @cached_property
    def encoder(self) -> Encoder:
        """Of its conversation format. One for all questions: it looks up the tokenizer's control tokens once."""
        assert self.template is not None, "a chat template is rendered whole"
        return Encoder(self.template, self.tokenizer, self.hf.config.image_token_id, self.parts.geometry)

    def prepare(self, question: Question) -> Sample:
        text = self.text(question)
        _whole(question, text)
        images = [self.preprocessed(path) for path in question.record.images]
        if self.template is not None:
            return self.encoder.prompt(question.record, images)
        encoded, sizes = encode_pieces([Piece(text)], self.tokenizer), [image.size for image in images]
        image_token, geometry = self.hf.config.image_token_id, self.parts.geometry
        ids, labels, spans = expand_slots(encoded.ids, encoded.labels, sizes, image_token, geometry, None)
        return Sample(question.id, torch.tensor(ids), torch.tensor(labels), tuple(images), tuple(spans))

    def inputs(self, prepared: Sequence[Sample], schedule: Schedule) -> tuple[dict[str, Tensor], list[list[int]]]:
        count = self.parts.geometry.num_tokens
        tokens = [[count(image.size, schedule.downsample) for image in sample.images] for sample in prepared]
        return model_inputs(prepared, self.tokenizer, self.hf), tokens

    def sharing(self, prepared: Sequence[Sample]) -> AbstractContextManager[None]:
        return shared_features(self.hf, [image for sample in prepared for image in sample.images])

    @cached_property
    def preprocessed(self) -> Callable[..., ImageInput]:
        """A picture as the tower takes it; the last ones are kept."""
        own = self.parts
        return lru_cache(16)(lambda source: preprocess(load_image(source), own.geometry, own.image_processor))


def model_inputs(samples: Sequence[Sample], tokenizer: Any, hf: Any) -> dict[str, Tensor]:
    """Prompts as ``generate`` wants them: ``input_ids`` and ``attention_mask`` (B, N) padded on the left, and where
    there are images ``pixel_values`` ((images, 3, h, w) for LLaVA; (images, tiles, 3, h, w), the missing tiles 0, with
    ``image_sizes`` (images, (height, width)) for LLaVA-NeXT)."""
    rows = [sample.input_ids for sample in samples]
    ids = pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id or 0, padding_side="left")  # masked
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    inputs = {"input_ids": ids, "attention_mask": mask}
    images = [image for sample in samples for image in sample.images]
    if not images:
        return inputs
    if hf.config.model_type != "llava_next":
        return inputs | {"pixel_values": torch.cat([image.pixels for image in images])}
    pixels = pad_sequence([image.pixels for image in images], batch_first=True)
    sizes = torch.tensor([image.size[::-1] for image in images])
    return inputs | {"pixel_values": pixels, "image_sizes": sizes}


@dataclass(frozen=True)
class ProcessorRespondent:
    """A vision-language model of any family, fed by the processor in its own directory."""

    hf: Any
    processor: Any
    schedule: Schedule | None = None
    stops: tuple[str, ...] = ()

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @cached_property
    def ends(self) -> list[int]:
        return _ends(self.hf, self.tokenizer, [])

    def length(self, question: Question) -> int:
        sizes = [image_size(picture) for picture in question.record.images]
        words = _words(self.tokenizer, question, self.text(question))
        return words + sum(width * height // PIXELS_PER_TOKEN for width, height in sizes)

    def text(self, question: Question) -> str:
        return _rendered(self.processor, question, None)

    def prepare(self, question: Question) -> tuple[str, list[Any]]:
        text = self.text(question)
        _whole(question, text)
        return text, [load_image(picture) for picture in question.record.images]

    def inputs(
        self, prepared: Sequence[tuple[str, list[Any]]], schedule: Schedule
    ) -> tuple[dict[str, Tensor], list[list[int]]]:
        if schedule.downsample:
            raise UserError(
                "pyramid_drop.downsample is evaluated with LLaVAs that can be trained here: how the processor of this "
                f"{type(self.hf).__name__} lays out tiles is not known"
            )
        texts, pictures = [text for text, _ in prepared], [own for _, own in prepared]
        bos, side = self.tokenizer.bos_token, self.tokenizer.padding_side
        try:
            self.tokenizer.padding_side = "left"
            inputs = self.processor(
                text=texts,
                images=pictures if any(pictures) else None,
                padding=True,
                return_tensors="pt",
                add_special_tokens=not (bos and texts[0].startswith(bos)),
            )
        except ValueError as error:
            raise UserError(f"{type(self.processor).__name__}: {clip(first_line(error))}") from None
        finally:  # somebody may train with it
            self.tokenizer.padding_side = side
        config = self.hf.config
        token = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
        counts = (inputs["input_ids"] == token).sum(1).tolist()
        return dict(inputs), [[count] if count else [] for count in counts]

    def sharing(self, prepared: Sequence[Any]) -> AbstractContextManager[None]:
        return nullcontext()


def open_respondent(directory: Path) -> ProcessorRespondent:
    """A model that is no LLaVA of ours, with its own processor.

    Raises:
        UserError: its files cannot be read or lack weights, or no chat template of its says where pictures stand.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.utils import logging

    if is_lora(directory):
        raise UserError(f"{directory}: holds adapters on no LLaVA: merge them into their base model with peft first")
    try:
        with reading(directory):
            processor = AutoProcessor.from_pretrained(directory)
    except ImportError as error:
        raise UserError(f"{directory}: its processor cannot be made: {first_line(error)} Install it.") from None
    if not hasattr(processor, "tokenizer"):
        raise UserError(f"{directory}: has a tokenizer and no image processor: copy preprocessor_config.json there")
    if not getattr(processor, "chat_template", None):
        raise UserError(
            f"{directory}: has no chat template, so nothing says how its model is asked: add chat_template.jinja"
        )
    check_chat(processor, str(directory))
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token  # masked, whatever it is
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # of its report on weights, which is said below
    try:
        with reading(directory):
            hf, found = AutoModelForImageTextToText.from_pretrained(
                directory, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
            )
    finally:
        logging.set_verbosity(verbosity)
    if random := sorted(found["missing_keys"] | {name for name, *_ in found["mismatched_keys"]}):
        raise UserError(
            f"{directory}: {len(random)} of its weights are missing or of another shape, such as {random[0]}: copy its "
            "files again"
        )
    section = getattr(hf.config, "pyramid_drop", None)
    return ProcessorRespondent(hf, processor, Schedule.from_dict(section) if section else None)


def check_chat(processor: Any, name: str) -> None:
    """Raises `UserError` unless the chat template writes the words of a question once, and more where a picture is
    shown. One for texts alone writes the list of both as Python prints it, or leaves the picture out."""
    words, picture = "which words are these", Path("picture")
    alone, shown = (_rendered(processor, ask("", words, pictures, "", ""), None) for pictures in ([], [picture]))
    if shown.count(words) != 1 or "'type'" in shown or shown == alone:
        raise UserError(
            f"{name}: its chat template is for texts alone, it writes {clip(shown)!r} for a question with a "
            "picture: take chat_template.jinja from where its processor comes from"
        )


def _whole(question: Question, text: str) -> None:
    """Raises `UserError` if ``text`` holds half a character."""
    try:
        refuse_halves(text)
    except UserError as error:
        raise UserError(f"question {clip(question.id)}: {error}") from None


def _words(tokenizer: Any, question: Question, text: str) -> int:
    """Tokens of ``text``."""
    _whole(question, text)
    return len(tokenizer(text).input_ids)


def _ends(hf: Any, tokenizer: Any, own: Sequence[int]) -> list[int]:
    known = ids_of(getattr(hf.generation_config, "eos_token_id", None))
    return list(dict.fromkeys([*own, *known, *ids_of(tokenizer.eos_token_id)]))


def _rendered(renderer: Any, question: Question, marker: str | None) -> str:
    """The conversation as the chat template of ``renderer`` writes it; without a beginning-of-sequence token where
    ``marker`` is given, which then has to stand there once per picture."""
    messages: list[dict[str, Any]] = []
    record = question.record
    if record.system is not None:
        messages.append({"role": "system", "content": [{"type": "text", "text": record.system}]})
    for turn in record.turns[: len(record.turns) - (record.turns[-1].role == "gpt")]:
        shown = [{"type": "image"}] * turn.text.count(IMAGE_MARKER)
        said = [{"type": "text", "text": turn.text.replace(IMAGE_MARKER, "").strip()}]
        messages.append({"role": "user" if turn.role == "human" else "assistant", "content": [*shown, *said]})
    try:
        text: str = renderer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except (TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"the chat template cannot write question {clip(question.id)} ({clip(first_line(error))}): mend "
            "chat_template.jinja, or for a LLaVA give model.template"
        ) from None
    if marker is None:
        return text
    if text.count(marker) != len(record.images):
        raise UserError(
            f"the chat template writes {text.count(marker)} {marker} for {len(record.images)} picture(s) of question "
            f"{clip(question.id)}: give model.template"
        )
    return text.removeprefix(renderer.bos_token or "")
