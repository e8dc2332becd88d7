"""Adds the flags that several tools share.

They name a checkpoint, a tolerance, and the mixture to convert a model to.
"""

from __future__ import annotations

import argparse
from typing import Any

from megatron_moa.command_line.megatron_flags import as_typed
from megatron_moa.command_line.numbers import positive, positive_number
from megatron_moa.errors import UserError
from megatron_moa.mixture.config import FORMS, GATES, MIXINGS


def add_iteration_flag(parser: argparse.ArgumentParser) -> None:
    """Adds ``--iteration N``, which checkpoint of a folder a tool takes; None is the latest."""
    parser.add_argument("--iteration", type=positive, metavar="N", help="which checkpoint; default: the latest")


def add_tolerance_flag(parser: argparse.ArgumentParser) -> None:
    """Adds ``--tolerance T``, how much logits of a conversion's source and result may differ."""
    what = "largest difference of logits over the largest logit; default 1e-5"
    parser.add_argument("--tolerance", type=positive_number, default=1e-5, metavar="T", help=what)


def add_target_flags(parser: argparse.ArgumentParser, required: bool) -> None:
    """Adds ``--mixing`` and what goes with it.

    Args:
        required: whether ``--mixing`` is; else a model stays as it is without it.
    """
    default = "" if required else "; default: the model stays as it is"
    parser.add_argument("--mixing", required=required, choices=MIXINGS, help=f"of the result{default}")
    form = "default: the source's; of a stock one type1, of SwiGLU one-sided with routed experts, else bi-sided"
    parser.add_argument("--form", choices=FORMS, help=form)
    dictionary = "the result's dictionary; default: the source's, of a stock one the form's default"
    parser.add_argument("--activations", nargs="+", default=(), metavar="NAME", help=dictionary)
    parser.add_argument("--gate", choices=GATES, help="of a MoA; default: the source's, else sigmoid")
    parser.add_argument("--gate-bias", action="store_true", help="gates get a bias, started at 0")


def target_settings(flags: argparse.Namespace) -> dict[str, Any] | None:
    """Returns what ``megatron_moa.trained.upcycling.target_mixture`` takes, from parsed flags.

    Without ``--mixing`` it is None.

    Raises:
        UserError: another flag of them without ``--mixing``.
    """
    settings = {name: getattr(flags, name) for name in ("mixing", "form", "activations", "gate", "gate_bias")}
    if flags.mixing is not None:
        return settings
    for name, value in settings.items():
        if value:
            raise UserError(f"{as_typed(name, value)}: has no effect without --mixing la or moa")
    return None
