"""Defines types of argparse for the numbers that flags take."""

import argparse


def positive(text: str) -> int:
    """An argparse type: a whole number above 0."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"a number above 0 is wanted, not {text}")
    return number
