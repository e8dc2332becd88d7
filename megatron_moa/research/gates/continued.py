"""Writes the trainings of examples/studies/continue_frozen.sh as JSON lines.

Those of other ways than the first have their differences to the first.

python -m megatron_moa.research.gates.continued runs/continued
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_moa.errors import OneLineParser, UserError, one_line_errors
from megatron_moa.research.gates.analysis import WAYS, continued_summary
from megatron_moa.runs.training_log import TrainingLog

LINES = "continued.jsonl"
_PROGRAM = "gate_continued"


def read_trainings(folder: Path) -> list[dict[str, Any]]:
    """Reads all trainings of a folder, sorted by seed and way.

    Each has ``way``, ``seed``, ``loss`` (validation, after the last iteration), ``iterations``, ``tokens``, peak
    learning rate ``lr``, and the ``difference`` to ``gates`` of the same seed, where it is of another way.

    Raises:
        UserError: none there, or one that has not ended.
    """
    lines = []
    for path in folder.glob("*-seed*/train.log"):
        match = re.fullmatch(r"(\w+)-seed(\d+)", path.parent.name)
        if match is None or match[1] not in WAYS:
            continue
        log = TrainingLog.read(path)
        if not log.complete or not math.isfinite(log.final_validation):
            raise UserError(f"{path}: has no validation loss after the last iteration; run the training again")
        iterations, settings = log.iterations[-1].total, log.settings
        lines.append(
            {
                "way": match[1],
                "seed": int(match[2]),
                "loss": log.final_validation,
                "iterations": iterations,
                "tokens": iterations * int(settings["global_batch_size"]) * int(settings["seq_length"]),
                "lr": float(settings["lr"]),
            }
        )
    if not lines:
        raise UserError(f"{folder}: has no training of examples/studies/continue_frozen.sh")
    lines.sort(key=lambda line: (line["seed"], list(WAYS).index(line["way"])))
    first = {line["seed"]: line["loss"] for line in lines if line["way"] == "gates"}
    for line in lines:
        if line["way"] != "gates" and line["seed"] in first:
            line["difference"] = round(line["loss"] - first[line["seed"]], 6)
    return lines


@one_line_errors(_PROGRAM)
def main(argv: Sequence[str] | None = None) -> None:
    """Writes and prints the lines, then a line a way over its seeds."""
    parser = OneLineParser(_PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="OUT of examples/studies/continue_frozen.sh")
    folder = parser.parse_args(argv).folder
    lines = read_trainings(folder)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / LINES).write_text(text)
    print(text, end="")
    for entry in continued_summary(lines):
        print(json.dumps(entry))


if __name__ == "__main__":
    main()
