"""Shows how far a tool has come: a bar on a terminal, now and then a line in a log file."""

import sys
import time
from typing import Any

_LOG_SECONDS = 30  # between two lines in a log file


class ProgressLines:
    """A progress bar for log files: a plain line on stderr now and then."""

    def __init__(self, total: int, title: str) -> None:
        """Counts up to ``total`` bytes."""
        self.total, self.title = total, title
        self.done = 0
        self.start = self.printed = time.monotonic()

    def update(self, count: int) -> None:
        """Adds bytes that are done."""
        self.done += count
        now = time.monotonic()
        if now - self.printed < _LOG_SECONDS or not self.done:
            return
        self.printed = now
        elapsed = now - self.start
        left = elapsed * max(0, self.total - self.done) / self.done
        print(
            f"{self.title}: {self.done / max(1, self.total):.1%}, {self.done / 1e6:,.0f} of "
            f"{self.total / 1e6:,.0f} MB, {self.done / elapsed / 1e6:.1f} MB/s, {left / 60:,.1f} minutes left",
            file=sys.stderr,
            flush=True,
        )

    def __enter__(self) -> "ProgressLines":
        return self

    def __exit__(self, *_: object) -> None:
        """Prints nothing: what follows says that it is done."""


def progress_bar(total: int, title: str) -> Any:
    """Shows on stderr how many bytes are done.

    On a terminal it is a bar, in a log file a line every half minute.
    """
    if not sys.stderr.isatty():
        return ProgressLines(total, title)
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # no thread besides the workers' fork
    return tqdm(total=total, unit="B", unit_scale=True, desc=title, file=sys.stderr, leave=False)


def counting_bar(count: int, title: str, unit: str) -> Any:
    """Shows on stderr how many things are done.

    On a terminal it does so all the time, in a log file every half minute.
    """
    from tqdm import tqdm

    return tqdm(total=count, unit=unit, desc=title, mininterval=0.5 if sys.stderr.isatty() else _LOG_SECONDS)
