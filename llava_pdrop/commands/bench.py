"""``llava-pdrop bench train``, ``bench prefill`` and ``bench generate``: their arguments, and what runs them."""

from __future__ import annotations

import argparse
from typing import Any

from llava_pdrop.commands.arguments import a_place, given


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command line takes. (No import of torch: this also runs for ``--help``. What is not given is as
    `bench.run` has it.)"""
    kinds = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    synthetic = "with random weights and synthetic batches"
    for name, summary, how, add in (
        ("train", "a training step, vanilla beside dropping", synthetic, add_train_arguments),
        ("prefill", "prompt and answer at inference", synthetic, add_prefill_arguments),
        (
            "generate", "time to the first token, per token, cache and throughput, vanilla beside dropping",
            "of the model in a directory with its weights, or of a shape with random ones", add_generate_arguments,
        ),
    ):  # fmt: skip
        own = kinds.add_parser(name, help=summary, description=f"Measure {summary}, {how}, on one device.")
        add(own)
        add_common_arguments(own)
        own.add_argument(  # which may also stand before WHAT, and is not to be taken back then
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )


def run(args: argparse.Namespace) -> None:
    """Runs one bench."""
    from llava_pdrop.bench import run as bench

    measures: dict[str, tuple[Any, Any]] = {
        "train": (bench.run_train, bench.TrainSettings),
        "prefill": (bench.run_prefill, bench.PrefillSettings),
        "generate": (bench.run_generate, bench.GenerateSettings),
    }
    measure, settings = measures[args.what]
    measure(settings(**given(args, settings)))


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``bench train``."""
    parser.add_argument(
        "--schedule", nargs="+", type=a_place, metavar="FILE",
        help="YAML with a pyramid_drop section, or a bare schedule, to measure beside vanilla (default: that of "
        "CONFIG or the shape)",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, metavar="N", help="measured steps per schedule")
    parser.add_argument("--warmup", type=int, metavar="N", help="steps before them, not counted")
    parser.add_argument(
        "--samples", type=int, metavar="N", help="samples per micro-batch (default: as CONFIG or the shape)"
    )
    parser.add_argument(
        "--images", nargs="+", metavar="WHICH",
        help="mixture (picture sizes as in training) or full (every tile used); both: a report of each",
    )  # fmt: skip
    parser.add_argument("--optimizer", help="auto (what fits), adamw, sharded (one of 8) or none")
    parser.add_argument(
        "--recompute", action=argparse.BooleanOptionalAction,
        help="activation checkpointing (default: as CONFIG or the shape)",
    )  # fmt: skip
    parser.add_argument(
        "--recompute-layers", nargs="+", metavar="WHICH",
        help="decoder layers to recompute, the first ones: all, a number, auto (what memory forces), or one of these "
        "for vanilla and for every schedule, such as 14,0. Several settings take turns: all auto",
    )  # fmt: skip
    parser.add_argument(
        "--card", metavar="NAME",
        help="GPU whose memory auto goes by and whose modelled time stands beside the measured one: H100, H200 or A100 "
        "(default: the device)",
    )  # fmt: skip
    parser.add_argument(
        "--attention", metavar="BACKEND", help="auto, sdpa, varlen or flash_attn (default: as CONFIG, else auto)"
    )
    parser.add_argument("--kernels", metavar="NAME", help="auto, eager, torch or liger (default: as CONFIG, else auto)")
    parser.add_argument(
        "--compare", action="store_true",
        help="also measure each design choice against its alternative, and every ranker at one drop, in the (first) "
        "setting of recomputation",
    )  # fmt: skip


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """What is measured, CONFIG with its overrides or ``--shape``, on what, and where it is written. (One list of words:
    argparse would lose a CONFIG that follows an option.)"""
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="CONFIG",
        help="YAML file or directory of a run, and section.key=value overrides: measures its model, without "
        "weights and data (generate: of a directory, a run or any model of attach(), with its weights)",
    )  # fmt: skip
    parser.add_argument("--shape", help="a model shape instead of CONFIG (default: llava-next-7b on CUDA, else tiny)")
    parser.add_argument("--seed", type=int, help="seed of weights, lengths, prompts and pictures")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    parser.add_argument("--out", type=a_place, metavar="DIR", help="directory of the three reports")


def add_prefill_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``bench prefill``."""
    parser.add_argument("--batch", type=int, nargs="+", metavar="N", help="batch sizes, in prompts")
    parser.add_argument(
        "--image-tokens", type=int, nargs="+", metavar="N",
        help="image tokens per prompt (default: CONFIG's largest picture, or 1, 5 and 9 tiles)",
    )  # fmt: skip
    parser.add_argument("--new-tokens", type=int, metavar="N", help="tokens per answer")
    parser.add_argument("--runs", type=int, metavar="N", help="measured runs per method")
    parser.add_argument("--attention", help="attn_implementation of the Hugging Face model")


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``bench generate``."""
    parser.add_argument("--batch", type=int, nargs="+", metavar="N", help="batch sizes, in prompts (default: 1 4)")
    parser.add_argument(
        "--image-tokens", type=int, nargs="+", metavar="N",
        help="image tokens per prompt of a shape or CONFIG (default: its largest picture)",
    )  # fmt: skip
    parser.add_argument("--new-tokens", type=int, metavar="N", help="tokens per answer (default: 32)")
    parser.add_argument("--runs", type=int, metavar="N", help="measured answers per method (default: 5)")
    parser.add_argument(
        "--attention", help="attn_implementation of the Hugging Face model (default: sdpa, or as the directory's)"
    )
