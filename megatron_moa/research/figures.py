"""Draws panels with matplotlib into a PNG, the same bytes for the same content."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure


@contextmanager
def drawn(rows: int, columns: int, size: tuple[float, float], file: Path, same_x: bool = False) -> Iterator[np.ndarray]:
    """Yields panels [rows, columns] and writes them as a PNG in the end.

    What a user has configured takes no part.

    Args:
        size: width and height in inches.
        same_x: whether the panels have one x axis.
    """
    with matplotlib.style.context("default", after_reset=True):
        figure = Figure(size, layout="constrained")
        yield figure.subplots(rows, columns, squeeze=False, sharex=same_x)
        figure.savefig(file, dpi=100, metadata={"Software": None})
