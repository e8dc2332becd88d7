"""Says how many GPU hours a study takes, by the planner."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_moa.command_line.tables import markdown_table
from megatron_moa.errors import UserError
from megatron_moa.mixture.config import DICTIONARIES
from megatron_moa.planning.report import Request, make_report
from megatron_moa.research.study.arms import ARMS
from megatron_moa.research.study.grid import Cell, Study, pending
from megatron_moa.research.study.runner import with_width

GPU, MFU = "h100", 0.25


def planned(study: Study, file: Path | str = "the study's file") -> Iterator[str]:
    """Lines of markdown: runs and hours of each model and layer, one GPU a run, and their sum.

    A widened SwiGLU is planned as SwiGLU, and gates of every kind as sigmoid ones. Rates that a grid goes on to are not
    known yet, and not counted.

    The process was prepared before, by :func:`megatron_moa.planning.inputs.prepare`.

    Args:
        file: the study's, for messages.

    Raises:
        UserError: a size that is of no recipe, or a plan that fails.
    """
    runs: Counter[tuple[str, int, str, str, bool, str, tuple[str, ...]]] = Counter()
    for cell in _at_least(study):
        arm = ARMS[cell.arm]
        if not study.sizes[cell.size].recipe:
            raise UserError(
                f"--plan: {file}: sizes.{cell.size}: has no recipe, which hours are planned by; add recipe = "
                "'dense-0.12b', or another of examples/models, or take a scale whose sizes have one"
            )
        mixing, activations = "none", ()
        if arm.mixture is not None:
            mixing = ("la-" if arm.mixture.kind == "la" else "") + arm.mixture.form
            if arm.mixture.activations != DICTIONARIES[arm.mixture.form]:
                activations = arm.mixture.activations
        runs[cell.size, cell.tokens, cell.optimizer, cell.schedule, arm.is_gated, mixing, activations] += 1
    total, table = 0.0, []
    for (name, tokens, optimizer, schedule, gated, mixing, activations), count in runs.items():
        size = study.sizes[name]
        own = {
            "TOKENS": tokens,
            "OPTIMIZER": optimizer,
            "SCHEDULE": schedule,
            "FFN": "type2" if gated else "type1",
            "PRECISION": "bf16" if "--bf16" in (*size.flags, *study.flags) else "fp32",
            "SEQ_LENGTH": size.sequence,
            "GLOBAL_BATCH_SIZE": size.batch,
            "MICRO_BATCH_SIZE": size.micro_batch or size.batch,
        }
        shape = {"--num-layers": size.layers, "--hidden-size": size.hidden, "--num-attention-heads": size.heads}
        fixed = ARMS["swiglu" if gated else "relu2"]
        further = [*size.flags, *study.flags]
        further = fixed.shared_flags(further) if mixing == "none" else further
        flags = [*(word for pair in shape.items() for word in map(str, pair)), *further]
        flags += ["--moa-activations", *activations] if activations else []
        flags = with_width(flags, fixed.width(size))
        hours = _hours(size.recipe, mixing, {key: str(value) for key, value in own.items()}, flags)
        total += count * hours
        layer = fixed.title if mixing == "none" else " ".join([mixing, *activations])
        table.append([name, f"{tokens / 1e9:g}e9", layer, count, f"{hours:.1f}", f"{count * hours:.0f}"])
    header = ["model", "tokens", "layer", "runs", f"hours of one {GPU.upper()} a run", "GPU hours"]
    yield markdown_table(header, table)
    more = (
        ", and more where an arm's best rate is the last of those tried" if any(g.extend for g in study.grids) else ""
    )
    count = sum(runs.values())
    yield f"\nAll: {count} runs, {total:.0f} GPU hours{more}; kernels at {MFU:.0%} of the peak, an assumption."


def _at_least(study: Study) -> dict[Cell, None]:
    """Returns the runs of rates that the file names, and of further seeds at best rates.

    Best rates are not known yet, and 0 here.
    """
    seeds = (
        Cell(*setting, arm, 0.0, seed)
        for grid in study.grids
        if not grid.rates
        for setting in grid.settings()
        for arm in grid.arms
        for seed in grid.seeds
        if seed != study.tuning_seed  # its run at the best rate is among those of rates
    )
    return dict.fromkeys([*pending(study, {}), *seeds])


def _hours(recipe: str, mixing: str, variables: dict[str, str], flags: Sequence[str]) -> float:
    try:
        return make_report(Request(recipe, mixing, 1, GPU, MFU, flags=flags, variables=variables)).hours
    except UserError as error:
        raise UserError(f"--plan: {recipe} {mixing}: {error}") from error
