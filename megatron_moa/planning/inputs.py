"""Turns a recipe's flags into what the planner needs.

Megatron parses and checks the flags, for any world size.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence

from megatron_moa import startup
from megatron_moa.errors import UserError
from megatron_moa.mixture.config import MixtureConfig
from megatron_moa.planning.model import Model, Split

# What a split recomputes, as flags of pretrain_gpt_moa.py.
_RECOMPUTE_FLAGS = {
    "none": (),
    "mixture": ("--moa-recompute",),
    "full": ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"),
}

# Flags of pretrain_gpt_moa.py that say what the planner chooses, or is told by a flag of its own.
_CHOSEN = {
    "--tensor-model-parallel-size": "--tp",
    "--pipeline-model-parallel-size": "--pp",
    "--num-virtual-stages-per-pipeline-rank": "--vpp",
    "--num-layers-per-virtual-pipeline-stage": "--vpp",
    "--expert-model-parallel-size": "--ep",
    "--expert-tensor-parallel-size": "--ep",
    "--context-parallel-size": "--cp",
    "--sequence-parallel": "--tp",
    "--micro-batch-size": "--micro-batch-size",
    "--recompute-activations": "--recompute",
    "--recompute-granularity": "--recompute",
    "--recompute-modules": "--recompute",
    "--recompute-method": "--recompute",
    "--recompute-num-layers": "--recompute",
    "--moa-recompute": "--recompute mixture",
    "--moa-mixing": "MIXING",
    "--moa-form": "MIXING",
}


def prepare() -> None:
    """Prepares this process for plans, for good, without a word on what its machine does not have.

    That says nothing about where the training will run.
    """
    warnings.filterwarnings("ignore")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):
        startup.prepare()


def check_further_flags(flags: Sequence[str]) -> None:
    """Refuses flags behind ``--`` that the planner chooses itself.

    Raises:
        UserError: there is such a flag; the text names the planner's own.
    """
    for flag in flags:
        if flag in ("-h", "--help"):
            raise UserError(f"{flag}: behind -- it would end the planner without a word; put it before")
        if (name := flag.partition("=")[0]) in _CHOSEN:
            raise UserError(f"{name}: chosen here by {_CHOSEN[name]}; drop it behind --")


def split_environment(split: Split) -> dict[str, str]:
    """The variables of examples/pretrain.sh that train with this split."""
    variables = {"TP": split.tp, "PP": split.pp, "CP": split.cp, "EP": split.ep, "MICRO_BATCH_SIZE": split.micro_batch}
    return {name: str(value) for name, value in variables.items()}


def split_flags(split: Split, model: Model) -> list[str]:
    """What this split needs beside :func:`split_environment`."""
    flags = []
    if split.vpp > 1:
        flags += ["--num-virtual-stages-per-pipeline-rank", str(split.vpp)]
    if split.recompute == "feed-forward":
        modules = [name for name, is_moe in (("mlp", False), ("moe", True)) if is_moe in model.moe_layers]
        return [*flags, "--recompute-granularity", "selective", "--recompute-modules", *modules]
    return [*flags, *_RECOMPUTE_FLAGS[split.recompute]]


@contextlib.contextmanager
def _world(gpus: int, flags: Sequence[str]) -> Iterator[None]:
    """Gives Megatron this command line and this many ranks inside a ``with`` block.

    Megatron does not print there; errors still come through.
    """
    before, argv = dict(os.environ), sys.argv
    os.environ.update(WORLD_SIZE=str(gpus), RANK="0", LOCAL_RANK="0")
    sys.argv = ["pretrain_gpt_moa.py", *flags]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        sys.argv = argv
        os.environ.clear()
        os.environ.update(before)


def parse(flags: Sequence[str], gpus: int) -> tuple[argparse.Namespace, MixtureConfig | None]:
    """Megatron's arguments for so many ranks, not validated yet, and the mixture.

    Raises:
        UserError: invalid flags of the mixture.
        SystemExit: flags that cannot be parsed, after one line that says so.
    """
    from megatron_moa.command_line.flags import mixture_from_args
    from megatron_moa.training.parser import parse_flags  # when megatron_moa.cpu has replaced what it must

    with _world(gpus, flags):
        args = parse_flags()
        mixture = mixture_from_args(args)
    if mixture is not None:
        args.bias_gelu_fusion = args.bias_swiglu_fusion = False  # as parse_arguments does
    return args, mixture


def validated(args: argparse.Namespace, split: Split | None = None) -> argparse.Namespace:
    """A copy that Megatron's validate_args has accepted, split as the arguments say, or as given.

    Raises:
        UserError: what Megatron finds wrong, or would fail at in the first step.
    """
    from megatron.training.arguments import validate_args

    from megatron_moa.training.megatron_checks import megatron_checks
    from megatron_moa.training.optimizer import check_validated_arguments

    args = copy.deepcopy(args)
    if split is not None:
        args.world_size = split.gpus
        args.tensor_model_parallel_size = split.tp
        args.sequence_parallel = split.tp > 1
        args.pipeline_model_parallel_size = split.pp
        args.num_virtual_stages_per_pipeline_rank = split.vpp if split.vpp > 1 else None
        args.expert_model_parallel_size = split.ep
        args.context_parallel_size = split.cp
        args.micro_batch_size = split.micro_batch
    with _world(args.world_size, ()), megatron_checks(args):
        validate_args(args)
    check_validated_arguments(args)
    return args
