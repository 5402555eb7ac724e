"""Copies the part of the full golden data that lives in this repository: ``python tests/golden/make_subset.py SOURCE``.

At most 6 MB: one LLaVA-1.5, one LLaVA-NeXT with grouped keys, one end-to-end model, and the cases where a corner of the
algorithm shows. The full set is compared as well wherever it lies beside the checkout.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

CASES = [
    "l15_train_multiturn",
    "l15_train_no_answer",
    "l15_train_image_in_second_turn",
    "l15_train_mask_hole",
    "l15_train_collator_cut_placeholder",
    "l15_train_trunc_inside_image",
    "l15_train_trunc_inside_image_crash",
    "l15_infer_image_last",
    "l15_infer_textonly_dummy",
    "next_gqa_infer",
    "e2e_l15_train",
    "e2e_l15_infer0",
]
MODELS = ["clip56", "llava15", "next_gqa", "e2e_l15"]
TOKENIZERS = ["sp_legacy_false", "sp_legacy_true", "bpe_neox"]
ALL_LABELS = {("sp_legacy_false", "v1"), ("sp_legacy_false", "plain")}
CORNERS = {
    "basic",
    "multiturn3",
    "two_images_one_turn",
    "text_only",
    "empty_answer_middle",
    "contains_special_tokens",
    "gpt_first",
    "human_last",
    "not_alternating",
}
"""Conversations of which the other tokenizers and templates keep their labels."""


def main(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    for model in MODELS:
        shutil.copytree(source / "models" / model, target / "models" / model)
    for tokenizer in TOKENIZERS:
        shutil.copytree(source / "tokenizers" / tokenizer, target / "tokenizers" / tokenizer)
    shutil.copytree(source / "e2e" / "l15", target / "e2e" / "l15")
    (target / "cases").mkdir()
    for case in CASES:
        for file in (source / "cases").glob(f"{case}.*"):
            shutil.copy(file, target / "cases")
    copy_text(source / "text", target / "text")
    copy_sizes(source / "preprocess", target / "preprocess")
    for file in target.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)


def copy_text(source: Path, target: Path) -> None:
    target.mkdir()
    for name in ("conversations.json", "prompts.json", "collator.json"):
        shutil.copy(source / name, target)
    encoded = json.loads((source / "encode.json").read_text())
    kept = {name: cases for name, cases in encoded.items() if name in TOKENIZERS}
    (target / "encode.json").write_text(json.dumps(kept, ensure_ascii=False))
    lines = (source / "labels.jsonl").read_text().splitlines(keepends=True)
    (target / "labels.jsonl").write_text("".join(line for line in lines if _wanted(json.loads(line))))


def _wanted(line: dict) -> bool:
    kind = line["tokenizer"], line["template"]
    return kind in ALL_LABELS or (line["tokenizer"] in TOKENIZERS and line["conversation"] in CORNERS)


def copy_sizes(source: Path, target: Path) -> None:
    """The tiling of every recorded picture size; the pixels stay in the full set."""
    recorded = json.loads((source / "geometry.json").read_text())
    target.mkdir()
    (target / "geometry.json").write_text(json.dumps(recorded | {"pictures": [], "tensors": {}, "tensor_meaning": {}}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(__file__).parent / "reference")
