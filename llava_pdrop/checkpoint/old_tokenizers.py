"""Tokenizer files as the original LLaVA's environment reads them: transformers 4.37 and tokenizers 0.15.

All of a LLaMA tokenizer is in its ``tokenizer.model``, and the published LLaVAs have nothing else. Any other one needs
a ``tokenizer.json``, and in that of today old readers trip over the pairs in ``merges``, over ``Metaspace`` without
``add_prefix_space``, and over parts they do not know.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from llava_pdrop.checkpoint.hf_files import SENTENCEPIECE, complete_tokenizer
from llava_pdrop.checkpoint.vocabulary import PAD_TOKEN
from llava_pdrop.errors import UserError
from llava_pdrop.files import read_json, write_json
from llava_pdrop.types import IMAGE_MARKER

SLOW, FAST = "LlamaTokenizer", "PreTrainedTokenizerFast"
"""Classes of transformers 4.37 for a tokenizer.model and for a tokenizer.json alone. The original code asks for slow
tokenizers, and gets this fast one where the class is named."""

KNOWN: dict[str, set[str]] = {
    "normalizer": {
        "BertNormalizer", "Strip", "StripAccents", "NFC", "NFD", "NFKC", "NFKD", "Sequence", "Lowercase", "Nmt",
        "Precompiled", "Replace", "Prepend",
    },
    "pre_tokenizer": {
        "BertPreTokenizer", "ByteLevel", "CharDelimiterSplit", "Metaspace", "Whitespace", "Sequence", "Split",
        "Punctuation", "WhitespaceSplit", "Digits", "UnicodeScripts",
    },
    "post_processor": {"RobertaProcessing", "BertProcessing", "ByteLevel", "TemplateProcessing", "Sequence"},
    "decoder": {
        "BPEDecoder", "ByteLevel", "WordPiece", "Metaspace", "CTC", "Sequence", "Replace", "Fuse", "Strip",
        "ByteFallback",
    },
    "model": {"BPE", "Unigram", "WordLevel", "WordPiece"},
}  # fmt: skip
"""Section of a tokenizer.json -> the parts of it that tokenizers 0.15 has."""

PROBE = "A chat: what's  in   the picture?\n\nÄpfel, 図 2\tand 10 more."


def write_original_tokenizer(tokenizer: Any, directory: Path, text_config: Any) -> list[str]:
    """Writes ``tokenizer`` without ``<image>`` and ``<pad>``. Where it was padded with ``<pad>``, unk is the pad token
    again, as the original training sets it.

    Args:
        text_config: of the decoder; the config.json of the original layout is none that transformers knows.

    Returns:
        lines for the user on what is not the same in the old environment.

    Raises:
        UserError: the old environment has no such tokenizer.
    """
    tokenizer.save_pretrained(directory)
    complete_tokenizer(tokenizer, directory)
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    ours = {IMAGE_MARKER, PAD_TOKEN} if tokenizer.pad_token == PAD_TOKEN else {IMAGE_MARKER}
    fields = read_json(directory / "tokenizer_config.json")
    decoder = fields["added_tokens_decoder"]
    fields["added_tokens_decoder"] = {i: token for i, token in decoder.items() if token["content"] not in ours}
    fields["additional_special_tokens"] = [t for t in fields["additional_special_tokens"] if t not in ours]
    fields.pop("processor_class", None)
    fields["padding_side"] = "right"  # as the original training wants it
    fields["tokenizer_class"] = SLOW if (directory / SENTENCEPIECE).is_file() else FAST
    if fields.get("pad_token") in ours:
        fields["pad_token"] = tokenizer.unk_token or tokenizer.eos_token
    write_json(directory / "tokenizer_config.json", fields)
    named = ("bos_token", "eos_token", "unk_token", "pad_token")
    write_json(directory / "special_tokens_map.json", {name: fields[name] for name in named if fields.get(name)})
    file = directory / "tokenizer.json"
    if not file.is_file():
        return []
    content = read_json(file)
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in ours]
    content["padding"] = content["truncation"] = None
    file.unlink()
    if (directory / SENTENCEPIECE).is_file():
        if _says_the_same(directory, tokenizer, ours, text_config):
            return []
        fields["tokenizer_class"] = FAST  # the sentencepiece model beside it is that of another tokenizer
        (directory / SENTENCEPIECE).unlink()
        write_json(directory / "tokenizer_config.json", fields)
    write_json(file, for_tokenizers_0_15(content, f"{tokenizer.name_or_path}: tokenizer.json"))
    if content["model"].get("ignore_merges"):
        return [
            "tokenizer.json: tokenizers 0.15 has no ignore_merges, so that some words are other tokens there: use the "
            "checkpoint with tokenizers 0.19 or newer"
        ]
    return []


def for_tokenizers_0_15(content: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """The content of a tokenizer.json as tokenizers 0.15 writes it; newer versions read that as well.

    Raises:
        UserError: it has a part that is not known there, or that cannot be said.
    """
    old = dict(content)
    for section, known in KNOWN.items():
        for part in _parts(old.get(section)):
            if part.get("type") not in known:
                raise UserError(
                    f"{origin}: {section} {part.get('type')!r} is not known to tokenizers 0.15, which the original "
                    "LLaVA code runs on: convert to llava-hf instead"
                )
    old["model"] = {name: value for name, value in content["model"].items() if name != "ignore_merges"}
    if "merges" in old["model"]:
        pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in old["model"]["merges"]]
        if spaced := next((pair for pair in pairs if any(" " in half for half in pair)), None):
            raise UserError(f"{origin}: merges {spaced!r}: tokenizers 0.15 cannot read a token with a space in it")
        old["model"]["merges"] = [" ".join(pair) for pair in pairs]
    metaspace = content.get("pre_tokenizer") or {}
    if metaspace.get("type") == "Metaspace" and not metaspace.get("split", True):
        old["normalizer"] = _spaces_as_normalizer(metaspace, content.get("normalizer"), origin)
        old["pre_tokenizer"] = None
    for section in ("pre_tokenizer", "decoder"):
        old[section] = _with_prefix_space(old.get(section), origin)
    return old


def _spaces_as_normalizer(metaspace: Mapping[str, Any], before: Any, origin: str) -> dict[str, Any]:
    """What tokenizers 0.15 has in place of a Metaspace that does not split: it writes the spaces while it
    normalises."""
    scheme, mark = metaspace.get("prepend_scheme", "always"), metaspace["replacement"]
    if scheme == "first":
        raise UserError(
            f"{origin}: pre_tokenizer Metaspace: prepend_scheme 'first' cannot be said to tokenizers 0.15: copy the "
            f"{SENTENCEPIECE} that it was made from beside it"
        )
    steps = [{"type": "Prepend", "prepend": mark}] if scheme == "always" else []
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": mark})
    return {"type": "Sequence", "normalizers": [*([] if before is None else [before]), *steps]}


def _with_prefix_space(part: Any, origin: str, inside: bool = False) -> Any:
    """``part`` with the older name of every Metaspace's ``prepend_scheme`` beside it.

    Args:
        inside: whether it is one of several pre-tokenizers.
    """
    if not isinstance(part, dict):
        return part
    if part.get("type") == "Sequence":
        inner = "decoders" if "decoders" in part else "pretokenizers"
        return {**part, inner: [_with_prefix_space(each, origin, inner != "decoders") for each in part[inner]]}
    if part.get("type") != "Metaspace":
        return part
    if inside and not part.get("split", True):
        raise UserError(f"{origin}: a Metaspace with split false in a Sequence cannot be said to tokenizers 0.15")
    scheme = part.get("prepend_scheme", "always")
    kept = {name: value for name, value in part.items() if name != "split"}
    return {**kept, "prepend_scheme": scheme, "add_prefix_space": scheme != "never"}


def _parts(part: Any) -> list[dict[str, Any]]:
    """A part of a tokenizer.json and, of a Sequence, all that are in it."""
    if not isinstance(part, dict):
        return []
    inner = [each for value in part.values() if isinstance(value, list) for each in value]
    return [part, *(p for each in inner if part.get("type") == "Sequence" for p in _parts(each))]


def _says_the_same(directory: Path, tokenizer: Any, ours: set[str], text_config: Any) -> bool:
    """Whether the tokenizer.model in ``directory`` is that of ``tokenizer``: then nothing else is needed."""
    try:
        alone = AutoTokenizer.from_pretrained(directory, config=text_config)
    except (ValueError, OSError, TypeError, RuntimeError):
        return False
    words = {token: index for token, index in tokenizer.get_vocab().items() if token not in ours}
    return alone.get_vocab() == words and alone(PROBE).input_ids == tokenizer(PROBE).input_ids
