"""Measures time and memory for the benchmarks in tools/, and records the machine they ran on.

Contenders run in alternation, and a ratio is the median of the rounds' own ratios: what slows the machine down for a
while slows all contenders of a round down, and leaves their ratio alone.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_moa.errors import UserError
from megatron_moa.mixture.config import MixtureConfig

ROOT = Path(__file__).resolve().parents[3]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOTAL = "total"

Lap = Callable[[str], None]  # ends a phase of a run, and names it
Run = Callable[[Lap], None]  # one repetition of what is timed


# Time.

_FLUSH_BYTES = 256 << 20  # several times the 50 MB of an H100's L2 cache
_HEAD_START_CYCLES = 4_000_000  # 2 ms at 2 GHz: longer than the host takes to queue a phase of one layer


class _HostClock:
    """Phases by the host's clock; what runs on the CPU is done when its call returns."""

    def start(self) -> None:
        self._phases: dict[str, float] = {}
        self._since = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self._phases[name] = (now - self._since) * 1000
        self._since = now

    def milliseconds(self) -> dict[str, float]:
        return self._phases


class _CudaClock:
    """Phases by the GPU's clock.

    With ``flush`` every phase starts with an empty L2 cache, as a layer's do in training, and on a GPU that waits until
    the host has queued the phase: the time is the kernels' own, without gaps between them.
    """

    def __init__(self, flush: bool) -> None:
        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda") if flush else None

    def start(self) -> None:
        self._laps: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._begin()

    def _begin(self) -> None:
        if self._flush is not None:
            self._flush.zero_()
            torch.cuda._sleep(_HEAD_START_CYCLES)
        self._since = torch.cuda.Event(enable_timing=True)
        self._since.record()

    def lap(self, name: str) -> None:
        end = torch.cuda.Event(enable_timing=True)
        end.record()
        self._laps.append((name, self._since, end))
        self._begin()

    def milliseconds(self) -> dict[str, float]:
        torch.cuda.synchronize()
        return {name: start.elapsed_time(end) for name, start, end in self._laps}


@dataclass(frozen=True)
class Timings:
    """Milliseconds by contender, phase and round; the phase ``total`` is the sum of a round's others."""

    milliseconds: Mapping[str, Mapping[str, Sequence[float]]]

    def median(self, contender: str, phase: str = TOTAL) -> float:
        """Milliseconds."""
        return statistics.median(self.milliseconds[contender][phase])

    def quartiles(self, contender: str, phase: str = TOTAL) -> tuple[float, float]:
        """The middle half of the rounds lies between these, milliseconds."""
        values = self.milliseconds[contender][phase]
        if len(values) == 1:
            return values[0], values[0]
        first, _, third = statistics.quantiles(values, n=4, method="inclusive")
        return first, third

    def ratio(self, contender: str, baseline: str, phase: str = TOTAL) -> float:
        """Median over rounds of contender's time over baseline's in the same round."""
        pairs = zip(self.milliseconds[contender][phase], self.milliseconds[baseline][phase], strict=True)
        return statistics.median(own / base for own, base in pairs)

    def fastest(self, contenders: Iterable[str], phase: str = TOTAL) -> str:
        """The one with the smallest median."""
        return min(contenders, key=lambda name: self.median(name, phase))

    def record(self, contender: str) -> dict[str, Any]:
        """Median and quartiles of every phase, for JSON."""
        phases = self.milliseconds[contender]
        return {
            "ms": {phase: self.median(contender, phase) for phase in phases},
            "ms_quartiles": {phase: self.quartiles(contender, phase) for phase in phases},
            "rounds": len(phases[TOTAL]),
        }


def time_alternately(
    contenders: Mapping[str, Run],
    device: torch.device,
    rounds: int,
    warmup: int = 3,
    flush: bool = False,
    before_each: Callable[[], None] = lambda: None,
) -> Timings:
    """Times every contender once a round, each round starting with another one.

    Args:
        contenders: by name; each calls its ``lap`` at the end of every phase.
        device: whose clock is read.
        rounds: how many are timed.
        warmup: how many come before them.
        flush: on a GPU, kernels alone with an empty cache (:class:`_CudaClock`).
        before_each: runs before every repetition, untimed.
    """
    clock = _CudaClock(flush) if device.type == "cuda" else _HostClock()
    names = list(contenders)
    milliseconds: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    collects_garbage = gc.isenabled()
    gc.disable()
    try:
        for index in range(-warmup, rounds):
            first = index % len(names)
            for name in names[first:] + names[:first]:
                before_each()
                clock.start()
                contenders[name](clock.lap)
                phases = clock.milliseconds()
                if index >= 0:
                    for phase, value in {**phases, TOTAL: sum(phases.values())}.items():
                        milliseconds[name].setdefault(phase, []).append(value)
    finally:
        if collects_garbage:
            gc.enable()
    return Timings(milliseconds)


def forward_backward(forward: Callable[[], Tensor], grad: Tensor, leaves: Sequence[Tensor]) -> Run:
    """A run of two phases: ``forward``, and ``backward`` from ``grad``.

    Args:
        forward: what is timed.
        grad: gradient of its output.
        leaves: tensors whose gradients are dropped at the end, so that every run makes them anew.
    """

    def run(lap: Lap) -> None:
        out = forward()
        lap("forward")
        out.backward(grad)
        lap("backward")
        for leaf in leaves:
            leaf.grad = None

    return run


def no_lap(name: str) -> None:
    """For a run that is not timed."""


def copy_bandwidth(device: torch.device, size: int | None = None) -> float:
    """GB/s (10^9 bytes read and written a second) of copying one tensor to another on the device.

    Args:
        size: bytes of one tensor; default 1 GiB on a GPU, 256 MiB on a CPU, above any cache.
    """
    size = size or (1 << 30 if device.type == "cuda" else 256 << 20)
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)

    def copy(lap: Lap) -> None:
        target.copy_(source)
        lap("copy")

    timings = time_alternately({"copy": copy}, device, rounds=9, warmup=2)
    return 2 * size / timings.median("copy") / 1e6


# Memory.


def peak_bytes(run: Run, device: torch.device) -> int:
    """The most memory a run holds at once above what is held before it, in bytes as requested by tensors.

    On a GPU the caching allocator's count (it rounds up to 512 bytes), on a CPU every allocation of tensor memory, in
    order, from torch's profiler. Warm up first, compilation allocates too; what is there before must stay.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(no_lap)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # it reports that it found no GPU as an error
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profiled:
        run(no_lap)
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@dataclass(frozen=True)
class Saved:
    """Storages kept for backward; a storage that several operations keep, or several views share, is there once."""

    storages: tuple[torch.UntypedStorage, ...]

    @property
    def bytes(self) -> int:
        """All of them, in bytes; measured when asked, so that outputs discarded to be recomputed count 0."""
        return sum(storage.nbytes() for storage in self.storages)

    def bytes_of(self, tensors: Iterable[Tensor]) -> int:
        """Those that hold one of these tensors."""
        own = {tensor.untyped_storage()._cdata for tensor in tensors}
        return sum(storage.nbytes() for storage in self.storages if storage._cdata in own)


def saved_for_backward(forward: Callable[[], Tensor], leave_out: Iterable[Tensor] = ()) -> Saved:
    """What autograd keeps after a forward: inputs and intermediate results, parameters left out.

    Args:
        forward: runs once, with gradients.
        leave_out: further tensors that do not count; parameters never do.
    """
    outside = {tensor.untyped_storage()._cdata for tensor in leave_out}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, torch.nn.Parameter) and storage._cdata not in outside:
            storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    del out
    return Saved(tuple(storages.values()))


# Surroundings.


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


def positive(text: str) -> int:
    """For argparse: a whole number above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def set_up(options: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """Device and dtype by the flags of :func:`add_arguments`; sets the number of threads, and hides a GPU that is not
    asked for, since Megatron takes any there is. To be called before CUDA is used.

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
    mixings: Iterable[MixtureConfig],
    dtype: torch.dtype,
    device: torch.device,
    *,
    width: int,
    hidden: int,
    tokens: int = 40,
    scale: bool = False,
) -> None:
    """Compares what is to be timed with the reference in float64, and leaves with exit code 1 where it is wrong.

    Args:
        program: for the message.
        mixings: with the backends they will be timed with.
        width: f, as timed: compiled code then serves both.
        hidden: h of the gates.
        tokens: few are enough.
        scale: whether the mixture multiplies by a router's probability.
    """
    from megatron_moa.research.benchmarks import kernel_errors

    try:
        for mixing in dict.fromkeys(mixings):
            kernel_errors.require(
                kernel_errors.check_mixture(mixing, dtype, device, tokens=tokens, width=width, scale=scale)
            )
            if mixing.kind == "moa":
                kernel_errors.require(kernel_errors.check_gate(mixing, dtype, device, tokens=tokens, hidden=hidden))
    except kernel_errors.AccuracyError as error:
        text = " ".join(str(error).split())
        if os.environ.get("RANK", "0") == "0":
            print(f"{program}: nothing was timed, because a result is wrong: {text}", flush=True)
        raise SystemExit(1) from None


# Reports.


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
