"""Tests all-reduces across all ranks: their sums, their speed, and which rank or link is slow.

NCCL on GPUs, gloo on CPUs.  An all-reduce makes all ranks wait for the slowest, so its time alone names nobody: each
rank's own speed (a product of matrices) and each link to the next rank are measured, too.  What ranks have to tell each
other goes through the store, which works where the network under test does not.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from megatron_moa.errors import UserError
from megatron_moa.megatron_fixes.single_process import single_process_environment

MIB = 2**20
SIZES = {"nccl": (1 * MIB, 16 * MIB, 256 * MIB, 1024 * MIB), "gloo": (MIB // 16, 1 * MIB, 16 * MIB)}  # bytes
LINK_BYTES = {"nccl": 256 * MIB, "gloo": 4 * MIB}
REPEATS = 10
SLOW_RANK = 1.5  # times the median rank's time for the same product
SLOW_LINK = 0.5  # times the median bandwidth of links of its kind


@dataclass(frozen=True)
class Sample:
    """The all-reduces of one size.

    Attributes:
        size: bytes on each rank.
        seconds: of one all-reduce, by rank.
    """

    size: int
    seconds: Sequence[float]

    def algorithm_bandwidth(self, seconds: float) -> float:
        """Bytes/s: size over time."""
        return self.size / seconds

    def bus_bandwidth(self, seconds: float) -> float:
        """Bytes/s each link of a ring carries: 2 (n - 1) / n times the algorithm's, so that worlds compare."""
        ranks = len(self.seconds)
        return self.algorithm_bandwidth(seconds) * 2 * (ranks - 1) / ranks


class _Ranks:
    """This rank and the others, over the launcher's store.

    Args:
        seconds: how long to wait for another rank.

    Raises:
        UserError: variables of a launcher that are missing or no numbers.
    """

    def __init__(self, seconds: float) -> None:
        single_process_environment()
        self.rank, self.size, self.local_rank = _number("RANK"), _number("WORLD_SIZE"), _number("LOCAL_RANK", "0")
        if not self.size:
            raise UserError("WORLD_SIZE 0: no ranks; start with megatron_moa.launch, which sets it")
        if self.rank >= self.size:
            self.leave(f"RANK {self.rank}: not below WORLD_SIZE {self.size}; start with megatron_moa.launch")
        self.timeout = timedelta(seconds=seconds)
        address, port = _variable("MASTER_ADDR"), _number("MASTER_PORT")
        if port >= 2**16:
            raise UserError(f"MASTER_PORT {port}: no port; give one below 65536")
        # Under torchrun its agent has the store, else the first rank.
        hosts = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        try:
            self.store = dist.TCPStore(address, port, self.size, hosts, self.timeout, wait_for_workers=False)
        except RuntimeError as error:
            self.leave(
                f"MASTER_ADDR:MASTER_PORT {address}:{port} does not answer within {seconds:.0f} s "
                f"({_first_line(error)}): is rank 0 there, the port free, and open in the firewall?"
            )

    def leave(self, message: str) -> NoReturn:
        """One line, and exit code 1 at once: an orderly end would wait for connections."""
        print(f"doctor: rank {self.rank} on {platform.node()}: {message}", file=sys.stderr, flush=True)
        os._exit(1)

    def meet(self, about: dict[str, Any]) -> list[dict[str, Any]]:
        """What each rank says about itself, once all are there; leaves if some do not come."""
        self.store.set(f"doctor/about/{self.rank}", json.dumps(about))
        keys = [f"doctor/about/{rank}" for rank in range(self.size)]
        deadline = time.monotonic() + self.timeout.total_seconds()
        while not self.store.check(keys):
            if time.monotonic() > deadline:
                there = [self.store.check([key]) for key in keys]
                away = [str(rank) for rank, came in enumerate(there) if not came]
                if there.index(True) != self.rank:
                    os._exit(1)  # another one says it
                present = [json.loads(self.store.get(key)) for key, came in zip(keys, there, strict=True) if came]
                hosts = sorted({entry["host"] for entry in present})
                self.leave(
                    f"no sign of rank {', '.join(away)} of {self.size} within {self.timeout.total_seconds():.0f} s "
                    f"(here are: {', '.join(hosts)}); look at the logs of the other nodes, or give --timeout more"
                )
            time.sleep(0.05)
        return [json.loads(self.store.get(key)) for key in keys]

    def gather(self, key: str, value: Any) -> list[Any]:
        """Every rank's value; a barrier, too."""
        self.store.set(f"doctor/{key}/{self.rank}", json.dumps(value))
        keys = [f"doctor/{key}/{rank}" for rank in range(self.size)]
        self.store.wait(keys, self.timeout)
        return [json.loads(self.store.get(name)) for name in keys]


def _variable(name: str, default: str | None = None) -> str:
    value = os.environ.get(name, default)
    if value is None:
        raise UserError(f"{name} is not set, but other variables of a launcher are: start with megatron_moa.launch")
    return value


def _number(name: str, default: str | None = None) -> int:
    value = _variable(name, default)
    if not value.isdecimal():
        raise UserError(f"{name} {value}: not a number; start with megatron_moa.launch, which sets it")
    return int(value)


def main(seconds: float, as_json: bool) -> int:
    """Measures, prints on the first rank, and returns the exit code: 0, or 1 for a wrong sum.

    Args:
        seconds: how long to wait for another rank.
        as_json: print JSON.
    """
    ranks = _Ranks(seconds)
    try:
        about = ranks.meet({"host": platform.node(), "gpus": torch.cuda.device_count(), "local_rank": ranks.local_rank})
        problem = complaint(about)
        if problem is not None:
            if ranks.rank == 0:
                ranks.leave(problem)
            return 1
        results = _measure(ranks, [entry["host"] for entry in about], "nccl" if about[0]["gpus"] else "gloo")
    except RuntimeError as error:  # of the store, gloo and NCCL
        ranks.leave(f"another rank is gone, or does not answer within {seconds:.0f} s: {_first_line(error)}")
    if ranks.rank == 0:
        print(json.dumps(results, indent=2) if as_json else "\n".join(_lines(results)), flush=True)
    return 0 if results["correct"] else 1


def complaint(about: Sequence[Mapping[str, Any]]) -> str | None:
    """What would hang or fail later: ranks that would use other backends, or share a GPU."""
    without = [str(rank) for rank, entry in enumerate(about) if not entry["gpus"]]
    if without and len(without) < len(about):
        return f"rank {', '.join(without)} sees no GPU, the others do; run python -m megatron_moa.doctor there"
    for rank, entry in enumerate(about):
        if entry["gpus"] and entry["local_rank"] >= entry["gpus"]:
            return f"rank {rank} has LOCAL_RANK {entry['local_rank']}, but {entry['host']} has {entry['gpus']} GPUs"
    return None


def _measure(ranks: _Ranks, hosts: list[str], backend: str) -> dict[str, Any]:
    device = torch.device("cuda", ranks.local_rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    store = dist.PrefixStore("doctor/group", ranks.store)
    dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.size, timeout=ranks.timeout)
    correct = True
    samples = []
    for size in SIZES[backend]:
        numbers = torch.arange(size // 4, dtype=torch.float32, device=device) % 97
        total = numbers * (ranks.rank + 1)
        dist.all_reduce(total)
        # Whole numbers below 2^24: exact in float32, whatever the order.
        right = torch.equal(total, numbers * (ranks.size * (ranks.size + 1) // 2))
        correct = all(ranks.gather(f"sum/{size}", right)) and correct
        seconds = _time(lambda buffer=total: dist.all_reduce(buffer), device)
        samples.append(Sample(size, ranks.gather(f"time/{size}", seconds)))
    factor = torch.ones(2 * (4096 if backend == "nccl" else 512,), device=device)
    # The best of several: a rank is slow if it never is fast.
    products = ranks.gather("product", min(_time(lambda: factor @ factor, device) for _ in range(5)))
    links = _links(ranks, device, LINK_BYTES[backend])
    dist.destroy_process_group()
    return {
        "backend": backend,
        "hosts": hosts,
        "correct": correct,
        "all_reduce": [_statistics(sample) for sample in samples],
        "product_ms": [1000 * seconds for seconds in products],
        "links": [{"ranks": pair, "bytes_per_second": speed} for pair, speed in links.items()],
        "slow": slow_ranks(products, hosts) + slow_links(links, hosts),
    }


def _time(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, the mean of :data:`REPEATS` after two that do not count."""
    for _ in range(2):
        work()
    start = _now(device)
    for _ in range(REPEATS):
        work()
    return (_now(device) - start) / REPEATS


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _links(ranks: _Ranks, device: torch.device, size: int) -> dict[tuple[int, int], float]:
    """Measures the links between each rank and the next, in bytes/s.

    Both directions run at once; the speed is that of one of them. The last rank's next is the first.
    """
    pairs = [(rank, (rank + 1) % ranks.size) for rank in range(ranks.size)][: ranks.size if ranks.size > 2 else 1]
    if ranks.size == 1:
        return {}
    measured: dict[tuple[int, int], float] = {}
    # Neighbours share a rank: those that run at once must not.
    for turn in range(3):
        now = [pair for pair in pairs if turn_of(pair, ranks.size) == turn]
        own = next((pair for pair in now if ranks.rank in pair), None)
        seconds = None
        if own is not None:
            peer = own[0] if own[1] == ranks.rank else own[1]
            out, back = (torch.zeros(size // 4, device=device) for _ in range(2))

            def exchange(peer: int = peer, out: torch.Tensor = out, back: torch.Tensor = back) -> None:
                work = [dist.P2POp(dist.isend, out, peer), dist.P2POp(dist.irecv, back, peer)]
                for request in dist.batch_isend_irecv(work):
                    request.wait()

            seconds = _time(exchange, device)
        times = ranks.gather(f"links/{turn}", seconds)
        measured |= {pair: size / max(times[pair[0]], times[pair[1]]) for pair in now}
    return measured


def turn_of(pair: tuple[int, int], size: int) -> int:
    """Returns the turn (0, 1 or 2) in which a link is measured.

    Even ranks' links come first, then odd ranks'. Of an odd number of ranks, the link that closes the ring has turn 2
    by itself.
    """
    return 2 if size % 2 and pair[0] == size - 1 else pair[0] % 2


def slow_ranks(seconds: Sequence[float], hosts: Sequence[str]) -> list[str]:
    """A line for each rank that needs :data:`SLOW_RANK` times the median rank's time for the same product."""
    usual = statistics.median_low(seconds)
    return [
        f"rank {rank} on {hosts[rank]} computes slowly: a product of matrices takes {1000 * own:.2f} ms, the median "
        f"rank {1000 * usual:.2f} ms"
        for rank, own in enumerate(seconds)
        if own > SLOW_RANK * usual
    ]


def slow_links(links: Mapping[tuple[int, int], float], hosts: Sequence[str]) -> list[str]:
    """Returns a line for each slow link: below :data:`SLOW_LINK` of the median of its kind.

    The kinds are within a host and between hosts. A rank all of whose links of a kind are slow gets one line for them.

    Args:
        links: bytes/s between two ranks.
        hosts: by rank.
    """
    lines = []
    for within in (True, False):
        kind = {pair: speed for pair, speed in links.items() if (hosts[pair[0]] == hosts[pair[1]]) is within}
        if not kind:
            continue
        usual = statistics.median_high(kind.values())
        slow = {pair: speed for pair, speed in kind.items() if speed < SLOW_LINK * usual}
        what = "link within a host" if within else "link between hosts"
        touching = {rank: [pair for pair in kind if rank in pair] for pair in slow for rank in pair}
        culprits = [rank for rank, own in touching.items() if len(own) > 1 and all(pair in slow for pair in own)]
        for rank in sorted(culprits):
            own = _gigabytes(slow[touching[rank][0]])
            lines.append(
                f"rank {rank} on {hosts[rank]}: every {what} of it is slow, {own} GB/s, where the median is "
                f"{_gigabytes(usual)} GB/s"
            )
        lines += [
            f"ranks {a} on {hosts[a]} and {b} on {hosts[b]}: this {what} has {_gigabytes(speed)} GB/s, the median "
            f"{_gigabytes(usual)} GB/s"
            for (a, b), speed in slow.items()
            if a not in culprits and b not in culprits
        ]
    return lines


def _statistics(sample: Sample) -> dict[str, Any]:
    median, most = statistics.median(sample.seconds), max(sample.seconds)
    return {
        "bytes": sample.size,
        "ms_median": 1000 * median,
        "algorithm_bandwidth_median": sample.algorithm_bandwidth(median),
        "algorithm_bandwidth_min": sample.algorithm_bandwidth(most),
        "bus_bandwidth_median": sample.bus_bandwidth(median),
        "bus_bandwidth_min": sample.bus_bandwidth(most),
        "slowest_rank": list(sample.seconds).index(most),
    }


def _lines(results: Mapping[str, Any]) -> list[str]:
    """The report for people."""
    hosts = results["hosts"]
    by_host = {host: [rank for rank, name in enumerate(hosts) if name == host] for host in dict.fromkeys(hosts)}
    where = ", ".join(f"{host}: rank {' '.join(map(str, own))}" for host, own in by_host.items())
    lines = [
        f"all-reduce of float32 across {len(hosts)} ranks by {results['backend']} ({where})",
        f"{'MiB':>9}  {'ms':>9}  {'algorithm GB/s':>20}  {'bus GB/s':>20}",
        f"{'':9}  {'median':>9}  {'median':>10}{'min':>10}  {'median':>10}{'min':>10}",
    ]
    for row in results["all_reduce"]:
        speeds = [row[f"{kind}_bandwidth_{of}"] for kind in ("algorithm", "bus") for of in ("median", "min")]
        columns = "".join(
            f"{_gigabytes(speed):>{width}}" for speed, width in zip(speeds, (12, 10, 12, 10), strict=True)
        )
        lines.append(f"{row['bytes'] / MIB:9.4g}  {row['ms_median']:9.3f}{columns}")
    lines += [
        f"link of ranks {link['ranks'][0]} and {link['ranks'][1]}: {_gigabytes(link['bytes_per_second'])} GB/s each way"
        for link in results["links"]
    ][:16]
    lines += [f"slow: {line}" for line in results["slow"]]
    if len(hosts) == 1:
        lines.append("one rank sends nothing: start several with python -m megatron_moa.launch --nproc-per-node N -m …")
    lines.append("all sums are right" if results["correct"] else "WRONG SUMS: do not train on these ranks")
    return lines


def _gigabytes(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e9:.3g}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
