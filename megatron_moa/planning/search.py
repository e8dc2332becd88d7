"""Searches the split over GPUs that fits and is fastest."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from megatron_moa.errors import UserError
from megatron_moa.mixture.config import MixtureConfig
from megatron_moa.planning.communication import GPUS_PER_NODE, StepTime, step_time
from megatron_moa.planning.memory import GIBIBYTE, Memory, peak
from megatron_moa.planning.model import RECOMPUTE, Model, Split
from megatron_moa.training.flops import Flops, flops_per_token
from megatron_moa.training.gpus import Gpu

_KEPT = 10  # best splits that are looked at closer
_MOST_GPUS = 1 << 16  # where searches for a number of GPUs end

FLAGS = {
    "tp": "--tp",
    "pp": "--pp",
    "vpp": "--vpp",
    "ep": "--ep",
    "cp": "--cp",
    "micro_batch": "--micro-batch-size",
    "recompute": "--recompute",
}


@dataclass(frozen=True)
class Plan:
    """A split with what it needs."""

    split: Split
    memory: Memory
    step: StepTime


def divisors(number: int, most: int) -> list[int]:
    """All up to ``most``, in order."""
    return [value for value in range(1, min(number, most) + 1) if number % value == 0]


# Which splits are possible.


def problems(model: Model, split: Split) -> dict[str, str]:
    """Returns what keeps a split from being built, by the split's attribute.

    Each is told in a line with the nearest values that would do.
    """
    found: dict[str, str] = {}
    rules = list(_rules(model, split))
    for name, works, why in rules:
        value = getattr(split, name)
        if name in found or works(value):
            continue
        every = [other for named, other, _ in rules if named == name]
        near = _nearest(name, value, lambda number, every=every: all(works(number) for works in every))
        found[name] = f"{FLAGS[name]} {value}: {why}; {near}"
    return found


def _rules(model: Model, split: Split) -> Iterator[tuple[str, Callable[[int], bool], str]]:
    """For each number of a split, what it must fulfil with the others as they are, and what that says."""
    gpus, experts = split.gpus, model.experts
    said = f"does not divide the {model.heads} attention heads"
    if model.groups != model.heads:
        said += f" and {model.groups} key heads"
    yield "tp", lambda tp: model.heads % tp == model.groups % tp == 0, said
    tokens = model.sequence // split.cp
    yield "tp", lambda tp: tokens % tp == 0, f"does not divide the {tokens} tokens of a sequence (SEQ_LENGTH, CP)"
    shared = [f"{name} {width}" for name, (width, ranks) in model.widths(split.tp).items() if ranks > 1]
    said = f"does not divide the {' and '.join(shared)} (FFN_MULTIPLE=128 rounds widths up)"
    yield "tp", lambda tp: all(width % ranks == 0 for width, ranks in model.widths(tp).values()), said
    yield "tp", lambda tp: gpus % tp == 0, f"does not divide {gpus} GPUs"
    yield "pp", lambda pp: model.layers % pp == 0, f"does not divide the {model.layers} layers"
    stages = split.tp * split.cp
    yield "pp", lambda pp: gpus % (stages * pp) == 0, f"times {stages} ranks (TP, CP) does not divide {gpus} GPUs"
    yield "cp", lambda cp: model.sequence % (2 * cp) == 0 or cp == 1, f"2 CP does not divide {model.sequence} tokens"
    others = split.tp * split.pp
    yield "cp", lambda cp: gpus % (others * cp) == 0, f"times {others} ranks (TP, PP) does not divide {gpus} GPUs"
    if split.vpp > 1:
        run = model.layers // split.pp
        yield "vpp", lambda vpp: vpp == 1 or split.pp > 1, "virtual stages need --pp 2 or more"
        yield "vpp", lambda vpp: run % vpp == 0, f"does not divide the {run} layers of a stage"
    if experts is None:
        yield "ep", lambda ep: ep == 1, "this model has no experts"
    else:
        said = f"there are {experts.number} experts, which it must divide"
        yield "ep", lambda ep: experts.number % ep == 0, said
        stage = gpus // split.pp
        yield "ep", lambda ep: stage % ep == 0, f"does not divide the {stage} ranks of a stage"
    batch, ranks = model.global_batch, max(split.dp, 1)
    said = f"times {ranks} data-parallel ranks does not divide the global batch of {batch}"
    yield "micro_batch", lambda size: batch % (ranks * size) == 0, said
    if split.vpp > 1:
        micro_batches = batch // (ranks * split.micro_batch)
        said = f"{micro_batches} micro-batches are no multiple of {split.pp} stages"
        yield "vpp", lambda vpp: vpp == 1 or micro_batches % split.pp == 0, said


def _nearest(name: str, value: int, works: Callable[[int], bool]) -> str:
    below = next((number for number in range(min(value, 4096) - 1, 0, -1) if works(number)), None)
    above = next((number for number in range(value + 1, min(4 * value, 4096) + 1) if works(number)), None)
    near = [f"{FLAGS[name]} {number}" for number in (below, above) if number is not None]
    if not near:
        return "take another number of GPUs (--gpus), or a larger batch (GLOBAL_BATCH_SIZE)"
    return f"take {' or '.join(near)}"


# Which fit, and how fast they are.


@dataclass(frozen=True)
class Planner:
    """Plans of one model on one kind of GPU.

    Attributes:
        flops: of one token, by the number of tensor-parallel ranks: the vocabulary's padding hangs on it.
        mfu: see :func:`megatron_moa.planning.communication.step_time`.
        micro_batch: the recipe's; the search takes it, or halves of it.
        check: a further check of a split, Megatron's own; raises UserError.
    """

    model: Model
    gpu: Gpu
    flops: Callable[[int], Flops]
    mfu: float
    micro_batch: int
    check: Callable[[Split], None]

    def plan(self, split: Split) -> Plan:
        """What a split needs, whether it fits or not."""
        step = step_time(self.model, split, self.flops(split.tp), self.gpu, self.mfu)
        return Plan(split, peak(self.model, split), step)

    def fits(self, plan: Plan) -> bool:
        """Whether it leaves the allowance."""
        return plan.memory.total <= self.gpu.memory_bytes

    def search(self, gpus: int, fixed: Mapping[str, int | str]) -> list[Plan]:
        """All possible splits that fit, the fastest first; of each TP, PP, EP, CP the best only.

        Args:
            fixed: attributes of :class:`Split` that are given.

        Raises:
            UserError: no split divides the model and the GPUs, none fits, or Megatron refuses those that do.
        """
        splits = list(self._candidates(gpus, fixed))
        if not splits:
            self._explain(gpus, fixed)
        plans = [self.plan(split) for split in splits]
        fitting = [plan for plan in plans if self.fits(plan)]
        if not fitting:
            raise UserError(self._too_little(plans, gpus, fixed))
        found = self._ranked(fitting)
        if not found:
            self.check(min(fitting, key=lambda plan: plan.step.seconds).split)
        return found

    def _ranked(self, plans: Iterable[Plan]) -> list[Plan]:
        """Returns the best plan of each TP, PP, EP, CP, sorted by time to three digits; at most ``_KEPT``.

        Where times are the same, less split ones come first, then less recomputed, then larger micro-batches.
        """

        def order(plan: Plan) -> tuple[float, ...]:
            split = plan.split
            ranks = split.tp * split.pp * split.cp * split.ep
            kind = RECOMPUTE.index(split.recompute)
            return float(f"{plan.step.seconds:.3g}"), ranks, split.vpp, kind, -split.micro_batch

        best: dict[tuple[int, ...], Plan] = {}
        for plan in sorted(plans, key=order):
            split = plan.split
            key = (split.tp, split.pp, split.ep, split.cp)
            if key not in best and self._accepts(split):
                best[key] = plan
            if len(best) == _KEPT:
                break
        return list(best.values())

    def _accepts(self, split: Split) -> bool:
        try:
            self.check(split)
        except UserError:
            return False
        return True

    def _candidates(self, gpus: int, fixed: Mapping[str, int | str]) -> Iterator[Split]:
        """What is not given: TP within a node, stages of whole layers, halves of the micro-batch."""
        model = self.model

        def choices(name: str, values: Iterable[int | str]) -> Iterable[int | str]:
            return (fixed[name],) if name in fixed else values

        halves = [self.micro_batch >> shift for shift in range(self.micro_batch.bit_length())]
        recompute = [kind for kind in RECOMPUTE if model.mixture is not None or kind != "mixture"]
        for tp in choices("tp", divisors(model.heads, min(gpus, GPUS_PER_NODE))):
            for pp in choices("pp", divisors(model.layers, gpus // tp)):
                for ep in choices("ep", divisors(model.experts.number, gpus // pp) if model.experts else (1,)):
                    for vpp in choices("vpp", divisors(model.layers // pp, 8) if pp > 1 else (1,)):
                        for micro_batch in choices("micro_batch", halves):
                            split = Split(gpus, tp, pp, vpp, ep, fixed.get("cp", 1), micro_batch)
                            if not _works(model, split):
                                continue
                            for kind in choices("recompute", recompute):
                                yield dataclasses.replace(split, recompute=kind)

    def _explain(self, gpus: int, fixed: Mapping[str, int | str]) -> None:
        """Raises UserError for the first given number that does not divide what it splits.

        If there is none, the error is raised for all of them together.
        """
        found = problems(self.model, Split(gpus, **fixed))
        for name in fixed:
            if name in found:
                raise UserError(found[name])
        raise UserError(
            f"--gpus {gpus}: no split over them divides {self.model.layers} layers, {self.model.heads} heads and a "
            f"global batch of {self.model.global_batch}; {self._nearest_gpus(gpus, fixed)}"
        )

    def _nearest_gpus(self, gpus: int, fixed: Mapping[str, int | str]) -> str:
        """Returns as advice the nearest number of GPUs, in whole nodes, that can be split.

        Such a number is TP PP CP times a divisor of the batch.
        """
        model, batch = self.model, self.model.global_batch
        tps = (fixed["tp"],) if "tp" in fixed else divisors(model.heads, GPUS_PER_NODE)
        pps = (fixed["pp"],) if "pp" in fixed else divisors(model.layers, model.layers)
        ranks = {tp * pp * fixed.get("cp", 1) for tp in tps for pp in pps}
        numbers = {number * dp for number in ranks for dp in divisors(batch, _MOST_GPUS)}
        for number in sorted(numbers, key=lambda number: (abs(number - gpus), number)):
            whole_nodes = number % GPUS_PER_NODE == 0 or GPUS_PER_NODE % number == 0
            if whole_nodes and next(self._candidates(number, fixed), None) is not None:
                return f"take --gpus {number}"
        return "take a larger batch (GLOBAL_BATCH_SIZE)"

    def _too_little(self, plans: list[Plan], gpus: int, fixed: Mapping[str, int | str]) -> str:
        """The least that is needed here, and the nearest thing that fits."""
        least = min(plans, key=lambda plan: plan.memory.total)
        has = self.gpu.memory_bytes / GIBIBYTE
        text = (
            f"--gpus {gpus}: too little memory, at least {least.memory.total / GIBIBYTE:.1f} GiB are needed on a GPU, "
            f"and a {self.gpu.name} has {has:.1f}; "
        )
        for name in ("recompute", "micro_batch", "ep", "tp", "pp"):
            freed = {other: value for other, value in fixed.items() if other != name}
            if name in fixed and (found := self._fitting(gpus, freed)):
                return text + f"{FLAGS[name]} {getattr(found.split, name)} fits"
        number = gpus
        while (number := 2 * number) <= _MOST_GPUS:
            if self._fitting(number, fixed):
                return text + f"--gpus {number} fits"
        return text + "no number of GPUs fits; shorten SEQ_LENGTH or take a GPU with more memory"

    def _fitting(self, gpus: int, fixed: Mapping[str, int | str]) -> Plan | None:
        plans = self._ranked(plan for plan in map(self.plan, self._candidates(gpus, fixed)) if self.fits(plan))
        return plans[0] if plans else None


def _works(model: Model, split: Split) -> bool:
    return all(works(getattr(split, name)) for name, works, _ in _rules(model, split))


def flops_by_tp(args: argparse.Namespace, mixture: MixtureConfig | None) -> Callable[[int], Flops]:
    """FLOPs of one token by the number of tensor-parallel ranks, each counted once."""

    @functools.cache
    def flops(tp: int) -> Flops:
        own = copy.copy(args)
        own.tensor_model_parallel_size = tp
        return flops_per_token(own, mixture)

    return flops
