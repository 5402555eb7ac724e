"""Makes the pretrained bases of the embedded default: decoder, vision tower, projector (README.md beside this file).

LLaVA starts from CLIP and Vicuna; this miniature starts from ``tower/`` and ``language_model/``: a decoder pretrained
on text alone and a tower pretrained on pictures alone. ``projector/`` joins them roughly, tile by tile, as CLIP's own
alignment with text would; stage 1 trains it through the decoder.

    python data/tiny/make_bases.py [--out data/tiny] [--seed 0] [--threads 2]

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
from transformers import AutoTokenizer, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "prepare"))  # forms.py, which draws the pages
from base_decoder import save_decoder, test_decoder, train_decoder
from base_text import TextPages, make_tokenizer
from base_training import Log
from base_vision import save_projector, save_tower, train_projector, train_tower

HERE = Path(__file__).resolve().parent


def main(arguments: list[str] | None = None) -> None:
    """Command line: see the top of the file."""
    parser = argparse.ArgumentParser(description="Makes the pretrained bases of the embedded default.")
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="more are faster, but round differently")
    parser.add_argument("--keep-decoder", action="store_true", help="use the decoder in --out, remake the rest")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    log = Log(args.out / "bases.log", append=args.keep_decoder)
    log(
        f"seed {args.seed}, {args.threads} threads, Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )
    if args.keep_decoder:
        decoder = LlamaForCausalLM.from_pretrained(args.out / "language_model", dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(args.out / "language_model")
    else:
        tokenizer = make_tokenizer()
        log(f"tokenizer: {len(tokenizer)} tokens")
        decoder = train_decoder(tokenizer, args.seed, log)
        test_decoder(decoder, tokenizer, log, grids=(12, 16, 24))
        save_decoder(decoder, tokenizer, args.out / "language_model")
    tower = train_tower(args.seed, log)
    words_VD = decoder.model.embed_tokens.weight.detach().float()[
        TextPages(tokenizer, np.random.default_rng()).word_ids
    ]
    projector = train_projector(tower, words_VD, args.seed, log)
    save_tower(tower, args.out / "tower")
    save_projector(projector, args.out / "projector")
    for name, model in (("decoder", decoder), ("tower", tower), ("projector", projector)):
        size = sum(parameter.numel() for parameter in model.parameters())
        log(f"{name}: {size / 1e6:.2f} M parameters, {2 * size / 1e6:.2f} MB in bfloat16")


if __name__ == "__main__":
    main()
