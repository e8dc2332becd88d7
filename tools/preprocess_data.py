"""Turns text into a Megatron dataset: PREFIX.bin with the tokens and PREFIX.idx with the documents.

    python tools/preprocess_data.py --input corpus/ --glob '**/*.txt' --output-prefix corpus \\
        --tokenizer-type SentencePieceTokenizer --tokenizer-model tokenizer.model

writes corpus.bin and corpus.idx; train on them with ``--data-path corpus``. A plain text file is one document, and so
is each line of a JSON-lines file. Documents keep the order of the input, whatever the number of workers. Megatron takes
the validation split from the end of that order: with --shuffle-documents it is a fair sample.
"""

import argparse
import ctypes
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy

from megatron_moa import data
from megatron_moa.errors import OneLineParser, UserError, one_line_errors

PROGRAM = "preprocess_data"
TASK_BYTES = 1 << 20  # text a worker gets at once: about half a second of work
PR_SET_PDEATHSIG = 1  # of Linux: a worker must not wait for ever for work from a parent that was killed
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
TOKENIZER_TYPES = (*data.SENTENCEPIECE_TYPES, "HuggingFaceTokenizer")


@dataclass(frozen=True)
class Piece:
    """The documents of a file that begin in the byte range ``[start, end)``."""

    file: data.TextFile
    start: int
    end: int


@dataclass(frozen=True)
class Settings:
    """What a worker needs to know; it gets the loaded tokenizer by forking."""

    tokenizer: Any
    vocab_size: int
    eod: int | None
    json_key: str
    errors: str


@dataclass
class Batch:
    """The documents of one task: their tokens end to end, and the length of each."""

    tokens: numpy.ndarray
    lengths: list[int]
    empty: int
    text_bytes: int
    input_bytes: int


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the flags, tokenizes, writes PREFIX.bin and PREFIX.idx."""
    args = parse_arguments(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leave through the clean-up
    try:
        with one_line_errors(PROGRAM):
            preprocess(args)
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted, nothing written", file=sys.stderr)
        raise SystemExit(130) from None


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags of this tool; those of the tokenizer are Megatron's."""
    parser = OneLineParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    data.add_input_flags(parser)
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
    group.add_argument("--workers", type=data.positive, default=len(os.sched_getaffinity(0)), metavar="N")
    return parser.parse_args(argv)


def preprocess(args: argparse.Namespace) -> None:
    """Everything after the flags. Raises UserError."""
    start = time.perf_counter()
    files = data.find_text_files(args.input, args.glob, args.exclude, args.json_key)
    targets = data.check_output("--output-prefix", args.output_prefix, (".bin", ".idx"), args.overwrite)
    data.check_tokenizer(args.tokenizer_type, args.tokenizer_model)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    tokenizer = data.build_tokenizer(args)
    eod = end_of_document(tokenizer, args) if args.append_eod else None
    settings = Settings(tokenizer, tokenizer.vocab_size, eod, args.json_key or "text", args.errors)
    with data.written_whole("--output-prefix", targets) as (bin_path, idx_path):
        totals = write_dataset(files, settings, args, bin_path, idx_path)
        if args.overwrite:  # Megatron finds these by name and would use them for the new documents
            shutil.rmtree(os.path.join(args.output_prefix, "cache", "GPTDataset_indices"), ignore_errors=True)
    documents, tokens = len(totals.lengths), sum(totals.lengths)
    print(f"documents      {documents:,}")
    print(f"tokens         {tokens:,}")
    print(f"empty, skipped {totals.empty:,}")
    print(f"packing        {totals.text_bytes / tokens:.2f} bytes per token")
    print(f"written        {targets[0]}, {targets[1]} in {time.perf_counter() - start:.1f} s")
    print(
        f"use it with    --data-path {args.output_prefix} --tokenizer-type {args.tokenizer_type} "
        f"--tokenizer-model {args.tokenizer_model}"
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
    files: Sequence[data.TextFile], settings: Settings, args: argparse.Namespace, bin_path: str, idx_path: str
) -> Batch:
    """Tokenizes all documents into the two files and returns the totals."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    dtype = DType.optimal_dtype(settings.vocab_size)
    totals = Batch(numpy.zeros(0, dtype), [], 0, 0, 0)
    ordered_path = f"{bin_path}.ordered" if args.shuffle_documents is not None else bin_path
    builder = IndexedDatasetBuilder(ordered_path, dtype=dtype)
    try:
        with progress_bar(sum(file.size for file in files)) as bar:
            for batch in tokenized(tasks(files), settings, args.workers):
                add_documents(builder, batch.tokens, batch.lengths)
                totals.lengths += batch.lengths
                totals.empty += batch.empty
                totals.text_bytes += batch.text_bytes
                bar.update(batch.input_bytes)
        if not totals.lengths:
            raise UserError(f"--input {' '.join(args.input)}: no document with text; give files that are not empty")
        if args.shuffle_documents is not None:
            builder.data_file.close()
            builder = IndexedDatasetBuilder(bin_path, dtype=dtype)
            totals.lengths = copy_shuffled(ordered_path, totals.lengths, args.shuffle_documents, builder)
        builder.finalize(idx_path)
    finally:
        builder.data_file.close()
        if ordered_path != bin_path and os.path.exists(ordered_path):
            os.unlink(ordered_path)
    return totals


def add_documents(builder: Any, tokens: numpy.ndarray, lengths: Sequence[int]) -> None:
    """Adds documents that lie end to end in ``tokens``."""
    begin = 0
    for length in lengths:
        builder.add_document(tokens[begin : begin + length], [length])
        begin += length


def copy_shuffled(path: str, lengths: Sequence[int], seed: int, builder: Any) -> list[int]:
    """Copies the documents of a .bin in a random order; returns their lengths in that order."""
    tokens = numpy.memmap(path, builder.dtype, "r")
    ends = numpy.cumsum(lengths, dtype=numpy.int64)
    order = numpy.random.default_rng(seed).permutation(len(lengths))
    for document in order:
        length = lengths[document]
        builder.add_document(tokens[ends[document] - length : ends[document]], [length])
    return [lengths[document] for document in order]


def progress_bar(total: int) -> Any:
    """Bytes read, on stderr; in a log file a line every half minute."""
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # no thread besides the workers' fork
    pace = {} if sys.stderr.isatty() else {"delay": 30, "mininterval": 30}
    with signals_held():  # a half-built bar complains when it is deleted
        return tqdm(total=total, unit="B", unit_scale=True, desc="tokenizing", file=sys.stderr, leave=False, **pace)


def tasks(files: Sequence[data.TextFile]) -> Iterator[list[Piece]]:
    """Cuts the input into tasks of about TASK_BYTES: small files together, JSON lines by byte ranges."""
    task: list[Piece] = []
    size = 0
    for file in files:
        step = TASK_BYTES if file.json_lines else max(1, file.size)
        for start in range(0, max(1, file.size), step):
            end = min(start + step, file.size)
            task.append(Piece(file, start, end))
            size += end - start
            if size >= TASK_BYTES:
                yield task
                task, size = [], 0
    if task:
        yield task


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
    documents: list[numpy.ndarray] = []
    empty = text_bytes = 0
    for piece in task:
        for text in texts(piece, settings):
            ids = settings.tokenizer.tokenize(text) if text else []
            if not ids:
                empty += 1
                continue
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
    input_bytes = sum(piece.end - piece.start for piece in task)
    return Batch(tokens, [document.size for document in documents], empty, text_bytes, input_bytes)


def texts(piece: Piece, settings: Settings) -> Iterator[str]:
    """The documents of a piece; blank lines of a JSON-lines file are none."""
    path = piece.file.path
    if not piece.file.json_lines:
        yield data.decode_text(data.read_bytes(path), path, 0, settings.errors)
        return
    for offset, line in data.lines_between(path, piece.start, piece.end):
        text = data.json_text(line, path, offset, settings.json_key, settings.errors)
        if text is not None:
            yield text


if __name__ == "__main__":
    main()
