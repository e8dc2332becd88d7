"""Runs the drill: the undisturbed training, then the faults that were asked for, a row each."""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from megatron_moa.errors import UserError
from megatron_moa.research.fault_drill.damage import can_mount
from megatron_moa.research.fault_drill.drill import INTERVAL, Drill
from megatron_moa.research.fault_drill.faults import FAULTS, NEEDS_MOUNT, NEEDS_TWO
from megatron_moa.research.fault_drill.kills import kill_repeatedly


def run_drill(options: argparse.Namespace) -> int:
    """Trains, hurts, compares, prints the table.

    Args:
        options: the flags of tools/fault_drill.py.

    Returns:
        How many faults did not end as expected.

    Raises:
        UserError: a flag has an invalid value, or the undisturbed run failed.
    """
    chosen = _chosen_faults(options)
    folder = Path(tempfile.mkdtemp(prefix="fault_drill_", dir=options.work_dir))
    (folder / "logs").mkdir()
    drill = Drill(folder, options.processes, options.kills, random.Random(options.seed))
    print(f"{options.processes} processes, logs in {folder / 'logs'}", flush=True)
    drill.run_undisturbed()
    final = drill.undisturbed.losses[drill.iterations]
    print(
        f"undisturbed: {drill.iterations} iterations, saved every {INTERVAL}, final loss {final}, validation "
        f"loss {drill.undisturbed.validation_losses[-1]}\n\n| fault | seen | recovered |\n| --- | --- | --- |",
        flush=True,
    )
    _try_all(drill, chosen)
    lost = sum(outcome.lost for outcome in drill.outcomes)
    if options.keep or lost:
        print(f"\ncheckpoints and logs: {folder}")
    else:
        shutil.rmtree(folder)
    print(f"\nlost {lost}")
    return lost


def _chosen_faults(options: argparse.Namespace) -> list[str]:
    if options.processes not in (1, 2, 4):  # the tiny model's batch is 4
        raise UserError(f"--processes {options.processes}: the tiny model trains on 1, 2 or 4")
    chosen = options.only.split(",") if options.only else ["kill", *FAULTS]
    for name in chosen:
        if name not in ("kill", *FAULTS):
            raise UserError(f"--only {name}: unknown; give names of kill, {', '.join(FAULTS)}")
    return chosen


def _try_all(drill: Drill, chosen: Sequence[str]) -> None:
    mounts = can_mount()
    for name in chosen:
        if name == "kill":
            kill_repeatedly(drill)
        elif name in NEEDS_TWO and drill.processes == 1:
            print(f"| {FAULTS[name][0]} | not tried: needs two processes | |")
        elif name in NEEDS_MOUNT and not mounts:
            print(f"| {FAULTS[name][0]} | not tried: no mounts for this user (unshare --mount) | |")
        else:
            fault, act = FAULTS[name]
            drill.record(fault, lambda act=act: act(drill))
