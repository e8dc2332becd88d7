"""Prints on the first rank alone, before torch.distributed is initialised."""

import functools
import os


def print_rank_0(message: str) -> None:
    """Prints a line on the first rank."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(message, flush=True)


# Megatron parses its arguments several times.
print_once = functools.cache(print_rank_0)
