"""Times one feed-forward layer with a mixture beside Megatron's own: SwiGLU, and GELU for type1.

    python tools/benchmark_layer.py --hidden 2048 --ffn 8192 --tokens 8192
    python tools/benchmark_layer.py --hidden 1280 --ffn 853 --tokens 8192 --experts 32 --topk 4    # a whole MoE layer
    python tools/benchmark_layer.py --hidden 1280 --ffn 853 --tokens 8192 --experts 64 --topk 4 --grow experts
    torchrun --nproc-per-node 4 tools/benchmark_layer.py --hidden 2048 --ffn 8192 --tokens 8192 --grow tp

Results of what is timed are compared with float64 first; a wrong one ends the program, exit code 1. Columns:

  forward, backward, total   median of the rounds, milliseconds; a GPU starts each phase with an empty cache
  to stock        total over that of Megatron's layer, fused or not, whichever is faster: median of the rounds' ratios
  to compiled     total over that of SwiGLU (GELU) by this project's backend, as a mixture of one frozen activation
  peak, saved     memory above what is there before: at most in a forward and backward; kept between the two. MB of 10^6
  to stock        peak over that of Megatron's layer, whichever needs less
  coefficients    what of the saved is mixing coefficients

On a CPU Megatron's fusion is not compiled, and torch's own SiLU can be slow: "to compiled" does not profit from that.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_moa import startup
from megatron_moa.command_line.numbers import positive
from megatron_moa.errors import OneLineParser, UserError, one_line_errors
from megatron_moa.mixture.config import BACKENDS, FORMS, MixtureConfig
from megatron_moa.mixture.functional import resolve_backend
from megatron_moa.research.benchmarks import conditions, peak_memory, tables, timing
from megatron_moa.research.benchmarks.one_layer import build_layer, layer_config, split_over, start

PROGRAM = "benchmark_layer.py"
LABELS = {"la": "LA", "moa": "MoA"}

# What --require demands of MoA, at most: total time over stock by form; peak memory over stock, of every form.
GOALS = {"bi-sided": 1.05, "one-sided": 1.02, "quadratic": 1.08, "type1": 1.05}
PEAK_GOAL = 1.01


@dataclass(frozen=True)
class Contender:
    """One contender.

    Attributes:
        name: unique.
        family: ``SwiGLU`` or ``GELU``, the fixed activation it is compared with; with an experts' execution if any.
        mixture: None for Megatron's layer.
        role: ``stock``; ``compiled``, the fixed activation by our backend; ``mixture``.
        settings: of TransformerConfig.
        variant: ``recomputed`` or ``overwriting``, None for the mixture as it comes.
    """

    name: str
    family: str
    mixture: MixtureConfig | None
    role: str
    settings: dict[str, Any]
    variant: str | None = None


def arms(options: argparse.Namespace) -> list[Contender]:
    """The contenders that the flags ask for, families one after the other."""
    executions = {None: {}} if not options.experts else {"sequential": {}, "grouped": {"moe_grouped_gemm": True}}
    if options.execution:
        executions = {options.execution: executions[options.execution]}
    return [
        replace(
            arm,
            name=f"{arm.name}, {execution}" if execution else arm.name,
            family=f"{arm.family}, {execution}" if execution else arm.family,
            settings={**arm.settings, **settings},
        )
        for execution, settings in executions.items()
        for gated in (True, False)
        for arm in _family(options, gated)
    ]


def _family(options: argparse.Namespace, gated: bool) -> list[Contender]:
    forms = [form for form in options.form if (form != "type1") == gated]
    if not forms:
        return []
    fixed, activation = ("SwiGLU", F.silu) if gated else ("GELU", F.gelu)
    settings = {"gated_linear_unit": gated, "activation_func": activation}
    one = MixtureConfig(
        kind="la",
        form="one-sided" if gated else "type1",
        activations=("identity" if gated else "gelu",),  # one-sided has SwiGLU's silu on the other branch
        freeze=True,
        backend=options.backend,
    )
    found = [Contender(f"{fixed}", fixed, None, "stock", settings)]
    if gated:  # Megatron fuses GELU with a bias only
        found.append(Contender(f"{fixed} fused", fixed, None, "stock", {**settings, "bias_activation_fusion": True}))
    found.append(Contender(f"{fixed} compiled here", fixed, one, "compiled", settings))
    for form in forms:
        for mixing in options.mixing:
            config = MixtureConfig(kind=mixing, form=form, backend=options.backend)
            name = f"{LABELS[mixing]} {form}"
            found.append(Contender(name, fixed, config, "mixture", settings))
            if options.recompute:
                found.append(_recomputed(found[-1], options))
            if options.overwrite:
                again = replace(config, overwrite=True)
                found.append(Contender(f"{name} overwriting", fixed, again, "mixture", settings, "overwriting"))
    return found


def _recomputed(arm: Contender, options: argparse.Namespace) -> Contender:
    """The mixture's output is not kept for backward but computed again."""
    arm = replace(arm, name=f"{arm.name} recomputed", variant="recomputed")
    if options.experts:
        again = {"recompute_granularity": "selective", "recompute_modules": ["moe_act"]}
        return replace(arm, settings={**arm.settings, **again})
    return replace(arm, mixture=replace(arm.mixture, recompute=True))


@dataclass
class Built:
    """A layer ready to be timed."""

    layer: torch.nn.Module
    forward: Callable[[], Tensor]
    run: timing.Run
    leaves: list[Tensor]

    def saved(self) -> tuple[int, int]:
        """Bytes that a forward keeps for backward, without parameters; and those that are coefficients."""
        from megatron_moa.layers.coefficients import Coefficients

        coefficients: list[Tensor] = []  # watched here alone: what holds them is not what is timed
        for module in self.layer.modules():
            if isinstance(module, Coefficients):
                module.observer = coefficients.append
        saved = peak_memory.saved_for_backward(self.forward, leave_out=self.leaves[1:])
        return saved.bytes, saved.bytes_of(coefficients)


def build(arm: Contender, options: argparse.Namespace, device: torch.device, dtype: torch.dtype, tp: int) -> Built:
    """Builds the layer with random input [tokens, 1, h] and a random gradient of its output.

    Input and gradient are the same for every arm.
    """
    from megatron.core.transformer.moe.experts import SequentialMLP

    config = layer_config(options, arm.settings, dtype, tp)
    layer = build_layer(config, arm.mixture, device)
    if config.moe_grouped_gemm and isinstance(layer.experts, SequentialMLP):
        raise UserError("--execution grouped: Megatron built experts that run one after the other; take sequential")
    tokens = options.tokens // tp if config.sequence_parallel else options.tokens
    generator = torch.Generator(device).manual_seed(1)
    shape = (tokens, 1, options.hidden)
    x = torch.randn(shape, generator=generator, device=device).to(dtype).requires_grad_()
    grad = torch.randn(shape, generator=generator, device=device).to(dtype)
    leaves = [x, *layer.parameters()]

    def forward() -> Tensor:
        return layer(x)[0]

    return Built(layer, forward, timing.forward_backward(forward, grad, leaves), leaves)


def measure(options: argparse.Namespace, device: torch.device, dtype: torch.dtype, tp: int) -> list[dict[str, Any]]:
    """Builds all arms, times each family in alternation, measures memory; a record for each arm."""
    built: dict[str, Built] = {}
    contenders: list[Contender] = []
    for arm in arms(options):
        try:
            built_arm = build(arm, options, device, dtype, tp)
        except UserError as error:
            if "moe_grouped_gemm" not in arm.settings:
                raise
            _say(f"left out, {arm.name}: {error}")
            continue
        contenders.append(arm)
        built[arm.name] = built_arm
    records: list[dict[str, Any]] = []
    for family in dict.fromkeys(arm.family for arm in contenders):
        own = [arm for arm in contenders if arm.family == family]
        if all(arm.role == "stock" for arm in own):
            continue
        barrier = torch.distributed.barrier if torch.distributed.get_world_size() > 1 else lambda: None
        runs = {arm.name: built[arm.name].run for arm in own}
        timings = timing.time_alternately(runs, device, options.rounds, flush=True, before_each=barrier)
        records += _family_records(own, built, timings, device)
    sizes = {name: getattr(options, name) for name in ("hidden", "ffn", "tokens", "experts", "topk", "dtype")}
    return [{**record, **sizes, "tp": tp} for record in records]


def _family_records(
    own: list[Contender], built: dict[str, Built], timings: timing.Timings, device: torch.device
) -> Iterator[dict[str, Any]]:
    by_role = {role: [arm.name for arm in own if arm.role == role] for role in ("stock", "compiled")}
    stock = timings.fastest(by_role["stock"]) if by_role["stock"] else None
    (compiled,) = by_role["compiled"]
    peaks = {arm.name: peak_memory.peak_bytes(built[arm.name].run, device) for arm in own}
    least = min((peaks[name] for name in by_role["stock"]), default=None)
    for arm in own:
        saved, of_coefficients = built[arm.name].saved()
        backend = None if arm.mixture is None else resolve_backend(arm.mixture.backend, device.type)
        yield {
            "arm": arm.name,
            "family": arm.family,
            "role": arm.role,
            "form": arm.mixture.form if arm.mixture and arm.role == "mixture" else None,
            "mixing": arm.mixture.kind if arm.mixture and arm.role == "mixture" else None,
            "variant": arm.variant,
            "backend": backend,
            **timings.record(arm.name),
            "stock": stock,
            "ratio_to_stock": {
                phase: timings.ratio(arm.name, stock, phase) for phase in ("forward", "backward", timing.TOTAL)
            }
            if stock
            else None,
            "ratio_to_compiled": timings.ratio(arm.name, compiled),
            "peak_bytes": peaks[arm.name],
            "peak_ratio": peaks[arm.name] / least if least else None,
            "peak_ratio_to_compiled": peaks[arm.name] / peaks[compiled],
            "saved_bytes": saved,
            "saved_coefficient_bytes": of_coefficients,
        }


def check_goals(records: list[dict[str, Any]]) -> bool:
    """Prints MoA's figures beside their goals; whether there are any, and all are met."""
    all_met: list[bool] = []
    for record in records:
        goal = GOALS.get(record["form"])
        if goal is None or record["mixing"] != "moa" or record["variant"]:
            continue
        figures = [
            (
                f"time over {record['stock']}",
                record["ratio_to_stock"] and record["ratio_to_stock"][timing.TOTAL],
                goal,
            ),
            ("peak memory over stock", record["peak_ratio"], PEAK_GOAL),
        ]
        for name, figure, limit in figures:
            if figure is None:
                continue
            all_met.append(figure <= limit)
            verdict = "met" if all_met[-1] else "NOT met"
            print(f"{record['arm']}: {name} {figure:.4f}, goal at most {limit:g}: {verdict}")
        own = f"time {record['ratio_to_compiled']:.4f}, peak memory {record['peak_ratio_to_compiled']:.4f}"
        print(f"{record['arm']}: over {record['family']} compiled here {own}, no goal")
    return bool(all_met) and all(all_met)


def _say(text: str) -> None:
    if torch.distributed.get_rank() == 0:
        print(text, flush=True)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Our flags."""
    parser = OneLineParser(prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = {"type": positive, "metavar": "N"}
    parser.add_argument("--hidden", **size, default=512, help="h (default: %(default)s)")
    parser.add_argument("--ffn", **size, default=1408, help="f, of one expert in a MoE (default: %(default)s)")
    parser.add_argument("--tokens", **size, default=2048, help="default: %(default)s")
    parser.add_argument("--form", nargs="+", choices=FORMS, default=list(FORMS), help="default: all")
    parser.add_argument("--mixing", nargs="+", choices=("la", "moa"), default=["la", "moa"], help="default: both")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="the mixture's (default: %(default)s)")
    parser.add_argument("--recompute", action="store_true", help="also with the mixture's output computed twice")
    parser.add_argument("--overwrite", action="store_true", help="also with gradients in the place of fc1's output")
    parser.add_argument("--experts", **size, help="a MoE layer of so many experts")
    parser.add_argument("--topk", **size, help="experts a token (default: 2)")
    parser.add_argument(
        "--execution", choices=("sequential", "grouped"), help="how experts run; default: both, compared apart"
    )
    parser.add_argument(
        "--router",
        choices=("balanced", "initial"),
        help="balanced: Megatron's --moe-router-force-load-balancing; initial: as it starts (default: balanced)",
    )
    parser.add_argument("--tp", **size, help="tensor-parallel size; default: all processes")
    parser.add_argument("--sequence-parallel", action="store_true", help="with --tp; a MoE has it anyway")
    parser.add_argument(
        "--grow",
        choices=("experts", "tp"),
        help="how costs grow: with experts, doubled up to --experts; with TP sizes, up to all processes of torchrun",
    )
    parser.add_argument("--require", action="store_true", help=f"exit code 1 unless MoA meets the goals: {GOALS}")
    conditions.add_arguments(parser, rounds=15)
    options = parser.parse_args(argv)
    for name in ("execution", "topk", "router"):
        value = getattr(options, name)
        if value and not options.experts:
            raise UserError(f"--{name} {value}: there are no experts; add --experts N")
    options.topk, options.router = options.topk or 2, options.router or "balanced"
    if options.require and "moa" not in options.mixing:
        raise UserError("--require: the goals are MoA's; add moa to --mixing")
    if options.tp and options.grow == "tp":
        raise UserError(f"--tp {options.tp}: has no effect with --grow tp; drop it")
    if options.grow == "experts" and not options.experts:
        raise UserError("--grow experts: up to how many? add --experts N")
    if options.experts and options.topk > options.experts:
        raise UserError(f"--topk {options.topk}: there are {options.experts} experts; take fewer a token")
    return options


def settings_to_measure(options: argparse.Namespace, world: int) -> list[tuple[argparse.Namespace, int]]:
    """Options and TP size of every measurement: one, or a series with --grow."""
    tp = options.tp or world
    if options.grow == "tp":
        return [(options, size) for size in _doubled(1, world) if world % size == 0]
    if options.grow == "experts":
        each = _doubled(min(max(options.topk, 2), options.experts), options.experts)
        return [(argparse.Namespace(**{**vars(options), "experts": number}), tp) for number in each]
    return [(options, tp)]


def _doubled(first: int, last: int) -> list[int]:
    sizes = [first]
    while sizes[-1] * 2 <= last:
        sizes.append(sizes[-1] * 2)
    return sizes


def main(argv: list[str] | None = None) -> None:
    """Checks, times, reports."""
    with one_line_errors(PROGRAM):
        options = parse(argv)
        device, dtype = conditions.set_up(options)
        warnings.filterwarnings("ignore", module="megatron")  # what is not installed, at every import
        startup.prepare()
        start(device)
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        series = settings_to_measure(options, world)
        for _, tp in series:
            if world % tp or options.hidden % tp or options.ffn % tp or options.tokens % tp:
                sizes = ", ".join(f"--{name} {getattr(options, name)}" for name in ("hidden", "ffn", "tokens"))
                raise UserError(f"--tp {tp}: does not divide all of {world} processes, {sizes}; give a divisor of each")
        if options.sequence_parallel and all(tp == 1 for _, tp in series):
            raise UserError("--sequence-parallel: has no effect with TP 1; start several processes with torchrun")
        surroundings = conditions.environment(device)
        _say(conditions.describe(surroundings))
        split_over(series[0][1])
        mixtures = [arm.mixture for arm in arms(options) if arm.mixture is not None]
        for width in {options.ffn // tp for _, tp in series}:
            conditions.require_correct(
                PROGRAM, mixtures, dtype, device, width=width, hidden=options.hidden, scale=bool(options.experts)
            )
        records: list[dict[str, Any]] = []
        for own, tp in series:
            split_over(tp)
            experts = f", {own.experts} experts, {own.topk} a token" if own.experts else ""
            _say(f"\nh {own.hidden}, f {own.ffn}, {own.tokens} tokens{experts}, {own.dtype}, TP {tp}\n")
            found = measure(own, device, dtype, tp)
            records += found
            if rank == 0:
                print(tables.layer_table(found, with_backend=True), flush=True)
        good = True
        if rank == 0:
            print()
            good = check_goals(records)
            conditions.append_records(options.json, "layer", surroundings, records)
    torch.distributed.destroy_process_group()
    raise SystemExit(1 if options.require and not good else 0)


if __name__ == "__main__":
    main()
