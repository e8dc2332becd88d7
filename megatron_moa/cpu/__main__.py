"""Runs a Megatron script on the CPU: ``python -m megatron_moa.cpu SCRIPT ARGS``."""

import os
import runpy
import sys

import torch

from megatron_moa.cpu.messages import print_rank_0
from megatron_moa.cpu.switch import enable
from megatron_moa.errors import fail, one_line_errors
from megatron_moa.megatron_fixes.single_process import single_process_environment


def main(arguments: list[str]) -> None:
    """``python -m megatron_moa.cpu SCRIPT ARGS...`` runs a Megatron script on the CPU."""
    program = "python -m megatron_moa.cpu"
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: {program} SCRIPT [ARGUMENTS OF THE SCRIPT]")
        raise SystemExit(0 if arguments else 2)
    script = arguments[0]
    if not os.path.isfile(script):
        fail(program, f"there is no script {script}")
    if torch.cuda.is_available():
        print_rank_0(f"{program}: a CUDA device is there, so nothing is changed and {script} runs as it is.")
    else:
        with one_line_errors(program):
            single_process_environment()
        enable()
    with one_line_errors(os.path.basename(script)):
        sys.argv = list(arguments)
        sys.path[0] = os.path.dirname(os.path.abspath(script))
        runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
