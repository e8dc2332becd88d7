"""Appends what a benchmark found to a file, a line of JSON each."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


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
