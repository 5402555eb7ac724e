"""`attach` on every family of `tests.families` against the slow reference, which masks and never removes a token.

The families' default decoders go through everything, the others through a prompt of three pictures and its answer.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llava_pdrop.generate import families, plugin
from llava_pdrop.generate import forward as forward_of
from llava_pdrop.generate.plugin import attach, detach
from llava_pdrop.generate.prefill import ForwardStep
from llava_pdrop.model import attention
from llava_pdrop.model.attention import OLDEST, is_older
from llava_pdrop.schedule import Schedule
from tests.families import FAMILIES, SPECIAL, Row, collate, make_row
from tests.messages import says
from tests.parity.reference import Reference, decoder_of, reference_logits

NEW = 4
TOLERANCE = 2e-5  # of any logit
CLEAR = 2e-4  # prompts whose kept and dropped tokens score closer than this say nothing: others are drawn
SLIDING = ("mistral_window", "qwen2_window", "cohere2", "gemma2", "gpt_oss")
TABLE = {name: families.ATTACHABLE["llava" if name == "pixtral" else name] for name in FAMILIES}
NAMES = [name for name in FAMILIES if not is_older(TABLE[name].since)]
WITH_CLIPS = [name for name in NAMES if FAMILIES[name].clip]
ALL = [
    pytest.param(name, decoder, id=f"{name}-{decoder}")
    for name in NAMES
    for decoder in FAMILIES[name].decoders
    if not is_older(families.DECODERS_SINCE.get(decoder, OLDEST))
]
POSITIONS = [
    pytest.param(name, positions, id=f"{name}-{positions}")
    for name in NAMES
    for positions in (("keep", "renumber") if FAMILIES[name].flat else ("keep",))
]


def schedule_of(name: str, positions: Any = "keep", ratios: tuple[float, ...] = (0.55, 0.3, 0.13)) -> Schedule:
    layers = (2, 3, 5) if FAMILIES[name].first <= 2 else (FAMILIES[name].first, 4, 5)
    return Schedule(layers, ratios, positions=positions)


def model_of(name: str, decoder: str | None = None) -> Any:
    """One model per family and decoder, shared by the tests."""
    return _built(name, decoder or FAMILIES[name].decoders[0])


@functools.cache
def _built(name: str, decoder: str) -> Any:
    return FAMILIES[name].make(decoder)


def pieces_of(name: str, kind: str) -> tuple:
    """Prompts by name; the first and the last size of a family differ in their tiles, where it has any."""
    small, large, clip = FAMILIES[name].sizes[0], FAMILIES[name].sizes[-1], FAMILIES[name].clip
    return {
        "one": (3, small, 4),
        "large": (2, large, 3),
        "apart": (2, large, 3, small, 2),
        "adjacent": (1, small, large, 2),
        "first": (large, 3),
        "three": (2, small, large, 3, small, 2),
        "none": (6,),
        "more text": (3,),
        "clip": (2, clip, 3),
        "clips": (1, clip, clip, 2),
        "mixed": (1, large, 2, clip, 2, small, 1),
    }[kind]


def row_of(name: str, kind: str, decoder: str | None = None) -> tuple[Row, dict[str, Reference]]:
    """A prompt that leaves no doubt about what is kept, and its reference for every kind of positions."""
    return _drawn(name, kind, decoder or FAMILIES[name].decoders[0])


@functools.cache
def _drawn(name: str, kind: str, decoder: str) -> tuple[Row, dict[str, Reference]]:
    family, model = FAMILIES[name], model_of(name, decoder)
    for seed in range(10):
        row = make_row(family, model, *pieces_of(name, kind), seed=seed)
        references = {
            positions: expected(name, [row], positions, decoder)
            for positions in (("keep", "renumber") if family.flat else ("keep",))
        }
        if all(reference.gap > CLEAR for reference in references.values()):
            return row, references
    raise AssertionError("no prompt without near ties")


def expected(name: str, rows: list[Row], positions: str, decoder: str | None = None) -> Reference:
    pictures, prompts = [row.pictures for row in rows], [row.prompt for row in rows]
    inputs = fresh(model_of(name, decoder), collate(FAMILIES[name], *rows))
    schedule = schedule_of(name, positions)
    return reference_logits(model_of(name, decoder), inputs, pictures, schedule, positions, prompts)


def fresh(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Forgets what the Qwen families remember of an earlier prompt."""
    for module in model.modules():
        if hasattr(module, "rope_deltas"):
            module.rope_deltas = None
    return {key: value.clone() for key, value in inputs.items()}


def forward(name: str, *rows: Row, decoder: str | None = None) -> Tensor:
    model = model_of(name, decoder)
    with torch.no_grad():
        return model(**fresh(model, collate(FAMILIES[name], *rows))).logits


def generate(name: str, *rows: Row, decoder: str | None = None) -> tuple[list[list[int]], Tensor]:
    """Greedy answers without special tokens, and logits (B, new, V)."""
    model = model_of(name, decoder)
    output = model.generate(
        **fresh(model, collate(FAMILIES[name], *rows)), max_new_tokens=NEW, do_sample=False, suppress_tokens=SPECIAL,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return output.sequences[:, -NEW:].tolist(), torch.stack(output.logits, dim=1)


class attached:
    """The family's model with a schedule, within the block."""

    def __init__(self, name: str, schedule: Schedule, decoder: str | None = None) -> None:
        self.model, self.schedule = model_of(name, decoder), schedule

    def __enter__(self) -> Any:
        return attach(self.model, self.schedule)

    def __exit__(self, *error: object) -> None:
        detach(self.model)


def same(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    difference = (got - want).abs().max().item()
    assert difference <= TOLERANCE, f"largest difference {difference:.1e}"


def same_survivors(logits: Tensor, index: int, reference: Reference) -> None:
    """Row ``index`` of an attached model's logits, padded on the left, against the reference of that row alone."""
    want = reference.row(0)
    assert logits.shape[1] >= len(want)
    same(logits[index, -len(want) :], want)


def decoded_like_recompute(name: str, row: Row, positions: str, decoder: str | None = None) -> None:
    with attached(name, schedule_of(name, positions), decoder):
        answers, logits = generate(name, row, decoder=decoder)
    reference = expected(name, [row.extended(answers[0][:-1])], positions, decoder)
    same(logits[0], reference.logits[0, row.prompt - 1 :])


# ---- the bench itself


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("name", "decoder"), ALL)
def test_reference_without_drops_is_vanilla(name, decoder, implementation):
    family, model = FAMILIES[name], model_of(name, decoder)
    rows = [make_row(family, model, *pieces_of(name, kind)) for kind in ("apart", "none")]
    inputs, real = collate(family, *rows), collate(family, *rows)["attention_mask"].bool()
    before = model.config.get_text_config()._attn_implementation
    model.set_attn_implementation(implementation if before == "sdpa" else before)
    try:
        vanilla = forward(name, *rows, decoder=decoder)
        pictures = [row.pictures for row in rows]
        reference = reference_logits(model, fresh(model, inputs), pictures, Schedule(), "keep")
    finally:
        model.set_attn_implementation(before)
    assert torch.isfinite(vanilla[real]).all() and 0.5 < vanilla[real].std() < 5
    same(reference.logits[real], vanilla[real])
    if family.build.__name__ != "_paligemma":  # its prompt sees itself in both directions, whatever the window
        assert bool(reference.windows) == (decoder in SLIDING or name == "gemma3")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "decoder"), ALL)
def test_vanilla_decoding_is_recompute(name, decoder):
    model = model_of(name, decoder)
    row = make_row(FAMILIES[name], model, *pieces_of(name, "apart"))
    answers, logits = generate(name, row, decoder=decoder)
    inputs = fresh(model, collate(FAMILIES[name], row.extended(answers[0][:-1])))
    reference = reference_logits(model, inputs, [row.pictures], Schedule(), "keep", [row.prompt])
    same(logits[0], reference.logits[0, row.prompt - 1 :])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "decoder"), ALL)
def test_reference_is_what_removal_gives(name, decoder):
    """The survivors of the reference, really taken out before the drop layers: its masks hide exactly the others."""
    row, references = row_of(name, "three", decoder)
    for positions, reference in references.items():
        same(removed(name, decoder, row, reference, positions)[0], reference.row(0))


def removed(name: str, decoder: str, row: Row, reference: Reference, positions: str) -> Tensor:
    """Logits of a vanilla forward whose layers are given the survivors only, with slices of all that came along."""
    model, layers = model_of(name, decoder), schedule_of(name).layers
    text = decoder_of(model)
    now = torch.arange(len(row.ids))

    def before_layer(index: int, module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        nonlocal now
        hidden = args[0]
        if index in layers:
            survivors = reference.kept[layers.index(index)][0]
            gone = {
                column
                for picture, alive in zip(row.pictures, survivors)
                for token, column in enumerate(picture)
                if token not in alive
            }
            stay = torch.tensor([place for place, column in enumerate(now.tolist()) if column not in gone])
            hidden, now = hidden[:, stay], now[stay]
        if index >= layers[0]:
            mask, rope = kwargs["attention_mask"], kwargs["position_embeddings"]
            kwargs["attention_mask"] = None if mask is None else mask[:, :, now][..., now]
            kwargs["position_embeddings"] = tuple(part[:, now] for part in rope)
            if positions == "renumber":
                places = torch.arange(len(now))
                more = (text.config.layer_types[index],) if name == "gemma3" else ()
                kwargs["position_embeddings"] = text.rotary_emb(hidden, places[None], *more)
                window = reference.windows.get(index)
                if window is not None:  # it counts survivors
                    near = (places[:, None] >= places) & (places[:, None] - places < window)
                    mask = kwargs["attention_mask"]
                    kwargs["attention_mask"] = mask | near if mask.dtype == torch.bool else mask.masked_fill(near, 0)
        return (hidden, *args[1:]), kwargs

    handles = [
        layer.register_forward_pre_hook(functools.partial(before_layer, index), with_kwargs=True)
        for index, layer in enumerate(text.layers)
    ]
    try:
        with torch.no_grad():
            return model(**fresh(model, collate(FAMILIES[name], row)), use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()


# ---- attach


def several(name: str) -> str:
    """A prompt with several pictures, where possible side by side."""
    return "apart" if name == "aria" else "three"


def skip_what_cannot_be_told(name: str, kind: str) -> None:
    """Aria's pictures side by side may as well be crops of one: `test_pictures_that_nothing_tells_apart`."""
    if name == "aria" and kind in ("adjacent", "three"):
        pytest.skip("nothing tells them apart: refused")


@pytest.mark.parametrize("kind", ["one", "large", "apart", "adjacent"])
@pytest.mark.parametrize(("name", "positions"), POSITIONS)
def test_survivors_have_the_logits_of_the_reference(name, positions, kind):
    skip_what_cannot_be_told(name, kind)
    row, references = row_of(name, kind)
    with attached(name, schedule_of(name, positions)):
        same_survivors(forward(name, row), 0, references[positions])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "positions"), POSITIONS)
def test_eager_has_the_logits_of_the_reference(name, positions):
    row, references = row_of(name, "apart")
    model = model_of(name)
    before = model.config.get_text_config()._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with attached(name, schedule_of(name, positions)):
            same_survivors(forward(name, row), 0, references[positions])
    finally:
        model.set_attn_implementation(before)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "decoder"), ALL)
def test_every_decoder_has_the_logits_of_the_reference(name, decoder):
    row, references = row_of(name, several(name), decoder)
    for positions, reference in references.items():
        with attached(name, schedule_of(name, positions), decoder):
            same_survivors(forward(name, row, decoder=decoder), 0, reference)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "decoder"), ALL)
def test_decoding_equals_recompute(name, decoder):
    row, references = row_of(name, several(name), decoder)
    for positions in references:
        decoded_like_recompute(name, row, positions, decoder)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "positions"), POSITIONS)
def test_padded_batch_equals_singles(name, positions):
    kinds = ("one", "apart", "none", "first")
    rows, references = zip(*(row_of(name, kind) for kind in kinds))
    with attached(name, schedule_of(name, positions)):
        logits = forward(name, *rows)
        for index, reference in enumerate(references):
            same_survivors(logits, index, reference[positions])
        answers, logits = generate(name, *rows)
        for index, row in enumerate(rows):
            single_answers, single_logits = generate(name, row)
            assert single_answers[0] == answers[index]
            same(logits[index], single_logits[0])


EARLY = {"before the decoder": Schedule((0, 3), (0.55, 0.3)), "injected": Schedule((3, 5), (0.55, 0.3), inject=2)}


@pytest.mark.slow
@pytest.mark.parametrize("early", EARLY)
@pytest.mark.parametrize(("name", "positions"), POSITIONS)
def test_the_first_layer_need_not_see_the_pictures(name, positions, early):
    """The cache of layer 0, by which models count positions, is then shorter than the prompt: against the reference,
    against decoding without a cache, and in a batch."""
    family, schedule = FAMILIES[name], replace(EARLY[early], positions=positions)
    if families.ATTACHABLE[model_of(name).config.model_type].first_drop(model_of(name).config):
        with pytest.raises(ValueError, match=says("layers", "features", "first")):
            attach(model_of(name), schedule)
        return
    rows = [row_of(name, kind)[0] for kind in ("one", "apart", "none", "first")]
    with attached(name, schedule) as model:
        answers, logits = generate(name, *rows)
        singles = [generate(name, row) for row in rows]
        got = [forward(name, row) for row in rows[:2]]
        model.generation_config.use_cache = False
        uncached = generate(name, rows[1])
        model.generation_config.use_cache = True
    for index, (answer, logit) in enumerate(singles):
        assert answer[0] == answers[index]
        same(logits[index], logit[0])
    same(uncached[1], singles[1][1])
    for row, logit in zip(rows, got):
        inputs = fresh(model_of(name), collate(family, row))
        reference = reference_logits(model_of(name), inputs, [row.pictures], schedule, positions, [row.prompt])
        if reference.gap > CLEAR and not schedule.inject:
            same_survivors(logit, 0, reference)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_rows_of_one_length_that_lose_different_numbers_of_tokens(name):
    """No row is padded before the first drop, so the model may make no mask at all; behind it one is needed."""
    row, references = row_of(name, "one")
    length = len(row.ids)
    text = next(text for n in range(length) if len((text := make_row(FAMILIES[name], model_of(name), n)).ids) == length)
    plain = forward(name, text)
    for implementation in ("sdpa", "eager"):
        model = model_of(name)
        before = model.config.get_text_config()._attn_implementation
        model.set_attn_implementation(implementation)
        try:
            with attached(name, schedule_of(name)):
                logits = forward(name, row, text)
        finally:
            model.set_attn_implementation(before)
        same_survivors(logits, 0, references["keep"])
        same(logits[1], plain[0])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "positions"), POSITIONS)
def test_ratio_of_one_is_vanilla(name, positions):
    rows = [row_of(name, kind)[0] for kind in (several(name), "none", "first")]
    vanilla_answers, vanilla = generate(name, *rows)
    with attached(name, schedule_of(name, positions, (1.0, 1.0, 1.0))):
        answers, logits = generate(name, *rows)
    assert answers == vanilla_answers
    same(logits, vanilla)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_text_alone_is_vanilla(name):
    rows = [row_of(name, kind)[0] for kind in ("none", "more text")]
    vanilla = forward(name, *rows)
    vanilla_answers, vanilla_logits = generate(name, *rows)
    with attached(name, schedule_of(name)):
        same(forward(name, *rows), vanilla)
        answers, logits = generate(name, *rows)
    assert answers == vanilla_answers
    same(logits, vanilla_logits)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_detach_restores_the_model(name):
    model, row = model_of(name), row_of(name, "apart")[0]
    fresh(model, {})
    before, logits = state(model), forward(name, row)
    _, generated = generate(name, row)
    with attached(name, schedule_of(name)):
        forward(name, row)
        generate(name, row)
    assert torch.equal(forward(name, row), logits)
    assert torch.equal(generate(name, row)[1], generated)
    fresh(model, {})
    assert state(model) == before


def state(model: Any) -> dict[str, Any]:
    """Hooks, attributes and config of a model and of what it is made of."""
    kinds = [name for name in vars(model) if "_hooks" in name]
    hooks = [dict(getattr(module, kind)) for module in model.modules() for kind in kinds]
    attributes = [sorted(vars(module)) for module in model.modules()]
    forwards = [vars(module).get("forward") for module in model.modules()]
    config = model.config.to_dict()
    return {
        "hooks": hooks,
        "attributes": attributes,
        "forwards": forwards,
        "config": config,
        "keys": [*model.state_dict()],
    }


@pytest.mark.parametrize("name", NAMES)
def test_the_trace_says_what_survives(name):
    row, references = row_of(name, "apart")
    trace: list[ForwardStep] = []
    model = attach(model_of(name), schedule_of(name), trace)
    try:
        generate(name, row)
    finally:
        detach(model)
    assert len(trace) == NEW and not any(step.survivors for step in trace[1:])
    assert [trace[0].kept(drop) for drop in range(3)] == [kept[0] for kept in references["keep"].kept]
    assert {positions.shape[-2:] for step in trace[1:] for positions in step.position_ids} <= {(1, 1)}


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_CLIPS)
@pytest.mark.parametrize("kind", ["clip", "clips", "mixed"])
def test_a_clip_is_a_picture(name, kind):
    if name.startswith("glm") and kind == "mixed":
        pytest.skip("clips are made of image tokens: transformers takes no picture beside one")
    row, references = row_of(name, kind)
    for positions, reference in references.items():
        with attached(name, schedule_of(name, positions)):
            same_survivors(forward(name, row), 0, reference)
        if kind == "clips":
            decoded_like_recompute(name, row, positions)


@pytest.mark.skipif("aria" not in NAMES, reason="Aria is refused on this release of transformers")
def test_pictures_that_nothing_tells_apart():
    model = model_of("aria")
    row = make_row(FAMILIES["aria"], model, *pieces_of("aria", "adjacent"))
    with attached("aria", schedule_of("aria")), pytest.raises(ValueError, match=says("1 runs", "2 feature maps")):
        forward("aria", row)


# ---- what the tests above would not let pass


def rebuilt_causal(own: Tensor, stages: Any, drop: int, column_BN: Tensor, keys: int, window: int | None) -> Tensor:
    """A plain causal mask instead of the model's own."""
    columns = column_BN.shape[1]
    allowed = torch.ones(columns, columns, dtype=torch.bool).tril().expand(len(column_BN), 1, -1, -1)
    return torch.nn.functional.pad(allowed, (0, keys - columns))


def first_columns(x: Tensor, column_BN: Tensor, dim: int) -> Tensor:
    """Positions of the first tokens instead of those of the survivors."""
    return x.narrow(dim, 0, column_BN.shape[1])


def by_row(ids_BN: Any, real_BN: Any, family: Any, image: int | None, video: int | None, shown: Any) -> Any:
    """One budget for all pictures of a row."""
    place_BN = ((ids_BN == image) | (ids_BN == video)) & real_BN
    return np.where(place_BN, np.cumsum(place_BN.any(1))[:, None] - 1, -1)


MUTANTS = {
    "mask rebuilt causal": (forward_of, "sliced_mask", rebuilt_causal),
    "rope of unsliced positions": (forward_of, "_taken", first_columns),
    "budget in the wrong unit": (plugin, "pictures_of", by_row),
}


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("name", NAMES)
def test_mutants_are_killed(name, mutant, monkeypatch):
    """By a prompt with pictures of two sizes and a shorter one without, padded."""
    rows, references = zip(*(row_of(name, kind) for kind in ("apart", "first")))

    def survivors_are_those_of_the_reference() -> None:
        with attached(name, schedule_of(name)):
            logits = forward(name, *rows)
            for index, reference in enumerate(references):
                same_survivors(logits, index, reference["keep"])

    survivors_are_those_of_the_reference()
    monkeypatch.setattr(*MUTANTS[mutant])
    with pytest.raises(AssertionError):
        survivors_are_those_of_the_reference()


@pytest.mark.parametrize(
    ("name", "decoder", "since"),
    [("smolvlm", None, TABLE["smolvlm"].since), ("llava", "gemma2", families.DECODERS_SINCE["gemma2"])],
)
def test_a_release_that_computes_a_class_otherwise_is_refused(name, decoder, since, monkeypatch):
    model = FAMILIES[name].make(decoder)
    for version, refused in ((OLDEST, True), (since, False)):
        monkeypatch.setattr(attention.transformers, "__version__", f"{version}.0")
        if refused:
            with pytest.raises(ValueError, match=says("attach()", since)):
                attach(model, schedule_of(name))
        else:
            detach(attach(model, schedule_of(name)))
