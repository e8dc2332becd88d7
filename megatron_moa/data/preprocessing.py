"""Writes a dataset, or a part of one, from files of text."""

from __future__ import annotations

import argparse
import os
import shlex
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy

from megatron_moa.command_line import output_files
from megatron_moa.command_line.progress_bar import progress_bar
from megatron_moa.data import corpus, dataset_writer, tokenizers
from megatron_moa.data.dataset_writer import Manifest, Part
from megatron_moa.data.pieces import Piece, pieces, tasks
from megatron_moa.data.tokenizing import Settings, worker_settings
from megatron_moa.data.workers import signals_held, tokenized
from megatron_moa.errors import UserError


@dataclass
class Totals:
    """Counts what was written, and the time it took."""

    lengths: list[numpy.ndarray] = field(default_factory=list)
    empty: int = 0
    text_bytes: int = 0
    special: Counter[str] = field(default_factory=Counter)
    unknown: int = 0
    busy_seconds: float = 0.0  # of all workers together
    seconds: float = 0.0

    @property
    def documents(self) -> int:
        """Returns how many documents have at least a token."""
        return sum(len(lengths) for lengths in self.lengths)

    @property
    def tokens(self) -> int:
        """Returns the number of tokens of all documents."""
        return sum(int(lengths.sum(dtype=numpy.int64)) for lengths in self.lengths)


def preprocess(args: argparse.Namespace) -> None:
    """Does everything after the flags. Raises UserError."""
    files = corpus.find_text_files(args.input, args.glob, args.exclude, args.json_key, args.errors, compressed=True)
    tokenizers.check_tokenizer(args)
    written = [args.output_prefix + ending for ending in (".bin", ".idx")]
    if args.part is not None:
        written += [args.part.prefix(args.output_prefix) + ending for ending in dataset_writer.PART_ENDINGS]
    corpus.check_not_overwritten([*(file.path for file in files), args.tokenizer_model], "--output-prefix", written)
    if args.part is not None:
        preprocess_part(files, args)
        return
    targets = output_files.check_output("--output-prefix", args.output_prefix, (".bin", ".idx"), args.overwrite)
    settings = worker_settings(args)
    with output_files.written_whole("--output-prefix", targets, args.overwrite) as (bin_path, idx_path):
        totals = write_dataset(list(pieces(files)), settings, args, bin_path, idx_path)
        if args.overwrite:
            dataset_writer.drop_index_cache(args.output_prefix)
    report(totals, args)
    print(f"written        {targets[0]}, {targets[1]} in {totals.seconds:.1f} s")
    flags = ["--data-path", args.output_prefix, "--tokenizer-type", args.tokenizer_type]
    print(f"use it with    {shlex.join([*flags, '--tokenizer-model', args.tokenizer_model])}")


def preprocess_part(files: Sequence[corpus.TextFile], args: argparse.Namespace) -> None:
    """Writes a part and its manifest, unless it is finished already."""
    part: Part = args.part
    prefix = part.prefix(args.output_prefix)
    decisive = decisive_settings(files, args)
    output_files.check_output("--output-prefix", args.output_prefix, (".bin", ".idx"), overwrite=True)
    if os.path.exists(f"{prefix}.json") and not args.overwrite:
        manifest = Manifest.read(f"{prefix}.json")
        if names := dataset_writer.differing_settings(manifest.settings, decisive):
            raise UserError(
                f"--part {part.number}/{part.count}: {prefix}.json is of a part made with another {names}; choose "
                "another --output-prefix, or add --overwrite"
            )
        manifest.check_files(prefix)
        print(f"skipped        {prefix}: finished, {manifest.tokens:,} tokens; --overwrite makes it again")
        return
    settings = worker_settings(args)
    targets = [prefix + ending for ending in dataset_writer.PART_ENDINGS]
    with output_files.written_whole("--output-prefix", targets) as (bin_path, idx_path, json_path):
        share = list(pieces(files, *part.bounds(sum(file.size for file in files))))
        totals = write_dataset(share, settings, args, bin_path, idx_path)
        dtype = numpy.dtype(settings.dtype).name
        manifest = Manifest(part.number, part.count, totals.documents, totals.tokens, dtype, decisive)
        manifest.write(json_path)
        if os.path.exists(f"{prefix}.json") and not args.overwrite:
            raise UserError(f"--part {part.number}/{part.count}: another run has written {prefix} meanwhile; keep it")
    report(totals, args)
    print(f"written        {prefix} ({' '.join(dataset_writer.PART_ENDINGS)}) in {totals.seconds:.1f} s")
    command = shlex.join(["merge_data.py", "--output-prefix", args.output_prefix])
    print(f"next           when all {part.count} parts are there: {command}")


def decisive_settings(files: Sequence[corpus.TextFile], args: argparse.Namespace) -> dict[str, Any]:
    """Returns what decides the documents and their order: parts belong together if these are equal."""
    names = ("tokenizer_type", "tokenizer_hf_no_include_special_tokens", "append_eod", "shuffle_documents")
    return {name: getattr(args, name) for name in (*names, "json_key", "errors")} | {
        "tokenizer": tokenizers.tokenizer_digest(args.tokenizer_model),
        "input": dataset_writer.input_digest(files),
    }


def write_dataset(
    work: Sequence[Piece], settings: Settings, args: argparse.Namespace, bin_path: str, idx_path: str
) -> Totals:
    """Tokenizes the documents of ``work`` into the two files.

    A part keeps their order, whatever the order wanted.
    """
    seed = args.shuffle_documents if args.part is None else None
    ordered_path = bin_path if seed is None else f"{bin_path}.ordered"
    try:
        with open(ordered_path, "wb") as stream:
            totals = write_tokens(work, settings, args, stream)
        if not totals.documents and args.part is None:
            raise UserError(f"--input {' '.join(args.input)}: no document with text; give files that are not empty")
        lengths = numpy.concatenate(totals.lengths) if totals.lengths else numpy.zeros(0, numpy.int32)
        if seed is not None:
            with open(bin_path, "wb") as stream:
                lengths = dataset_writer.shuffle_documents([ordered_path], settings.dtype, lengths, seed, stream)
        dataset_writer.check_size(bin_path, settings.dtype, lengths)
        dataset_writer.write_index(idx_path, settings.dtype, lengths)
    finally:
        if ordered_path != bin_path and os.path.exists(ordered_path):
            os.unlink(ordered_path)
    return totals


def write_tokens(work: Sequence[Piece], settings: Settings, args: argparse.Namespace, stream: BinaryIO) -> Totals:
    """Writes the tokens of all documents in their order."""
    totals = Totals()
    start = time.perf_counter()
    title = "tokenizing" if args.part is None else f"tokenizing part {args.part.number} of {args.part.count}"
    with signals_held():  # a half-built bar complains when it is deleted
        progress = progress_bar(sum(piece.input_bytes for piece in work), title)
    with progress as bar:
        for batch in tokenized(tasks(work), settings, args.workers):
            stream.write(batch.tokens)  # not tofile, which overlooks an error of the last bytes it writes
            totals.lengths.append(batch.lengths)
            totals.empty += batch.empty
            totals.text_bytes += batch.text_bytes
            totals.special += batch.special
            totals.unknown += batch.unknown
            totals.busy_seconds += batch.seconds
            bar.update(batch.input_bytes)
    totals.seconds = time.perf_counter() - start
    return totals


def report(totals: Totals, args: argparse.Namespace) -> None:
    """Prints what was made and how fast.

    MB are 10^6 bytes of text, decompressed and without JSON around it.
    """
    rate = totals.text_bytes / totals.seconds / 1e6
    busy = totals.busy_seconds / totals.seconds / args.workers
    print(f"documents      {totals.documents:,}")
    print(f"tokens         {totals.tokens:,}")
    print(f"empty, skipped {totals.empty:,}")
    if totals.special:
        names = ", ".join(name for name, _ in totals.special.most_common(5))
        print(
            f"special tokens {totals.special.total():,} were written out in the texts ({names}) and read as such; "
            'with "split_special_tokens": true in its tokenizer_config.json the tokenizer reads them as text'
        )
    if totals.unknown:
        print(
            f"unknown tokens {totals.unknown:,} stand for text that the tokenizer has no token for, and that is lost; "
            "use one that falls back to bytes, or one trained on such texts"
        )
    if totals.tokens:
        print(f"packing        {totals.text_bytes / totals.tokens:.2f} bytes per token")
    print(
        f"speed          {rate:.1f} MB/s of text, {totals.tokens / totals.seconds / 1e6:.2f} million tokens/s; "
        f"{rate / args.workers:.2f} MB/s per process, {args.workers} busy {busy:.0%} of the time"
    )
