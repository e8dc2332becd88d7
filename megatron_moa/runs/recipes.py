"""Reads the recipes of examples/: their names, and the flags of pretrain_gpt_moa.py they stand for."""

from __future__ import annotations

import argparse
import difflib
import os
import shlex
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from megatron_moa.errors import UserError
from megatron_moa.mixture.config import FORMS

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
RECIPE_MIXINGS = ("none", "la", "moa", *FORMS, *(f"la-{form}" for form in FORMS))
TENSOR_CORE_MULTIPLE = 8  # elements of two bytes; a row of a matrix must begin at a multiple of 16 bytes


def model_files() -> dict[str, Path]:
    """The models of examples/models by name, smallest names first.

    Raises:
        UserError: the folder is not there: the package is installed without its repository.
    """
    folder = EXAMPLES / "models"
    if not folder.is_dir():
        raise UserError(f"{folder}: no recipes there; run from a checkout of the repository")
    return {path.name.removesuffix(".sh"): path for path in sorted(folder.glob("*.sh"))}


def model_path(model: str) -> Path:
    """The file of a model: of examples/models by name, or any by its path.

    Raises:
        UserError: there is none; the text has the nearest names.
    """
    if "/" in model or model.endswith(".sh"):
        if not Path(model).is_file():
            raise UserError(f"{model}: there is no such recipe; see examples/models/")
        return Path(model)
    names = model_files()
    if model not in names:
        near = difflib.get_close_matches(model, names, n=3, cutoff=0.5)
        remedy = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names)}"
        raise UserError(f"{model}: there is no such recipe; {remedy}")
    return names[model]


def read_recipe(path: Path, baseline: bool = False) -> list[str]:
    """Returns the array MODEL_ARGS of a bash file, as bash reads it.

    With ``baseline`` it returns BASELINE_ARGS, too, where there are any.

    Raises:
        UserError: no such file, or no such array.
    """
    path = model_path(str(path))
    script = 'set -eu; source "$1"; : "${MODEL_ARGS[0]}"; printf "%s\\0" "${MODEL_ARGS[@]}"'
    if baseline:
        script += ' ${BASELINE_ARGS[@]+"${BASELINE_ARGS[@]}"}'
    environment = {**os.environ, "EXAMPLES": str(EXAMPLES)}  # as pretrain.sh has it: a model's file may lie anywhere
    done = _run(["bash", "-c", script, "bash", str(path.absolute())], environment)
    if done.returncode != 0:
        raise UserError(f"{path}: bash finds no array MODEL_ARGS there: {' '.join(done.stderr.split())}")
    return done.stdout.split("\0")[:-1]


def recipe_flags(
    model: str, mixing: str, flags: Iterable[str] = (), environment: Mapping[str, str] | None = None
) -> list[str]:
    """The flags of pretrain_gpt_moa.py that ``examples/pretrain.sh MODEL MIXING FLAGS`` would run with.

    Args:
        model: a name of :func:`model_files`, or the path of a recipe.
        mixing: one of :data:`RECIPE_MIXINGS`.
        flags: further ones; ``--mock-data`` among them gives the recipe's vocabulary without a tokenizer.
        environment: the script's variables (``TP``, ``MICRO_BATCH_SIZE``, …) beside this process's own, which hold too.

    Raises:
        UserError: no such recipe, or whatever else the script refuses.
    """
    model_path(model)
    if mixing not in RECIPE_MIXINGS:
        raise UserError(f"{mixing}: there is no such mixing; take one of {', '.join(RECIPE_MIXINGS)}")
    # One process: how it is launched does not matter here, and the script asks about addresses otherwise.
    variables = {**os.environ, "NPROC_PER_NODE": "1", "NNODES": "1", **(environment or {})}
    command = ["bash", str(EXAMPLES / "pretrain.sh"), model, mixing, *flags, "--dry-run"]
    done = _run(command, variables)
    if done.returncode != 0:
        raise UserError(" ".join(done.stderr.split()).removeprefix("pretrain.sh: ").removeprefix("error: "))
    try:
        words = shlex.split(done.stdout.replace("\\\n", ""))
        script = next(index for index, word in enumerate(words) if word.endswith("pretrain_gpt_moa.py"))
    except (ValueError, StopIteration):
        raise UserError(
            f"{model}: examples/pretrain.sh prints no command with it; a recipe only sets MODEL_ARGS and variables"
        ) from None
    return words[script + 1 :]


def _run(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Runs bash; what a file that is no recipe makes it print may be no text."""
    return subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
    )


def feed_forward_widths(flags: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Reads the widths of feed-forward layers or experts off a recipe's flags.

    Returns:
        By name, a width and the tensor-parallel ranks that share it; routed experts are not cut (as in the recipes).

    Raises:
        UserError: a width is missing, or no number.
    """
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False, exit_on_error=False)
    widths = ("ffn-hidden-size", "moe-ffn-hidden-size", "moe-shared-expert-intermediate-size")
    for name in (*widths, "num-experts", "tensor-model-parallel-size"):
        parser.add_argument(f"--{name}", type=int)
    try:
        own, _ = parser.parse_known_args(list(flags))
    except argparse.ArgumentError as error:
        raise UserError(f"{error.argument_name}: {error.message}; mend MODEL_ARGS") from None
    dense, routed, shared = own.ffn_hidden_size, own.moe_ffn_hidden_size, own.moe_shared_expert_intermediate_size
    tp = own.tensor_model_parallel_size or 1
    if own.num_experts is None:
        found = {"feed-forward width": (dense, tp)}
    else:
        found = {} if shared is None else {"shared expert's width": (shared, tp)}
        found["routed experts' width"] = (routed, 1)
    for name, (width, _) in found.items():
        if width is None or width < 1:
            raise UserError(f"MODEL_ARGS: {name} is {width}; give {' or '.join(f'--{flag}' for flag in widths)}")
    return found


def awkward_widths(widths: Mapping[str, tuple[int, int]]) -> str:
    """Names the widths that tensor cores or tensor parallelism do not take well.

    The names are in one line, which is empty if there is no such width.

    Args:
        widths: as :func:`feed_forward_widths` gives them.
    """
    found = []
    for name, (width, ranks) in widths.items():
        if width % ranks:
            found.append(f"{name} {width} is not divisible by TP {ranks}")
        elif width // ranks % TENSOR_CORE_MULTIPLE:
            share = f"{width // ranks} on each of {ranks} ranks" if ranks > 1 else str(width)
            kind = "odd" if width // ranks % 2 else f"no multiple of {TENSOR_CORE_MULTIPLE}"
            found.append(f"{name} {share} is {kind}")
    if not found:
        return ""
    return f"{', '.join(found)}: slow on tensor cores; FFN_MULTIPLE=128 rounds a recipe's widths up"
