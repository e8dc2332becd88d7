"""Checks the flags that say which trained model a tool loads, before torch and Megatron are imported."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_moa.command_line.flags import our_flags
from megatron_moa.command_line.megatron_flags import check_words
from megatron_moa.errors import UserError

_DTYPES = {"--bf16": "bfloat16", "--fp16": "float16"}  # flags of Megatron's that models of both kinds of folders take


def check_megatron_flags(flags: argparse.Namespace, megatron_flags: Sequence[str]) -> None:
    """Raises UserError for a flag that neither a tool nor Megatron has.

    Args:
        flags: the tool's own, parsed; the nearest name may be one of theirs.
        megatron_flags: what is left for Megatron.
    """
    own = ["--" + name.replace("_", "-") for name in vars(flags)]
    check_words(megatron_flags, [*our_flags(), *own])


def check_source(flags: argparse.Namespace, megatron_flags: Sequence[str]) -> None:
    """Raises UserError for a folder that is not there, and for flags that do not fit it.

    Args:
        flags: a tool's own, parsed, with ``load``, a Megatron checkpoint's folder or a Hugging Face folder, whose
            content is checked when it is loaded, and ``iteration``, which checkpoint; None for the latest.
        megatron_flags: further flags for a checkpoint.
    """
    folder = flags.load
    if not Path(folder).is_dir():
        raise UserError(
            f"--load {folder}: no checkpoint there, nor a folder; give what training's --save named, or an export"
        )
    if not (Path(folder) / "config.json").is_file():
        check_megatron_flags(flags, megatron_flags)
    else:
        check_no_checkpoint_flags(folder, flags.iteration, megatron_flags)


def check_no_checkpoint_flags(folder: str | Path, iteration: int | None, megatron_flags: Sequence[str]) -> str:
    """Raises UserError for flags that are for a Megatron checkpoint, not for a Hugging Face folder.

    Returns:
        The name of the dtype to compute in: float32, if no flag says another.
    """
    if iteration is not None:
        raise UserError(f"--iteration {iteration}: {folder} is a Hugging Face folder, which has none; drop the flag")
    for flag in megatron_flags:
        if flag not in _DTYPES:
            raise UserError(f"{flag}: unknown, or for Megatron checkpoints; {folder} is a Hugging Face folder")
    if len(set(megatron_flags)) > 1:
        raise UserError(f"{' '.join(megatron_flags)}: a model computes in one of them; drop the other")
    return _DTYPES[megatron_flags[0]] if megatron_flags else "float32"
