"""Tests examples/slurm with stand-ins for Slurm's commands.

They do what a real Slurm does not do on request;
tests/end_to_end/test_slurm.py has a real one.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.training import ROOT

SCONTROL = 'case "$1 $2" in "show hostnames") echo "$3" ;; "show node") echo NodeAddr=127.0.0.1 ;; esac'
SRUN = 'echo "srun $*" >&2; while [ "$1" != python3 ]; do shift; done; SLURMD_NODENAME=n1 SLURM_NODEID=0 exec "$@"'


def write_program(path: Path, lines: str) -> Path:
    """A bash script."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/bash\n{lines}\n")
    path.chmod(0o755)
    return path


def run_job(
    folder: Path,
    program: str,
    script: str = "pretrain.sbatch",
    *arguments: str,
    scontrol: str = SCONTROL,
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """A job on one node; ``program`` stands for Python, in bash."""
    write_program(folder / "bin" / "scontrol", scontrol)
    write_program(folder / "bin" / "srun", SRUN)
    python = write_program(folder / "bin" / "program", program)
    environment = {
        "PATH": f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHON": str(python),
        "MEGATRON_MOA_DIR": str(ROOT),
        "RUN_DIR": "run",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n1",
        "SLURM_JOB_NUM_NODES": "1",
        **variables,
    }
    arguments = arguments or ("dense-0.12b", "moa", "--mock-data")
    command = ["bash", str(ROOT / "examples" / "slurm" / script), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=100)


def test_a_job_that_was_requeued_before_it_began_trains(tmp_path: Path) -> None:
    """As after a node whose prologue failed: a restart, and nothing of an earlier start."""
    done = run_job(tmp_path, "exit 0", SLURM_RESTART_COUNT="1")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "slurm" / "starts").read_text() == "0 1\n"
    done = run_job(tmp_path, "exit 0", SLURM_RESTART_COUNT="2")
    assert (tmp_path / "run" / "slurm" / "starts").read_text() == "0 2\n"


def test_a_signal_just_before_the_step_is_passed_on(tmp_path: Path) -> None:
    hook = tmp_path / "hook"
    hook.write_text('unset BASH_ENV; set -T; trap \'[ "$BASH_COMMAND" != "STEP=\\$!" ] || kill -s USR2 $$\' DEBUG\n')
    done = run_job(tmp_path, "trap 'exit 75' USR2; for i in {1..300}; do sleep 0.1; done; exit 17", BASH_ENV=str(hook))
    assert "the time limit is near: saving" in done.stderr
    assert "requeued" in done.stderr
    assert "exit code 17" not in done.stderr


@pytest.mark.parametrize("name", ["CHAIN", "DOCTOR"])
def test_switches_are_0_or_1(name: str, tmp_path: Path) -> None:
    done = run_job(tmp_path, "exit 0", **{name: "yes"})
    assert done.returncode == 2
    assert done.stderr == f"pretrain.sbatch: {name} yes: neither 0 nor 1; take 1 to turn it on\n"


def test_a_sweeps_folder_with_a_space_is_named_whole(tmp_path: Path) -> None:
    """It was cut at the space, and the task looked for its checkpoints elsewhere."""
    task = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0", "SWEEP_DIR": "my sweep", "LRS": "1e-3"}
    done = run_job(tmp_path, "exit 0", "sweep.sbatch", "--mock-data", **task)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert done.stderr.startswith("sweep.sbatch: RUN_DIR my sweep/none-lr1e-3-seed1: has a space")
    done = run_job(tmp_path, "exit 0", "sweep.sbatch", "--mock-data", **{**task, "SWEEP_DIR": "sweep"})
    assert (tmp_path / "sweep" / "none-lr1e-3-seed1" / "slurm" / "starts").exists(), done.stderr


def test_a_node_without_an_exit_code_is_lost(tmp_path: Path) -> None:
    """An empty file, as of a full disk, once left the node out of the list."""
    write_program(tmp_path / "bin" / "python3", 'mkdir -p "$2/n1"; : >"$2/n1/exit_code"')
    done = run_job(tmp_path, "exit 0")
    assert (done.returncode, "exit code 76 at iteration 0: requeued" in done.stderr) == (76, True), done.stderr


def test_a_command_that_is_not_there_is_one_line_of_its_node(tmp_path: Path) -> None:
    done = run_job(tmp_path, "exit 0", CONTAINER="", PYTHON="/nowhere/python", DOCTOR="1")
    assert "node.py: /nowhere/python: cannot be started on n1: No such file or directory\n" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == 127


@pytest.mark.parametrize("flag", ["--save", "--save=ck", "--load", "--load=ck"])
def test_checkpoints_elsewhere_are_refused(flag: str, tmp_path: Path) -> None:
    """The job counts its progress in RUN_DIR: it gave up a training that went well."""
    done = run_job(tmp_path, "exit 0", "pretrain.sbatch", "dense-0.12b", "moa", "--mock-data", flag, "ck")
    name = flag.partition("=")[0]
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert done.stderr.startswith(f"pretrain.sbatch: {name}: a job goes on from the checkpoints in RUN_DIR; set that")


def test_a_container_has_the_runs_folder(tmp_path: Path) -> None:
    """A run on another disk, or behind a link, was written into the container."""
    project, disk, submitted = str(ROOT), tmp_path / "disk", tmp_path / "submitted"
    for folder in (disk, submitted):
        folder.mkdir()
    (submitted / "runs").symlink_to(disk)
    container = {"CONTAINER": "image.sif", "CONTAINER_MOUNTS": "/data:/data"}
    for run, mounts in (
        (str(disk / "run"), [submitted, project, disk / "run"]),
        ("runs/run", [submitted, project, disk / "run"]),
        ("run", [submitted, project]),
    ):
        done = run_job(submitted, "exit 0", RUN_DIR=run, **container)
        binds = ",".join([f"{folder}:{folder}" for folder in mounts] + ["/data:/data"])
        assert f"apptainer exec --nv --bind {binds} --pwd {submitted} image.sif" in done.stderr, done.stderr


def test_the_port_is_free_and_the_package_found(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("", 10007))
        other.listen()
        done = run_job(tmp_path, 'echo "$PYTHONPATH $*"', NPROC_PER_NODE="2")
    assert done.returncode == 0, done.stderr
    assert "--master-port 10008" in done.stdout
    assert done.stdout.startswith(f"{ROOT}:{ROOT} ")


def test_a_first_node_without_an_address_is_said(tmp_path: Path) -> None:
    """The script ended without a word."""
    no_address = SCONTROL.replace("NodeAddr=127.0.0.1", "")
    done = run_job(tmp_path, "exit 0", scontrol=no_address)
    assert (done.returncode, "n1: neither the name service nor Slurm has its address: requeued" in done.stderr) == (
        1,
        True,
    )
