"""Times what a feed-forward layer's Python takes of the host: microseconds, with no kernel launched.

    python tools/benchmark_host.py                  dense layers: every form beside SwiGLU, GELU and no activation
    python tools/benchmark_host.py --experts 32     grouped experts, too

Small layers wait for the host: it has to issue launches faster than the GPU runs them. Here layers are tiny and lie on
the CPU; the mixture's Triton launches are made up to the call that would start the kernel. Columns:

  forward, backward   of a layer in Megatron's DDP: the call that one in ten calls is faster than, so that what else
                      the machine does is left out; the linears and all of torch's dispatch are in it, so only
                      differences between rows mean something
  beyond identity     forward and backward over those of a layer whose activation launches nothing
  over SwiGLU         the same over SwiGLU's of Megatron (experts: grouped as ours are); ratio: the rounds' median
  step, a parameter   Megatron's optimizer step, norm and clipping included, and that over the number of parameters

Runs without a GPU, and hides one that is there.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_moa import startup
from megatron_moa.command_line.numbers import positive
from megatron_moa.command_line.tables import markdown_table
from megatron_moa.errors import OneLineParser, UserError, one_line_errors
from megatron_moa.mixture.config import FORMS, MixtureConfig
from megatron_moa.research.benchmarks import conditions
from megatron_moa.research.benchmarks.mocked_launches import mocked_launches
from megatron_moa.research.benchmarks.one_layer import build_layer, layer_config, split_over, start

PROGRAM = "benchmark_host.py"
HIDDEN, FFN, TOKENS = 16, 32, 8
PHASES = ("forward", "backward", "step")
GELU = {"gated_linear_unit": False, "activation_func": F.gelu}
SWIGLU = {"gated_linear_unit": True, "activation_func": F.silu}


def nothing(x: Tensor) -> Tensor:
    """An activation that launches no kernel."""
    return x


@dataclass
class TimedLayer:
    """One layer, and the microseconds of its calls by phase, in lists by round.

    Attributes:
        family: arms of one family are compared with each other.
        phases: forward, which gives the output; backward; the optimizer's step.
    """

    name: str
    family: str
    parameters: int
    forward: Callable[[], Tensor]
    backward: Callable[[Tensor], None]
    step: Callable[[], None]
    rounds: dict[str, list[list[float]]] = field(default_factory=lambda: {phase: [] for phase in PHASES})

    def usual(self, phase: str) -> float:
        """Microseconds of a call that is not held up."""
        return _fast([call for calls in self.rounds[phase] for call in calls])

    def layer(self) -> float:
        """Forward and backward."""
        return self.usual("forward") + self.usual("backward")

    def layer_by_round(self) -> list[float]:
        """The same of each round alone."""
        return [_fast(f) + _fast(b) for f, b in zip(self.rounds["forward"], self.rounds["backward"], strict=True)]


def _fast(times: list[float]) -> float:
    return sorted(times)[len(times) // 10]


def build(
    name: str, family: str, mixture: MixtureConfig | None, settings: dict[str, Any], options: argparse.Namespace
) -> TimedLayer:
    """A layer in Megatron's DDP with Megatron's optimizer."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    of_layer = argparse.Namespace(
        hidden=HIDDEN, ffn=FFN, experts=options.experts if family == "experts" else None, topk=2,
        router="balanced", sequence_parallel=False,
    )  # fmt: skip
    config = layer_config(of_layer, settings, torch.float32, tp=1)
    layer = build_layer(config, mixture, torch.device("cpu"))
    model = DistributedDataParallel(config, DistributedDataParallelConfig(), layer)
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=1e-4, clip_grad=1.0), [model])
    x = torch.zeros(TOKENS, 1, HIDDEN, requires_grad=True)
    gradient = torch.zeros(TOKENS, 1, HIDDEN)

    def backward(output: Tensor) -> None:
        output.backward(gradient)
        x.grad = None

    def step() -> None:
        for buffer in (*model.buffers, *model.expert_parallel_buffers):
            buffer.grad_data.zero_()  # whatever a kernel that did not run left
        optimizer.step()

    count = sum(parameter.requires_grad for parameter in layer.parameters())
    return TimedLayer(name, family, count, lambda: model(x)[0], backward, step)


def built_arms(options: argparse.Namespace) -> list[TimedLayer]:
    """All contenders."""
    mixtures = [
        (f"{kind} {form}", MixtureConfig(kind.lower(), form)) for form in options.form for kind in ("MoA", "LA")
    ]
    arms = [
        build("identity", "dense", None, {**GELU, "activation_func": nothing}, options),
        build("SwiGLU", "dense", None, SWIGLU, options),
        build("GELU", "dense", None, GELU, options),
    ]
    for name, mixture in mixtures:
        arms.append(build(name, "dense", mixture, SWIGLU if mixture.gated else GELU, options))
    if options.experts:
        grouped = {**SWIGLU, "moe_grouped_gemm": True}
        arms.append(build("SwiGLU", "experts", None, grouped, options))
        arms += [build(name, "experts", mixture, grouped, options) for name, mixture in mixtures if mixture.gated]
    return arms


def time_rounds(arms: list[TimedLayer], rounds: int, repetitions: int) -> None:
    """Microseconds of each call, each round starting with another arm; the first does not count."""
    for number in range(rounds + 1):
        for arm in (*arms[number % len(arms) :], *arms[: number % len(arms)]):
            spent: dict[str, list[float]] = {phase: [] for phase in PHASES}
            gc.collect()
            for _ in range(repetitions):
                times = [time.perf_counter()]
                output = arm.forward()
                times.append(time.perf_counter())
                arm.backward(output)
                times.append(time.perf_counter())
                arm.step()
                times.append(time.perf_counter())
                for phase, (begin, end) in zip(PHASES, itertools.pairwise(times), strict=True):
                    spent[phase].append(1e6 * (end - begin))
            if number:
                for phase, calls in spent.items():
                    arm.rounds[phase].append(calls)


def records(arms: list[TimedLayer]) -> list[dict[str, Any]]:
    """The figures of each arm."""
    found = []
    for arm in arms:
        baseline = next(other for other in arms if (other.name, other.family) == ("SwiGLU", arm.family))
        identity = next(other for other in arms if other.name == "identity")
        pairs = zip(arm.layer_by_round(), baseline.layer_by_round(), strict=True)
        us = {phase: arm.usual(phase) for phase in PHASES}
        beyond = arm.layer() - identity.layer() if arm.family == "dense" else None
        found.append(
            {"arm": arm.name, "family": arm.family, "parameters": arm.parameters, "us": us}
            | {"beyond_identity_us": beyond, "over_swiglu": statistics.median(own / base for own, base in pairs)}
            | {"over_swiglu_us": arm.layer() - baseline.layer()}
            | {"step_us_a_parameter": us["step"] / arm.parameters}
        )
    return found


def print_table(found: list[dict[str, Any]]) -> None:
    """A line an arm."""
    head = [
        "layer",
        "parameters",
        "forward us",
        "backward us",
        "beyond identity",
        "over SwiGLU, us",
        "ratio",
        "step us",
    ]
    rows = []
    for record in found:
        us = record["us"]
        beyond = record["beyond_identity_us"]
        rows.append(
            [f"{record['family']}, {record['arm']}", record["parameters"], f"{us['forward']:.0f}"]
            + [f"{us['backward']:.0f}", "" if beyond is None else f"{beyond:.0f}", f"{record['over_swiglu_us']:.0f}"]
            + [f"{record['over_swiglu']:.2f}", f"{us['step']:.0f}", f"{record['step_us_a_parameter']:.1f}"]
        )
    print(markdown_table([*head, "a parameter"], rows), flush=True)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Our flags."""
    parser = OneLineParser(prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = {"type": positive, "metavar": "N"}
    parser.add_argument("--form", nargs="+", choices=FORMS, default=list(FORMS), help="default: all")
    parser.add_argument("--experts", **size, help="also a MoE layer of so many grouped experts, two a token")
    parser.add_argument("--repetitions", **size, default=20, help="calls a round (default: %(default)s)")
    conditions.add_run_arguments(parser, rounds=10, threads="1")
    options = parser.parse_args(argv)
    if options.experts == 1:
        raise UserError("--experts 1: a token takes two; give 2 or more")
    options.device, options.dtype, options.threads = "cpu", "fp32", options.threads or 1
    return options


def main(argv: list[str] | None = None) -> None:
    """Builds, times, prints."""
    os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported: its interpreter launches nothing
    with one_line_errors(PROGRAM):
        options = parse(argv)
        device, _ = conditions.set_up(options)
        warnings.filterwarnings("ignore", module="megatron")
        startup.prepare()
        start(device)
        split_over(1)
        surroundings = conditions.environment(device)
        print(conditions.describe(surroundings), flush=True)
        with mocked_launches():
            arms = built_arms(options)
            time_rounds(arms, options.rounds, options.repetitions)
        found = records(arms)
        print_table(found)
        conditions.append_records(options.json, "host", surroundings, found)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
