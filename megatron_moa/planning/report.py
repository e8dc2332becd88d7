"""Plans the training of a recipe: the best split, hours, cost, and the command that trains so."""

from __future__ import annotations

import functools
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_moa.errors import UserError
from megatron_moa.planning import inputs, search
from megatron_moa.planning.communication import gpus_of_a_node
from megatron_moa.planning.model import Model
from megatron_moa.planning.parameters import Parameters, count
from megatron_moa.runs.recipes import awkward_widths, recipe_flags
from megatron_moa.training.gpus import GPUS

# Variables of examples/pretrain.sh that the plan depends on and does not choose: the command repeats what is set.
VARIABLES = (
    "TOKENS TOKENS_PER_PARAMETER SEQ_LENGTH GLOBAL_BATCH_SIZE FFN FFN_MULTIPLE OPTIMIZER SCHEDULE PRECISION "
    "DISTRIBUTED_OPTIMIZER VOCAB_SIZE"
).split()


@dataclass(frozen=True)
class Request:
    """What is to be planned.

    Attributes:
        recipe: a file of examples/models/ without its .sh, or the path of one.
        mixing: as in examples/pretrain.sh.
        gpus: of all nodes.
        gpu: their kind, a name of :data:`megatron_moa.training.gpus.GPUS`.
        mfu: share of the peak that kernels reach while a GPU computes.
        fixed: attributes of :class:`megatron_moa.planning.model.Split` that are given; the others are searched.
        flags: further ones of pretrain_gpt_moa.py.
        variables: of examples/pretrain.sh, beside this process's own, which hold too.
        dollars_per_gpu_hour: None for the GPU's own price.
    """

    recipe: str
    mixing: str
    gpus: int
    gpu: str
    mfu: float
    fixed: Mapping[str, int | str] = field(default_factory=dict)
    flags: Sequence[str] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    dollars_per_gpu_hour: float | None = None


@dataclass(frozen=True)
class Report:
    """All that is printed."""

    request: Request
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
    def tokens(self) -> int:
        """Of the whole training."""
        return self.model.iterations * self.model.tokens_per_step

    @property
    def hours(self) -> float:
        """Of the whole training."""
        return self.best.step.seconds * self.model.iterations / 3600

    @property
    def dollars(self) -> float:
        """Of all GPUs for these hours."""
        hourly = self.request.dollars_per_gpu_hour
        hourly = self.planner.gpu.dollars_per_hour if hourly is None else hourly
        return self.hours * self.request.gpus * hourly

    @property
    def overall_mfu(self) -> float:
        """The model's FLOPs over the peak's in a step, waiting included."""
        flops = self.planner.flops(self.best.split.tp).total * self.model.tokens_per_step
        peak = self.planner.gpu.peak_flops["bf16" if self.model.element == 2 else "fp32"]
        return flops / (self.best.step.seconds * self.request.gpus * peak)


def make_report(request: Request) -> Report:
    """Reads the recipe and searches its split.

    The process was prepared before, by :func:`megatron_moa.planning.inputs.prepare` or startup.prepare.

    Raises:
        UserError: whatever is wrong with recipe, numbers, flags; or nothing fits.
        SystemExit: flags that cannot be parsed, after one line that says so.
    """
    inputs.check_further_flags(request.flags)
    if request.mixing == "none" and request.fixed.get("recompute") == "mixture":
        raise UserError("--recompute mixture: MIXING none has no mixture; take --recompute feed-forward or full")
    fixed = {**_exported_split({**os.environ, **request.variables}), **request.fixed}
    # One of each: the split comes later, and may not be what the script itself accepts.
    variables = {**request.variables, **dict.fromkeys(("TP", "PP", "CP", "EP"), "1")}
    flags = recipe_flags(request.recipe, request.mixing, ["--mock-data", *request.flags], variables)
    args, mixture = inputs.parse(flags, request.gpus)
    alone, _ = inputs.parse([*flags, "--micro-batch-size", "1"], 1)
    stock = inputs.validated(alone)
    model = Model.from_args(stock, mixture)

    planner = search.Planner(
        model=model,
        gpu=GPUS[request.gpu],
        flops=search.flops_by_tp(stock, mixture),
        mfu=request.mfu,
        micro_batch=args.micro_batch_size,
        check=functools.partial(inputs.validated, args),
    )
    plans = planner.search(request.gpus, fixed)
    return Report(request, model, count(model, plans[0].split.tp), planner, plans)


def _exported_split(variables: Mapping[str, str]) -> dict[str, int]:
    """The split that variables of examples/pretrain.sh ask for, which is kept as one given by flags."""
    fixed = {}
    for name in ("TP", "PP", "CP", "EP"):
        value = variables.get(name)
        if not value:
            continue
        if not (value.isascii() and value.isdigit() and int(value)):
            raise UserError(f"{name} {value}: not a whole number above 0; give one, or unset {name}")
        fixed[name.lower()] = int(value)
    return fixed


def command(report: Report) -> str:
    """What trains with the best split."""
    request, split = report.request, report.best.split
    given = {**os.environ, **request.variables}
    variables = {name: given[name] for name in VARIABLES if name in given}
    chosen = inputs.split_environment(split)
    on_a_node = gpus_of_a_node(request.gpus, split.tp)
    chosen["NPROC_PER_NODE"] = str(on_a_node)
    chosen["NNODES"] = str(request.gpus // on_a_node)
    # One of a kind is the default, unless this process was told otherwise: the command must not be.
    said = {"MICRO_BATCH_SIZE", "NPROC_PER_NODE", *given}
    variables |= {name: value for name, value in chosen.items() if value != "1" or name in said}
    words = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
    words += ["examples/pretrain.sh", shlex.quote(request.recipe), request.mixing]
    return " ".join([*words, *map(shlex.quote, [*inputs.split_flags(split, report.model), *request.flags])])
