"""Reads from the flags which datasets a training is given: prefixes, weights, blend files."""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_moa.data.dataset import TEST, TRAIN, VALIDATION
from megatron_moa.errors import UserError


def is_remote(prefix: str) -> bool:
    """Whether a dataset lies in an object store, whose files are not checked."""
    return prefix.startswith(("s3://", "msc://"))


@dataclass(frozen=True)
class Source:
    """The datasets that serve one purpose first, and how they are split (None: not at all)."""

    prefixes: list[tuple[str, str]]  # where each was named (a flag; a file and its line), and the prefix
    split: str | None
    part: str


def data_sources(args: argparse.Namespace) -> list[Source]:
    """The datasets that the flags name, read as Megatron reads them; empty for mock data."""
    flags = ["data_path", "data_args_path", "train_data_path", "valid_data_path", "test_data_path"]
    given = {name: getattr(args, name, None) for name in [*flags, "per_split_data_args_path"]}
    shared = [name for name in ("data_path", "data_args_path") if given[name] is not None]
    separate = [name for name in flags[2:] if given[name] is not None]
    per_split = ["per_split_data_args_path"] if given["per_split_data_args_path"] is not None else []
    kinds = [[name] for name in shared] + ([separate] if separate else []) + ([per_split] if per_split else [])
    if getattr(args, "mock_data", False):
        if kinds:
            raise UserError(f"--mock-data: contradicts {flag_of(kinds[0][0])}; drop one of them")
        return []
    if not kinds:
        raise UserError(
            "--data-path is missing; add --data-path PREFIX (made by tools/preprocess_data.py), or --mock-data"
        )
    if len(kinds) > 1:
        raise UserError(
            f"{flag_of(kinds[0][0])} and {flag_of(kinds[1][0])}: two ways to name the data; drop one of them"
        )
    split = getattr(args, "split", None)
    if shared:
        if given["data_path"] is not None:
            prefixes = _prefixes("--data-path", given["data_path"])
            split = split or "969, 30, 1"  # what Megatron falls back to
        else:
            prefixes = read_blend_file("--data-args-path", given["data_args_path"])
            if split is None:
                raise UserError(f"--data-args-path {given['data_args_path']}: needs shares; add e.g. --split 99,1,0")
        return [Source(prefixes, split, TRAIN)]
    if split is not None:
        raise UserError(f"--split {split}: contradicts {flag_of(kinds[0][0])}, which names each part; drop --split")
    if per_split:
        named = read_blends_file("--per-split-data-args-path", given["per_split_data_args_path"])
        missing = f"--per-split-data-args-path {given['per_split_data_args_path']}: names no training data; add some"
    else:
        flags = {part: f"--{key}-data-path" for part, key in _KEYS.items()}
        lists = {part: given[f"{key}_data_path"] for part, key in _KEYS.items()}
        named = {part: _prefixes(flags[part], words) for part, words in lists.items() if words is not None}
        missing = "--train-data-path names no training data; add --train-data-path PREFIX"
    if TRAIN not in named and not getattr(args, "skip_train", False):
        raise UserError(missing)
    return [Source(prefixes, None, part) for part, prefixes in named.items()]


_KEYS = {TRAIN: "train", VALIDATION: "valid", TEST: "test"}


def flag_of(attribute: str) -> str:
    return "--" + attribute.replace("_", "-")


def _prefixes(flag: str, words: Sequence[str]) -> list[tuple[str, str]]:
    """The prefixes among a flag's weights and prefixes, each with the flag."""
    if not words:
        raise UserError(f"{flag}: names no data; add a prefix made by tools/preprocess_data.py")
    return _without_weights([(flag, word) for word in words], flag, f"{flag} {' '.join(words)}:")


def read_blend_file(flag: str, path: str) -> list[tuple[str, str]]:
    """Returns the prefixes of a blend file, each with its place in the file.

    The file consists of words: prefixes, or a weight before each.

    Raises:
        UserError: the file cannot be read or is empty, a weight is missing or none, with the line.
    """
    lines = _read_text(flag, path).splitlines()
    words = [(f"{flag} {path}, line {i}:", word) for i, line in enumerate(lines, 1) for word in line.split()]
    for where, word in words:
        if word.startswith("#"):
            raise UserError(f"{where} {word}: no comments, Megatron reads each word as a weight or a prefix; drop it")
    if not words:
        raise UserError(f"{flag} {path}: the file is empty; write one with tools/blend.py")
    return _without_weights(words, flag)


def read_blends_file(flag: str, path: str) -> dict[str, list[tuple[str, str]]]:
    """The same for a JSON object of blends for train, valid and test (null: none), by the part they serve."""
    try:
        named = json.loads(_read_text(flag, path))
        lists = {part: named[key] for part, key in _KEYS.items()}
    except (json.JSONDecodeError, KeyError, TypeError, RecursionError):
        raise UserError(
            f"{flag} {path}: not a JSON object with the keys train, valid and test; write one, with null for a part "
            "without data"
        ) from None
    blends = {}
    for part, given in lists.items():
        where = f"{flag} {path}, {_KEYS[part]}:"
        words = given.split() if isinstance(given, str) else given
        if words is None:
            continue
        if not isinstance(words, list) or not all(isinstance(word, str | int | float) for word in words) or not words:
            raise UserError(f"{where} {given!r}: neither null nor a blend; write weights and prefixes, or null")
        blends[part] = _without_weights([(where, str(word)) for word in words], flag)
    return blends


def _without_weights(words: Sequence[tuple[str, str]], flag: str, shown: str = "") -> list[tuple[str, str]]:
    """The prefixes of a blend, where all or none have a weight before them, as Megatron reads it.

    Args:
        words: where each word stands, and the word.
        shown: what a message begins with, instead of the place and the word.
    """
    weights = [as_number(word) for _, word in words]
    if len(words) == 1 or not any(weight is not None for weight in weights):
        return list(words)
    for i, ((where, word), weight) in enumerate(zip(words, weights, strict=True)):
        is_last_weight = weight is not None and i == len(words) - 1
        if (weight is None) == (i % 2 == 0) or is_last_weight:
            example = f"{flag} 0.7 web 0.3 code" if shown else "0.7 web 0.3 code"
            raise UserError(f"{shown or f'{where} {word}:'} give prefixes, or a weight before each, e.g. {example}")
    for (where, word), weight in zip(words[::2], weights[::2], strict=True):
        if not 0 < weight < math.inf:
            problem = "the weights must be positive; change them, or leave out a dataset that shall give nothing"
            raise UserError(f"{shown or f'{where} {word}:'} {problem}")
    if not 0 < min(weights[::2]) / sum(weights[::2]) <= 1:  # as Megatron divides them
        raise UserError(f"{shown or words[0][0]} the weights are too large or too far apart; give shares of 1")
    return list(words[1::2])


def as_number(word: str) -> float | None:
    """Returns the weight that a word of a blend is, or None for a prefix."""
    try:
        return float(word)
    except ValueError:
        return None


def _read_text(flag: str, path: str) -> str:
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise UserError(f"{flag} {path}: {reason}; check the path") from None
