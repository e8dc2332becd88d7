"""Defines types of argparse for the numbers that flags take."""

import argparse


def positive(text: str) -> int:
    """An argparse type: a whole number above 0."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"a number above 0 is wanted, not {text}")
    return number


def seed(text: str) -> int:
    """An argparse type: a seed that Python, NumPy and PyTorch all take."""
    number = int(text)
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(f"a number from 0 to 4294967295 is wanted, not {text}")
    return number
