"""``llava-pdrop bench prefill``: what dropping saves where an answer is generated."""

from __future__ import annotations

import argparse
from pathlib import Path

TILES = (1, 5, 9)
"""Tiles of a picture whose tokens are measured by default: 576, 2,880 and 5,184 image tokens of a 336-pixel tower."""

OUT = Path("playground/benchmarks")


def add_shape_arguments(parser: argparse.ArgumentParser) -> None:
    """What is measured: CONFIG with its overrides, or ``--shape``. (One list of words: argparse would lose a CONFIG
    that follows an option.)"""
    parser.add_argument(
        "overrides", nargs="*", metavar="CONFIG",
        help="the YAML file of a run, or its directory, and section.key=value to change it: what is measured is its "
        "model, without weights and data",
    )  # fmt: skip
    parser.add_argument("--shape", help="a model shape instead (default: llava-next-7b on CUDA, else tiny)")


def add_prefill_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command line takes. (No import of torch: this also runs for ``--help``.)"""
    add_shape_arguments(parser)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], metavar="N", help="prompts at once")
    parser.add_argument(
        "--image-tokens", type=int, nargs="+", metavar="N",
        help="per prompt (default: those of CONFIG's largest picture, or of 1, 5 and 9 tiles)",
    )  # fmt: skip
    parser.add_argument("--new-tokens", type=int, default=32, metavar="N", help="tokens of every answer")
    parser.add_argument("--runs", type=int, default=10, metavar="N", help="counted runs of every method")
    parser.add_argument("--seed", type=int, default=0, help="of weights, prompts and pictures")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    parser.add_argument("--attention", default="sdpa", help="attn_implementation of the Hugging Face model")
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="where the three files go")


def check_counts(args: argparse.Namespace, **least: int) -> None:
    """Numbers of the command line against the least that each may be; lists by their smallest entry.

    Raises:
        ValueError: one is too small, or the seed is more than generators take.
    """
    for name, bound in least.items():
        given = getattr(args, name)
        value = min(given) if isinstance(given, list) else given
        if value is not None and value < bound:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {bound}, got {value}")
    if args.seed >= 2**32:
        raise ValueError(f"--seed must be less than 2**32, got {args.seed}")


def run_prefill(args: argparse.Namespace) -> None:
    """Measures, prints a table, and writes JSON, Markdown and PNG.

    Raises:
        ValueError: a shape, device or attention that is not there, a config that cannot be measured, or a count that
            is too small.
    """
    check_counts(args, batch=1, image_tokens=1, new_tokens=2, runs=1, seed=0)
    from llava_pdrop.bench.chosen import chosen_shape, file_name
    from llava_pdrop.bench.inference_measure import TEXT_TOKENS, bench_prefill
    from llava_pdrop.bench.inference_report import show, write
    from llava_pdrop.bench.nominal import paper_tokens
    from llava_pdrop.bench.report import check_out
    from llava_pdrop.bench.workload import full_picture
    from llava_pdrop.model.hardware import device_label, device_named

    check_out(args.out)
    device = device_named(args.device)
    name, shape = chosen_shape(args.shape, args.overrides, device.type == "cuda")
    geometry = shape.geometry
    own = [paper_tokens(geometry, full_picture(geometry))] if args.overrides else None
    image_tokens = args.image_tokens or own or [tiles * geometry.patches for tiles in TILES]
    room = shape.text_config().max_position_embeddings - sum(TEXT_TOKENS)
    if args.new_tokens >= room:
        raise ValueError(f"--new-tokens must be less than {room}: the decoder has no positions for more")
    if max(image_tokens) > room - args.new_tokens:
        raise ValueError(
            f"--image-tokens must be at most {room - args.new_tokens}: the decoder has no positions for more"
        )
    report = bench_prefill(
        name, shape, device, args.batch, image_tokens, args.new_tokens, args.runs, args.seed, args.attention
    )
    show(report)
    files = write(report, args.out, file_name("prefill", name, device_label(device)))
    print(f"written: {', '.join(str(file) for file in files)}")
