"""Makes a value NaN in a training, while it runs.

``python -m megatron_moa.research.fault_drill.poison WHAT PARAMETER ITERATION SCRIPT ARGUMENTS`` runs a script so.
"""

from __future__ import annotations

import os
import runpy
import sys

from megatron_moa import startup


def poison(what: str, parameter: str, iteration: int, value: float = float("nan")) -> None:
    """Spoils a training that then begins in this process.

    Changes one value of a parameter before an iteration, or all of its gradient in that iteration.

    Args:
        what: "parameter" or "gradient".
        parameter: its global name (megatron_moa.training.nan_guard).
        iteration: counted from 1, as in the log.
        value: what it becomes.
    """
    import torch
    from megatron.core.utils import unwrap_model
    from megatron.training import training

    from megatron_moa.training.nan_guard import global_name

    train_step = training.train_step

    def poisoned_step(forward_step, data_iterator, model, *rest, **options):
        if options["iteration"] == iteration - 1:
            for chunk in unwrap_model(model):
                for name, tensor in chunk.named_parameters():
                    if global_name(chunk, name) != parameter:
                        continue
                    if what == "parameter":
                        tensor.data.view(-1)[0] = value
                    else:
                        tensor.register_hook(lambda gradient: torch.full_like(gradient, value))
        return train_step(forward_step, data_iterator, model, *rest, **options)

    training.train_step = poisoned_step


def run_poisoned(what: str, parameter: str, iteration: str, script: str, *arguments: str) -> None:
    """Runs a script as ``python script arguments...`` does, poisoned."""
    startup.prepare()
    poison(what, parameter, int(iteration))
    sys.argv = [script, *arguments]
    sys.path[0] = os.path.dirname(os.path.abspath(script))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    run_poisoned(*sys.argv[1:])
