"""The flags that name the mixture a model is converted to: the same in every tool that converts to one."""

from __future__ import annotations

import argparse
from typing import Any

from megatron_moa.config import FORMS, GATES, MIXINGS
from megatron_moa.errors import UserError


def add_target_flags(parser: argparse.ArgumentParser, required: bool) -> None:
    """Adds ``--mixing`` and what goes with it.

    Args:
        required: whether ``--mixing`` is; else a model stays as it is without it.
    """
    default = "" if required else "; default: the model stays as it is"
    parser.add_argument("--mixing", required=required, choices=MIXINGS, help=f"of the result{default}")
    parser.add_argument("--form", choices=FORMS, help="default: the source's; of a stock one bi-sided or type1")
    parser.add_argument("--activations", nargs="+", default=(), metavar="NAME", help="all of the result's dictionary")
    parser.add_argument("--gate", choices=GATES, help="of a MoA; default: the source's, else sigmoid")
    parser.add_argument("--gate-bias", action="store_true", help="gates get a bias, started at 0")


def target_settings(flags: argparse.Namespace) -> dict[str, Any] | None:
    """What ``megatron_moa.upcycling.target_mixing`` takes, from parsed flags; None without ``--mixing``.

    Raises:
        UserError: another flag of them without ``--mixing``.
    """
    settings = {name: getattr(flags, name) for name in ("mixing", "form", "activations", "gate", "gate_bias")}
    if flags.mixing is not None:
        return settings
    for name, value in settings.items():
        if value:
            text = " ".join(value) if isinstance(value, (list, tuple)) else "" if value is True else value
            raise UserError(f"{f'--{name.replace("_", "-")} {text}'.strip()}: says nothing without --mixing la or moa")
    return None
