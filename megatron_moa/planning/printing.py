"""Prints a plan in full for people, in brief for a recipe's header, or as JSON for programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from megatron_moa.command_line.tables import markdown_table
from megatron_moa.planning import memory
from megatron_moa.planning.communication import GPUS_PER_NODE
from megatron_moa.planning.model import RECOMPUTE, Split
from megatron_moa.planning.parameters import count
from megatron_moa.planning.report import Report, command

SHOWN = 5  # splits in the table


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


def gib(size: float) -> str:
    """GiB, one decimal."""
    return f"{size / memory.GIBIBYTE:.1f}"


def brief(report: Report) -> str:
    """Comment lines for a recipe's header."""
    request, model = report.request, report.model
    counted = count(model)
    stock, active = counted.total - counted.mixture, counted.active - counted.active_mixture
    parameters = f"{stock:,}"
    if model.experts:
        parameters += f", {active:,} of them for a token"
    if model.mixture:
        parameters += f"; the mixture adds {counted.mixture:,}, {100 * counted.mixture / stock:.2f} %"
    return "\n".join(
        [
            f"# Parameters: {parameters}; vocabulary {model.padded_vocabulary(1):,}.",
            f"# Hardware: {request.gpus} x {report.planner.gpu.name}; {describe(report.best.split)}; "
            f"{gib(report.best.memory.total)} GiB a GPU.",
            f"# Duration: {duration(report.hours)} for {report.tokens / 1e9:.3g} billion tokens, estimated at "
            f"{100 * request.mfu:.0f} % MFU while computing ({100 * report.overall_mfu:.0f} % overall).",
            f"# Cost: {report.hours * request.gpus:.3g} GPU hours, about ${report.dollars:,.0f}.",
        ]
    )


def full(report: Report) -> str:
    """Everything, for people."""
    request = report.request
    sections = (
        f"{request.recipe} {request.mixing} on {request.gpus} x {report.planner.gpu.name}",
        _work(report),
        _splits(report),
        _memory(report),
        _messages(report),
        _time_and_cost(report),
        _command(report),
    )
    return "\n\n".join(sections)


def _work(report: Report) -> str:
    """What is trained, and on how many tokens."""
    model, parameters = report.model, report.parameters
    flops = report.planner.flops(report.best.split.tp)
    lines = [
        f"parameters  {parameters.total:,}, active for a token {parameters.active:,}",
        f"FLOPs       {flops.total:.4g} a token, forward and backward",
    ]
    if model.mixture:
        share = 100 * parameters.mixture / parameters.total
        lines[0] += f"; the mixture {parameters.mixture:,}, {share:.4f} %"
        gates, mixture = 100 * flops.gates / flops.total, 100 * flops.mixture / flops.total
        lines[1] += f"; gates {gates:.2f} %, mixture {mixture:.2f} %"
    lines.append(f"vocabulary  {model.padded_vocabulary(report.best.split.tp):,}, padded; VOCAB_SIZE=N for another")
    if report.widths:
        lines.append(f"widths      {report.widths}")
    lines.append(
        f"step        {model.global_batch:,} samples of {model.sequence:,}: {model.tokens_per_step:,} tokens; "
        f"{model.iterations:,} steps: {report.tokens:,} tokens"
    )
    return "\n".join(lines)


def _splits(report: Report) -> str:
    header = ("split", "GiB a GPU", "s a step", "compute", "pipeline bubble", "exposed messages")
    rows = []
    for plan in report.plans[:SHOWN]:
        step = plan.step
        rows.append(
            (describe(plan.split), gib(plan.memory.total), step.seconds, step.compute, step.bubble, step.exposed)
        )
    title = f"Splits that fit, fastest first (compute at {100 * report.request.mfu:.0f} % of the peak, unmeasured)"
    return f"{title}\n{markdown_table(header, rows)}"


def _memory(report: Report) -> str:
    needs = report.best.memory
    parts = {
        "weights": needs.weights,
        "gradients": needs.gradients,
        "optimizer": needs.optimizer,
        "activations": needs.activations,
        "logits, loss": needs.logits,
        "workspace": needs.workspace,
        "allowance": needs.allowance,
        "all": needs.total,
        "has": report.planner.gpu.memory_bytes,
    }
    uncounted = "CUDA's context, cuBLAS's and NCCL's buffers, fragmentation"
    if report.model.experts:
        uncounted += ", experts with more tokens than others"
    lines = [
        f"Memory of the first, GiB, on pipeline stage {needs.stage}",
        markdown_table(list(parts), [[gib(size) for size in parts.values()]]),
        f"Activations by what is recomputed: {by_recompute(report)}.",
        f"The allowance, {gib(memory.ALLOWANCE_BYTES)} GiB and {100 * memory.ALLOWANCE_SHARE:.0f} %, is for what is "
        f"not counted: {uncounted}.",
    ]
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


def _messages(report: Report) -> str:
    header = ("kind", "messages", "GB sent", "s", "of these exposed")
    rows = [
        (kind.kind, int(kind.messages), kind.bytes / 1e9, kind.seconds, kind.exposed)
        for kind in report.best.step.traffic
    ]
    return f"Messages of the first, a GPU and step\n{markdown_table(header, rows)}"


def _time_and_cost(report: Report) -> str:
    speed = report.model.tokens_per_step / report.best.step.seconds
    return (
        f"time        {duration(report.hours)}, {speed:,.0f} tokens/s, {100 * report.overall_mfu:.1f} % MFU overall\n"
        f"cost        {report.hours * report.request.gpus:,.0f} GPU hours, ${report.dollars:,.0f}"
    )


def _command(report: Report) -> str:
    lines = [command(report)]
    if report.request.gpus > GPUS_PER_NODE:
        lines.append("# on every node, with NODE_RANK and MASTER_ADDR; or by examples/slurm")
    if report.best.split.cp > 1:
        lines.append("# context parallelism needs Transformer Engine's attention")
    return "\n".join(lines)


def record(report: Report) -> Mapping[str, Any]:
    """Everything, for programs."""
    plans = [
        {**dataclasses.asdict(plan), "memory_total": plan.memory.total, "seconds": plan.step.seconds}
        for plan in report.plans
    ]
    return {
        "recipe": report.request.recipe,
        "mixing": report.request.mixing,
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
