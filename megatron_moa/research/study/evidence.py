"""Reads what a report is made from: the folders that tools/study.py and tools/analyze_gates.py fill."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_moa.errors import UserError
from megatron_moa.research.study.grid import Cell, cell_from
from megatron_moa.research.study.lines import RESULTS, read_results, read_timings
from megatron_moa.research.study.statistics import Results
from megatron_moa.research.study.timing import TIMING


@dataclass(frozen=True)
class Evidence:
    """What is in the folders.

    Attributes:
        timings: by size and optimizer, a line of timing.jsonl: the median step of each arm in ``milliseconds``, and how
            that was measured.
        gates: by the name in gates-NAME.json.
    """

    results: Results
    timings: dict[tuple[str, str], dict[str, Any]]
    gates: dict[str, dict[str, Any]]


def read_evidence(folders: Sequence[Path]) -> Evidence:
    """Everything in the folders; what two of them have alike is taken once.

    Raises:
        UserError: no finished run, a line that is not as tools/study.py writes it, or two that contradict each other.
    """
    from megatron_moa.research.gates.analysis import as_written, beside_one_another, markdown  # takes torch

    runs: dict[Cell, tuple[Path, dict[str, Any]]] = {}
    texts: dict[str, tuple[Path, dict[str, Any]]] = {}
    timings: dict[tuple[str, str], tuple[Path, dict[str, Any]]] = {}
    gates: dict[str, tuple[Path, dict[str, Any]]] = {}
    for folder in folders:
        path = folder / RESULTS
        if not path.is_file():
            raise UserError(f"{folder}: holds no {RESULTS}; name the folder that tools/study.py --out wrote")
        for line in read_results(path):
            cell = cell_from(line["cell"])
            _add(runs, cell, path, line, f"the run {cell.name}")
            if line["text"] is not None:
                _add(texts, cell.corpus, path, line["text"], f"the text or the tokenizer of {cell.corpus}")
        path = folder / TIMING
        # A study that got further arms timed all of them once more, together: its last line counts.
        latest = {(line["size"], line["optimizer"]): line for line in read_timings(path)}
        for (size, optimizer), line in latest.items():
            _add(timings, (size, optimizer), path, line, f"the step times of {size} with {optimizer}")
        for path in sorted(folder.glob("gates-*.json")):
            try:
                content = json.loads(path.read_bytes())
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}: is not JSON ({error}); write it anew with tools/analyze_gates.py") from None
            with as_written(path):
                list(markdown(content))
                list(beside_one_another({"": content}))
            name = path.stem.removeprefix("gates-")
            _add(gates, name, path, content, f"the gates of {name}")
    if not runs:
        raise UserError(f"{folders[0] / RESULTS}: holds no finished run; let tools/study.py finish one")
    return Evidence(
        Results([line for _, line in runs.values()]),
        {key: line for key, (_, line) in timings.items()},
        {name: content for name, (_, content) in gates.items()},
    )


def _add(found: dict, key: object, path: Path, content: dict[str, Any], what: str) -> None:
    before, there = found.setdefault(key, (path, content))
    if there != content:
        raise UserError(f"{path}: {what} is another one than in {before}; delete one of the two")
