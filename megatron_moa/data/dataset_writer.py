"""Writes the two files of a Megatron dataset, whole or in parts that are merged.

PREFIX.bin holds the tokens of all documents end to end, PREFIX.idx their lengths and offsets (docs/data.md). A part is
such a dataset of its own beside a manifest, which is written last and says what the part was made from.
"""

import argparse
import glob
import hashlib
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy

from megatron_moa.data import corpus, dataset
from megatron_moa.errors import UserError, has_types

SHUFFLE_BYTES = 1 << 28  # what is gathered in memory before it is written
COPY_BYTES = 1 << 26
MANIFEST_FORMAT = 1
PART_ENDINGS = (".bin", ".idx", ".json")
_PART_NAME = re.compile(r"\.part-(\d+)-of-(\d+)\.json$")


def write_index(path: str, dtype: type, lengths: numpy.ndarray) -> None:
    """Writes an .idx byte for byte as Megatron's ``IndexedDatasetBuilder`` does.

    It makes no object for each document.

    Args:
        dtype: of the tokens in the .bin.
        lengths: [documents], int32, tokens of each.
    """
    ends = numpy.cumsum(lengths, dtype=numpy.int64)
    with open(path, "wb") as stream:
        stream.write(dataset.index_header(dtype, len(lengths)))
        stream.write(lengths.astype(numpy.int32, copy=False))
        stream.write((ends - lengths) * numpy.dtype(dtype).itemsize)
        stream.write(numpy.arange(len(lengths) + 1, dtype=numpy.int64))


def check_size(path: str, dtype: type, lengths: numpy.ndarray) -> None:
    """Raises OSError unless a .bin has the bytes of documents of these lengths."""
    found, expected = os.path.getsize(path), int(lengths.sum(dtype=numpy.int64)) * numpy.dtype(dtype).itemsize
    if found != expected:
        raise OSError(f"{found:,} bytes arrived instead of {expected:,}")


def shuffle_documents(
    paths: Sequence[str],
    dtype: type,
    lengths: numpy.ndarray,
    seed: int,
    target: BinaryIO,
    done: Callable[[int], object] = lambda _: None,
) -> numpy.ndarray:
    """Writes the documents of some .bin files, taken as one, in a random order.

    Documents are gathered by the hundred megabytes and read forwards within each: a disk need not seek for every one.

    Args:
        paths: .bin files whose documents lie end to end.
        lengths: [documents], tokens of each, in the order of the files.
        seed: decides the order, together with the number of documents.
        target: receives the tokens.
        done: told the bytes as they are written.

    Returns:
        [documents], the lengths in the new order.
    """
    itemsize = numpy.dtype(dtype).itemsize
    starts = numpy.cumsum(lengths, dtype=numpy.int64) - lengths
    sizes = [os.path.getsize(path) // itemsize for path in paths]
    first_tokens = numpy.cumsum([0, *sizes], dtype=numpy.int64)
    first_documents = numpy.searchsorted(starts, first_tokens)  # no document is empty, so the files' bounds are theirs
    sources = [numpy.memmap(path, dtype, "r") if size else None for path, size in zip(paths, sizes, strict=True)]
    order = numpy.random.default_rng(seed).permutation(len(lengths))
    new_lengths = lengths[order]
    new_ends = numpy.cumsum(new_lengths, dtype=numpy.int64)
    begin = written = 0
    while begin < len(order):
        end = int(numpy.searchsorted(new_ends, written + SHUFFLE_BYTES // itemsize, "right"))
        end = max(end, begin + 1)
        gathered = numpy.empty(int(new_ends[end - 1]) - written, dtype)
        places = new_ends[begin:end] - new_lengths[begin:end] - written
        forwards = numpy.argsort(order[begin:end])
        documents = order[begin:end][forwards]
        of_file = numpy.searchsorted(documents, first_documents)
        for number, source in enumerate(sources):
            for i in range(of_file[number], of_file[number + 1]):
                length, place = int(lengths[documents[i]]), int(places[forwards[i]])
                start = int(starts[documents[i]] - first_tokens[number])
                gathered[place : place + length] = source[start : start + length]
        target.write(gathered)
        done(gathered.nbytes)
        written, begin = int(new_ends[end - 1]), end
    return new_lengths


@dataclass(frozen=True)
class Part:
    """The share ``number`` (from 1) of ``count`` of an input."""

    number: int
    count: int

    def prefix(self, output_prefix: str) -> str:
        """What the names of this part's files begin with."""
        return f"{output_prefix}.part-{self.number:05}-of-{self.count:05}"

    def bounds(self, total: int) -> tuple[int, int]:
        """The first and last-plus-one byte of this part; the last one has the empty files at the end, too."""
        last = total + 1 if self.number == self.count else total * self.number // self.count
        return total * (self.number - 1) // self.count, last


def part_from_flag(text: str) -> Part:
    """An argparse type: ``K/N``, or ``slurm`` for what srun numbers its tasks with."""
    if text == "slurm":
        # Only srun's own tasks have these: in the batch script itself there would be one part of many.
        rank, count = os.environ.get("SLURM_PROCID"), os.environ.get("SLURM_STEP_NUM_TASKS")
        if rank is None or count is None:
            raise argparse.ArgumentTypeError("slurm: this is no task of srun; start it with srun, or give K/N")
        return Part(int(rank) + 1, int(count))
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    part = Part(int(match[1]), int(match[2])) if match else None
    if part is None or not 1 <= part.number <= part.count:
        raise argparse.ArgumentTypeError(f"{text}: K/N is wanted with K from 1 to N, e.g. 3/8, or slurm")
    return part


def input_digest(files: Sequence[corpus.TextFile]) -> str:
    """A fingerprint of the input: names, order, sizes and times of change."""
    listed = [(file.path, file.size, os.stat(file.path).st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


@dataclass(frozen=True)
class Manifest:
    """The record of what a part was made from and what it holds.

    Its file is PREFIX.part-K-of-N.json, there only if the part is finished.
    """

    part: int
    parts: int
    documents: int
    tokens: int
    dtype: str  # numpy's name
    settings: dict[str, Any]  # everything that decides the documents: equal in all parts
    format: int = MANIFEST_FORMAT

    def write(self, path: str) -> None:
        """Writes the manifest as JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: str) -> "Manifest":
        """Reads one; UserError if it is none of this format, or cannot be read."""
        try:
            held = json.loads(Path(path).read_text())
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); check the file and its permissions") from None
        except (ValueError, RecursionError):
            held = None
        types = {"part": int, "parts": int, "documents": int, "tokens": int, "dtype": str, "settings": dict}
        if not (
            has_types(held, types | {"format": int})
            and held.keys() == types.keys() | {"format"}
            and held["format"] == MANIFEST_FORMAT
            and min(held["documents"], held["tokens"]) >= 0
            and held["dtype"] in dataset.DTYPE_NAMES
            and _is_seed(held["settings"].get("shuffle_documents"))
        ):
            raise UserError(
                f"{path}: not the manifest of a part that this version writes; delete it and make the part again"
            )
        return cls(**held)

    @property
    def expected_sizes(self) -> dict[str, int]:
        """Bytes of the part's .bin and .idx."""
        return {
            ".bin": self.tokens * numpy.dtype(self.dtype).itemsize,
            ".idx": len(dataset.index_header(numpy.dtype(self.dtype).type, 0)) + 20 * self.documents + 8,
        }

    def check_files(self, prefix: str) -> None:
        """Raises UserError unless the part's files are there with the sizes this manifest says."""
        for ending, expected in self.expected_sizes.items():
            path = prefix + ending
            found = os.path.getsize(path) if os.path.exists(path) else 0
            if found != expected:
                raise UserError(f"{path}: {found:,} bytes instead of {expected:,}; {self.made_again}")

    @property
    def made_again(self) -> str:
        """The remedy where the part's files are damaged."""
        return f"make the part again: tools/preprocess_data.py … --part {self.part}/{self.parts} --overwrite"


def _is_seed(value: Any) -> bool:
    """Whether it is a seed of --shuffle-documents, or None."""
    return value is None or (type(value) is int and value >= 0)


def differing_settings(one: dict[str, Any], other: dict[str, Any]) -> str:
    """The names of the settings that differ, for a message; empty if none does."""
    return ", ".join(sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name)))


def finished_parts(output_prefix: str) -> tuple[list[str], list[Manifest]]:
    """The prefixes and manifests of all parts of an output, in order.

    Raises:
        UserError: parts are missing, damaged, or do not belong together.
    """
    folder = os.path.dirname(output_prefix) or "."
    start = os.path.basename(output_prefix)
    found = [
        Part(int(match[1]), int(match[2]))
        for name in (os.listdir(folder) if os.path.isdir(folder) else [])
        if name.startswith(start) and (match := _PART_NAME.fullmatch(name[len(start) :]))
    ]
    flag = f"--output-prefix {output_prefix}"
    if not found:
        raise UserError(f"{flag}: no finished part there; make them with tools/preprocess_data.py … --part K/N")
    counts = sorted({part.count for part in found})
    if len(counts) > 1:
        raise UserError(
            f"{flag}: parts of divisions into {' and '.join(map(str, counts))}; delete those that are not wanted, "
            f"e.g. rm {shlex.quote(output_prefix)}.part-*-of-{counts[0]:05}.*"
        )
    missing = sorted(set(range(1, counts[0] + 1)) - {part.number for part in found})
    if missing:
        listed = ", ".join(map(str, missing[:20])) + (", …" if len(missing) > 20 else "")
        raise UserError(
            f"{flag}: {len(missing)} of {counts[0]} parts missing ({listed}); make each with "
            f"tools/preprocess_data.py … --part K/{counts[0]}, e.g. --part {missing[0]}/{counts[0]}"
        )
    found.sort(key=lambda part: part.number)
    prefixes = [part.prefix(output_prefix) for part in found]
    manifests = [Manifest.read(f"{prefix}.json") for prefix in prefixes]
    for prefix, part, manifest in zip(prefixes, found, manifests, strict=True):
        if (manifest.part, manifest.parts) != (part.number, part.count):
            raise UserError(f"{prefix}.json: says part {manifest.part} of {manifest.parts}; give it its own name again")
        if names := differing_settings(manifests[0].settings, manifest.settings):
            raise UserError(
                f"{prefix}: does not belong to part 1, which was made with another {names}; make one of the two again: "
                "tools/preprocess_data.py … --part K/N --overwrite"
            )
        manifest.check_files(prefix)
    return prefixes, manifests


def merge(
    prefixes: Sequence[str],
    manifests: Sequence[Manifest],
    bin_path: str,
    idx_path: str,
    done: Callable[[int], object] = lambda _: None,
) -> None:
    """Writes the dataset that one process would have written.

    The parts come in their order, or shuffled as their settings say. Without shuffling bytes are copied and no token is
    looked at.

    Args:
        prefixes, manifests: of the parts, as :func:`finished_parts` gives them.
        bin_path, idx_path: what is written.
        done: told the bytes as they are written.

    Raises:
        UserError: a part's lengths are damaged.
    """
    dtype = numpy.dtype(manifests[0].dtype).type
    header = len(dataset.index_header(dtype, 0))
    of_parts = []
    for prefix, manifest in zip(prefixes, manifests, strict=True):
        found = numpy.fromfile(f"{prefix}.idx", numpy.int32, manifest.documents, offset=header)
        if found.sum(dtype=numpy.int64) != manifest.tokens or (found < 1).any():
            raise UserError(
                f"{prefix}.idx: damaged, its lengths are not those of {manifest.tokens:,} tokens; {manifest.made_again}"
            )
        of_parts.append(found)
    lengths = numpy.concatenate(of_parts)
    seed = manifests[0].settings["shuffle_documents"]
    paths = [f"{prefix}.bin" for prefix in prefixes]
    with open(bin_path, "wb") as target:
        if seed is None:
            for path in paths:
                _append(path, target, done)
        else:
            lengths = shuffle_documents(paths, dtype, lengths, seed, target, done)
    check_size(bin_path, dtype, lengths)
    write_index(idx_path, dtype, lengths)


def _append(path: str, target: BinaryIO, done: Callable[[int], object]) -> None:
    """Copies a file to the end of another, in the kernel."""
    with open(path, "rb", buffering=0) as source:
        while copied := os.sendfile(target.fileno(), source.fileno(), None, COPY_BYTES):
            done(copied)


def remove_parts(prefixes: Sequence[str]) -> None:
    """Deletes parts, and what killed runs left of them.

    Manifests go first, for without one a part counts as none.
    """
    for prefix in prefixes:
        for path in sorted(glob.glob(f"{glob.escape(prefix)}.*"), key=lambda path: not path.endswith(".json")):
            os.unlink(path)


def drop_index_cache(prefix: str) -> None:
    """Deletes Megatron's index cache beside a dataset that was replaced.

    Megatron would find the cache by its name, but its indices fit the old dataset.
    """
    shutil.rmtree(os.path.join(prefix, "cache", "GPTDataset_indices"), ignore_errors=True)
