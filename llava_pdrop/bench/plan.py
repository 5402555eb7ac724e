"""What a config's schedule does to the image tokens, before anything is trained: ``llava-pdrop plan CONFIG``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from llava_pdrop.config import Config, ConfigError
from llava_pdrop.config_paths import number, part_configs
from llava_pdrop.geometry import ImageGeometry
from llava_pdrop.model.schedule import Schedule, image_tokens_by_stage, paper_tflop

PICTURES = ((336, 336), (640, 480), (480, 640), (1280, 720), (1000, 1400), (2000, 500))
"""(width, height) of typical pictures: square, photographs, a screenshot, a page, a banner."""


@dataclass(frozen=True)
class Row:
    """One picture: tokens before any drop and after each one, and the paper's TFLOP without and with the schedule."""

    size: tuple[int, int]
    tokens: list[int]
    vanilla: float
    dropping: float


@dataclass(frozen=True)
class Plan:
    """``layers`` of the decoder and the average share of image tokens over them, with a row per picture."""

    schedule: Schedule
    layers: int
    average: float
    rows: list[Row]


def make_plan(config: Config, pictures: Sequence[tuple[int, int]] = PICTURES) -> Plan:
    """Token counts and costs of ``config`` for ``pictures`` (width, height), from config.json numbers alone.

    Raises:
        ConfigError: neither config.json nor ``model.reference_shape`` gives the numbers.
    """
    decoder, tower = part_configs(config.model)
    if decoder is None or tower is None:
        part = "decoder" if decoder is None else "tower"
        raise ConfigError(
            f"{config.file}: the config.json of the {part} is not on this machine: download it, or give its numbers in "
            "model.reference_shape"
        )
    layers, hidden, intermediate = (
        _need(config, decoder, key) for key in ("num_hidden_layers", "hidden_size", "intermediate_size")
    )
    model = config.model
    tile, patch = model.image_size or _need(config, tower, "image_size"), _need(config, tower, "patch_size")
    geometry = ImageGeometry(tile, patch, model.aspect, model.merge, model.pinpoints, model.rounding)
    schedule = config.schedule.check(layers)
    rows = []
    for size in pictures:
        n = geometry.num_tokens(size)
        costs = [paper_tflop(n, layers, hidden, intermediate, plan) for plan in (Schedule(), schedule)]
        rows.append(Row(size, image_tokens_by_stage([n], schedule), *costs))
    return Plan(schedule, layers, schedule.average_ratio(layers), rows)


def show_plan(config: Config) -> None:
    """Prints `make_plan` as a table."""
    plan = make_plan(config)
    edges = (0, *plan.schedule.layers, plan.layers)
    table = Table(title=f"{config.name}: image tokens of one picture")
    table.add_column("picture", no_wrap=True)
    for first, stop in zip(edges, edges[1:]):
        table.add_column(f"layers {first}-{stop - 1}", justify="right")
    for title in ("TFLOP vanilla", "TFLOP dropping", "saved"):
        table.add_column(title, justify="right")
    same = len({tuple(row.tokens) for row in plan.rows}) == 1
    for row in plan.rows[:1] if same else plan.rows:
        saved = 1 - row.dropping / row.vanilla
        costs = (f"{row.vanilla:.3g}", f"{row.dropping:.3g}", f"{saved:.1%}")
        table.add_row("any size" if same else f"{row.size[0]}x{row.size[1]}", *map(str, row.tokens), *costs)
    console = Console()
    console.print(table)
    console.print(
        f"Average over {plan.layers} layers: {plan.average:.1%} of the image tokens. TFLOP by the paper's formula: "
        "1e12 multiply-accumulates of image tokens in the decoder, forward; text, tower and head are not in it.",
        style="dim",
    )


def _need(config: Config, part: dict[str, Any], key: str) -> int:
    value = number(part, key)
    if not isinstance(value, int):
        raise ConfigError(f"{config.file}: {key} is neither in the part's config.json nor in model.reference_shape")
    return value
