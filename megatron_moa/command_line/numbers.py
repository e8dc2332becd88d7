"""Defines types of argparse for the numbers that flags take."""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Callable


def positive(text: str) -> int:
    """An argparse type: a whole number above 0."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"a number above 0 is wanted, not {text}")
    return number


def positive_number(text: str) -> float:
    """An argparse type: a finite number above 0."""
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"a number above 0 is wanted, not {text}")


def seed(text: str) -> int:
    """An argparse type: a seed that Python, NumPy and PyTorch all take."""
    number = int(text)
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(f"a number from 0 to 4294967295 is wanted, not {text}")
    return number


def share(text: str) -> float:
    """An argparse type: a number above 0, at most 1."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1, as 0.4")
    return value


def within(kind: type, low: float, high: float = math.inf) -> Callable[[str], float]:
    """Returns an argparse type: a number of a type, int or float, from ``low`` to ``high``."""
    bounds = f"of {low:g} or more" if high == math.inf else f"from {low:g} to {high:g}"

    def parse(text: str) -> float:
        number = kind(text)
        if not low <= number <= high:
            raise argparse.ArgumentTypeError(f"a number {bounds} is wanted, not {text}")
        return number

    parse.__name__ = kind.__name__  # argparse names it to who gives no number at all
    return parse
