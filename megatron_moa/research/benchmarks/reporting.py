"""Writes what a benchmark found: a table on the screen, a line of JSON each in a file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A markdown table; floats with four significant digits, None as an empty cell."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def append_records(
    path: Path | None, benchmark: str, surroundings: Mapping[str, Any], records: Iterable[Mapping[str, Any]]
) -> None:
    """Appends one JSON object a line: the benchmark's name, the record, the environment."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as stream:
        for record in records:
            print(json.dumps({"benchmark": benchmark, **record, "environment": surroundings}), file=stream)
