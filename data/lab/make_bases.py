"""Makes the pretrained bases of the laboratory: a decoder of 16 layers and its projector (README.md beside this file).

The tower is that of the embedded default, ``data/tiny/tower``, and the tokenizer that of its decoder.

    python data/lab/make_bases.py [--out data/lab] [--seed 0] [--threads 1] [--keep-decoder]

Everything is drawn from ``--seed``. Progress goes to the terminal and to ``bases.log`` in the output directory.
"""

from __future__ import annotations

import argparse
import platform
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoTokenizer, CLIPVisionModel, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "prepare"))  # chains.py, which draws the pages
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tiny"))  # what both recipes share
from base_training import Log
from base_vision import save_projector, train_projector
from lab_decoder import save_decoder, test_decoder, train_decoder
from lab_text import PathTexts

HERE = Path(__file__).resolve().parent
TINY = HERE.parent / "tiny"


def main(arguments: list[str] | None = None) -> None:
    """Command line: see the top of the file."""
    parser = argparse.ArgumentParser(description="Makes the pretrained bases of the laboratory.")
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="more are faster, but round differently")
    parser.add_argument("--keep-decoder", action="store_true", help="use the decoder in --out, remake the projector")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    log = Log(args.out / "bases.log", append=args.keep_decoder)
    log(
        f"seed {args.seed}, {args.threads} threads, Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )
    tokenizer = AutoTokenizer.from_pretrained(TINY / "language_model")
    if args.keep_decoder:
        decoder = LlamaForCausalLM.from_pretrained(args.out / "language_model", dtype=torch.float32)
    else:
        decoder = train_decoder(tokenizer, args.seed, log).to(torch.bfloat16).float()  # as it will be loaded
        test_decoder(decoder, tokenizer, log)
        save_decoder(decoder, tokenizer, args.out / "language_model")
    tower = CLIPVisionModel.from_pretrained(TINY / "tower", dtype=torch.float32)
    words = torch.from_numpy(PathTexts(tokenizer, np.random.default_rng()).word_ids)
    words_VD = decoder.model.embed_tokens.weight.detach().float()[words]
    projector = train_projector(tower, words_VD, args.seed, log, steps=1000)
    save_projector(projector, args.out / "projector")
    for name, model in (("decoder", decoder), ("projector", projector)):
        size = sum(parameter.numel() for parameter in model.parameters())
        log(f"{name}: {size / 1e6:.3f} M parameters, {2 * size / 1e6:.3f} MB in bfloat16")


if __name__ == "__main__":
    main()
