"""Defines the doctor's report and its lines, each of which says what was found and what to do."""

from __future__ import annotations

from dataclasses import dataclass

OK, FALLS_BACK, CHECK, MISSING = "ok", "falls back", "check", "missing"

GIB = 2**30

Facts = dict  # what a probe found: JSON; {"error": text} if it failed, {} where the package is not installed


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: what was looked at.
        state: :data:`OK`, :data:`FALLS_BACK`, :data:`CHECK` or :data:`MISSING`.
        text: what is there, and what a run does with it.
        remedy: what to do, a command where there is one; empty for nothing.
    """

    name: str
    state: str
    text: str
    remedy: str = ""


@dataclass(frozen=True)
class Report:
    """Everything that was found.

    Attributes:
        findings: in the order of the report.
        uses: as :func:`uses` gives it.
        smoke: the finding of ``--smoke``, where it was asked for.
    """

    findings: list[Finding]
    uses: dict[str, str]
    smoke: Finding | None = None

    @property
    def can_start(self) -> bool:
        """Whether training can start: nothing is missing, and the smoke test did not fail."""
        return all(finding.state != MISSING for finding in [*self.findings, *filter(None, [self.smoke])])
