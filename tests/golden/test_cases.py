"""Every case of the golden directories against the packed training path (`PyramidLlava`).

Tolerances are those golden/README suggests for float32: hidden states and logits 1e-4, scores 1e-5, loss 1e-5, token
losses 5e-5, gradients 1e-4 of a tensor's largest entry; integers exactly.
"""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F

from llava_pdrop.checkpoint.layouts import ORIGINAL_TO_MEMORY, rename
from llava_pdrop.model import kernels
from llava_pdrop.model.decoder import Drop
from llava_pdrop.model.stream import StreamPlan
from llava_pdrop.model.vision import image_features
from llava_pdrop.model.vlm import PyramidLlava
from llava_pdrop.schedule import Schedule
from llava_pdrop.types import IGNORE_INDEX, PackedBatch, Sample
from tests.golden.cases import Case, case_files
from tests.golden.expectations import DEFAULT, NOT_COMPARED, REASONS
from tests.reference import slow_reference

HIDDEN, SCORE, LOSS, TOKEN_LOSS, GRADIENT = 1e-4, 1e-5, 1e-5, 5e-5, 1e-4


def identify(file):
    return f"{file.parents[1].name}/{file.stem}"


@pytest.fixture(params=case_files(), ids=identify)
def case(request, record_property):
    case = Case.load(request.param)
    yield case
    record_property("golden_case", identify(case.file))
    record_property("golden_numbers", case.compared)
    record_property("golden_flagged", case.flagged)
    record_property("golden_end_to_end", case.data_file is not None)
    record_property("golden_cut_short", case.cut_short)


def pyramid(case: Case, schedule: Schedule | None = None) -> PyramidLlava:
    return PyramidLlava(case.parts().hf, case.schedule if schedule is None else schedule, case.geometry())


def rows(batch_or_layout, stream):
    """The samples of a packed tensor, one by one."""
    return stream.split(batch_or_layout.seq_lens)


def test_case(case: Case) -> None:
    compare(case)


@pytest.mark.parametrize("file", case_files(), ids=identify)
def test_case_with_fused_kernels(file, monkeypatch) -> None:
    """The same with `model.kernels: torch`, within the same tolerances."""
    monkeypatch.setitem(kernels.AUTO, "cpu", ("torch",))
    compare(Case.load(file))


def compare(case: Case) -> None:
    samples = case.samples()
    batch = PackedBatch.pack(samples, query=case.query).to(case.device)
    check_inputs(case, samples)
    case.check_pixels(samples)
    if case.flagged:
        check_expectation(case, batch, samples)
    else:
        check_official(case, batch)
    if case.tensors:
        check_vanilla(case, batch)
        accounted = [name for name in case.tensors if not any(re.fullmatch(p, name) for p in NOT_COMPARED)]
        left_over = [] if case.flagged else sorted(set(accounted) - case.seen - generation_only(case))
        assert not left_over, f"recorded but not compared: {left_over}"
    assert case.compared > 0 or "outcome" in case.info


def generation_only(case: Case) -> set[str]:
    """What `test_generation.py` compares."""
    return {name for name in case.tensors if name.startswith("infer.") or name == "vanilla.generated"}


def check_inputs(case: Case, samples) -> None:
    """End-to-end cases: our data path gives the ids and labels the official one gave."""
    if case.data_file is None:
        return
    token = case.parts().hf.config.image_token_id
    for row, sample in enumerate(samples):
        ids, labels = sample.input_ids.tolist(), sample.labels.tolist()
        for start, stop in reversed(sample.image_spans):
            ids[start:stop], labels[start:stop] = [-200], [IGNORE_INDEX]
        assert token not in ids
        real = case.tensors["in.attention_mask"][row]
        recorded = case.tensors["in.input_ids"][row][real].tolist()
        case.same("input ids", ids, recorded[: len(ids)])
        if "in.labels" in case.tensors:
            case.same("labels", labels, case.tensors["in.labels"][row][real].tolist()[: len(labels)])


@torch.no_grad()
def check_embeddings(case: Case, model: PyramidLlava, batch: PackedBatch) -> StreamPlan:
    """Tower features and merged embeddings and labels, row by row."""
    plan = StreamPlan.build(batch, model.schedule, model.geometry, model.device)
    if "vision.tower_out" in case.tensors and case.has_images():
        pixels = torch.cat([image.pixels for image in case.all_images()]).to(case.device)
        tower = model.hf.model.vision_tower
        hidden = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        case.close("vision.tower_out", hidden, atol=HIDDEN)
        assert image_features(model.hf, pixels).shape[0] == hidden.shape[0] * hidden.shape[1]
    elif "vision.tower_out" in case.tensors:  # end to end: pixels are ours, made from the pictures
        hidden = model.hf.model.vision_tower(batch.pixels, output_hidden_states=True).hidden_states[-2][:, 1:].cpu()
        recorded = case.tensors["vision.tower_out"]
        shown = [tile for tile in recorded if any(torch.allclose(tile, own, atol=HIDDEN) for own in hidden)]
        assert len(shown) >= len(hidden), "a tile of ours has no equal among the recorded ones"
        case.seen.add("vision.tower_out")
        case.compared += hidden.numel()
    embedded = rows(batch, model.embed(batch, plan))
    for row, (ours, labels) in enumerate(zip(embedded, rows(batch, batch.labels))):
        if "merged.inputs_embeds" not in case.tensors:  # the official code skips merging when no image is passed
            assert not batch.image_spans or "outcome" in case.info
            break
        theirs = case.tensors["merged.inputs_embeds"][row]
        case.close("merged.inputs_embeds", ours, theirs[: len(ours)], HIDDEN)
        assert not theirs[len(ours) :].any(), "the official row is longer than ours"
        if "merged.labels" in case.tensors:
            case.close("merged.labels", labels, case.tensors["merged.labels"][row, : len(labels)])
    return plan


def check_official(case: Case, batch: PackedBatch) -> None:
    mode, training = case.info["mode"], case.info["mode"] == "train"
    model = pyramid(case).train(training)
    set_trainable(case, model)
    plan = check_embeddings(case, model, batch)
    trace: list[Drop] = []
    inputs: dict[int, torch.Tensor] = {}
    decoder = model.hf.model.language_model
    hooks = [
        layer.register_forward_pre_hook(lambda module, args, index=index: inputs.__setitem__(index, args[0][0]))
        for index, layer in enumerate(decoder.layers)
    ]
    logits = model.logits(batch, trace).float().cpu()
    for hook in hooks:
        hook.remove()
    survivors = check_drops(case, batch, plan, trace)
    last = plan.stages[-1].layout

    if mode == "infer":
        ends = torch.tensor(last.seq_lens).cumsum(0) - 1
        case.close("infer.prefill_logits_last", logits[ends], atol=HIDDEN)
        if "infer.prefill_logits" in case.tensors:
            for row, ours in enumerate(rows(last, logits)):
                case.close("infer.prefill_logits", ours, case.tensors["infer.prefill_logits"][row, : len(ours)], HIDDEN)
        return
    labels = [label.index_select(0, kept) for label, kept in zip(rows(batch, batch.labels.cpu()), survivors)]
    for row, (ours, label) in enumerate(zip(rows(last, logits), labels)):
        n = len(label)
        case.close(f"{mode}.final_labels", label, case.tensors[f"{mode}.final_labels"][row, :n])
        if f"{mode}.logits" in case.tensors:
            case.close(f"{mode}.logits", ours, case.tensors[f"{mode}.logits"][row, :n], HIDDEN)
        nll = F.cross_entropy(ours[:-1], label[1:], reduction="none", ignore_index=IGNORE_INDEX)
        case.close(f"{mode}.token_nll", nll, case.tensors[f"{mode}.token_nll"][row, : n - 1], TOKEN_LOSS)
    for name in [name for name in case.tensors if name.startswith("train.hidden.")]:
        index = int(name.rsplit(".", 1)[1])
        if index < len(decoder.layers):
            stage = sum(layer <= index for layer in case.schedule.layers)
            for row, ours in enumerate(rows(plan.stages[stage].layout, inputs[index])):
                case.close(name, ours, case.tensors[name][row, : len(ours)], HIDDEN)
        else:
            captured = capture_norm(model, batch)
            for row, ours in enumerate(rows(last, captured)):
                case.close(name, ours, case.tensors[name][row, : len(ours)], HIDDEN)
    output = model(batch)
    if output.labels:
        loss = output.loss / output.labels
        case.close(f"{mode}.loss", loss.detach(), atol=LOSS)
        if training:
            check_gradients(case, model, loss)
    else:
        assert torch.isnan(case.tensors[f"{mode}.loss"])
        case.seen |= {name for name in case.tensors if name == f"{mode}.loss" or name.startswith("grad.")}


def capture_norm(model: PyramidLlava, batch: PackedBatch) -> torch.Tensor:
    captured: list[torch.Tensor] = []
    hook = model.hf.model.language_model.norm.register_forward_hook(lambda m, a, out: captured.append(out))
    with torch.no_grad():
        model.logits(batch)
    hook.remove()
    return captured[0]


def check_drops(case: Case, batch: PackedBatch, plan: StreamPlan, trace: list[Drop]) -> list[torch.Tensor]:
    """Scores, kept tokens, positions, labels of every stage; returns each sample's final survivors."""
    current = [torch.arange(n) for n in batch.seq_lens]  # merged positions, sample by sample
    for number, drop in enumerate(trace):
        name = f"stage{number}.features_in"
        for row, hidden in enumerate(rows(drop.stage.layout, drop.hidden_TD) if name in case.tensors else ()):
            case.close(name, hidden, case.tensors[name][row, : len(hidden)], HIDDEN)
        for name, stage in (
            (f"stage{number}.position_ids_in", plan.stages[number]),
            (f"stage{number}.position_ids_out", plan.stages[number + 1]),
        ):
            for row, ours in enumerate(rows(stage.layout, stage.position_T) if name in case.tensors else ()):
                theirs = case.tensors[name]
                case.close(name, ours, theirs[min(row, len(theirs) - 1), : len(ours)])
    if "stages" not in case.info:  # the official code drops nothing when no image is passed
        assert not batch.image_spans and all(len(drop.index_K) == len(drop.hidden_TD) for drop in trace)
        return current
    for number, (drop, recorded) in enumerate(zip(trace, case.info["stages"], strict=True)):
        before, after = plan.stages[number], plan.stages[number + 1]
        offsets = [0, *torch.tensor(before.layout.seq_lens).cumsum(0).tolist()]
        kept_rows = drop.index_K.cpu().split(after.layout.seq_lens)
        for sample in recorded["samples"]:
            row = sample["sample"]
            local = kept_rows[row] - offsets[row]
            merged = current[row][local]
            official = [position for position in sample["survivors_in_merged"] if position >= 0]
            case.same(f"stage {number} survivors of sample {row}", merged.tolist(), official)
            if sample["status"] == "dropped":
                query = [position - 1 - offsets[row] for position in before.layout.answer_starts[row]]
                case.same("query", query, sample["query_index"])
                score = image_scores(drop, row)
                case.close(f"stage{number}.sample{row}.scores", score, atol=SCORE)
                counted = {"query_position_in_merged": current[row][query].tolist(), "n_scored": len(score)}
                counted |= image_tokens(batch, row, current[row].tolist(), merged.tolist())
                case.same(f"stage {number} of sample {row}", list(counted.values()), [sample[k] for k in counted])
                gone = (
                    before.layout.seq_lens[row] - after.layout.seq_lens[row]
                )  # lengths are recorded with padding (B10)
                case.same(f"stage {number} dropped", [gone], [sample["seq_len_in"] - sample["seq_len_out"]])
            current[row] = merged
        for name, stage in ((f"stage{number}.labels_in", before), (f"stage{number}.labels_out", after)):
            if name in case.tensors:
                for row, n in enumerate(stage.layout.seq_lens):
                    first = sum(stage.layout.seq_lens[:row])
                    own = [p - first for p in stage.layout.label_positions if first <= p < first + n]
                    theirs = (case.tensors[name][row, :n] != IGNORE_INDEX).nonzero()[:, 0].tolist()
                    case.same(name, own, theirs)
                case.seen.add(name)
    return current


def image_tokens(batch: PackedBatch, row: int, before: list[int], after: list[int]) -> dict[str, int | list[int]]:
    """What a stage's JSON counts of a sample with one image: ``before`` and ``after`` are merged positions."""
    first = sum(batch.seq_lens[:row])
    start, stop = next((a - first, b - first) for a, b in batch.image_spans if first <= a < first + batch.seq_lens[row])
    shown = [position for position in before if start <= position < stop]
    kept = [position for position in after if start <= position < stop]
    return {
        "image_tokens": len(shown),
        "keep_length": len(kept),
        "kept_original": [position - start for position in kept],
        "kept_current": [index for index, position in enumerate(shown) if position in kept],
    }


def image_scores(drop: Drop, row: int) -> torch.Tensor:
    layout = drop.stage.layout
    first = sum(layout.seq_lens[:row])
    position = drop.stage.candidates.row_V
    return drop.score_V[(position >= first) & (position < first + layout.seq_lens[row])]


def set_trainable(case: Case, model: PyramidLlava) -> None:
    """As the golden runs were made: everything trains, the tower only in LLaVA-NeXT."""
    model.requires_grad_(True)
    model.hf.model.vision_tower.requires_grad_(bool(case.original_config.get("unfreeze_mm_vision_tower")))
    model.zero_grad(set_to_none=True)


def check_gradients(case: Case, model: PyramidLlava, loss: torch.Tensor) -> None:
    loss.backward()
    gradients = {n: p.grad for n, p in model.hf.named_parameters() if p.grad is not None}
    flat = {name.replace(".vision_model.", "."): gradient for name, gradient in gradients.items()}
    for name in [name for name in case.tensors if name.startswith("grad.")]:
        theirs = case.tensors[name]
        (ours,) = rename({name.removeprefix("grad."): theirs}, ORIGINAL_TO_MEMORY)
        assert ours in flat, f"{ours} has no gradient"
        case.close(name, flat[ours], atol=GRADIENT * theirs.abs().max().item() + 1e-12)
    for name, norm in case.info.get("grad_norms", {}).items():
        (ours,) = rename({name: torch.empty(0)}, ORIGINAL_TO_MEMORY)
        own = flat[ours].norm().item() if ours in flat else 0.0
        case.compared += 1
        assert own == pytest.approx(norm, rel=1e-3, abs=1e-6), f"gradient norm of {name}"


def check_vanilla(case: Case, batch: PackedBatch) -> None:
    """The same batch without dropping equals the official model without dropping."""
    names = {name for name in case.tensors if name.startswith("vanilla.") and name != "vanilla.generated"}
    if not names or (case.flagged and "trunc" in case.info["case"]):
        case.seen |= names
        return
    model = pyramid(case, Schedule()).eval()
    logits = model.logits(batch).float().cpu()
    if "vanilla.loss" in names and torch.isnan(case.tensors["vanilla.loss"]):
        assert not batch.label_positions, "the official loss is not a number, yet there are labels"
        case.seen.add("vanilla.loss")
    elif "vanilla.loss" in names:
        with torch.no_grad():
            output = model(batch)
        case.close("vanilla.loss", output.loss / output.labels, atol=LOSS)
    if "vanilla.logits" in names:
        for row, ours in enumerate(rows(batch, logits)):
            case.close("vanilla.logits", ours, case.tensors["vanilla.logits"][row, : len(ours)], HIDDEN)
    if "vanilla.prefill_logits_last" in names:
        case.close("vanilla.prefill_logits_last", logits[torch.tensor(batch.seq_lens).cumsum(0) - 1], atol=HIDDEN)


def check_expectation(case: Case, batch: PackedBatch, samples: list[Sample]) -> None:
    """Our own promise for flagged cases, see `expectations.py`: which tokens are left, and the logits, are those of a
    slow reference that knows one sample and one image at a time."""
    reason = REASONS.get(case.info["case"], DEFAULT)
    model = pyramid(case).train(case.info["mode"] == "train")
    if case.tensors and "tie" not in case.info["flags"]:
        check_embeddings(case, model, batch)
    trace: list[Drop] = []
    logits = model.logits(batch, trace).cpu()
    assert torch.isfinite(model(batch).loss), reason
    references = [slow_reference(model, sample, case.query) for sample in samples]
    counts = [len(reference) for reference, _ in references]
    for ours, (theirs, _) in zip(logits.split(counts), references, strict=True):
        torch.testing.assert_close(ours, theirs.cpu(), atol=HIDDEN, rtol=0.0, msg=lambda m: f"{reason}: {m}")
        case.compared += theirs.numel()
    firsts = [0, *torch.tensor(batch.seq_lens).cumsum(0).tolist()]
    position = torch.arange(sum(batch.seq_lens))
    for stage, drop in enumerate(trace):
        position = position[drop.index_K.cpu()]
        expected = [first + p for first, (_, left) in zip(firsts, references) for p in left[stage]]
        case.same(f"{reason}; stage {stage}", position.tolist(), expected)
