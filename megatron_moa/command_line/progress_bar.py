"""Shows how far a tool has come: a bar on a terminal all the time, in a log file every half minute."""

import sys
from typing import Any

_LOG_SECONDS = 30  # between two bars in a log file


def progress_bar(total: int, title: str) -> Any:
    """Shows on stderr how many bytes are done, until all are."""
    delay = 0 if sys.stderr.isatty() else _LOG_SECONDS
    return _bar(total, title, unit="B", unit_scale=True, leave=False, delay=delay)


def counting_bar(count: int, title: str, unit: str) -> Any:
    """Shows on stderr how many things are done; the last bar stays."""
    return _bar(count, title, unit=unit)


def _bar(total: int, title: str, **options: Any) -> Any:
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # no thread besides the workers' fork
    seconds = 0.5 if sys.stderr.isatty() else _LOG_SECONDS
    return tqdm(total=total, desc=title, mininterval=seconds, miniters=1, **options)
