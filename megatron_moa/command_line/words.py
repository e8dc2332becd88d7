"""Splits the words of a command line into flags and their values."""

from __future__ import annotations

from collections.abc import Sequence


def flag_groups(words: Sequence[str]) -> list[list[str]]:
    """Returns each flag with the words that follow it, in order.

    Words before the first flag are a group of their own.
    """
    groups: list[list[str]] = []
    for word in words:
        if word.startswith("--") or not groups:
            groups.append([])
        groups[-1].append(word)
    return groups


def flag_values(words: Sequence[str]) -> dict[str, str]:
    """Returns by flag its values, joined by blanks; of a flag given twice the last ones."""
    return {flag: " ".join(values) for flag, *values in flag_groups(words)}
