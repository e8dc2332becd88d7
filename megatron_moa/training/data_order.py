"""Tells whether a run that goes on reads its data in another order than its checkpoint did.

Megatron 0.19.2 draws the order of a dataset from ``--seed`` and from how often the dataset is read in the whole run. A
longer run that reads it more often therefore has another order from its first sample on: a run that goes on at the same
sample number sees some samples again, and others later or never.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from megatron_moa.checkpoints.files import Checkpoint
from megatron_moa.command_line.megatron_flags import as_typed
from megatron_moa.data.blends import is_remote
from megatron_moa.data.dataset import TRAIN, read_index, split_bounds

_SEPARATE_BELOW = 0.8  # of a pass: a last one that is shorter is shuffled apart (GPTDataset)


def changed_order(args: argparse.Namespace, saved: argparse.Namespace, checkpoint: Checkpoint) -> Iterator[str]:
    """Yields a line for each dataset that the run reads in another order than before its checkpoint.

    Datasets in an object store and mock data are left out, and so are datasets that both name without weights: they are
    read once. Where the commands of a trained model read its checkpoint nothing is trained, and nothing is said.

    Args:
        args: the run's, validated by Megatron.
        saved: those in the checkpoint.
        checkpoint: where they are from, for the message.
    """
    if args.finetune or args.skip_train or args.mock_data or checkpoint.flag != "--load" or not checkpoint.iteration:
        return
    samples, samples_before = _samples(args), _samples(saved)
    if not (samples and samples_before) or samples == samples_before:  # none of a tool, which trains nothing
        return
    for prefix, share in _shares(args):
        if is_remote(prefix):
            continue
        passes, passes_before = (_passes(args, prefix, share(number)) for number in (samples, samples_before))
        if passes != passes_before:
            yield (
                f"{_length(args)}: the run now reads {prefix} {_described(*passes)}, and read it "
                f"{_described(*passes_before)} with the checkpoint's {_length(saved)} "
                f"({checkpoint}); Megatron draws another order of its samples for that, so the run sees some of them "
                "again and misses others"
            )


def _samples(args: argparse.Namespace) -> int:
    return args.train_samples or (args.train_iters or 0) * args.global_batch_size


def _length(args: argparse.Namespace) -> str:
    name = "train_samples" if args.train_samples else "train_iters"
    return as_typed(name, getattr(args, name))


def _shares(args: argparse.Namespace) -> list:
    """Each dataset of the training, and a function: how many of so many samples are built of it."""
    from megatron.core.datasets.blended_megatron_dataset_builder import _get_size_per_split_per_dataset
    from megatron.core.datasets.utils import normalize
    from megatron.training.utils import get_blend_and_blend_per_split

    blend, per_split = get_blend_and_blend_per_split(args)
    prefixes, weights = blend or per_split[0]
    if weights is None:
        return [(prefixes[0], lambda samples: samples)] if len(prefixes) == 1 else []

    def share_of(weight: float):
        surplus = args.mid_level_dataset_surplus
        return lambda samples: _get_size_per_split_per_dataset([weight, 1 - weight], [samples], surplus)[0][0]

    return [(prefix, share_of(weight)) for prefix, weight in zip(prefixes, normalize(weights), strict=True)]


def _passes(args: argparse.Namespace, prefix: str, samples: int) -> tuple[int, bool]:
    """How often samples go through a dataset, and whether the last pass is shuffled apart (GPTDataset)."""
    index = read_index(prefix)
    begin, end = (0, index.sequences) if args.split is None else split_bounds(args.split, index.sequences)[TRAIN]
    tokens = index.tokens_between(begin, end)
    passes = max(-(-(samples * args.seq_length + 1) // tokens), 1)
    if passes == 1:
        return 1, False
    in_last = samples - ((passes - 1) * tokens - 1) // args.seq_length
    return passes, in_last < int(_SEPARATE_BELOW * ((tokens - 1) // args.seq_length))


def _described(passes: int, last_is_apart: bool) -> str:
    words = "once" if passes == 1 else f"{passes} times"
    return f"{words}, the last time in part" if last_is_apart else words
