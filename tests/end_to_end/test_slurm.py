"""Tests examples/slurm/ under a real Slurm on this machine (tests/slurm/start.sh).

There are two nodes, with one task each over gloo.

Skipped where Slurm is not installed and cannot be. What does not depend on a training runs a few lines of bash in its
place: PYTHON names what is started on every node.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_moa.checkpoints.files import TRACKER
from megatron_moa.research.fault_drill.starts import Log
from megatron_moa.runs.recipes import recipe_flags
from tests.support import launch
from tests.support.training import ROOT

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

CANNOT_INSTALL = 69  # start.sh's exit code
ITERATIONS = 400
# A model of some 100,000 parameters: 20 to 30 ms an iteration on two cores.
SMALL = {
    "PRECISION": "fp32",
    "SEQ_LENGTH": "32",
    "MICRO_BATCH_SIZE": "2",
    "GLOBAL_BATCH_SIZE": "4",
    "TOKENS": str(ITERATIONS * 4 * 32),
    "VOCAB_SIZE": "63",
    "LOG_INTERVAL": "1",
    "EVAL_ITERS": "0",
    "EVAL_INTERVAL": "1000",
    "SAVE_INTERVAL": "1000",
}
FLAGS = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --ffn-hidden-size 128 --mock-data --num-workers 0 "
    "--moa-backend eager --make-vocab-size-divisible-by 16"
).split()


def until(condition: Callable[[], bool], what: str, seconds: float = 270) -> None:
    """Waits for it."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{seconds:.0f} s and not yet: {what}"
        time.sleep(0.05)


@dataclass
class Slurm:
    """The cluster; ``folder`` is for what a test's jobs write."""

    configuration: Path
    folder: Path

    def call(self, *command: str, **variables: str) -> str:
        """Returns what one of Slurm's commands prints.

        The jobs' environment is what ``variables`` say, and little else.
        """
        environment = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
        environment |= {"SLURM_CONF": str(self.configuration), "PYTHON": sys.executable, **variables}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, *options_and_script: str, **variables: str) -> str:
        """A job's id; it writes to ``folder/log`` and keeps its run in ``folder/run``."""
        until(lambda: self.call("sinfo", "--noheader", "--Node", "--format=%t").split() == ["idle"] * 2, "idle nodes")
        options = ["--parsable", f"--output={self.folder / 'log'}", "--time=10", "--signal=B:USR2@5"]
        variables = {"RUN_DIR": str(self.folder / "run"), **variables}
        return self.call("sbatch", *options, *options_and_script, **variables).strip()

    def train(self, *options: str, flags: tuple[str, ...] = ("--mock-data",), **variables: str) -> str:
        """A job of pretrain.sbatch."""
        script = ("examples/slurm/pretrain.sbatch", "dense-0.12b", "moa", *flags)
        return self.submit(*options, *script, **variables)

    def job(self, job: str) -> dict[str, str]:
        """What Slurm knows of a job, or of a task of an array."""
        words = self.call("scontrol", "show", "job", "--oneliner", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def until(self, job: str, *states: str) -> dict[str, str]:
        """Waits until the job is in one of these states."""
        until(lambda: self.job(job)["JobState"] in states, f"{states}: {self.job(job)}\n{self.log[-3000:]}")
        return self.job(job)

    def end(self, job: str) -> tuple[str, str, int]:
        """State, exit code and restarts of a job, once it has ended."""
        last = self.until(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        return last["JobState"], last["ExitCode"].removesuffix(":0"), int(last["Restarts"])

    @property
    def log(self) -> str:
        """What the job has printed, over all of its starts."""
        path = self.folder / "log"
        return path.read_text(errors="replace") if path.exists() else ""


@pytest.fixture(scope="module")
def configuration(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("slurm")
    scripts = ROOT / "tests" / "slurm"
    started = subprocess.run([scripts / "start.sh", folder], capture_output=True, text=True, timeout=250)
    if started.returncode == CANNOT_INSTALL:
        pytest.skip(started.stderr.strip())
    assert started.returncode == 0, started.stderr
    yield folder / "slurm.conf"
    subprocess.run([scripts / "stop.sh", folder], check=True, timeout=100)


@pytest.fixture
def slurm(configuration: Path, tmp_path: Path) -> Iterator[Slurm]:
    slurm = Slurm(configuration, tmp_path)
    yield slurm
    slurm.call("scancel", "--user", str(os.getuid()))


def program(folder: Path, lines: str) -> str:
    """A bash script that stands for Python; called once on every node."""
    path = folder / "program"
    path.write_text(f"#!/bin/bash\n{lines}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.full
@pytest.mark.timeout(900)  # two starts and a minute of Slurm's, on a machine that may have much else to do
def test_requeued_at_the_time_limit_it_ends_as_an_uninterrupted_run(slurm: Slurm, tmp_path: Path) -> None:
    job = slurm.train("--nodes=2", flags=tuple(FLAGS), **SMALL)

    def losses(start: int) -> dict[int, str]:
        logs = list((tmp_path / "run" / "slurm" / f"{job}-{start}" / "n2").glob("*/attempt_0/0/stdout.log"))
        return Log(logs[0]).losses if logs else {}

    # However slow the machine is: the limit is set once it trains, to the next minute, which is what Slurm counts in;
    # that is longer than this training, so it stands still until the warning comes. The second start has time again.
    until(lambda: len(losses(0)) > 3, "iterations")
    slurm.call("scancel", "--signal=STOP", job)
    hours, minutes, seconds = map(int, slurm.job(job)["RunTime"].split(":"))
    slurm.call("scontrol", "update", f"JobId={job}", f"TimeLimit={60 * hours + minutes + 1 + (seconds > 45)}")
    until(lambda: "the time limit is near" in slurm.log, "warned of the time limit")
    slurm.call("scancel", "--signal=CONT", job)
    until(lambda: slurm.job(job)["Restarts"] == "1", "requeued")
    slurm.call("scontrol", "update", f"JobId={job}", "TimeLimit=10")

    assert slurm.end(job) == ("COMPLETED", "0", 1)
    first, second = losses(0), losses(1)
    saved = max(first)
    assert 3 < saved < ITERATIONS
    assert f"exit code 75 at iteration {saved}: requeued" in slurm.log
    assert (min(second), max(second)) == (saved + 1, ITERATIONS)
    assert (tmp_path / "run" / "checkpoints" / TRACKER).read_text() == str(ITERATIONS)

    flags = recipe_flags("dense-0.12b", "moa", FLAGS, {**SMALL, "RUN_DIR": str(tmp_path / "whole")})
    code, output = launch.launch(launch.script, (str(ROOT / "pretrain_gpt_moa.py"), flags), 2, ROOT)
    assert code == 0, output
    (tmp_path / "whole.log").write_text(output)
    whole = Log(tmp_path / "whole.log").losses
    assert len(whole) == ITERATIONS - 1
    assert {**first, **second} == {iteration: whole[iteration] for iteration in {**first, **second}}


def test_every_node_has_one_launcher_with_the_address_of_the_first(slurm: Slurm, tmp_path: Path) -> None:
    show = 'echo "$SLURMD_NODENAME: $CUDA_DEVICE_MAX_CONNECTIONS $OMP_NUM_THREADS $GLOO_SOCKET_IFNAME $*"'
    job = slurm.train(
        "--nodes=2", PYTHON=program(tmp_path, show), MASTER_ADDR="login", MASTER_PORT="1", SOCKET_IFNAME="lo"
    )
    assert slurm.end(job) == ("COMPLETED", "0", 0)
    lines = sorted(line.partition(": ")[2] for line in slurm.log.splitlines() if "megatron_moa.launch" in line)
    port = 10000 + int(job) % 20000
    for rank, (node, line) in enumerate(zip(("n1", "n2"), lines, strict=True)):
        # n1 is no name that is known outside of Slurm, so its address is taken.
        launcher = f"--nnodes 2 --node-rank {rank} --master-addr 127.0.0.1 --master-port {port}"
        logs = f"--log-dir {tmp_path}/run/slurm/{job}-0/{node} --redirects 3 --tee 3"
        assert line.startswith(f"{node}: 1 1 lo -m megatron_moa.launch --nproc-per-node 1 {launcher} {logs}")


def test_users_mistake_is_not_requeued(slurm: Slurm) -> None:
    assert slurm.end(slurm.train("--nodes=2", flags=())) == ("FAILED", "2", 0)
    assert "pretrain.sh: DATA_PATH is not set" in slurm.log


def test_nan_is_not_requeued_whatever_the_other_nodes_say(slurm: Slurm, tmp_path: Path) -> None:
    job = slurm.train("--nodes=2", PYTHON=program(tmp_path, '[ "$NODE_RANK" = 1 ] && exit 17; exit 76'))
    assert slurm.end(job) == ("FAILED", "17", 0)


def test_starts_without_progress_are_bounded(slurm: Slurm) -> None:
    assert slurm.end(slurm.train(PYTHON="false", MAX_STARTS="2")) == ("FAILED", "1", 1)
    assert "2 starts from iteration 0 and no new checkpoint: given up" in slurm.log


@pytest.mark.full
def test_progress_starts_the_count_anew(slurm: Slurm, tmp_path: Path) -> None:
    # Lost ranks, with a checkpoint two iterations on at every start but the first.
    lines = f"""
        cd {tmp_path}/run; mkdir -p checkpoints; starts=$(ls -d slurm/*-* | wc -l)
        [ $starts = 1 ] || echo $((2 * starts)) >checkpoints/{TRACKER}
        [ $starts -lt 3 ] && exit 76; exit 0
    """
    assert slurm.end(slurm.train(PYTHON=program(tmp_path, lines), MAX_STARTS="2")) == ("COMPLETED", "0", 2)


def test_told_to_end_it_saves_and_stays_away(slurm: Slurm, tmp_path: Path) -> None:
    lines = "trap 'echo saved; exit 75' USR2; echo begun; while :; do sleep 0.1; done"
    job = slurm.train("--nodes=2", PYTHON=program(tmp_path, lines))
    until(lambda: slurm.log.count("begun") == 2, "begun")
    slurm.call("scancel", "--batch", "--signal=TERM", job)
    assert slurm.end(job) == ("FAILED", "75", 0)
    assert slurm.log.count("saved\n") == 2
    assert "stopped at iteration 0; the same sbatch line goes on from there" in slurm.log


def test_chain_of_jobs(slurm: Slurm, tmp_path: Path) -> None:
    lines = f"[ -e {tmp_path}/once ] && exit 0; touch {tmp_path}/once; exit 75"
    options = f"--output={tmp_path / 'log'} --nodes=2 --comment=successor"
    job = slurm.train("--nodes=1", CHAIN="1", SBATCH_ARGS=options, PYTHON=program(tmp_path, lines))
    assert slurm.end(job) == ("FAILED", "75", 0)
    successor = str(int(job) + 1)
    assert slurm.end(successor) == ("COMPLETED", "0", 0)
    assert slurm.job(successor)["Comment"] == "successor"
    assert slurm.job(successor)["NumNodes"] == "2"


def test_chain_needs_the_options_of_its_jobs(slurm: Slurm) -> None:
    assert slurm.end(slurm.train(CHAIN="1")) == ("FAILED", "2", 0)
    assert "SBATCH_ARGS is not set; set it to the options you gave sbatch" in slurm.log


@pytest.mark.full
def test_nodes_in_the_list_are_left_at_once(slurm: Slurm, tmp_path: Path) -> None:
    (tmp_path / "bad").write_text("# memory errors\nn1  # since Monday\n")
    job = slurm.train(EXCLUDE_FILE=str(tmp_path / "bad"), PYTHON="true")
    assert slurm.end(job) == ("COMPLETED", "0", 1)
    assert f"n1: in EXCLUDE_FILE {tmp_path / 'bad'}: requeued" in slurm.log
    assert slurm.job(job)["NodeList"] == "n2"
    assert slurm.job(job)["ExcNodeList"] == "n1"


def test_node_that_fails_alone_is_added_to_the_list(slurm: Slurm, tmp_path: Path) -> None:
    lines = '[ "$NODE_RANK" = 1 ] && exit 134; exit 76'
    job = slurm.train("--nodes=2", EXCLUDE_FILE=str(tmp_path / "bad"), PYTHON=program(tmp_path, lines))
    until(lambda: slurm.job(job)["ExcNodeList"] == "n2", "n2 excluded")
    slurm.until(job, "PENDING")
    assert (tmp_path / "bad").read_text() == "n2\n"
    assert "n2 failed alone (exit code 134): added to EXCLUDE_FILE" in slurm.log


def test_node_whose_doctor_says_no_is_added_too(slurm: Slurm, tmp_path: Path) -> None:
    lines = '[[ "$*" == "-m megatron_moa.doctor" ]] || exit 17; [ "$NODE_RANK" = 0 ]'
    exclude = {"DOCTOR": "1", "EXCLUDE_FILE": str(tmp_path / "bad"), "MAX_STARTS": "1"}
    assert slurm.end(slurm.train("--nodes=2", PYTHON=program(tmp_path, lines), **exclude)) == ("FAILED", "1", 0)
    assert (tmp_path / "bad").read_text() == "n2\n"


def test_apptainer_runs_the_node(slurm: Slurm, tmp_path: Path) -> None:
    # Its stand-in says what it was asked for, and runs what follows the image.
    (tmp_path / "apptainer").write_text('#!/bin/bash\necho "apptainer ${*:1:7}"\nexec "${@:8}"\n')
    (tmp_path / "apptainer").chmod(0o755)
    container = {"CONTAINER": "image.sif", "CONTAINER_MOUNTS": "/data:/data"}
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    assert slurm.end(slurm.train(PYTHON="true", PATH=path, **container)) == ("COMPLETED", "0", 0)
    run = tmp_path / "run"
    assert f"apptainer exec --nv --bind {ROOT}:{ROOT},{run}:{run},/data:/data --pwd {ROOT} image.sif" in slurm.log


def test_nodes_that_fail_together_are_not(slurm: Slurm, tmp_path: Path) -> None:
    job = slurm.train("--nodes=2", EXCLUDE_FILE=str(tmp_path / "bad"), PYTHON="false", MAX_STARTS="1")
    assert slurm.end(job) == ("FAILED", "1", 0)
    assert not (tmp_path / "bad").exists()


@pytest.mark.full
def test_lost_node(slurm: Slurm, tmp_path: Path) -> None:
    lines = f"[ -e {tmp_path}/once ] && exit 0; touch {tmp_path}/once; sleep 100"
    job = slurm.train("--nodes=2", PYTHON=program(tmp_path, lines))
    until((tmp_path / "once").exists, "begun")
    slurm.call("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    until(lambda: slurm.job(job)["Restarts"] == "1", "requeued by Slurm")
    slurm.call("scontrol", "update", "NodeName=n2", "State=RESUME")
    assert slurm.end(job) == ("COMPLETED", "0", 1)
    assert (tmp_path / "run" / "slurm" / "starts").read_text() == "0 2\n"


@pytest.mark.full
def test_tasks_of_a_sweep_are_requeued_by_themselves(slurm: Slurm, tmp_path: Path) -> None:
    # One of the two is stopped once, and must alone begin again.
    lines = f'[[ "$*" != *"--moa-mixing la"* || -e {tmp_path}/once ]] && exit 0; touch {tmp_path}/once; exit 75'
    sweep = {"MIXINGS": "none la", "LRS": "1e-3", "SEEDS": "1", "SWEEP_DIR": str(tmp_path / "sweep")}
    script = ("examples/slurm/sweep.sbatch", "--mock-data")
    job = slurm.submit("--array=0-1", *script, PYTHON=program(tmp_path, lines), **sweep)
    assert slurm.end(f"{job}_1") == ("COMPLETED", "0", 1)
    assert slurm.end(f"{job}_0") == ("COMPLETED", "0", 0)
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir()) == ["la-lr1e-3-seed1", "none-lr1e-3-seed1"]


@pytest.mark.full
def test_sweep(slurm: Slurm, tmp_path: Path) -> None:
    sweep = {"MIXINGS": "moa la", "LRS": "1e-3", "SEEDS": "1", "SWEEP_DIR": str(tmp_path / "sweep")}
    job = slurm.submit("--array=0-1", "examples/slurm/sweep.sbatch", *FLAGS, **SMALL, **sweep)
    for task in range(2):
        assert slurm.end(f"{job}_{task}") == ("COMPLETED", "0", 0), slurm.log
    for arm in ("moa", "la"):
        assert max(Log(tmp_path / "sweep" / f"{arm}-lr1e-3-seed1" / "train.log").losses) == ITERATIONS


def test_sweep_without_an_array(slurm: Slurm) -> None:
    job = slurm.submit("examples/slurm/sweep.sbatch", MIXINGS="none la", LRS="1e-3", SEEDS="1 2")
    assert slurm.end(job) == ("FAILED", "2", 0)
    assert "not an array job: add --array=0-3 to sbatch" in slurm.log
