"""Plans the training of a recipe on so many GPUs: memory, time, cost, and the split.

    python tools/plan.py moe-2b --gpus 64 --gpu h200                 # the mixture's plan: searches splits, ranks them
    python tools/plan.py dense-2b none --gpus 8 --gpu h100 --tp 2    # the baseline's, TP given
    python tools/plan.py dense-1.3b --gpus 8 --gpu h100 --brief      # four lines, for a recipe's header
    TOKENS=100000000000 python tools/plan.py dense-2b --gpus 128 --gpu b200 -- --seq-length 4096

A plan also has parameters, FLOPs and communication. RECIPE is a file of examples/models/ without its .sh, or the path
of one; MIXING as in examples/pretrain.sh (default moa); its variables hold, and flags of pretrain_gpt_moa.py may follow
``--``. What is not given is searched. Formulas, and what was checked: docs/planning.md. Seconds are estimates: kernels
are taken to reach --mfu of the GPU's peak while it computes, in every split; messages to run at the wires' full
bandwidth.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import io
import json
import logging
import math
import os
import shlex
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_moa import startup
from megatron_moa.command_line.numbers import positive, share
from megatron_moa.command_line.tables import markdown_table
from megatron_moa.errors import OneLineParser, UserError, one_line_errors
from megatron_moa.planning import inputs, memory, search
from megatron_moa.planning.communication import GPUS_PER_NODE
from megatron_moa.planning.model import RECOMPUTE, Model, Split
from megatron_moa.planning.parameters import Parameters, count
from megatron_moa.runs.recipes import RECIPE_MIXINGS, awkward_widths, recipe_flags
from megatron_moa.training.gpus import GPUS

PROGRAM = "plan.py"
SHOWN = 5  # splits in the table

# Variables of examples/pretrain.sh that the plan depends on and does not choose: the command repeats what is set.
VARIABLES = (
    "TOKENS TOKENS_PER_PARAMETER SEQ_LENGTH GLOBAL_BATCH_SIZE FFN FFN_MULTIPLE OPTIMIZER SCHEDULE PRECISION "
    "DISTRIBUTED_OPTIMIZER VOCAB_SIZE"
).split()

# Flags of pretrain_gpt_moa.py that are this program's to choose.
OURS = {
    "--tensor-model-parallel-size": "--tp",
    "--pipeline-model-parallel-size": "--pp",
    "--num-virtual-stages-per-pipeline-rank": "--vpp",
    "--num-layers-per-virtual-pipeline-stage": "--vpp",
    "--expert-model-parallel-size": "--ep",
    "--expert-tensor-parallel-size": "--ep",
    "--context-parallel-size": "--cp",
    "--sequence-parallel": "--tp",
    "--micro-batch-size": "--micro-batch-size",
    "--recompute-activations": "--recompute",
    "--recompute-granularity": "--recompute",
    "--recompute-modules": "--recompute",
    "--recompute-method": "--recompute",
    "--recompute-num-layers": "--recompute",
    "--moa-recompute": "--recompute mixture",
    "--moa-mixing": "MIXING",
    "--moa-form": "MIXING",
}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Our flags, and pretrain_gpt_moa.py's after ``--``."""
    further: list[str] = []
    if "--" in argv:
        split = list(argv).index("--")
        argv, further = argv[:split], list(argv[split + 1 :])
    parser = OneLineParser(prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = {"type": positive, "metavar": "N"}
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument("mixing", metavar="MIXING", nargs="?", default="moa", help=", ".join(RECIPE_MIXINGS))
    parser.add_argument("--gpus", **size, required=True, help="of all nodes")
    parser.add_argument("--gpu", required=True, choices=tuple(GPUS))
    parser.add_argument("--tp", **size, help="tensor-parallel ranks; with 2 or more, sequence parallelism too")
    parser.add_argument("--pp", **size, help="pipeline stages")
    parser.add_argument("--vpp", **size, help="virtual stages on each pipeline stage")
    parser.add_argument("--ep", **size, help="expert-parallel ranks")
    parser.add_argument("--cp", **size, help="context-parallel ranks; never searched: needs Transformer Engine")
    parser.add_argument("--micro-batch-size", **size, help="samples; the search takes the recipe's, or halves of it")
    parser.add_argument(
        "--recompute",
        choices=RECOMPUTE,
        help="mixture: --moa-recompute; feed-forward: --recompute-modules mlp or moe; full: whole layers",
    )
    parser.add_argument(
        "--mfu",
        type=share,
        default=0.4,
        metavar="X",
        help="share of the peak that kernels reach while a GPU computes (default: %(default)s, an assumption)",
    )
    parser.add_argument(
        "--dollars-per-gpu-hour", type=price, metavar="X", help="default: megatron_moa/training/gpus.py's"
    )
    output = parser.add_mutually_exclusive_group()
    output.add_argument(
        "--brief", action="store_true", help="parameters, hardware, duration, cost: for a recipe's header"
    )
    output.add_argument("--json", action="store_true", help="everything as one JSON object")
    options = parser.parse_args(argv)
    options.further = further
    for flag in further:
        if flag in ("-h", "--help"):
            raise UserError(f"{flag}: behind -- it would end the planner without a word; put it before")
        if (name := flag.partition("=")[0]) in OURS:
            raise UserError(f"{name}: chosen here by {OURS[name]}; drop it behind --")
    return options


def price(text: str) -> float:
    """For argparse: dollars."""
    value = float(text)
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"{text} is no price")
    return value


@dataclasses.dataclass(frozen=True)
class Report:
    """All that is printed."""

    options: argparse.Namespace
    model: Model
    parameters: Parameters
    planner: search.Planner
    plans: list[search.Plan]

    @property
    def best(self) -> search.Plan:
        """The fastest that fits."""
        return self.plans[0]

    @property
    def widths(self) -> str:
        """What is to be said of the best split's feed-forward widths; empty for nothing."""
        return awkward_widths(self.model.widths(self.best.split.tp))

    @property
    def hours(self) -> float:
        """Of the whole training."""
        return self.best.step.seconds * self.model.iterations / 3600

    @property
    def dollars(self) -> float:
        """Of all GPUs for these hours."""
        hourly = self.options.dollars_per_gpu_hour
        hourly = self.planner.gpu.dollars_per_hour if hourly is None else hourly
        return self.hours * self.options.gpus * hourly

    @property
    def overall_mfu(self) -> float:
        """The model's FLOPs over the peak's in a step, waiting included."""
        flops = self.planner.flops(self.best.split.tp).total * self.model.tokens_per_step
        peak = self.planner.gpu.peak_flops["bf16" if self.model.element == 2 else "fp32"]
        return flops / (self.best.step.seconds * self.options.gpus * peak)


def make(options: argparse.Namespace) -> Report:
    """Reads the recipe, searches.

    Raises:
        UserError: whatever is wrong with recipe, numbers, flags; or nothing fits.
    """
    fixed = {name: getattr(options, name) for name in ("tp", "pp", "vpp", "ep", "cp", "recompute")}
    fixed["micro_batch"] = options.micro_batch_size
    fixed = {name: value for name, value in fixed.items() if value is not None}
    if options.mixing == "none" and options.recompute == "mixture":
        raise UserError("--recompute mixture: MIXING none has no mixture; take --recompute feed-forward or full")
    # One of each: the split comes later, and may not be what the script itself accepts.
    whole = dict.fromkeys(("TP", "PP", "CP", "EP"), "1")
    flags = recipe_flags(options.recipe, options.mixing, ["--mock-data", *options.further], whole)
    args, mixture = inputs.parse(flags, options.gpus)
    alone, _ = inputs.parse([*flags, "--micro-batch-size", "1"], 1)
    stock = inputs.validated(alone)
    model = Model.from_args(stock, mixture)

    planner = search.Planner(
        model=model,
        gpu=GPUS[options.gpu],
        flops=search.flops_by_tp(stock, mixture),
        mfu=options.mfu,
        micro_batch=args.micro_batch_size,
        check=functools.partial(inputs.validated, args),
    )
    plans = planner.search(options.gpus, fixed)
    return Report(options, model, count(model, plans[0].split.tp), planner, plans)


def gpus_of_a_node(gpus: int) -> int:
    """As many as a node has, where that makes nodes alike."""
    return max(search.divisors(gpus, GPUS_PER_NODE))


def command(report: Report) -> str:
    """What trains with the best split."""
    options, split = report.options, report.best.split
    variables = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    chosen = inputs.split_environment(split)
    chosen["NPROC_PER_NODE"] = str(gpus_of_a_node(options.gpus))
    chosen["NNODES"] = str(options.gpus // gpus_of_a_node(options.gpus))
    # One of a kind is the default, unless this process was told otherwise: the command must not be.
    said = {"MICRO_BATCH_SIZE", "NPROC_PER_NODE", *os.environ}
    variables |= {name: value for name, value in chosen.items() if value != "1" or name in said}
    words = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
    words += ["examples/pretrain.sh", shlex.quote(options.recipe), options.mixing]
    return " ".join([*words, *map(shlex.quote, [*inputs.split_flags(split, report.model), *options.further])])


def describe(split: Split) -> str:
    """A split in a few words."""
    words = [f"TP {split.tp}", f"PP {split.pp}"]
    words += [f"{name} {size}" for name, size in (("VPP", split.vpp), ("EP", split.ep), ("CP", split.cp)) if size > 1]
    words += [f"DP {split.dp}", f"micro-batch {split.micro_batch}"]
    return ", ".join(words) + (f", recompute {split.recompute}" if split.recompute != "none" else "")


def duration(hours: float) -> str:
    """To three digits."""
    if hours < 1:
        return f"{hours * 60:.3g} minutes"
    return f"{hours:.3g} hours" if hours < 72 else f"{hours / 24:.3g} days"


def brief(report: Report) -> str:
    """Comment lines for a recipe's header."""
    gpus, model = report.options.gpus, report.model
    tokens = model.iterations * model.tokens_per_step
    parameters = count(model)
    stock, active = parameters.total - parameters.mixture, parameters.active - parameters.active_mixture
    added = f"; the mixture adds {parameters.mixture:,}, {100 * parameters.mixture / stock:.2f} %"
    return "\n".join(
        [
            f"# Parameters: {stock:,}"
            + (f", {active:,} of them for a token" if model.experts else "")
            + (added if model.mixture else "")
            + f"; vocabulary {model.padded_vocabulary(1):,}.",
            f"# Hardware: {gpus} x {report.planner.gpu.name}; {describe(report.best.split)}; "
            f"{gib(report.best.memory.total)} GiB a GPU.",
            f"# Duration: {duration(report.hours)} for {tokens / 1e9:.3g} billion tokens, estimated at "
            f"{100 * report.options.mfu:.0f} % MFU while computing ({100 * report.overall_mfu:.0f} % overall).",
            f"# Cost: {report.hours * gpus:.3g} GPU hours, about ${report.dollars:,.0f}.",
        ]
    )


def gib(size: float) -> str:
    """GiB, one decimal."""
    return f"{size / memory.GIBIBYTE:.1f}"


def full(report: Report) -> str:
    """Everything, for people."""
    model, plan, options = report.model, report.best, report.options
    parameters, step, needs = report.parameters, plan.step, plan.memory
    flops = report.planner.flops(plan.split.tp)
    gpu = report.planner.gpu
    tokens = model.iterations * model.tokens_per_step
    added = f"; the mixture {parameters.mixture:,}, {100 * parameters.mixture / parameters.total:.4f} %"
    lines = [
        f"{options.recipe} {options.mixing} on {options.gpus} x {gpu.name}",
        "",
        f"parameters  {parameters.total:,}, active for a token {parameters.active:,}"
        + (added if model.mixture else ""),
        f"FLOPs       {flops.total:.4g} a token, forward and backward"
        + (f"; gates {100 * flops.gates / flops.total:.2f} %, mixture {100 * flops.mixture / flops.total:.2f} %")
        * bool(model.mixture),
        *([f"widths      {report.widths}"] if report.widths else []),
        f"step        {model.global_batch:,} samples of {model.sequence:,}: {model.tokens_per_step:,} tokens; "
        f"{model.iterations:,} steps: {tokens:,} tokens",
        "",
        f"Splits that fit, fastest first (compute at {100 * options.mfu:.0f} % of the peak, unmeasured)",
        markdown_table(
            ("split", "GiB a GPU", "s a step", "compute", "pipeline bubble", "exposed messages"),
            [
                (
                    describe(other.split),
                    gib(other.memory.total),
                    other.step.seconds,
                    other.step.compute,
                    other.step.bubble,
                    other.step.exposed,
                )
                for other in report.plans[:SHOWN]
            ],
        ),
        "",
        f"Memory of the first, GiB, on pipeline stage {needs.stage}",
        markdown_table(
            (
                "weights",
                "gradients",
                "optimizer",
                "activations",
                "logits, loss",
                "workspace",
                "allowance",
                "all",
                "has",
            ),
            [
                [
                    gib(size)
                    for size in (
                        needs.weights,
                        needs.gradients,
                        needs.optimizer,
                        needs.activations,
                        needs.logits,
                        needs.workspace,
                        needs.allowance,
                        needs.total,
                        gpu.memory_bytes,
                    )
                ]
            ],
        ),
        f"Activations by what is recomputed: {by_recompute(report)}.",
        f"The allowance, {gib(memory.ALLOWANCE_BYTES)} GiB and {100 * memory.ALLOWANCE_SHARE:.0f} %, is for what is "
        "not counted: CUDA's context, cuBLAS's and NCCL's buffers, fragmentation"
        + (", experts with more tokens than others." if model.experts else "."),
        "",
        "Messages of the first, a GPU and step",
        markdown_table(
            ("kind", "messages", "GB sent", "s", "of these exposed"),
            [(kind.kind, int(kind.messages), kind.bytes / 1e9, kind.seconds, kind.exposed) for kind in step.traffic],
        ),
        "",
        f"time        {duration(report.hours)}, {model.tokens_per_step / step.seconds:,.0f} tokens/s, "
        f"{100 * report.overall_mfu:.1f} % MFU overall",
        f"cost        {report.hours * options.gpus:,.0f} GPU hours, ${report.dollars:,.0f}",
        "",
        command(report),
    ]
    if options.gpus > GPUS_PER_NODE:
        lines.append("# on every node, with NODE_RANK and MASTER_ADDR; or by examples/slurm")
    if plan.split.cp > 1:
        lines.append("# context parallelism needs Transformer Engine's attention")
    return "\n".join(lines)


def by_recompute(report: Report) -> str:
    """GiB that the best split keeps for backward under each kind of recomputation."""
    split, model = report.best.split, report.model
    kinds = [kind for kind in RECOMPUTE if model.mixture is not None or kind != "mixture"]
    kept = {
        kind: memory.activations_in_flight(model, dataclasses.replace(split, recompute=kind), report.best.memory.stage)
        for kind in kinds
    }
    return ", ".join(f"{kind} {gib(size)}" for kind, size in kept.items())


def record(report: Report) -> Mapping[str, Any]:
    """Everything, for programs."""
    plans = [
        {
            **dataclasses.asdict(plan),
            "memory_total": plan.memory.total,
            "seconds": plan.step.seconds,
        }
        for plan in report.plans
    ]
    return {
        "recipe": report.options.recipe,
        "mixing": report.options.mixing,
        "gpu": dataclasses.asdict(report.planner.gpu),
        "parameters": dataclasses.asdict(report.parameters),
        "flops_per_token": dataclasses.asdict(report.planner.flops(report.best.split.tp)),
        "plans": plans,
        "hours": report.hours,
        "dollars": report.dollars,
        "mfu": report.overall_mfu,
        "widths": report.widths,
        "command": command(report),
    }


@one_line_errors(PROGRAM)
def main(argv: Sequence[str] | None = None) -> None:
    """Plans, prints."""
    options = parse(sys.argv[1:] if argv is None else argv)
    # What this machine does not have says nothing about where the training will run.
    warnings.filterwarnings("ignore")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):
        startup.prepare()
    report = make(options)
    if options.json:
        print(json.dumps(record(report)))
    else:
        print(brief(report) if options.brief else full(report))


if __name__ == "__main__":
    main()
