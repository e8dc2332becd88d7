"""Defines types of argparse for the numbers that flags take."""

import argparse
import contextlib
import math


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
