"""Examines everything: probes the packages, looks at the machine, and collects the findings."""

from __future__ import annotations

import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

from megatron_moa.doctor.finding import CHECK, MISSING, OK, Finding, Report
from megatron_moa.doctor.host import judge_host
from megatron_moa.doctor.judgements import (
    judge_apex,
    judge_cuda,
    judge_emerging_optimizers,
    judge_environment,
    judge_megatron,
    judge_python,
    judge_torch,
    judge_transformer_engine,
    judge_triton,
)
from megatron_moa.doctor.machine import ask_driver, check_compiler, check_disk, check_limits, check_shared_memory
from megatron_moa.doctor.probes import PROBES, probe
from megatron_moa.doctor.uses import uses
from megatron_moa.errors import UserError


def examine(seconds: float, save: str | None = None, recipe: str | None = None) -> Report:
    """Looks at everything.

    Args:
        seconds: how long each import may take.
        save: the folder that --save will name.
        recipe: one of examples/models that will be trained.

    Raises:
        UserError: no such recipe, or one with invalid numbers.
    """
    python = judge_python(sys.version_info, sys.executable)
    if python.state == MISSING:
        return Report([python], {})
    try:
        recipe_findings = [check_recipe(recipe), check_host(recipe)] if recipe else []
    except UserError as error:
        raise UserError(f"--recipe {error}") from None
    with ThreadPoolExecutor(max_workers=max(2, (os.cpu_count() or 2) // 2)) as pool:
        found = dict(zip(PROBES, pool.map(lambda name: probe(name, seconds), PROBES), strict=True))
    environment = dict(os.environ)
    torch = found["torch"]
    gpu = bool(torch.get("devices"))
    findings = [
        python,
        judge_torch(torch),
        *judge_cuda(torch, ask_driver(), environment),
        *judge_megatron(found["megatron"]),
        judge_transformer_engine(found["transformer_engine"], gpu),
        judge_apex(found["apex"], gpu),
        judge_triton(found["triton"], gpu, environment.get("TRITON_INTERPRET") == "1"),
        judge_emerging_optimizers(found["emerging_optimizers"]),
        *check_compiler(gpu),
        check_shared_memory(),
        check_disk("disk, here", os.getcwd(), needed=False),
        check_disk("disk, TMPDIR", os.environ.get("TMPDIR") or tempfile.gettempdir(), needed=True),
        *([check_disk("disk, --save", save, needed=True)] if save else []),
        *check_limits(),
        *judge_environment(environment, torch, "RANK" in environment),
        *recipe_findings,
    ]
    return Report(findings, uses(found["megatron"], torch))


def check_recipe(model: str) -> Finding:
    """Looks at a recipe's feed-forward widths, with FFN, FFN_MULTIPLE and TP as they are set."""
    from megatron_moa.runs.recipes import awkward_widths, feed_forward_widths, recipe_flags

    widths = feed_forward_widths(recipe_flags(model, "none", ["--mock-data"]))
    text = ", ".join(f"{name} {width}" for name, (width, _) in widths.items())
    if awkward := awkward_widths(widths):
        found, _, remedy = awkward.partition("; ")
        return Finding("recipe", CHECK, f"{model}: {found}", remedy)
    return Finding("recipe", OK, f"{model}: {text}")


def check_host(model: str) -> Finding:
    """Estimates whether GPUs wait for Python while they train a recipe's mixture.

    The recipe's variables are taken as they are set.
    """
    from megatron_moa.runs.recipes import recipe_flags

    return judge_host(recipe_flags(model, "moa", ["--mock-data"]))
