"""Builds Megatron's index cache on the first rank for all.

The cache says what documents make up a sample; a run that finds the cache builds nothing. Megatron names its files by a
digest of what they depend on: the data's paths and the tokenizer's as they were typed, the number of samples, split,
sequence length and seed. docs/data.md, "The index cache".
"""

import errno
import os
from collections.abc import Sequence
from typing import Any, NoReturn

from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.training import get_args

from megatron_moa.errors import UserError
from megatron_moa.training.exit_codes import report

_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)
_ARRAYS = ("description.txt", "document_index.npy", "sample_index.npy", "shuffle_index.npy")
_BLEND_ARRAYS = ("description.txt", "dataset_index.npy", "dataset_sample_index.npy")


def cache_files(datasets: Any) -> tuple[list[str], int]:
    """Returns the cache's files behind datasets, and the number of indices that it keeps in none.

    Megatron caches nothing for mock data, and for a blend only under --data-cache-path.

    Args:
        datasets: a dataset, a blend, a list of them, or None where this rank reads no data.
    """
    if datasets is None:
        return [], 0
    if isinstance(datasets, list | tuple):
        found = [cache_files(dataset) for dataset in datasets]
        return [path for files, _ in found for path in files], sum(uncached for _, uncached in found)
    blended = isinstance(datasets, BlendedDataset)
    files, uncached = cache_files(datasets.datasets) if blended else ([], 0)
    folder, kind = datasets.config.path_to_cache, type(datasets).__name__
    if folder is None and not blended and not datasets.config.mock:
        folder = os.path.join(datasets.dataset.path_prefix, "cache", f"{kind}_indices")
    if not folder:
        return files, uncached + 1
    split = datasets.split if blended else datasets.index_split
    name = os.path.join(folder, f"{datasets.unique_description_hash}-{kind}-{split.name}-")
    return [*files, *(name + array for array in (_BLEND_ARRAYS if blended else _ARRAYS))], uncached


def build(builder: BlendedMegatronDatasetBuilder) -> Sequence[Any]:
    """Calls Megatron's ``builder.build()``, and checks the index cache and the amount of data.

    A cache that a node does not see and data that would run out are one line. All ranks call this function. The
    first one prints what it found in the cache and what it built.

    Returns:
        training, validation and test datasets, None where there is none.

    Raises:
        UserError: data without weights are too few for the run; the run may not build the cache, or cannot write it,
            and it is not there.
        SystemExit: code 2, on another rank than the first, whose node does not see the cache or cannot write it.
    """
    first = int(os.environ.get("RANK", "0")) == 0
    before = _names_in_cache(builder.config) if first else set()
    try:
        datasets = builder.build()
    except Exception as error:  # on the first rank Megatron puts an exception without a type around it
        missing = error if isinstance(error, OSError) else error.__cause__
        if isinstance(missing, OSError) and missing.errno in _UNWRITABLE:
            _leave(_unwritten(missing, builder.config.path_to_cache), first)
        if not isinstance(missing, FileNotFoundError) or not str(missing.filename).endswith("_index.npy"):
            raise
        _leave(_missing(missing.filename, first), first)
    files, uncached = cache_files(datasets)
    if builder.config.defer_npy_index_mmap:  # opened when the first sample is drawn
        for path in files:
            if not os.path.isfile(path):
                _leave(_missing(path, first), first)
    _check_enough(datasets, builder)
    if first and not builder.config.mock:
        built = [path for path in files if os.path.abspath(path) not in before]
        rest = f", and {uncached} kept in none: a blend's needs --data-cache-path" if uncached else ""
        if built:
            print(f"index cache: {len(built)} of {len(files)} files built{rest}", flush=True)
        else:
            print(f"index cache: all {len(files)} files found, none built{rest}", flush=True)
    return datasets


def _unwritten(error: OSError, cache_path: str | None) -> str:
    """What to say of a part of the cache that is missing and cannot be written."""
    where = f"--data-cache-path {cache_path}" if cache_path else "the index cache beside the data"
    return (
        f"{where}: lacks a part that this run needs, and {error.filename or 'its folder'} cannot be read or "
        f"written ({error.strerror}); give --data-cache-path a writable folder, or build "
        "the cache with tools/build_cache.py"
    )


def _missing(path: str, first: bool) -> str:
    """What to say of a file of the cache that is not there."""
    if first:  # which builds what is missing, unless it was told not to
        return (
            f"--dataloader-fast-cache-load, --dataloader-defer-npy-index-mmap: {path} is not there; build the index "
            "cache beforehand with tools/build_cache.py, or drop the flags"
        )
    return (
        f"{path}: the first rank has this part of the index cache, this node has not; give --data-cache-path a "
        "folder that all nodes see, or build the cache on every node beforehand with tools/build_cache.py"
    )


def _leave(problem: str, first: bool) -> NoReturn:
    """Ends this rank in one line, whichever rank it is."""
    if first:
        raise UserError(problem)
    report(f"error: {problem}")
    raise SystemExit(2)


def _names_in_cache(config: Any) -> set[str]:
    """The paths of all files in the folders that Megatron may read the cache from."""
    if config.path_to_cache:
        folders = {config.path_to_cache}
    else:
        blends = [config.blend, *(config.blend_per_split or ())]
        prefixes = {prefix for blend in blends if blend is not None for prefix in blend[0]}
        folders = {os.path.join(prefix, "cache", "GPTDataset_indices") for prefix in prefixes}
    return {
        os.path.join(os.path.abspath(folder), name)
        for folder in folders
        if os.path.isdir(folder)
        for name in os.listdir(folder)
    }


def _check_enough(datasets: Sequence[Any], builder: BlendedMegatronDatasetBuilder) -> None:
    """Checks that data without weights are enough for the run.

    Megatron repeats a single dataset, and those of a blend with weights, as often as needed; without weights it goes
    once through each, and a longer run would end in the middle.
    """
    for dataset, wanted, name in zip(datasets, builder.sizes, ("training", "validation", "test"), strict=True):
        unused = name == "training" and get_args().skip_train
        if isinstance(dataset, BlendedDataset) and not unused and wanted is not None and len(dataset) < wanted:
            raise UserError(
                f"the {name} data, named without weights, are read once: {len(dataset):,} samples, and the run draws "
                f"{wanted:,}; give each a weight (tools/blend.py), or shorten the run"
            )
