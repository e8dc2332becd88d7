"""Tests exit_codes.py, nan_guard.py and launch.py.

Tested are signals, lost ranks, values that are not finite, and exit codes.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_moa.errors import UserError
from megatron_moa.launch import children, exit_code
from megatron_moa.launch import main as launcher
from megatron_moa.research.fault_drill.poison import poison as poison_training
from megatron_moa.runs.tiny_model import MOE, SWIGLU, TINY
from megatron_moa.training.exit_codes import STOP_SIGNALS
from megatron_moa.training.megatron_checks import megatron_checks
from tests.support import launch
from tests.support.training import ROOT, Run

pytestmark = pytest.mark.distributed


def run_hurt(
    tmp_path: Path, hurt: Callable[..., None], hurt_arguments: tuple, *flags: str, processes: int = 2
) -> tuple[Run, list[int]]:
    """Trains the tiny model in processes that first call ``hurt(*hurt_arguments)``.

    Returns the run, and all exit codes.
    """
    flags = (*TINY, *SWIGLU, "--moa-backend", "eager", "--train-iters", "8", *flags)
    code, log = launch.launch(_hurt_rank, (hurt, hurt_arguments, str(tmp_path), list(flags)), processes, ROOT)
    codes = [int(file.read_text()) for file in sorted(tmp_path.glob("code*"))]
    return Run(code, log), codes


def _hurt_rank(hurt: Callable[..., None], hurt_arguments: tuple, folder: str, flags: list[str]) -> None:
    """One rank; leaves its exit code in a file, since the launcher keeps the first only."""
    from megatron_moa import startup

    startup.prepare()
    hurt(*hurt_arguments)
    code = 0
    try:
        launch.script(str(ROOT / "pretrain_gpt_moa.py"), flags)
    except SystemExit as leaving:
        code = leaving.code or 0
        raise
    finally:
        Path(folder, f"code{os.environ['RANK']}").write_text(str(code))


def before(name: str, act: Callable[[], None], call: int = 1) -> None:
    """Has ``act()`` called in Megatron's training loop, before the given call of one of its functions."""
    from megatron.training import training

    function = getattr(training, name)
    calls = 0

    def with_act(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls == call:
            act()
        return function(*arguments, **options)

    setattr(training, name, with_act)


def send_signal(number: int, name: str, call: int) -> None:
    """The last rank gets a signal, twice."""
    if os.environ["RANK"] == "1":
        before(name, lambda: [os.kill(os.getpid(), number) for _ in range(2)], call)


@pytest.mark.parametrize(
    ("number", "when", "call", "saved"),
    [
        (signal.SIGTERM, "train_step", 3, 3),
        (signal.SIGUSR2, "evaluate", 1, 4),
        (signal.SIGUSR2, "save_checkpoint", 1, 5),  # of iteration 4: the next one is saved too
        (signal.SIGTERM, "setup_model_and_optimizer", 1, 1),
    ],
)
def test_signal_on_one_rank_saves_and_all_leave_with_75(tmp_path, number, when, call, saved):
    save = tmp_path / "save"
    flags = ("--save", str(save), "--save-interval", "4", "--eval-interval", "4", "--eval-iters", "1")
    run, codes = run_hurt(tmp_path, send_signal, (number, when, call), *flags, "--exit-signal-handler")
    assert codes == [75, 75], run.log[-3000:]
    assert (save / "latest_checkpointed_iteration.txt").read_text() == str(saved)
    (line,) = re.findall(r".*received: saves.*", run.log)
    assert "rank 1" in line
    assert signal.Signals(number).name in line


def test_signal_after_training_changes_nothing(tmp_path):
    save = ("--save", str(tmp_path / "save"), "--save-interval", "8", "--exit-signal-handler")
    flags = (*save, "--eval-interval", "8", "--eval-iters", "1")
    # The first evaluation is in the last iteration's place of the loop, the second after the training.
    run, codes = run_hurt(tmp_path, send_signal, (signal.SIGTERM, "evaluate", 2), *flags)
    assert "SIGTERM received" in run.log
    assert codes == [0, 0]


def kill_rank() -> None:
    """The last rank dies in its third step."""
    if os.environ["RANK"] == "1":
        before("train_step", lambda: os.kill(os.getpid(), signal.SIGKILL), 3)


def test_killed_rank_is_told_in_one_line_by_the_other(tmp_path):
    run, _ = run_hurt(tmp_path, kill_rank, (), "--distributed-timeout-minutes", "1")
    assert run.returncode in (-signal.SIGKILL, 76)
    (line,) = re.findall(r".*another rank is gone.*", run.log)
    assert "rank 0" in line
    assert "exit code 76" in line
    assert "Traceback" not in run.log


def poison(what: str, parameter: str, iteration: int, *value: float) -> None:
    """The last rank that has the parameter gets a NaN, or another value."""
    if os.environ["RANK"] == "1" or "experts." in parameter or "layers.0" in parameter:
        poison_training(what, parameter, iteration, *value)


@pytest.mark.parametrize(
    ("what", "parameter", "flags"),
    [
        ("parameter", "decoder.layers.1.mlp.linear_fc1.weight", ["--tensor-model-parallel-size", "2"]),
        ("parameter", "decoder.layers.1.mlp.linear_fc2.weight", ["--pipeline-model-parallel-size", "2"]),
        ("gradient", "decoder.layers.1.mlp.coefficients.weight", ["--use-distributed-optimizer"]),
        pytest.param(
            "gradient",
            "decoder.layers.1.mlp.coefficients.weight",
            ["--use-distributed-optimizer", "--overlap-grad-reduce"],
            marks=pytest.mark.full,
        ),
        pytest.param(
            "parameter",
            "decoder.layers.1.mlp.experts.local_experts.3.linear_fc1.weight",
            [*MOE, "--expert-model-parallel-size", "2"],
            marks=pytest.mark.full,
        ),
        pytest.param(
            "gradient",
            "decoder.layers.1.mlp.experts.linear_fc1.weight3",
            [*MOE, "--moe-grouped-gemm", "--expert-model-parallel-size", "2"],
            marks=pytest.mark.full,
        ),
    ],
)
@pytest.mark.parametrize("iteration", [1, 3])
def test_nan_stops_all_ranks_and_names_layer_and_step(tmp_path, what, parameter, flags, iteration):
    save = tmp_path / "save"
    flags = [*flags, "--save", str(save), "--save-interval", "2"]
    run, codes = run_hurt(tmp_path, poison, (what, parameter, iteration), *flags)
    assert codes == [17, 17], run.log[-3000:]
    (line,) = re.findall(r".*nothing was updated or saved.*", run.log)
    assert "rank 1" in line
    assert f"{parameter} is not finite" in line
    assert f"at iteration {iteration}:" in line
    saved = iteration // 2 * 2
    assert sorted(folder.name for folder in save.glob("iter_*")) == [f"iter_{n:07d}" for n in range(2, saved + 1, 2)]


def test_a_gradient_whose_norm_overflows_stops_all_ranks(tmp_path):
    parameter = "decoder.layers.1.mlp.linear_fc1.weight"
    run, codes = run_hurt(tmp_path, poison, ("gradient", parameter, 2, 1e30))
    assert codes == [17, 17], run.log[-3000:]
    (line,) = re.findall(r".*nothing was updated or saved.*", run.log)
    assert f"the gradient of {parameter} overflows in its norm, at iteration 2: " in line


def poison_once() -> None:
    """The loss of the third step is NaN on the last rank, and is not when computed again."""
    if os.environ["RANK"] == "1":
        from megatron.core.rerun_state_machine import RerunState, get_rerun_state_machine

        from megatron_moa.training import nan_guard

        validate = nan_guard.StopOnNonFinite.validate_result

        def seen_once(machine, result, *rest, **options):
            if get_rerun_state_machine().state is RerunState.INITIAL_RUN and nan_guard._iteration() == 3:
                result = result * float("nan")
            validate(machine, result, *rest, **options)

        nan_guard.StopOnNonFinite.validate_result = seen_once


def test_nan_that_does_not_come_again_blames_the_machine(tmp_path):
    run, codes = run_hurt(tmp_path, poison_once, ())
    assert codes == [17, 17], run.log[-3000:]
    (line,) = re.findall(r".*nothing was updated or saved.*", run.log)
    assert f"not when computed again on {os.uname().nodename}" in line
    assert "at iteration 3:" in line


def test_nan_without_reruns(tmp_path):
    parameter = "decoder.layers.0.mlp.linear_fc1.weight"
    run, codes = run_hurt(tmp_path, poison, ("parameter", parameter, 2), "--rerun-mode", "disabled", processes=1)
    assert codes == [17], run.log[-3000:]
    assert f"parameter {parameter} is not finite, at iteration 2" in run.log


def poison_update() -> None:
    """An update makes a parameter of the last rank NaN just before it would be saved."""
    from megatron.training import training

    decide = training.checkpoint_and_decide_exit

    def poisoned(model, *rest, **options):
        if os.environ["RANK"] == "1":
            model[0].module.decoder.layers[0].mlp.linear_fc2.weight.data[0, 0] = float("inf")
        return decide(model, *rest, **options)

    training.checkpoint_and_decide_exit = poisoned


def test_parameters_that_are_not_finite_are_not_saved(tmp_path):
    save = tmp_path / "save"
    run, codes = run_hurt(tmp_path, poison_update, (), "--save", str(save), "--save-interval", "1")
    assert codes == [17, 17], run.log[-3000:]
    assert "parameter decoder.layers.0.mlp.linear_fc2.weight is not finite, when iteration 1 was to be saved" in run.log
    assert "an update made it so, and it is not saved; exit code 17" in run.log
    assert not list(save.glob("iter_*"))


def look_at_timeouts(file: str) -> None:
    """Writes the timeouts of all groups, in seconds, in the first step."""
    before("train_step", lambda: Path(file + os.environ["RANK"]).write_text(json.dumps(group_timeouts())))


def group_timeouts() -> dict[str, float]:
    """Of every process group of this rank."""
    import torch
    from torch.distributed import distributed_c10d

    backends = {group.group_name: group._get_backend(torch.device("cpu")) for group in distributed_c10d._world.pg_map}
    return {name: backend.options._timeout.total_seconds() for name, backend in backends.items()}


def test_timeout_holds_for_every_group(tmp_path):
    file = str(tmp_path / "timeouts")
    save = ("--save", str(tmp_path / "save"), "--save-interval", "8")
    run_hurt(
        tmp_path, look_at_timeouts, (file,), "--distributed-timeout-minutes", "3", "--moa-log-interval", "1", *save
    )
    for rank in "01":
        timeouts = json.loads(Path(file + rank).read_text())
        assert len(timeouts) > 5
        assert set(timeouts.values()) == {180.0}, timeouts


@pytest.mark.parametrize(
    ("codes", "received", "expected"),
    [
        ([75, 75], {signal.SIGTERM}, 75),
        ([75, -15], {signal.SIGTERM}, 75),  # the second was still starting
        ([-12], {signal.SIGUSR2}, 75),
        ([-15], set(), 143),  # sent by somebody else
        ([-9, 76], set(), 137),
        ([-9, 75], {signal.SIGTERM}, 137),
        ([76, 17], set(), 17),
        ([1, -15], set(), 1),
        ([2, 2], set(), 2),
    ],
)
def test_launcher_exit_code(codes, received, expected):
    assert exit_code(codes, received) == expected


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        *((f"--nproc-per-node={count}", f"--nproc-per-node {count}: give 1 to 1024") for count in (0, -1, "x", 10**9)),
        *((f"--nnodes={nodes}", f"--nnodes {nodes}: no number of nodes") for nodes in (0, "x", "2:1", "1:2:3")),
        ("--nnodes=2 --node-rank=2", "--node-rank 2: out of range; give 0 to 1"),
        ("--max-restarts=x", "--max-restarts: invalid int value: 'x'; see python -m megatron_moa.launch --help"),
        ("--max-restarts=-1", "torchrun: max_restarts must be"),
        ("--rdzv-conf=x", "torchrun: The rendezvous configuration option 'x'"),
        ("--rdzv-backend=x", "torchrun: The rendezvous backend 'x'"),
        ("--rdzv-endpoint=a:b", "torchrun: The port number"),
    ],
)
def test_launcher_says_in_one_line_what_it_cannot_start_with(flags, said, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        with pytest.raises(SystemExit) as leaving:
            launcher([*flags.split(), "script.py"])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert leaving.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("megatron_moa.launch: error: ")
    assert said in line.replace("/--max_restarts", "")


def test_launcher_takes_a_free_port_unless_one_is_named(tmp_path):
    """Two runs on a machine had torchrun's 29500, and the second died of a traceback."""
    script = tmp_path / "script.py"
    script.write_text("import os; print(os.environ['MASTER_PORT'])")
    command = [sys.executable, "-m", "megatron_moa.launch", "--nproc-per-node", "2"]
    done = subprocess.run([*command, str(script)], cwd=ROOT, capture_output=True, text=True, timeout=100)
    ports = set(done.stdout.split())
    assert (done.returncode, len(ports), "29500" in ports) == (0, 1, False), done.stderr
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = str(other.getsockname()[1])
        command += ["--master-port", port, str(script)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    said = f"megatron_moa.launch: error: --master-port {port}: something else listens there; give another"
    assert (done.returncode, said in done.stderr, "Traceback" in done.stderr) == (2, True, False), done.stderr


def test_launcher_finds_its_children():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        assert child.pid in children(os.getpid())
        assert os.getpid() not in children(os.getpid())
    finally:
        child.kill()
        child.wait()
    assert child.pid not in children(os.getpid())


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.full), signal.SIGUSR2])
def test_launcher_forwards_signals_and_passes_the_code_on(tmp_path, number):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, pathlib, signal, sys, time\n"
        f"signal.signal({int(number)}, lambda *_: (time.sleep(1), os._exit(75)))\n"
        f"pathlib.Path({str(tmp_path)!r}, 'ready' + os.environ['RANK']).touch()\n"
        "time.sleep(120)\n"
    )
    command = [sys.executable, "-m", "megatron_moa.launch", "--standalone", "--nproc-per-node", "2", str(script)]
    launcher = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("ready*"))) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        launcher.send_signal(number)
        _, errors = launcher.communicate(timeout=60)
    finally:
        launcher.kill()
    assert launcher.returncode == 75, errors
    assert "exit code 75" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_signal_to_a_process_that_shuts_down_changes_nothing(number):
    """Python gives every handler's signal its default back before the process is gone."""
    ending = "sys.exit(0)" if number == signal.SIGTERM else "pass"
    program = (
        "import os, sys\n"
        "from types import SimpleNamespace\n"
        "from megatron_moa.training import exit_codes\n"
        "class Last:\n"
        "    def __del__(self, kill=os.kill, pid=os.getpid()):\n"
        f"        kill(pid, {int(number)})\n"
        "sys.last = Last()  # deleted after the handlers\n"
        "stop = exit_codes.StopSignals(SimpleNamespace(save=None, exit_signal=15))\n"
        "with exit_codes.exit_codes(stop):\n"
        f"    {ending}\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_no_handler_without_its_flag():
    from megatron_moa.training.exit_codes import catch_stop_signals

    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)]
    assert catch_stop_signals(SimpleNamespace(exit_signal_handler=False)) is None
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)] == handlers


def test_a_signal_before_the_handlers_are_exchanged_counts():
    """Megatron's handler is there first, while ranks meet."""
    program = (
        "import os, signal\n"
        "from types import SimpleNamespace\n"
        "from megatron.training import global_vars\n"
        "from megatron_moa.training.exit_codes import catch_stop_signals\n"
        "global_vars._set_signal_handler(signal.SIGTERM)\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "stop = catch_stop_signals(SimpleNamespace(save=None, exit_signal=signal.SIGTERM, exit_signal_handler=True))\n"
        "print(stop._received)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.endswith("True\n"), done.stderr
    assert "SIGTERM received" in done.stdout + done.stderr


@pytest.mark.parametrize(
    "error", [torch.distributed.DistBackendError("NCCL error"), RuntimeError("[../gloo/pair.cc:1]")]
)
def test_a_rank_lost_while_a_model_is_built_is_no_mistake_in_the_flags(error):
    """Slurm would not requeue a job that ends with exit code 2."""
    with pytest.raises(type(error)) as same, megatron_checks():
        raise error
    assert same.value is error
    with pytest.raises(UserError), megatron_checks():
        raise RuntimeError("heads do not divide")


def test_launcher_leaves_nothing_behind_of_a_killed_process(tmp_path):
    script = tmp_path / "script.py"
    helper = tmp_path / "helper"
    script.write_text(
        "import os, pathlib, signal, subprocess, sys\n"
        "helper = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(120)'])\n"
        f"pathlib.Path({str(helper)!r}).write_text(str(helper.pid))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, "-m", "megatron_moa.launch", "--standalone", "--nproc-per-node", "1", str(script)]
    assert subprocess.run(command, cwd=ROOT, timeout=120).returncode == 137
    state = Path("/proc", helper.read_text(), "stat")
    deadline = time.monotonic() + 5
    while state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.1)
