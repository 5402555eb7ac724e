"""The small files of a Hugging Face LLaVA directory, written so that transformers 4, transformers 5 and vLLM open it.

transformers 5 leaves out or renames what transformers 4 looks for: ``rope_theta``, ``torch_dtype``, one of
``image_token_index`` and ``image_token_id``, ``preprocessor_config.json``, and the shape of ``tokenizer_config.json``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from llava_pdrop.errors import UserError
from llava_pdrop.files import read_json, write_json

ARCHITECTURES = {"llava": "LlavaForConditionalGeneration", "llava_next": "LlavaNextForConditionalGeneration"}
SENTENCEPIECE = "tokenizer.model"
GENERIC = "TokenizersBackend"
NEW_IN_5 = ("backend", "is_local", "local_files_only", "extra_special_tokens", "sp_model_kwargs")
"""Keys of a tokenizer_config.json that say nothing about the tokenizer, or that transformers 4 cannot read."""


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """What is wrong with ``file``, in our words or a library's, becomes a `UserError` that begins with its path."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (StrictDataclassError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        kind = "" if isinstance(error, ValueError | StrictDataclassError) else f"{type(error).__name__}: "
        raise UserError(f"{file}: {kind}{' '.join(str(error).removeprefix(f'{file.name}: ').split())}") from None


def chat_template_in(directory: Path) -> str | None:
    """The chat template that a checkpoint brings along, None where it has none."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        if (directory / name).is_file():
            found = read_json(directory / name).get("chat_template")
            if isinstance(found, str):
                return found
    return None


def write_config(config: Any, directory: Path, dtype: torch.dtype) -> None:
    """Writes ``config.json`` of a Hugging Face LLaVA under the field names of all versions."""
    fields = json.loads(config.to_json_string())
    fields["architectures"] = [ARCHITECTURES[config.model_type]]
    for name in ("dtype", "torch_dtype"):
        fields[name] = str(dtype).removeprefix("torch.")
    fields["image_token_index"] = fields["image_token_id"] = config.image_token_id
    fields["tie_word_embeddings"] = bool(config.tie_word_embeddings)
    fields["text_config"] |= rope_fields(config.text_config)
    for part in ("text_config", "vision_config"):
        for name in ("dtype", "architectures", "_name_or_path"):
            fields[part].pop(name, None)
    write_json(directory / "config.json", fields)


def rope_fields(text_config: Any) -> dict[str, Any]:
    """``rope_theta`` and ``rope_scaling`` as transformers 4 and the original code read them. Without them they would
    fall back to 10000, which is wrong for LLaMA 3 and Mistral, and say nothing."""
    rope = dict(text_config.rope_parameters)
    theta, kind = rope.pop("rope_theta", 10000.0), rope.pop("rope_type", "default")
    rope.pop("type", None)
    return {"rope_theta": theta, "rope_scaling": None if kind == "default" else {"rope_type": kind, **rope}}


def write_processor(processor: Any, directory: Path) -> None:
    """Writes a Hugging Face processor: ``preprocessor_config.json``, ``processor_config.json``, its chat template
    and the tokenizer, which pads on the left whatever training did, as ``generate`` needs it."""
    directory.mkdir(parents=True, exist_ok=True)
    kind = type(processor).__name__
    write_image_processor(processor.image_processor, directory, kind)
    processor.save_pretrained(directory)
    own = read_json(directory / "processor_config.json")
    own.pop("image_processor", None)  # transformers 4 would take it for a second image processor
    write_json(directory / "processor_config.json", own)
    complete_tokenizer(processor.tokenizer, directory)
    fields = read_json(directory / "tokenizer_config.json")
    write_json(directory / "tokenizer_config.json", fields | {"padding_side": "left"})


def write_image_processor(image_processor: Any, directory: Path, processor_class: str | None = None) -> None:
    """Writes ``preprocessor_config.json``."""
    fields = json.loads(image_processor.to_json_string())
    fields["image_processor_type"] = fields["image_processor_type"].removesuffix("Pil")
    if processor_class is not None:
        fields["processor_class"] = processor_class
    write_json(directory / "preprocessor_config.json", fields)


def complete_tokenizer(tokenizer: Any, directory: Path) -> None:
    """Makes the tokenizer files that transformers 5 has written into ``directory`` readable by transformers 4, and
    adds the sentencepiece model where the tokenizer was read beside one."""
    file = directory / "tokenizer_config.json"
    fields = {name: value for name, value in read_json(file).items() if name not in NEW_IN_5 and value is not None}
    for name in ("add_bos_token", "add_eos_token", "legacy"):
        value = tokenizer.init_kwargs.get(name, source_settings(tokenizer).get(name))
        if value is not None:
            fields[name] = value
    if fields.get("tokenizer_class") == GENERIC:  # a name that only transformers 5 knows
        fields["tokenizer_class"] = _known_class(tokenizer)
    decoder = tokenizer.added_tokens_decoder
    fields["added_tokens_decoder"] = {str(index): _added(token) for index, token in sorted(decoder.items())}
    named = {fields.get(name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    fields["additional_special_tokens"] = [
        token.content for _, token in sorted(decoder.items()) if token.special and token.content not in named
    ]
    write_json(file, fields)
    if (model := sentencepiece_of(tokenizer)) is not None and model.parent.resolve() != directory.resolve():
        shutil.copyfile(model, directory / SENTENCEPIECE)


def _known_class(tokenizer: Any) -> str:
    named = source_settings(tokenizer).get("tokenizer_class", GENERIC)
    generic = "PreTrainedTokenizerFast" if sentencepiece_of(tokenizer) is None else "LlamaTokenizer"
    return generic if named == GENERIC else named


def source_settings(tokenizer: Any) -> dict[str, Any]:
    """The ``tokenizer_config.json`` that ``tokenizer`` was read from: transformers 5 forgets some of its keys."""
    file = Path(tokenizer.name_or_path) / "tokenizer_config.json"
    return read_json(file) if file.is_file() else {}


def sentencepiece_of(tokenizer: Any) -> Path | None:
    """The sentencepiece model that ``tokenizer`` was read beside."""
    file = Path(tokenizer.name_or_path) / SENTENCEPIECE
    return file if file.is_file() else None


def _added(token: Any) -> dict[str, Any]:
    names = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return {name: getattr(token, name) for name in names}
