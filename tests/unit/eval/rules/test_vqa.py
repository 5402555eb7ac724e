"""Soft accuracy and its three normal forms."""

from __future__ import annotations

import pytest

from llava_pdrop.eval.rules.vqa import (
    CONTRACTIONS,
    eval_ai,
    normalised,
    official,
    official_accuracy,
    soft_accuracy,
    vlmevalkit,
)


@pytest.mark.parametrize("equal", range(11))
def test_soft_accuracy_leaves_one_annotator_out(equal: int) -> None:
    golds = ["x"] * equal + ["y"] * (10 - equal)
    matching = [equal - (gold == "x") for gold in golds]
    by_hand = sum(min(1.0, count / 3) for count in matching) / 10
    assert soft_accuracy("x", golds) == pytest.approx(by_hand, abs=1e-12)
    assert soft_accuracy("x", golds) == pytest.approx([0, 0.3, 0.6, 0.9, 1][min(equal, 4)], abs=1e-12)


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("", ""), ("a", ""), ("The", ""), ("a+", ""), (".", ""), ("An a THE", ""),
        ("None", "0"), ("zero", "0"), ("Ten men", "10 men"), ("eleven", "eleven"),
        ("t-shirt", "t shirt"), ("T -shirt", "t shirt"), ("red- blue-green", "red bluegreen"),
        ("bob's", "bob 's"), ("lorn's bay", "lorn 's bay"),
        ("1,250-seat", "1250 seat"), ("yes, it is", "yes it is"), ("What??", "what"),
        ("5.", "5"), (".5", ".5"), ("0.5", "0.5"), ("U.S.A.", "usa"), ("e.g. fig. 2", "eg fig 2"), ("3.x", "3x"),
        ("dont", "don't"), ("dont walk", "don't walk"), ("Im", "im"), ("somebody'd", "somebodyd"),
        ("couldnt've", "couldn't've"), ("yalld've", "yalld've"), ("y'alld've", "y'all'd've"), ("twas", "'twas"),
        ("10:15", "10:15"), ("50%", "50%"), ("$5 & #3*", "$5 & #3*"), ("“x”", "“x”"), ("东京。", "东京。"),
        ("a\tb\nc", "b c"), ("x!", "x"), ("(c)1998", "c 1998"), ("(c) 1998", "c1998"[:1] + " 1998"),
        (".a" * 40, "a" * 32 + ".a" * 8),  # only 32 full stops go
    ],
)  # fmt: skip
def test_eval_ai(text: str, form: str) -> None:
    assert eval_ai(text) == form


@pytest.mark.parametrize(
    ("text", "form"),
    [("1,250-seat", "1250seat"), ("1,250 (x) y-z", "1250 x yz"), ("yes,it is", "yes it is"), ("bob's", "bob's"),
     ("what?", "what"), ("5.", "5"), ("A\nB", "b")],
)  # fmt: skip
def test_official(text: str, form: str) -> None:
    assert official(text) == form


@pytest.mark.parametrize(
    ("text", "form"), [("5.", "5."), (".5", ".5"), ("U.S.A.", "usa"), ("a.5", "a.5"), ("5.x", "5.x"), ("it's", "it's")]
)
def test_vlmevalkit(text: str, form: str) -> None:
    assert vlmevalkit(text) == form


def test_contractions_lack_one_apostrophe_each() -> None:
    for short, word in CONTRACTIONS.items():
        if short != "somebody'd":
            assert len(word) == len(short) + 1 and short.replace("'", "") == word.replace("'", "")
    assert len(CONTRACTIONS) == 114
    assert not {"im", "ive", "shed", "well", "hell", "its", "wed", "id"} & CONTRACTIONS.keys()


def test_official_code_leaves_answers_alone_on_which_all_agree() -> None:
    assert official_accuracy("Yes.", ["yes"] * 10)[0] == 0
    assert official_accuracy(" yes\n", ["yes"] * 10)[0] == 1
    assert official_accuracy("Yes.", ["yes"] * 9 + ["no"])[0] == 1
    assert official_accuracy("two", ["two", " two"] * 5) == (1.0, "two")
    assert normalised("Yes.", ["yes"] * 10, official) == (1.0, "yes")
