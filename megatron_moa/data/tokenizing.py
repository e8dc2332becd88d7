"""Tokenizes the documents of a task, and counts the special tokens that are written out in them."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from megatron_moa.data import corpus, tokenizers
from megatron_moa.data.pieces import Piece
from megatron_moa.errors import UserError, one_line


@dataclass(frozen=True)
class Settings:
    """Holds what a worker needs to know; it gets the loaded tokenizer by forking."""

    tokenizer: Any
    model: str  # --tokenizer-model, for messages
    vocab_size: int
    dtype: type  # of the tokens in the .bin
    eod: int | None
    special_tokens: SpecialTokens


class SpecialTokens:
    """Counts the places of a text that a tokenizer reads as its special tokens, such as ``</s>``.

    A Hugging Face tokenizer does so, unless its ``split_special_tokens`` is set; a sentencepiece model does not. Tokens
    for unknown text are counted, too.
    """

    def __init__(self, tokenizer: Any) -> None:
        inner = getattr(getattr(tokenizer, "_tokenizer", None), "tokenizer", None)  # Megatron wraps it twice
        added = getattr(inner, "added_tokens_decoder", {})
        self.ids = {str(token): number for number, token in added.items() if token.special and str(token)}
        longest_first = sorted(self.ids, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)))
        self.around_a_text = tokenizer.tokenize("")
        self.unknown = tokenizer.unk  # its id, or None

    def read_from(self, text: str, ids: Sequence[int]) -> Counter[str]:
        """Counts how often each was read from a text whose tokens are ``ids``."""
        written = Counter(self.pattern.findall(text)) if self.ids else Counter()
        read = {name: ids.count(self.ids[name]) - self.around_a_text.count(self.ids[name]) for name in written}
        return Counter({name: min(read[name], written[name]) for name in written if read[name] > 0})

    def unknown_among(self, ids: Sequence[int], written: Counter[str]) -> int:
        """Counts the unknown tokens of a text, but for those that are spelled out in it.

        Args:
            ids: the text's tokens.
            written: what :meth:`read_from` returns for it.
        """
        spelled_out = sum(count for name, count in written.items() if self.ids[name] == self.unknown)
        return ids.count(self.unknown) - self.around_a_text.count(self.unknown) - spelled_out


@dataclass
class Batch:
    """Holds the tokens of one task."""

    tokens: numpy.ndarray  # of all documents, end to end, as they lie in the .bin
    lengths: numpy.ndarray  # [documents], int32
    empty: int
    text_bytes: int
    special: Counter[str]  # special tokens spelled out in the texts
    unknown: int  # tokens that stand for text which the tokenizer has no token for
    input_bytes: int
    seconds: float  # a worker's time for it


def worker_settings(args: argparse.Namespace) -> Settings:
    """Loads the tokenizer. Raises UserError."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    tokenizer = tokenizers.build_tokenizer(args)
    from megatron.core.datasets.indexed_dataset import DType

    eod = end_of_document(tokenizer, args) if args.append_eod else None
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    inner = tokenizer._tokenizer.tokenizer
    if hasattr(inner, "model_max_length"):
        inner.model_max_length = sys.maxsize  # it would warn of longer texts, but training cuts documents itself
    special_tokens = SpecialTokens(tokenizer)
    if leaves_out_characters(tokenizer, special_tokens.around_a_text):
        print("note           the tokenizer leaves out characters that it has no token for, uncounted", flush=True)
    return Settings(tokenizer, args.tokenizer_model, tokenizer.vocab_size, dtype, eod, special_tokens)


def leaves_out_characters(tokenizer: Any, around_a_text: Sequence[int]) -> bool:
    """Returns whether a tokenizer gives no token for a character that hardly any has: a hieroglyph."""
    try:
        return tokenizer.tokenize("\U00013000") == around_a_text
    except Exception:  # it tells of each such text
        return False


def end_of_document(tokenizer: Any, args: argparse.Namespace) -> int:
    """Returns the id of the end-of-document token; raises UserError if the tokenizer has none."""
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


def tokenize(task: list[Piece], settings: Settings) -> Batch:
    """Returns the token ids of a task's documents, each with its end-of-document token."""
    start = time.perf_counter()
    documents: list[numpy.ndarray] = []
    empty = text_bytes = unknown = 0
    special: Counter[str] = Counter()
    for piece in task:
        for text in corpus.texts(piece.file, piece.start, piece.end, piece.lines):
            ids = tokens_of(text, piece.file, settings) if text else []
            if not ids or ids == settings.special_tokens.around_a_text:
                empty += 1
                continue
            written = settings.special_tokens.read_from(text, ids)
            special += written
            unknown += settings.special_tokens.unknown_among(ids, written)
            if settings.eod is not None and ids[-1] != settings.eod:  # some Hugging Face tokenizers add it themselves
                ids.append(settings.eod)
            documents.append(numpy.array(ids, dtype=numpy.int32))
            text_bytes += len(text.encode())
    tokens = numpy.concatenate(documents) if documents else numpy.zeros(0, dtype=numpy.int32)
    if tokens.size and int(tokens.max()) >= settings.vocab_size:
        raise UserError(
            f"--tokenizer-model {settings.model}: gives token {int(tokens.max())}, above its own vocabulary of "
            f"{settings.vocab_size}; repair the tokenizer (its ids must have no holes)"
        )
    lengths = numpy.array([document.size for document in documents], dtype=numpy.int32)
    input_bytes = sum(piece.input_bytes for piece in task)
    seconds = time.perf_counter() - start
    return Batch(tokens.astype(settings.dtype), lengths, empty, text_bytes, special, unknown, input_bytes, seconds)


def tokens_of(text: str, file: corpus.TextFile, settings: Settings) -> list[int]:
    """Returns the token ids of a text; raises UserError where the tokenizer fails on it."""
    try:
        return settings.tokenizer.tokenize(text)
    except MemoryError:
        raise corpus.too_large(file) from None
    except Exception as error:  # tokenizers raise anything
        raise UserError(
            f"--tokenizer-model {settings.model}: cannot tokenize a text of {file.path} ({one_line(error)[:300]}); "
            "mend the tokenizer, or leave the text out"
        ) from None
