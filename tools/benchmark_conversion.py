"""Measures what the conversion of a recipe's model takes: time, memory, disk.

    python tools/benchmark_conversion.py dense-2b moe-2b --folder /scratch

Writes a checkpoint of the recipe's shapes, stock layers and random weights in bf16, and passes it through the tools as
a user runs them: convert_mixing.py makes it a MoA, convert_to_hf.py a Hugging Face folder, convert_from_hf.py a
checkpoint again, each with its verification. Memory is that of the tool with all its child processes, read every 50 ms:
"own" is what no file backs, and must fit the machine; "with files" counts the pages of mapped files, too, which the
system takes back when others need memory. GiB of 2^30 bytes. Exit code 1 where a tool fails, or needs more than
--limit.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from megatron_moa.command_line.numbers import positive_number
from megatron_moa.errors import OneLineParser, UserError, one_line_errors
from megatron_moa.runs.recipes import recipe_flags

PROGRAM = "benchmark_conversion.py"
_TOOLS = Path(__file__).resolve().parent
_INTERVAL = 0.05  # seconds
GIB = 2**30


@dataclass(frozen=True)
class Usage:
    """What a command took.

    Attributes:
        returncode: its exit code.
        seconds: from its start to its end.
        own: the peak of memory in bytes that no file backs, it and its children together.
        resident: the peak of all memory in bytes, pages of mapped files too.
        log: the end of what it printed.
    """

    returncode: int
    seconds: float
    own: int
    resident: int
    log: str


def measure(command: list[str]) -> Usage:
    """Runs a command and watches its memory."""
    start, own, resident = time.monotonic(), 0, 0
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        while process.poll() is None:
            sizes = [_memory(pid) for pid in _family(process.pid)]
            own = max(own, sum(size[0] for size in sizes))
            resident = max(resident, sum(map(sum, sizes)))
            time.sleep(_INTERVAL)
        seconds = time.monotonic() - start
        log.seek(0)
        return Usage(process.returncode, seconds, own, resident, log.read()[-2000:])


def _family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    try:
        children = [
            int(child) for tasks in Path(f"/proc/{pid}/task").glob("*/children") for child in tasks.read_text().split()
        ]
    except OSError:  # it has ended
        return [pid]
    return [pid, *(one for child in children for one in _family(child))]


def _memory(pid: int) -> tuple[int, int]:
    """Bytes of a process in memory: its own and shared ones, and pages of files."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    sizes = {
        name: 1024 * int(value.split()[0])
        for name, _, value in (line.partition(":") for line in lines)
        if "Rss" in name
    }
    return sizes.get("RssAnon", 0) + sizes.get("RssShmem", 0), sizes.get("RssFile", 0)


def write_random(flags: list[str], root: Path) -> None:
    """Writes a checkpoint of a model with random weights; once a process.

    Args:
        flags: of pretrain_gpt_moa.py.
        root: as ``--save`` names it.
    """
    from megatron_moa.megatron_fixes import expected_warnings  # noqa: F401  before Megatron

    # isort: split
    import torch
    from megatron.training import get_tokenizer
    from megatron.training.initialize import initialize_megatron

    from megatron_moa import startup
    from megatron_moa.checkpoints.writer import write_release
    from megatron_moa.trained.from_megatron import empty_model
    from megatron_moa.training.arguments import parse_arguments
    from megatron_moa.training.model import model_config_from_args

    sys.stdout = sys.stderr  # for Megatron's log; the table is standard output
    startup.prepare()
    sys.argv[1:] = [*flags, "--transformer-impl", "local"]
    args, mixture = parse_arguments()
    initialize_megatron(allow_no_cuda=True)
    get_tokenizer()  # pads the vocabulary
    model = empty_model(model_config_from_args(args, mixture))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}

    def read(name: str) -> torch.Tensor:
        if len(shapes[name]) == 1:  # norms
            return torch.ones(shapes[name])
        return torch.empty(shapes[name], dtype=args.params_dtype).normal_(0, args.init_method_std)

    write_release(model, args, root, read)


def conversions(folder: Path) -> dict[str, tuple[list[str], Path]]:
    """By tool: its command, and what it writes; each takes what the one before wrote."""
    start, moa, exported, back = (folder / name for name in ("start", "moa", "exported", "back"))
    return {
        "convert_mixing.py": (["--load", str(start), "--out", str(moa), "--mixing", "moa"], moa),
        "convert_to_hf.py": (["--load", str(moa), "--out", str(exported)], exported),
        "convert_from_hf.py": (["--hf", str(exported), "--out", str(back)], back),
    }


def size(folder: Path) -> int:
    """Of all files in a folder, in bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main(argv: list[str] | None = None) -> None:
    """Writes, converts, prints a table."""
    parser = OneLineParser(
        PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="recipes of examples/models")
    where = "that is there, to write in; 9 bytes a parameter; default: TMPDIR, else /tmp"
    parser.add_argument("--folder", type=Path, metavar="FOLDER", help=where)
    most = "of the tools' own memory; default 12"
    parser.add_argument("--limit", type=positive_number, default=12, metavar="GIB", help=most)
    flags = parser.parse_args(argv)
    failed = False
    with one_line_errors(PROGRAM):
        if flags.folder and not (flags.folder.is_dir() and os.access(flags.folder, os.W_OK)):
            raise UserError(f"--folder {flags.folder}: no folder to write in; make it, or name another")
        trainings = {model: recipe_flags(model, "none", ["--mock-data"]) for model in flags.models}
    print("| model | tool | seconds | own memory | with files | writes |\n| --- | --- | --- | --- | --- | --- |")
    for model, training in trainings.items():
        with tempfile.TemporaryDirectory(dir=flags.folder, prefix="conversion-") as scratch:
            folder = Path(scratch)
            writer = multiprocessing.get_context("spawn").Process(
                target=write_random, args=(training, folder / "start")
            )
            writer.start()
            writer.join()
            if writer.exitcode:
                raise SystemExit(1)
            for tool, (arguments, out) in conversions(folder).items():
                usage = measure([sys.executable, str(_TOOLS / tool), *arguments])
                if usage.returncode:
                    print(usage.log, file=sys.stderr)
                    raise SystemExit(1)
                cells = f"{usage.seconds:.0f} | {usage.own / GIB:.2f} GiB | {usage.resident / GIB:.2f} GiB"
                print(f"| {model} | {tool} | {cells} | {size(out) / GIB:.2f} GiB |", flush=True)
                if usage.own > flags.limit * GIB:
                    print(f"{PROGRAM}: {model}, {tool}: more than --limit {flags.limit:g} GiB", file=sys.stderr)
                    failed = True
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
