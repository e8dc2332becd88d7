"""Checks the tokenizer, the datasets and the index cache of a training before it starts.

The tools that make datasets share these checks; corpus.py reads their texts. Nothing here imports torch or Megatron
until a function needs it, and no check reads a whole dataset.
"""

import argparse
from collections.abc import Sequence

from megatron_moa.data.blends import Source, data_sources, flag_of, is_remote
from megatron_moa.data.cached_arrays import cache_folder, check_cached_arrays, check_index_cache
from megatron_moa.data.dataset import TEST, TRAIN, VALIDATION, check_dataset, check_token_ids, read_index, split_bounds
from megatron_moa.data.tokenizers import build_tokenizer, check_tokenizer
from megatron_moa.errors import UserError


def check_data_files(args: argparse.Namespace) -> list[Source]:
    """Checks that the tokenizer's files and the datasets are there and can be read.

    That takes neither torch nor Megatron.

    Args:
        args: Megatron's parsed namespace, or what it says about data and tokenizer.

    Returns:
        The datasets; none for mock data.

    Raises:
        UserError: with the flag, its value and the remedy.
    """
    check_tokenizer(args)
    sources = data_sources(args)
    for source in sources:
        for where, prefix in source.prefixes:
            if not is_remote(prefix):
                read_index(prefix, where)
    return sources


def check_data_arguments(args: argparse.Namespace) -> None:
    """Checks what Megatron's flags say about data and tokenizer, before Megatron initialises.

    Args:
        args: Megatron's parsed namespace.

    Raises:
        UserError: with the flag, its value and the remedy.
    """
    sources = check_data_files(args)
    vocab_size = build_tokenizer(args).vocab_size
    _check_full_validation(args, sources)
    if not sources:
        return
    sequence_length = getattr(args, "seq_length", None)
    if not sequence_length:
        raise UserError("--seq-length is missing; add e.g. --seq-length 1024")
    evaluates = bool(getattr(args, "eval_iters", None)) or bool(getattr(args, "full_validation", False))
    skips_training = bool(getattr(args, "skip_train", False))
    cache_path, cache_folders = getattr(args, "data_cache_path", None), set()
    for source in sources:
        for where, prefix in source.prefixes:
            if is_remote(prefix):
                continue
            if source.part == TRAIN or evaluates:
                length = sequence_length
            else:
                length = 0  # not drawn from, but Megatron opens it and needs a token
            check_dataset(prefix, length, source.split, evaluates, where, needs_training=not skips_training)
            check_token_ids(prefix, vocab_size, where)
            check_index_cache(prefix, cache_path, where)
            cache_folders.add(cache_folder(prefix, cache_path))
        if not evaluates and len(source.prefixes) > 1:
            _check_unused_parts(source)
    if evaluates:
        _check_validation(sources)
    for folder in sorted(cache_folders):
        check_cached_arrays(folder)


def _check_validation(sources: Sequence[Source]) -> None:
    """Raises UserError if there is no validation data.

    Megatron evaluates at the end at the latest, and the run would be lost there.
    """
    split = sources[0].split
    if split is None and not any(source.part == VALIDATION for source in sources):
        raise UserError("--valid-data-path is missing: a part for validation; add it, or use --eval-iters 0")
    if split is not None and VALIDATION not in split_bounds(split, 1):
        raise UserError(f"--split {split}: leaves nothing to validation; use e.g. --split 99,1,0, or --eval-iters 0")


def _check_full_validation(args: argparse.Namespace, sources: Sequence[Source]) -> None:
    """Raises UserError for flags of full validation that do not go together.

    Megatron's full validation takes several validation sets, and fails at the first evaluation without them. It does
    not know several sets without full validation.
    """
    pair = ("full_validation", "multiple_validation_sets")
    given = [name for name in pair if getattr(args, name, False)]
    if len(given) == 1:
        other = next(name for name in pair if name not in given)
        raise UserError(
            f"{flag_of(given[0])}: Megatron takes it only with {flag_of(other)}; add that, or drop this flag"
        )
    if not given:
        return
    if not any(source.part == VALIDATION for source in sources):
        raise UserError("--full-validation: needs a dataset of its own to go through; add --valid-data-path PREFIX…")
    if any(source.part == TEST for source in sources):
        raise UserError("--full-validation: Megatron cannot evaluate test data beside it; drop --test-data-path")


def _check_unused_parts(source: Source) -> None:
    """Without an evaluation Megatron builds no sample of a blend's validation part, and cannot load that."""
    if source.split is None and source.part != TRAIN:
        where = source.prefixes[0][0].removesuffix(":")
        raise UserError(f"{where}: with --eval-iters 0 Megatron cannot load a {source.part} blend; leave it out")
    if source.split is not None and set(split_bounds(source.split, 1)) - {TRAIN}:
        raise UserError(
            f"--split {source.split}: with --eval-iters 0 Megatron cannot load a blend's validation and test parts; "
            "use --split 1,0,0"
        )
