"""Makes the changes to Megatron that a training needs once its arguments are known.

All of them are in this one place. What must be changed before arguments are parsed,
:func:`megatron_moa.startup.prepare` changes. ``python -m megatron_moa.doctor --patches`` lists both, with reasons.
"""

from __future__ import annotations

import argparse

from megatron_moa.megatron_fixes import checkpointing, optimizer_resharding, random_states
from megatron_moa.mixture.config import MixtureConfig
from megatron_moa.training import flops, nan_guard, optimizer
from megatron_moa.training.exit_codes import StopSignals, catch_stop_signals
from megatron_moa.training.progress import Progress


def patch_training(args: argparse.Namespace, mixture: MixtureConfig | None, progress: Progress) -> StopSignals | None:
    """Changes Megatron's training loop in place; before ``pretrain``.

    Args:
        args: Megatron's, parsed, validated and global; ``save_retain_interval`` is taken from Megatron.
        mixture: the mixture; None for the stock model.
        progress: follows the training.

    Returns:
        What catches stop signals; None without --exit-signal-handler.
    """
    optimizer_resharding.install()
    random_states.keep_every_ranks()
    checkpointing.install(args)
    optimizer.install(args)
    flops.install(args, mixture)
    nan_guard.install()  # after checkpointing: what is not finite is refused before a save begins
    progress.install()
    return catch_stop_signals(args)
