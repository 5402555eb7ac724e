"""``python -m llava_pdrop.bench.gpu``: the arguments of ``scripts/gpu_check.sh``."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path

from llava_pdrop.bench.gpu import runner
from llava_pdrop.bench.gpu.stages import STAGES, chosen, limit_of
from llava_pdrop.errors import UserError

OUT = Path("checkpoints/gpu_check")


def main(words: list[str] | None = None) -> int:
    """Runs the check, or (``--child``) its stages in this process. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="gpu_check.sh",
        description="Measures all that needs a GPU, stage by stage, and packs the results.",
        epilog="Stages: " + ", ".join(f"{name} (up to {stage.seconds} s)" for name, stage in STAGES.items()),
    )
    parser.add_argument(
        "--stages", metavar="A,B", help="only these (default: all but learn and generate; ranks only with several GPUs)"
    )
    parser.add_argument(
        "--seconds", type=float, metavar="N",
        help="time limit of all of them together (default: the sum of their limits)",
    )  # fmt: skip
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal at tiny shapes")
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help=f"for the results (default: {OUT})")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--ends", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if args.child:
        from llava_pdrop.bench.gpu.check import run_stages
        from llava_pdrop.runtime.device import device_named

        return run_stages(args.stages.split(","), args.ends, args.child, device_named(args.device))
    if args.seconds is not None and not args.seconds > 0:
        parser.error(f"--seconds must be more than 0, got {args.seconds:g}")
    try:
        names = chosen(args.stages, args.device, _gpus(args.device))
        seconds = limit_of(names) if args.seconds is None else args.seconds
        return runner.check(names, seconds, args.device, args.out)
    except UserError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return 130


def _gpus(device: str) -> int:
    if device == "cpu":
        return 0
    import torch  # this process makes no CUDA context: counting needs none

    return torch.cuda.device_count()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: what was found is packed
    sys.exit(main())
