"""Prepares the text for tools/gpu_suite.sh, and writes the figures and the report of what it ran.

    python tools/gpu_report.py corpus PREFIX [--glob 'asyncio/*.py']     bytes of Python's own library, .bin and .idx
    python tools/gpu_report.py training LOG --arm MoA --json FILE        what Megatron's log says, as a record
    python tools/gpu_report.py table RESULTS.jsonl                       the records as markdown, on standard output

Tokens of the corpus are bytes, each file a document that ends with token 256: --tokenizer-type NullTokenizer
--vocab-size 257.
"""

from __future__ import annotations

import argparse
import json
import math
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_moa.command_line.output_files import check_output, written_whole
from megatron_moa.command_line.tables import markdown_table
from megatron_moa.data.corpus import find_text_files
from megatron_moa.errors import OneLineParser, UserError, one_line_errors
from megatron_moa.research.benchmarks import conditions, tables
from megatron_moa.research.study.corpora import LEFT_OUT
from megatron_moa.runs.training_log import TrainingLog

PROGRAM = "gpu_report.py"
END_OF_DOCUMENT = 256

Record = dict[str, Any]
_ONE_OF_MANY = ("dtype ", "backend ", "form ")  # flags of the suite's processes beside each other


def write_corpus(prefix: Path, pattern: str) -> int:
    """Writes PREFIX.bin and PREFIX.idx for Megatron; the number of tokens.

    Raises:
        UserError: no file matches, or they cannot be written.
    """
    import numpy
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    files = find_text_files([sysconfig.get_paths()["stdlib"]], pattern, LEFT_OUT)
    targets = check_output("PREFIX", str(prefix), (".bin", ".idx"), overwrite=True)
    total = 0
    with written_whole("PREFIX", targets) as (data, index):
        builder = IndexedDatasetBuilder(data, dtype=numpy.uint16)
        for file in files:
            tokens = torch.tensor([*Path(file.path).read_bytes(), END_OF_DOCUMENT], dtype=torch.int32)
            builder.add_document(tokens, [len(tokens)])
            total += len(tokens)
        builder.finalize(index)
    return total


def read_training(log: Path, arm: str) -> Record:
    """Losses, speed and size by Megatron's log.

    Raises:
        UserError: no training in it.
    """
    run = TrainingLog.read(log)
    if not run.iterations:
        raise UserError(f"{log}: no line of a training; look into it for what went wrong")
    return {
        "arm": arm,
        "parameters": run.parameters,
        "curve": [[step.iteration, step.loss] for step in run.iterations],
        "validation_loss": run.final_validation if run.validation else None,
        "ms": run.milliseconds,
        "iterations": run.iterations[-1].iteration,
    }


def read_records(path: Path) -> list[Record]:
    """Raises UserError for a file that is not JSON lines."""
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: {error}; give the results.jsonl of a run") from None


def report(records: list[Record]) -> str:
    """All records as markdown, a section a kind of benchmark; the environment once, if it is one."""
    surroundings = {conditions.describe({**r["environment"], "date": ""})[2:] for r in records if "environment" in r}
    dates = sorted(r["environment"]["date"] for r in records if "environment" in r)
    parts = ["# GPU results", *(f"{text}; from {dates[0]} to {dates[-1]}" for text in sorted(surroundings))]
    if unknown := {record["benchmark"] for record in records} - _SECTIONS.keys():
        raise ValueError(f"no table for {', '.join(sorted(unknown))}")
    for kind, (title, section) in _SECTIONS.items():
        own = [record for record in records if record["benchmark"] == kind]
        if own:
            parts += [f"## {title}", *section(own)]
            commands = _commands(record["environment"]["command"] for record in own if "environment" in record)
            parts += ["Measured by\n\n" + "\n".join(f"    {command}" for command in commands)] if commands else []
    return "\n\n".join(parts) + "\n"


def _commands(commands: Iterable[str]) -> list[str]:
    """Each once, without its --json; those that differ in dtype, backend or form alone as one."""
    together: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for command in dict.fromkeys(commands):
        parts = [part for part in command.split(" --") if not part.startswith("json ")]
        flags = {part.split(" ", 1)[0]: part for part in parts if part.startswith(_ONE_OF_MANY)}
        pattern = tuple(flag if (flag := part.split(" ", 1)[0]) in flags else part for part in parts)
        values = together.setdefault(pattern, {flag: [] for flag in flags})
        for flag, part in flags.items():
            values[flag].append(part.removeprefix(f"{flag} "))
    return [
        " --".join(f"{part} {'|'.join(dict.fromkeys(values[part]))}" if part in values else part for part in pattern)
        for pattern, values in together.items()
    ]


def _status(records: list[Record]) -> Iterator[str]:
    rows = [(r["step"], r["status"], r["exit_code"], r["seconds"], r["limit"]) for r in records]
    yield markdown_table(("step", "status", "exit code", "seconds", "limit"), rows)


def _kernels(records: list[Record]) -> Iterator[str]:
    for (tokens, ffn, hidden, dtype, k), own in _grouped(records, "tokens", "ffn", "hidden", "dtype", "K"):
        growing = "" if k is None else f", K {k}"
        yield f"{tokens} tokens, f {ffn}, h {hidden} (gates), {dtype}{growing}; copy {own[0]['copy_gb_per_s']:.0f} GB/s"
        yield tables.kernels_table(own)


def _layers(records: list[Record]) -> Iterator[str]:
    sizes = ("hidden", "ffn", "tokens", "experts", "topk", "dtype", "tp")
    for (hidden, ffn, tokens, experts, topk, dtype, tp), own in _grouped(records, *sizes):
        moe = f", {experts} experts, {topk} a token" if experts else ""
        split = f", TP {tp}" if tp > 1 else ""
        yield f"h {hidden}, f {ffn}, {tokens} tokens{moe}, {dtype}{split}"
        yield tables.layer_table(own)


def _steps(records: list[Record]) -> Iterator[str]:
    yield tables.step_table(records)
    changed = {(r["recipe"], " ".join(r["flags"])) for r in records if r["flags"]}
    yield from (f"{recipe} with {flags}" for recipe, flags in sorted(changed))


def _trainings(records: list[Record]) -> Iterator[str]:
    header = ("arm", "parameters", "iterations", "training loss, last line", "validation loss", "ms an iteration")
    rows = [
        (r["arm"], r["parameters"], r["iterations"], r["curve"][-1][1], r["validation_loss"], r["ms"]) for r in records
    ]
    yield markdown_table(header, rows)
    yield "One seed: a difference of losses here is no comparison of methods."


def _grouped(records: list[Record], *names: str) -> Iterator[tuple[tuple, list[Record]]]:
    keys = dict.fromkeys(tuple(record[name] for name in names) for record in records)
    for key in keys:
        yield key, [record for record in records if tuple(record[name] for name in names) == key]


_SECTIONS = {
    "suite": ("Steps", _status),
    "accuracy": ("Accuracy, against float64", lambda records: [tables.accuracy_table(records)]),
    "kernels": ("The activation step", _kernels),
    "layer": ("One layer", _layers),
    "step": ("A training step", _steps),
    "training": ("Trainings on the bytes of Python's library", _trainings),
}


def main(argv: list[str] | None = None) -> None:
    """One of the commands."""
    parser = OneLineParser(prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    corpus = commands.add_parser("corpus")
    corpus.add_argument("prefix", type=Path)
    corpus.add_argument("--glob", default="**/*.py", help="files of Python's library (default: %(default)s)")
    training = commands.add_parser("training")
    training.add_argument("log", type=Path)
    training.add_argument("--arm", required=True)
    training.add_argument("--json", type=Path, required=True)
    commands.add_parser("table").add_argument("results", type=Path)
    options = parser.parse_args(argv)
    with one_line_errors(PROGRAM):
        if options.command == "corpus":
            print(f"{write_corpus(options.prefix, options.glob):,} tokens in {options.prefix}.bin")
        elif options.command == "training":
            record = read_training(options.log, options.arm)
            conditions.append_records(options.json, "training", None, [record])
            loss = record["curve"][-1][1]
            if loss is None or not math.isfinite(loss):
                raise UserError(f"{options.log}: the last loss is {loss}")
        else:
            records = read_records(options.results)
            try:
                text = report(records)
            except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
                raise UserError(
                    f"{options.results}: holds other records than a run's ({error!r}); give the results.jsonl of a run"
                ) from error
            print(text, end="")


if __name__ == "__main__":
    main()
