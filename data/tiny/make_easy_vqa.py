"""Makes what the easy-vqa runs start from: decoder, tower and projector (README.md in ``easy_vqa/`` beside this file).

    python data/tiny/make_easy_vqa.py [--out data/tiny/easy_vqa] [--package PATH] [--seed 0] [--threads 1]

The decoder is trained on text alone, in the wording of the training questions of the package easy-vqa; tower and
projector on its training pictures. The tokenizer is that of the embedded default. Everything is drawn from ``--seed``.
Progress goes to the terminal and to ``bases.log`` in the output directory.
"""

from __future__ import annotations

import argparse
import platform
import sys
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "prepare"))  # easy_vqa.py and forms.py
from base_decoder import save_decoder
from base_text import COLORS, SHAPES, encode
from base_training import Log
from base_vision import save_projector, save_tower
from easy_vqa_decoder import test_decoder, train_decoder
from easy_vqa_text import BLANK, form_of
from easy_vqa_vision import easy_vqa, read_pictures, train_projector, train_tower

HERE = Path(__file__).resolve().parent


def main(arguments: list[str] | None = None) -> None:
    """Command line: see the top of the file."""
    parser = argparse.ArgumentParser(description="Makes decoder, tower and projector of the easy-vqa runs.")
    parser.add_argument("--out", type=Path, default=HERE / "easy_vqa")
    parser.add_argument("--package", type=Path, help="directory of the easy_vqa package (default: the installed one)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="more are faster, but round differently")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    log = Log(args.out / "bases.log", append=False)
    log(
        f"seed {args.seed}, {args.threads} threads, Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )
    package = args.package or easy_vqa.find_package()
    asked = easy_vqa.read_questions(package, "train").values()
    forms = sorted({form_of(question) for questions in asked for question, _ in questions})
    log(f"{len(forms)} forms of training questions")
    tokenizer = AutoTokenizer.from_pretrained(HERE / "language_model")
    decoder = train_decoder(tokenizer, forms, args.seed, log).to(torch.bfloat16).float()  # as it will be loaded
    test_decoder(decoder, tokenizer, forms, log)
    pictures = read_pictures(package)
    log(f"{len(pictures.pixels)} training pictures whose questions name shape and colour")
    tower = train_tower(pictures, args.seed, log)

    def embeddings(words: tuple[str, ...]) -> Tensor:
        return decoder.model.embed_tokens.weight.detach()[[encode(tokenizer, f" {word}")[0] for word in words]]

    projector = train_projector(
        tower, pictures, embeddings(SHAPES), embeddings(COLORS), embeddings((BLANK,))[0], args.seed, log
    )
    save_decoder(decoder, tokenizer, args.out / "language_model")
    save_tower(tower, args.out / "tower")
    save_projector(projector, args.out / "projector")
    for name, model in (("decoder", decoder), ("tower", tower), ("projector", projector)):
        size = sum(parameter.numel() for parameter in model.parameters())
        log(f"{name}: {size / 1e6:.2f} M parameters, {2 * size / 1e6:.2f} MB in bfloat16")


if __name__ == "__main__":
    main()
