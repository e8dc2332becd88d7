"""Times what the benchmarks in tools/ compare, in alternation, on a CPU or a GPU.

Contenders run in alternation, and a ratio is the median of the rounds' own ratios: what slows the machine down for a
while slows all contenders of a round down, and leaves their ratio alone.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TOTAL = "total"


Lap = Callable[[str], None]  # ends a phase of a run, and names it


Run = Callable[[Lap], None]  # one repetition of what is timed


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

    def fastest(self, contenders: Iterable[str]) -> str:
        """The one with the smallest median."""
        return min(contenders, key=lambda name: self.median(name, TOTAL))

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
