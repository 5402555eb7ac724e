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
TOKENIZERS = ["sp_legacy_false", "sp_legacy_true"]
LABEL_TEMPLATES = {"plain", "v1"}


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
    (target / "text").mkdir()
    for name in ("conversations.json", "encode.json", "prompts.json"):
        shutil.copy(source / "text" / name, target / "text")
    lines = (source / "text" / "labels.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if _wanted(json.loads(line))]
    (target / "text" / "labels.jsonl").write_text("".join(kept))
    for file in target.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)


def _wanted(line: dict) -> bool:
    return line["tokenizer"] in TOKENIZERS and line["template"] in LABEL_TEMPLATES


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(__file__).parent / "reference")
