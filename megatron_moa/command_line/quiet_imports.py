"""Keeps the warnings that Megatron prints out of a tool's output."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Keeps warnings of Megatron and torch, such as those about absent packages, out of a tool's output.

    This project's own stay.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    loggers = logging.getLogger(), logging.getLogger("megatron_moa")
    levels = [logger.level for logger in loggers]
    for logger, level in zip(loggers, (logging.ERROR, logging.WARNING), strict=True):
        logger.setLevel(level)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
