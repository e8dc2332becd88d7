"""Cuts files of text into pieces, and puts pieces together to tasks for workers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_moa.data import corpus

TASK_BYTES = 1 << 20  # text a worker gets at once: about half a second of work


@dataclass(frozen=True)
class Piece:
    """Names the documents of a file that :func:`corpus.texts` finds between ``start`` and ``end``.

    ``lines`` holds that range of a compressed file of JSON lines: it cannot be read from its middle.
    """

    file: corpus.TextFile
    start: int
    end: int
    input_bytes: int  # of the file as it lies there
    lines: bytes | None = None


def pieces(files: Sequence[corpus.TextFile], begin: int = 0, end: float = math.inf) -> Iterator[Piece]:
    """Cuts all files, laid end to end, into pieces between the bytes ``begin`` and ``end``.

    JSON lines that are not compressed are cut there and into pieces of TASK_BYTES. Any other file goes whole to where
    it begins, a Parquet file in a piece for each of its row groups.
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
    """Puts pieces together to tasks of about TASK_BYTES.

    It reads compressed JSON lines, which no worker can share.
    """
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
    """Reads the lines of a compressed file in pieces of about TASK_BYTES."""
    for offset, lines, input_bytes in corpus.blocks_of_lines(piece.file, TASK_BYTES):
        yield Piece(piece.file, offset, offset + len(lines), input_bytes, lines)
