"""Sets up a benchmark, and records what it ran on beside what it found.

That is flags, device, versions and commit.
"""

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
from megatron_moa.errors import UserError
from megatron_moa.mixture.config import MixtureConfig

ROOT = Path(__file__).resolve().parents[3]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_TOKENS = 40  # on which a mixture is compared before it is timed


def add_arguments(parser: argparse.ArgumentParser, rounds: int) -> None:
    """The flags all benchmarks have."""
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument(
        "--threads", type=positive, metavar="N", help="of the CPU; default: OMP_NUM_THREADS, else all CPUs there are"
    )
    parser.add_argument(
        "--rounds",
        type=positive,
        default=rounds,
        metavar="N",
        help="repetitions of each contender, in alternation (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the results, one JSON object a line")


def set_up(options: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """Returns the device and dtype that the flags of :func:`add_arguments` ask for.

    Sets the number of threads, and hides a GPU that is not asked for, since Megatron takes any there is. To be called
    before CUDA is used.

    Raises:
        UserError: CUDA is asked for where there is none.
    """
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    has_cuda = torch.cuda.is_available()
    if options.device == "cuda" and not has_cuda:
        raise UserError("--device cuda: no CUDA device here; take --device cpu")
    device = torch.device(options.device or ("cuda" if has_cuda else "cpu"))
    if options.threads or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(options.threads or len(os.sched_getaffinity(0)))
    options.dtype = options.dtype or ("bf16" if device.type == "cuda" else "fp32")
    return device, DTYPES[options.dtype]


def environment(device: torch.device) -> dict[str, Any]:
    """What a figure depends on: command, date, hardware, versions, commit."""
    return {
        "command": shlex.join([os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]),
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
    path: Path | None, benchmark: str, surroundings: Mapping[str, Any], records: Iterable[Mapping[str, Any]]
) -> None:
    """Appends one JSON object a line: the benchmark's name, the record, the environment."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as stream:
        for record in records:
            print(json.dumps({"benchmark": benchmark, **record, "environment": surroundings}), file=stream)
