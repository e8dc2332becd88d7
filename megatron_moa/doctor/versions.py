"""Names the versions this project needs and is tested with, as setup.py and constraints.txt have them."""

from __future__ import annotations

import re

PYTHON = (3, 12)
MEGATRON = "0.19.2"
TORCH = "2.11.0"
OLDEST_TORCH = (2, 6)
TRITON = "3.6.0"
EMERGING_OPTIMIZERS = "0.3.0"


def numbers(version: str) -> tuple:
    """Returns a version's leading numbers, to be compared."""
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])
