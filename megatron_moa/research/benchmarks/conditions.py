"""Adds the benchmarks' common flags, and records flags, device, versions and commit beside results."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_moa.command_line.numbers import positive
from megatron_moa.command_line.output_files import check_output
from megatron_moa.errors import UserError
from megatron_moa.mixture.config import MixtureConfig
from megatron_moa.mixture.triton_backend.tile_sizes import VARIABLE

ROOT = Path(__file__).resolve().parents[3]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_TOKENS = 40  # on which a mixture is compared before it is timed
_VARIABLES = (VARIABLE, "FFN", "FFN_MULTIPLE", "SEQ_LENGTH")  # what changes kernels, and a recipe's model


def add_arguments(parser: argparse.ArgumentParser, rounds: int) -> None:
    """The flags of the benchmarks that run on either device."""
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: bf16 on a GPU, fp32 on a CPU")
    add_run_arguments(parser, rounds, threads="OMP_NUM_THREADS, else all CPUs there are")


def add_run_arguments(parser: argparse.ArgumentParser, rounds: int, threads: str) -> None:
    """The flags all benchmarks have; ``threads`` says how many there are without ``--threads``."""
    parser.add_argument("--threads", type=positive, metavar="N", help=f"of the CPU; default: {threads}")
    parser.add_argument(
        "--rounds",
        type=positive,
        default=rounds,
        metavar="N",
        help="repetitions of each contender, in alternation (default: %(default)s)",
    )
    add_json_argument(parser)


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """Adds ``--json FILE``, for :func:`check_json` and :func:`append_records`."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the results, one JSON object a line")


def check_json(path: Path | None) -> None:
    """Raises UserError for what cannot be a file, before minutes are spent on what it is to hold."""
    if path is None or (os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)):
        return  # a device or a pipe, to which one can append
    check_output("--json", str(path), ("",), overwrite=True)


def set_up(options: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """Returns the device and dtype that the flags of :func:`add_arguments` ask for.

    Sets the number of threads, and hides a GPU that is not asked for, since Megatron takes any there is. To be called
    before CUDA is used.

    Raises:
        UserError: CUDA is asked for where there is none, the CPU where the GPU cannot be hidden any more, or ``--json``
            names what is no file.
    """
    check_json(options.json)
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    has_cuda = torch.cuda.is_available()
    if options.device == "cpu" and has_cuda:
        raise UserError("--device cpu: CUDA has started already and shows its GPU; set CUDA_VISIBLE_DEVICES= before")
    if options.device == "cuda" and not has_cuda:
        raise UserError("--device cuda: no CUDA device here; take --device cpu")
    device = torch.device(options.device or ("cuda" if has_cuda else "cpu"))
    if options.threads or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(options.threads or len(os.sched_getaffinity(0)))
    options.dtype = options.dtype or ("bf16" if device.type == "cuda" else "fp32")
    return device, DTYPES[options.dtype]


def environment(device: torch.device) -> dict[str, Any]:
    """What a figure depends on: command, date, hardware, versions, commit."""
    variables = [f"{name}={os.environ[name]}" for name in _VARIABLES if os.environ.get(name)]
    return {
        "command": shlex.join([*variables, os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device_name(device),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        **{name: _version(name) for name in ("torch", "triton", "megatron-core", "transformer-engine")},
        **_commit(),
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's."""
    return torch.cuda.get_device_name() if device.type == "cuda" else _cpu_name()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, platform.machine())}, {len(os.sched_getaffinity(0))} CPUs"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> dict[str, Any]:
    """The checkout's commit and whether files differ from it; None where this is no checkout."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
        changes = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
    return {"commit": commit.stdout.strip(), "dirty": bool(changes.stdout.strip())}


def describe(surroundings: Mapping[str, Any]) -> str:
    """An environment in one line."""
    commit = (surroundings["commit"] or "no commit")[:12] + (" with changes" if surroundings["dirty"] else "")
    versions = (f"{name} {surroundings[name]}" for name in ("python", "torch", "triton", "megatron-core"))
    hardware = f"{surroundings['device']}, {surroundings['threads']} threads"
    return f"{surroundings['date']}, {hardware}, {', '.join(versions)}, {commit}"


def require_correct(
    program: str,
    mixtures: Iterable[MixtureConfig],
    dtype: torch.dtype,
    device: torch.device,
    *,
    width: int,
    hidden: int,
    scale: bool = False,
) -> None:
    """Compares what is to be timed with the reference in float64.

    Leaves with exit code 1 where a result is wrong.

    Args:
        program: for the message.
        mixtures: with the backends they will be timed with.
        width: f, as timed: compiled code then serves both.
        hidden: h of the gates.
        scale: whether the mixture multiplies by a router's probability.
    """
    from megatron_moa.research.benchmarks import kernel_errors

    try:
        for mixture in dict.fromkeys(mixtures):
            kernel_errors.require(
                kernel_errors.check_mixture(mixture, dtype, device, tokens=_TOKENS, width=width, scale=scale)
            )
            if mixture.kind == "moa":
                kernel_errors.require(kernel_errors.check_gate(mixture, dtype, device, tokens=_TOKENS, hidden=hidden))
    except kernel_errors.AccuracyError as error:
        text = " ".join(str(error).split())
        if os.environ.get("RANK", "0") == "0":
            print(f"{program}: nothing was timed, because a result is wrong: {text}", flush=True)
        raise SystemExit(1) from None


def append_records(
    path: Path | None, benchmark: str, surroundings: Mapping[str, Any] | None, records: Iterable[Mapping[str, Any]]
) -> None:
    """Appends one JSON object a line: the benchmark's name, the record, the environment if there is one.

    Raises:
        UserError: the file cannot be written.
    """
    if path is None:
        return
    around = {"environment": surroundings} if surroundings else {}
    lines = [json.dumps({"benchmark": benchmark, **record, **around}) + "\n" for record in records]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a") as stream:
            stream.write("".join(lines))
    except OSError as error:
        raise UserError(f"--json {path}: {error.strerror}; name a file that can be written") from error
