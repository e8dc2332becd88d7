"""Fills memory that torch.empty hands out with NaN.

So an output which a kernel does not write shows.
"""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _unwritten_is_nan() -> Iterator[None]:
    # torch fills it where deterministic algorithms are asked for; the kernels are deterministic in any case.
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
