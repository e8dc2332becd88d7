"""Builds Megatron's index cache before the run, in one process and without a GPU.

    python tools/build_cache.py --world-size 64 --data-path web --data-cache-path cache …    the run's own flags
    python tools/build_cache.py --world-size 64 --recipe moe-2b moa …                        or examples/pretrain.sh's

A run with the same flags then starts at once: no rank builds an index while all the others wait for it. Where nodes
have disks of their own, run this once on each, e.g. with srun --ntasks-per-node 1. docs/data.md, "The index cache".
"""

import argparse
import contextlib
import io
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_moa.command_line.numbers import positive
from megatron_moa.command_line.quiet_imports import quiet_imports
from megatron_moa.data import cached_arrays
from megatron_moa.errors import OneLineParser, UserError, one_line_errors

PROGRAM = "build_cache.py"
# What the cache does not depend on: it is neither read nor written, and a machine without a GPU need not serve it.
UNUSED = {
    "load": None,
    "save": None,
    "pretrained_checkpoint": None,
    "tensorboard_dir": None,
    "wandb_project": "",
    "exit_signal_handler": False,
    "fp8": None,
    "fp4": None,
    "transformer_impl": "local",
    "tp_comm_overlap": False,
    "moe_token_dispatcher_type": "alltoall",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Parses both tools' flags and builds."""
    parser = OneLineParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--world-size", type=positive, required=True, metavar="N", help="number of GPUs (processes) of the run"
    )
    parser.add_argument(
        "--recipe",
        nargs=2,
        metavar=("MODEL", "MIXING"),
        help="take the flags of examples/pretrain.sh MODEL MIXING, and its variables; further flags follow",
    )
    own, flags = parser.parse_known_args(argv)
    with one_line_errors(PROGRAM):
        build_cache(flags if own.recipe is None else recipe_flags(*own.recipe, flags), own.world_size)


def recipe_flags(model: str, mixing: str, flags: Sequence[str]) -> list[str]:
    """What examples/pretrain.sh would run with."""
    from megatron_moa.runs import recipes

    return recipes.recipe_flags(model, mixing, flags)


def build_cache(flags: Sequence[str], world_size: int) -> None:
    """Builds what a run of pretrain_gpt_moa.py with these flags will look for. Raises UserError."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same everywhere, and no GPU is taken from anybody
    # As the first of so many ranks. There is no group: Megatron's builder then does all by itself.
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size)}
    sys.argv = ["pretrain_gpt_moa.py", *flags]
    with quiet_imports():
        from megatron_moa import startup
        from megatron_moa.cpu import flags as cpu_flags

        cpu_flags.GPU_FLAGS = ()  # the run has GPUs
        startup.prepare()
        from megatron.training import training

        from megatron_moa.training import index_cache
        from pretrain_gpt_moa import datasets_provider

    with contextlib.redirect_stdout(io.StringIO()):  # Megatron lists all its arguments
        args = parse_run_flags()
    start = time.perf_counter()
    training.update_train_iters(args)
    files, uncached = [], 0
    # Megatron draws a number of samples for each phase of --phase-transition-iterations.
    for iteration in (0, *(args.phase_transition_iterations or ())):
        args.iteration = iteration
        sizes = training.get_train_valid_test_num_samples()
        print(f"samples        training {sizes[0]}, validation {sizes[1]}, test {sizes[2]}")
        found, without = index_cache.cache_files(datasets_provider(list(sizes)))
        files, uncached = files + found, uncached + without
    if uncached:
        raise UserError(
            "--data-cache-path is missing: without it Megatron keeps a blend's index nowhere and every rank builds it; "
            "add --data-cache-path FOLDER, here and in the run"
        )
    missing = [path for path in files if not os.path.isfile(path)]
    assert not missing, f"not written: {missing}"
    for folder in {os.path.dirname(path) for path in files}:
        cached_arrays.check_cached_arrays(Path(folder))
    size = sum(map(os.path.getsize, set(files)))
    print(f"there now      {len(set(files))} files, {size / 1e6:,.1f} MB, in {time.perf_counter() - start:.1f} s")
    print(f"in             {' '.join(sorted({os.path.dirname(path) for path in files}))}")


def parse_run_flags() -> argparse.Namespace:
    """Parses the run's flags from ``sys.argv``, and sets Megatron's global args.

    Megatron checks and completes the flags as at its start.
    """
    from megatron.training.arguments import validate_args
    from megatron.training.global_vars import set_global_variables

    from megatron_moa.training.arguments import settle_evaluation
    from megatron_moa.training.megatron_checks import megatron_checks
    from megatron_moa.training.parser import parse_flags
    from pretrain_gpt_moa import check

    args = parse_flags()
    if args.mock_data:
        raise UserError("--mock-data: has no index cache; give --data-path PREFIX")
    if args.use_checkpoint_args:
        raise UserError("--use-checkpoint-args: no checkpoint is read here; give the flags it stands for")
    vars(args).update(UNUSED)
    check(args)
    settle_evaluation(args)
    # These read a cache that is there, and never build one.
    args.dataloader_fast_cache_load = args.dataloader_defer_npy_index_mmap = False
    try:
        with megatron_checks(args):
            validate_args(args)
    except UserError as error:
        raise UserError(f"{error} (--world-size {args.world_size}, the run's flags)") from None
    set_global_variables(args)
    return args


if __name__ == "__main__":
    main()
