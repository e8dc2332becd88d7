"""Turns text into a Megatron dataset: PREFIX.bin with the tokens and PREFIX.idx with the documents.

    python tools/preprocess_data.py --input corpus/ --glob '**/*.txt' --output-prefix corpus \\
        --tokenizer-type SentencePieceTokenizer --tokenizer-model tokenizer.model

writes corpus.bin and corpus.idx; train on them with ``--data-path corpus``. A plain text file is one document, and so
is each line of a JSON-lines file and each row of a Parquet file. Documents keep the order of the input, whatever the
number of workers. Megatron takes the validation split from the end of that order: with --shuffle-documents it is a fair
sample.

Several machines share the work with --part K/N, or under Slurm

    srun --nodes 8 --ntasks-per-node 1 python tools/preprocess_data.py … --part slurm

and tools/merge_data.py puts the parts together, to the bytes that one process would have written. A part that was
interrupted is made again alone; finished ones are skipped.
"""

import argparse
import ctypes
import math
import multiprocessing
import os
import re
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy

from megatron_moa.command_line import output_files
from megatron_moa.command_line.numbers import positive
from megatron_moa.command_line.progress_bar import progress_bar
from megatron_moa.data import corpus, dataset_writer, tokenizers
from megatron_moa.data.dataset_writer import Manifest, Part
from megatron_moa.errors import OneLineParser, UserError, one_line_ending

PROGRAM = "preprocess_data"
MOST_WORKERS = 1024
TASK_BYTES = 1 << 20  # text a worker gets at once: about half a second of work
PR_SET_PDEATHSIG = 1  # of Linux: a worker must not wait for ever for work from a parent that was killed
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
TOKENIZER_TYPES = (*tokenizers.SENTENCEPIECE_TYPES, "HuggingFaceTokenizer")


@dataclass(frozen=True)
class Piece:
    """The documents of a file that :func:`corpus.texts` finds between ``start`` and ``end``.

    ``lines`` holds that range of a compressed file of JSON lines: it cannot be read from its middle.
    """

    file: corpus.TextFile
    start: int
    end: int
    input_bytes: int  # of the file as it lies there
    lines: bytes | None = None


@dataclass(frozen=True)
class Settings:
    """What a worker needs to know; it gets the loaded tokenizer by forking."""

    tokenizer: Any
    vocab_size: int
    dtype: type  # of the tokens in the .bin
    eod: int | None
    special_tokens: "SpecialTokens"


class SpecialTokens:
    """Counts the places of a text that a tokenizer reads as its special tokens, such as ``</s>``.

    A Hugging Face tokenizer does so, unless its ``split_special_tokens`` is set; a sentencepiece model does not.
    """

    def __init__(self, tokenizer: Any) -> None:
        inner = getattr(getattr(tokenizer, "_tokenizer", None), "tokenizer", None)  # Megatron wraps it twice
        added = getattr(inner, "added_tokens_decoder", {})
        self.ids = {str(token): number for number, token in added.items() if token.special and str(token)}
        longest_first = sorted(self.ids, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)))
        self.around_a_text = tokenizer.tokenize("") if self.ids else []

    def read_from(self, text: str, ids: Sequence[int]) -> Counter[str]:
        """How often each was read from a text whose tokens are ``ids``."""
        written = Counter(self.pattern.findall(text)) if self.ids else Counter()
        read = {name: ids.count(self.ids[name]) - self.around_a_text.count(self.ids[name]) for name in written}
        return Counter({name: min(read[name], written[name]) for name in written if read[name] > 0})


@dataclass
class Batch:
    """The documents of one task."""

    tokens: numpy.ndarray  # of all documents, end to end, as they lie in the .bin
    lengths: numpy.ndarray  # [documents], int32
    empty: int
    text_bytes: int
    special: Counter[str]  # special tokens spelled out in the texts
    input_bytes: int
    seconds: float  # a worker's time for it


@dataclass
class Totals:
    """What was written, and the time it took."""

    lengths: list[numpy.ndarray] = field(default_factory=list)
    empty: int = 0
    text_bytes: int = 0
    special: Counter[str] = field(default_factory=Counter)
    busy_seconds: float = 0.0  # of all workers together
    seconds: float = 0.0

    @property
    def documents(self) -> int:
        """How many have at least a token."""
        return sum(len(lengths) for lengths in self.lengths)

    @property
    def tokens(self) -> int:
        """Of all documents."""
        return sum(int(lengths.sum(dtype=numpy.int64)) for lengths in self.lengths)


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the flags, tokenizes, writes PREFIX.bin and PREFIX.idx."""
    args = parse_arguments(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leave through the clean-up
    with one_line_ending(PROGRAM, "nothing written"):
        preprocess(args)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags of this tool; those of the tokenizer are Megatron's."""
    parser = OneLineParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    corpus.add_input_flags(parser)
    group = parser.add_argument_group("tokenizer (as in training)")
    group.add_argument("--tokenizer-type", choices=TOKENIZER_TYPES, required=True)
    group.add_argument("--tokenizer-model", metavar="PATH", help="a .model file, or a Hugging Face folder")
    group.add_argument(
        "--tokenizer-hf-no-include-special-tokens",
        action="store_true",
        help="do not add the tokens that a Hugging Face tokenizer puts around a text",
    )
    group.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the tokenizer")
    group.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end each document with the tokenizer's end-of-document token",
    )
    group = parser.add_argument_group("output")
    group.add_argument("--output-prefix", required=True, metavar="PREFIX", help="writes PREFIX.bin and PREFIX.idx")
    group.add_argument("--overwrite", action="store_true", help="replace the files if they exist")
    group.add_argument("--shuffle-documents", type=int, metavar="SEED", help="put the documents in a random order")
    group = parser.add_argument_group("work")
    group.add_argument(
        "--workers",
        type=positive,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes on this machine; default: its cores",
    )
    group.add_argument(
        "--part",
        type=dataset_writer.part_from_flag,
        metavar="K/N",
        help="do the K-th of N shares of the input, for tools/merge_data.py; slurm: the task of srun that this is",
    )
    args = parser.parse_args(argv)
    if args.workers > MOST_WORKERS:
        parser.error(f"--workers {args.workers}: out of range; give 1 to {MOST_WORKERS}")
    if args.shuffle_documents is not None and args.shuffle_documents < 0:
        parser.error(f"--shuffle-documents {args.shuffle_documents}: out of range; give 0 or more")
    return args


def preprocess(args: argparse.Namespace) -> None:
    """Everything after the flags. Raises UserError."""
    files = corpus.find_text_files(args.input, args.glob, args.exclude, args.json_key, args.errors, compressed=True)
    tokenizers.check_tokenizer(args.tokenizer_type, args.tokenizer_model)
    if args.part is not None:
        preprocess_part(files, args)
        return
    targets = output_files.check_output("--output-prefix", args.output_prefix, (".bin", ".idx"), args.overwrite)
    settings = worker_settings(args)
    with output_files.written_whole("--output-prefix", targets) as (bin_path, idx_path):
        totals = write_dataset(list(pieces(files)), settings, args, bin_path, idx_path)
        if args.overwrite:
            dataset_writer.drop_index_cache(args.output_prefix)
    report(totals, args)
    print(f"written        {targets[0]}, {targets[1]} in {totals.seconds:.1f} s")
    print(
        f"use it with    --data-path {args.output_prefix} --tokenizer-type {args.tokenizer_type} "
        f"--tokenizer-model {args.tokenizer_model}"
    )


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
    report(totals, args)
    print(f"written        {prefix} ({' '.join(dataset_writer.PART_ENDINGS)}) in {totals.seconds:.1f} s")
    print(f"next           when all {part.count} parts are there: merge_data.py --output-prefix {args.output_prefix}")


def worker_settings(args: argparse.Namespace) -> Settings:
    """Loads the tokenizer. Raises UserError."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    tokenizer = tokenizers.build_tokenizer(args)
    from megatron.core.datasets.indexed_dataset import DType

    eod = end_of_document(tokenizer, args) if args.append_eod else None
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    return Settings(tokenizer, tokenizer.vocab_size, dtype, eod, SpecialTokens(tokenizer))


def decisive_settings(files: Sequence[corpus.TextFile], args: argparse.Namespace) -> dict[str, Any]:
    """What decides the documents and their order: parts belong together if these are equal."""
    names = ("tokenizer_type", "tokenizer_hf_no_include_special_tokens", "append_eod", "shuffle_documents")
    return {name: getattr(args, name) for name in (*names, "json_key", "errors")} | {
        "tokenizer": tokenizers.tokenizer_digest(args.tokenizer_model),
        "input": dataset_writer.input_digest(files),
    }


def report(totals: Totals, args: argparse.Namespace) -> None:
    """Prints what was made and how fast; MB are 10^6 bytes of text, decompressed and without JSON around it."""
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
    if totals.tokens:
        print(f"packing        {totals.text_bytes / totals.tokens:.2f} bytes per token")
    print(
        f"speed          {rate:.1f} MB/s of text, {totals.tokens / totals.seconds / 1e6:.2f} million tokens/s; "
        f"{rate / args.workers:.2f} MB/s per process, {args.workers} busy {busy:.0%} of the time"
    )


def end_of_document(tokenizer: Any, args: argparse.Namespace) -> int:
    """The id of the end-of-document token; raises UserError if the tokenizer has none."""
    try:
        eod = tokenizer.eod
    except (AttributeError, NotImplementedError, TypeError, ValueError):
        eod = None
    if eod is None or not 0 <= eod < tokenizer.vocab_size:
        raise UserError(
            f"--tokenizer-model {args.tokenizer_model}: has no end-of-document token (eos); add one to it, or use "
            "--no-append-eod to write the documents without a mark between them"
        )
    return int(eod)


def write_dataset(
    work: Sequence[Piece], settings: Settings, args: argparse.Namespace, bin_path: str, idx_path: str
) -> Totals:
    """Tokenizes the documents of ``work`` into the two files; a part keeps their order, whatever the order wanted."""
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
            batch.tokens.tofile(stream)
            totals.lengths.append(batch.lengths)
            totals.empty += batch.empty
            totals.text_bytes += batch.text_bytes
            totals.special += batch.special
            totals.busy_seconds += batch.seconds
            bar.update(batch.input_bytes)
    totals.seconds = time.perf_counter() - start
    return totals


def pieces(files: Sequence[corpus.TextFile], begin: int = 0, end: float = math.inf) -> Iterator[Piece]:
    """What of the files lies between two bytes of all of them end to end. JSON lines are cut there and into pieces of
    TASK_BYTES; any other file goes whole to where it begins, a Parquet file in a piece for each of its row groups.
    """
    offset = 0
    for file in files:
        if file.json_lines and not file.compressed:
            last = int(min(max(0, end - offset), file.size))
            for first in range(max(0, begin - offset), last, TASK_BYTES):
                stop = min(first + TASK_BYTES, last)
                yield Piece(file, first, stop, stop - first)
        elif file.parquet and begin <= offset < end:
            groups = corpus.row_groups(file)
            for group in range(groups):
                share = file.size * (group + 1) // groups - file.size * group // groups
                yield Piece(file, group, group + 1, share)
        elif begin <= offset < end:
            yield Piece(file, 0, file.size, file.size)
        offset += file.size


def tasks(work: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Puts pieces together to tasks of about TASK_BYTES; reads compressed JSON lines, which no worker can share."""
    task: list[Piece] = []
    size = 0
    for piece in work:
        for part in decompressed(piece) if piece.file.json_lines and piece.file.compressed else (piece,):
            task.append(part)
            size += max(0 if part.file.parquet else part.end - part.start, part.input_bytes)
            if size >= TASK_BYTES:
                yield task
                task, size = [], 0
    if task:
        yield task


def decompressed(piece: Piece) -> Iterator[Piece]:
    """The lines of a compressed file in pieces of about TASK_BYTES."""
    for offset, lines, input_bytes in corpus.blocks_of_lines(piece.file, TASK_BYTES):
        yield Piece(piece.file, offset, offset + len(lines), input_bytes, lines)


def tokenized(work: Iterator[list[Piece]], settings: Settings, workers: int) -> Iterator[Batch]:
    """The batches of all tasks in their order, from this process or from ``workers`` forked ones."""
    if workers == 1:
        for task in work:
            yield tokenize(task, settings)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), start_worker, (settings,))
    pending: deque[Future[Batch]] = deque()
    try:
        with signals_held():  # the first submit forks all workers; interrupted, it would lose track of one
            pending.append(pool.submit(tokenize_in_worker, next(work)))
        for task in work:
            pending.append(pool.submit(tokenize_in_worker, task))
            if len(pending) >= 4 * workers:  # a bound on memory; enough that no worker waits
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        for worker in multiprocessing.active_children():
            worker.kill()  # the pool sends SIGTERM, which a process that was just forked can lose, and waits for ever
        raise UserError(f"--workers {workers}: a worker was killed, probably for memory; use fewer workers") from None
    finally:
        with signals_held():
            pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def signals_held() -> Iterator[None]:
    """Puts Ctrl-C and SIGTERM off until the end. A signal mask would not do: another thread may take the signal."""
    caught: list[int] = []
    process = os.getpid()

    def hold(number: int, _: object) -> None:
        if os.getpid() != process:
            # A worker just forked: its pool ends it, when another died, before it has handlers of its own.
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        caught.append(number)

    previous = {number: signal.signal(number, hold) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if caught:
        signal.raise_signal(caught[0])


_worker_settings: Settings | None = None


def start_worker(settings: Settings) -> None:
    """Keeps the settings, which forking brought along; lets Ctrl-C, and the end of the parent, end the worker."""
    global _worker_settings
    _worker_settings = settings
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def tokenize_in_worker(task: list[Piece]) -> Batch:
    """What a forked worker does with a task."""
    assert _worker_settings is not None
    return tokenize(task, _worker_settings)


def tokenize(task: list[Piece], settings: Settings) -> Batch:
    """The token ids of a task's documents, each with its end-of-document token."""
    start = time.perf_counter()
    documents: list[numpy.ndarray] = []
    empty = text_bytes = 0
    special: Counter[str] = Counter()
    for piece in task:
        for text in corpus.texts(piece.file, piece.start, piece.end, piece.lines):
            ids = settings.tokenizer.tokenize(text) if text else []
            if not ids:
                empty += 1
                continue
            special += settings.special_tokens.read_from(text, ids)
            if settings.eod is not None and ids[-1] != settings.eod:  # some Hugging Face tokenizers add it themselves
                ids.append(settings.eod)
            documents.append(numpy.array(ids, dtype=numpy.int32))
            text_bytes += len(text.encode())
    tokens = numpy.concatenate(documents) if documents else numpy.zeros(0, dtype=numpy.int32)
    if tokens.size and int(tokens.max()) >= settings.vocab_size:
        raise UserError(
            f"--tokenizer-model: gives token {int(tokens.max())}, above its own vocabulary of {settings.vocab_size}; "
            "repair the tokenizer (its ids must have no holes)"
        )
    lengths = numpy.array([document.size for document in documents], dtype=numpy.int32)
    input_bytes = sum(piece.input_bytes for piece in task)
    seconds = time.perf_counter() - start
    return Batch(tokens.astype(settings.dtype), lengths, empty, text_bytes, special, input_bytes, seconds)


if __name__ == "__main__":
    main()
