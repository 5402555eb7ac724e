"""What we do where the official code has a bug or its result is arbitrary: one table.

Every case with the flag ``quirk`` or ``tie`` or with a recorded crash is held against a slow reference of ours
(`tests/reference.py`) instead of the recorded result. The inputs, the merged embeddings (where no image was cut off)
and the model without dropping are still compared with what was recorded.
"""

from __future__ import annotations

REASONS: dict[str, str] = {
    "l15_train_multi_image": "B4: official drops from the first image only; every image keeps its own share here",
    "l15_infer_multi_image": "B4: as above, and the query really is the last prompt token",
    "next_train_multi_image": "B4: official reads image counts by sample; here each image has its own",
    "l15_infer_textonly_dummy": "B6: official shifts decode positions of a text-only prompt; nothing happens here",
    "l15_infer_trunc_crash": "B8: official crashes on prompts over the training limit; no prompt is cut here",
    "l15_train_trunc_inside_image": "B8: a cut image is counted by the tokens that are left of it; all its scores tie",
    "l15_train_trunc_inside_image_crash": "B8: as above, where official asks topk for more tokens than there are",
}
"""Known flagged cases. A flagged case of another directory is held against the same expectations (`DEFAULT`)."""

DEFAULT = "flagged in its JSON: every image keeps the best int(n * ratio) of its own tokens, text is whole"

NOT_COMPARED: dict[str, str] = {
    r"in\..*": "an input",
    r"stage\d+\.attention_mask_(in|out)": "padding does not exist in a packed stream",
    r"merged\.(attention_mask|position_ids_padded)": "padding does not exist in a packed stream",
    r"(train|eval)\.final_valid_mask|vanilla\.valid_mask": "says which rows are real",
}
"""Recorded tensors that carry no number of their own, with the reason."""

TEXT_REASONS: dict[str, str] = {
    "masked": "its counts disagree, so it masks the whole conversation (4.15, 4.16)",
    "unchecked": "the text reaches model_max_length, so it does not check its counts and labels lie wrong (4.15)",
    "shifted": "mpt counts agree by luck: the first answer gains the line end before it and loses its end (4.16)",
    "generic": "v0 counts every turn with a BOS of its own and trains on role names, not on the answers alone",
    "merged": "several images of one turn become one marker (4.16); each stays here",
    "greeting": "an answer before the first question is trained on (v0) or refused (plain); left out here, and refused "
    "where it shows an image",
    "one speaker": "v0 takes two turns by one speaker in a row; refused here, as by its other formats",
    "wordless": "a question without words or image loses its marks or raises; written like any other here",
    "pad": "a real token that equals the padding token is masked away in the batch (B15); kept here",
    "nfc": "transformers 5 normalises the text of this tokenizer to NFC, transformers 4.37 did not",
    "slot": "an image inside an answer keeps its placeholder (-200) as a label until the model merges and masks it",
    "spaces": "transformers 5 decodes with other spaces beside special tokens",
    "tags": "a research format of the first LLaVA; `test_a_template_is_added_in_a_few_lines` adds it",
    "end": "plain has one question and one answer; the official code raises on a second question, ours says so",
}
"""What is recorded in ``text/`` and differs from ours, by the rule that tells why (`test_text.py`)."""
