"""Checks Megatron's index cache before a training: can it be written, is it whole, is it the data's."""

import json
import math
import os
import shlex
from pathlib import Path

import numpy

from megatron_moa.data.dataset import DatasetIndex, read_index
from megatron_moa.errors import UserError

_COMPARED = 1000  # samples of a cached index


def check_index_cache(prefix: str, cache_path: str | None, flag: str = "--data-path") -> None:
    """Raises UserError if Megatron's cached sample indices cannot be written, or are of other data.

    Megatron finds a cached index by path, split and sequence length, not by content: after the data were made again, or
    others were moved there, it would silently use document numbers and offsets of the old ones.
    """
    folder = cache_folder(prefix, cache_path)
    written = os.path.getmtime(prefix + ".idx")
    for path in sorted(folder.glob("*-description.txt")) if folder.is_dir() else []:
        try:
            described = json.loads(path.read_text())
            is_ours, length = described["dataset_path"] == prefix, int(described["sequence_length"])
        except (OSError, ValueError, TypeError, LookupError):
            continue
        if not is_ours:
            continue
        older = path.stat().st_mtime < written
        if older or not _fits(path, read_index(prefix, flag), length):
            what = "older than the data" if older else "of other data"
            raise UserError(f"{flag} {prefix}: the index cache is {what}; delete it: rm -r {shlex.quote(str(folder))}")
    if folder.is_dir() and any(folder.glob("*_index.npy")):
        return  # it may be all that the run needs; if not, index_cache.build says so
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        where = f"--data-cache-path {cache_path}" if cache_path else f"{flag} {prefix}"
        raise UserError(
            f"{where}: Megatron cannot write its index cache below {existing}; add --data-cache-path with a writable "
            "folder that all nodes see"
        )


def _fits(description: Path, index: DatasetIndex, length: int) -> bool:
    """Returns whether the first samples of a cached index have their ``length`` tokens in these data.

    True where its arrays cannot be read: :func:`check_cached_arrays` says what is wrong with them.
    """
    try:
        documents, samples = (
            numpy.load(f"{str(description).removesuffix('description.txt')}{name}_index.npy", mmap_mode="r")
            for name in ("document", "sample")
        )
        last = min(len(samples) - 1, _COMPARED)
        position, offset = map(int, samples[last])
    except (EOFError, OSError, TypeError, ValueError):
        return True
    *before, reached = map(int, documents[: position + 1])
    if max([*before, reached]) >= index.sequences or offset > index.tokens_between(reached, reached + 1):
        return False
    return sum(index.tokens_between(document, document + 1) for document in before) + offset == last * length


def cache_folder(prefix: str, cache_path: str | None) -> Path:
    return Path(cache_path) if cache_path else Path(prefix, "cache", "GPTDataset_indices")


def check_cached_arrays(folder: Path) -> None:
    """Raises UserError if an array of Megatron's index cache is cut off.

    Megatron takes any file of the right name for a finished one, also what a run left that was killed while it wrote.
    """
    for path in sorted(folder.glob("*_index.npy")):
        problem = _damage_of_array(path)
        if problem is not None:
            raise UserError(
                f"{path}, part of the index cache, {problem}; unless another run is writing it now, delete the cache, "
                f"it is made again: rm -r {shlex.quote(str(folder))}"
            )


def _damage_of_array(path: Path) -> str | None:
    """What is wrong with a .npy file by its header and size, None for nothing."""
    try:
        with open(path, "rb") as stream:
            version = numpy.lib.format.read_magic(stream)
            read_header = {
                (1, 0): numpy.lib.format.read_array_header_1_0,
                (2, 0): numpy.lib.format.read_array_header_2_0,
            }[version]
            shape, _, dtype = read_header(stream)
            expected = stream.tell() + math.prod(shape) * dtype.itemsize
    except FileNotFoundError:
        return None  # deleted meanwhile: it is made again
    except (OSError, ValueError, KeyError):
        return "is not an array of numbers"
    size = path.stat().st_size
    return None if size == expected else f"is cut off or damaged, {size} bytes instead of {expected}"
