"""Holds what the chapters of a report share: results, pictures, the main setting."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_moa.research.study.evidence import Evidence
from megatron_moa.research.study.statistics import Interval, Setting, Tuned

Lines = Iterator[str]


class Material:
    """Holds what every chapter of a report is written from, and where its pictures go.

    Args:
        pictures: an empty folder to draw into.
        link: that folder, as seen from the text.
    """

    def __init__(self, evidence: Evidence, pictures: Path, link: str) -> None:
        self.evidence, self.results = evidence, evidence.results
        self.pictures, self.link = pictures, link
        self.main = self.results.main

    def difference(self, arm: str, to: str) -> Interval | None:
        """Returns an arm's difference to another in the main setting; None where it is not known."""
        return self.results.difference(self.main, arm, to)

    def tuned(self, setting: Setting) -> list[Tuned]:
        """Returns the arms that have a best learning rate in a setting."""
        pairs = [self.results.tuned(setting, arm) for arm in self.results.arms(setting)]
        return [tuned for tuned in pairs if tuned is not None]

    def picture(self, name: str, title: str, draw: Callable[..., None], *what: object) -> Lines:
        """Draws a picture and shows it."""
        draw(self.results, self.pictures / name, *what)
        yield f"![{title}]({self.link}/{name})\n"
