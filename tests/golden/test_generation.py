"""Every golden inference case: Hugging Face's ``generate`` with the plug-in attached, and a recomputation without it.

The plug-in runs on the model with rows for ``<image>`` and ``<pad>``; those never win (``suppress_tokens``), and the
recorded logits are compared with the columns the official model has.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llava_pdrop.generate.plugin import attach, detach
from llava_pdrop.generate.prefill import ForwardStep
from llava_pdrop.model.stream import StreamPlan
from llava_pdrop.model.vision import pack_by_geometry
from llava_pdrop.model.vlm import PyramidLlava
from llava_pdrop.schedule import Schedule
from llava_pdrop.types import IGNORE_INDEX, PackedBatch, Sample
from tests.golden.cases import Case, case_files
from tests.golden.expectations import DEFAULT, REASONS
from tests.golden.test_cases import HIDDEN, identify

FILES = [file for file in case_files() if Case.load(file).info["mode"] == "infer"]


@pytest.fixture(params=FILES, ids=identify)
def case(request, record_property):
    case = Case.load(request.param)
    yield case
    record_property("golden_case", identify(case.file))
    record_property("golden_numbers", case.compared)
    record_property("golden_flagged", case.flagged)
    record_property("golden_end_to_end", case.data_file is not None)
    record_property("golden_cut_short", case.cut_short)


def test_generate(case: Case) -> None:
    """Cached decoding with per-layer cache lengths."""
    (sample,) = case.samples()
    case.check_pixels([sample])
    steps: list[ForwardStep] = []
    tokens, logits = generate(case, sample, case.schedule, steps)
    if case.flagged:
        check_expectation(case, sample, tokens, steps)
        return
    case.same("greedy tokens", tokens, case.tensors["infer.generated"][0].tolist())
    case.same("greedy tokens of the JSON", tokens, case.info["generated"][0])
    case.close("infer.scores", logits, atol=HIDDEN)
    decoded = [[int(layer[0, -1]) for layer in step.position_ids] for step in steps[1:]]
    case.same("decode positions", decoded, case.tensors["infer.decode_position_ids"].tolist())
    lengths = [layer.shape[1] for layer in steps[0].position_ids]
    case.same("cache lengths", lengths, case.info["kv_lengths_after_prefill"])
    for stage, recorded in enumerate(case.info.get("stages", [])):
        (dropped,) = [s for s in recorded["samples"] if s["status"] == "dropped"]
        case.same(f"kept at stage {stage}", steps[0].kept(stage)[0], dropped["kept_original"])
    case.same("without dropping", generate(case, sample, Schedule())[0], case.tensors["vanilla.generated"][0].tolist())


def test_recomputation(case: Case) -> None:
    """The packed forward over prompt and answer at once, the query staying at the end of the prompt."""
    if case.flagged:
        pytest.skip("no official answer to recompute; test_generate holds it against our expectation")
    (sample,) = case.samples()
    case.check_pixels([sample])
    answer = case.tensors["infer.generated"][0]
    model = PyramidLlava(case.parts().hf, case.schedule, case.geometry())
    logits, plan = teacher_forced(model, sample, answer)
    case.close("infer.scores", logits, atol=HIDDEN)
    decoded = []
    for step in range(len(answer) - 1):
        row = []
        for layer in range(model.hf.config.text_config.num_hidden_layers):
            stage = plan.stages[sum(drop <= layer for drop in case.schedule.layers)]
            row.append(int(stage.position_T[stage.layout.tokens - len(answer) + step]))
        decoded.append(row)
    case.same("decode positions", decoded, case.tensors["infer.decode_position_ids"].tolist())


def generate(case: Case, sample: Sample, schedule: Schedule, steps: list[ForwardStep] | None = None):
    """Greedy tokens and logits (steps, V) of at most 16 new tokens."""
    hf = case.parts(padded=True).hf.eval()
    official = case.original_config["vocab_size"]
    inputs: dict = {"input_ids": sample.input_ids[None], "attention_mask": torch.ones(1, len(sample.input_ids))}
    if sample.images and case.geometry().aspect == "anyres":
        inputs["pixel_values"] = torch.stack([image.pixels for image in sample.images])
        inputs["image_sizes"] = torch.tensor([[h, w] for w, h in (image.size for image in sample.images)])
    elif sample.images:
        inputs["pixel_values"] = torch.cat([image.pixels for image in sample.images])
    inputs = {name: tensor.to(case.device) for name, tensor in inputs.items()}
    pack_by_geometry(hf, case.geometry())
    attach(hf, schedule, trace=steps)
    output = hf.generate(
        **inputs, max_new_tokens=16, do_sample=False, eos_token_id=2, pad_token_id=0,
        suppress_tokens=list(range(official, hf.config.text_config.vocab_size)),
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    detach(hf)
    new = output.sequences[0, len(sample.input_ids) :]
    return new.tolist(), torch.cat(output.logits)[:, :official].cpu()


def teacher_forced(model: PyramidLlava, sample: Sample, answer: torch.Tensor):
    """Logits (len(answer), V) that predict ``answer``, and the plan they were made with."""
    ids = torch.cat([sample.input_ids, answer])
    labels = torch.cat([torch.full_like(sample.input_ids, IGNORE_INDEX), answer])
    batch = PackedBatch.pack([replace(sample, input_ids=ids, labels=labels)]).to(model.device)
    plan = StreamPlan.build(batch, model.schedule, model.geometry, model.device)
    return model.eval().logits(batch)[-len(answer) - 1 : -1].cpu(), plan


def check_expectation(case: Case, sample: Sample, tokens: list[int], steps: list[ForwardStep]) -> None:
    reason = REASONS.get(case.info["case"], DEFAULT)
    for stage in range(len(steps[0].survivors)):
        for (start, stop), kept in zip(sample.image_spans, steps[0].kept(stage), strict=True):
            assert len(kept) == int((stop - start) * case.schedule.ratios[stage]), reason
    if not sample.image_spans:
        assert tokens == case.tensors["vanilla.generated"][0].tolist(), reason
    model = PyramidLlava(case.parts().hf, case.schedule, case.geometry())
    logits, _ = teacher_forced(model, sample, torch.tensor(tokens))
    assert logits.argmax(-1).tolist() == tokens, reason
    case.compared += len(tokens)
