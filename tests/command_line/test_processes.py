"""megatron_moa/command_line/processes.py: what was started ends, whatever it does about SIGTERM."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_moa.command_line.processes import end_processes, start_process


def started(script: str) -> tuple[subprocess.Popen, int]:
    """A shell in a process group of its own, and the process number that it prints."""
    process = subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, text=True, start_new_session=True)
    return process, int(process.stdout.readline())


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for_end(pid: int) -> bool:
    deadline = time.monotonic() + 5
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not is_alive(pid)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_what_is_being_started_ends_with_an_interrupt(stop: signal.Signals, tmp_path: Path) -> None:
    parent, name = os.getpid(), tmp_path / "pid"

    def interrupt() -> None:  # in the new process, while the parent waits for it
        name.write_text(str(os.getpid()))
        os.kill(parent, stop)

    before = signal.signal(stop, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            start_process(["sleep", "60"], preexec_fn=interrupt)
        assert signal.getsignal(stop) is signal.default_int_handler
    finally:
        signal.signal(stop, before)
    assert wait_for_end(int(name.read_text()))


def test_ends_processes_and_what_they_have_started() -> None:
    # The second's child outlives SIGTERM, and its parent.
    pairs = [started("sleep 60 & echo $!; wait"), started("sh -c 'trap \"\" TERM; echo $$; sleep 60; sleep 60' & wait")]
    end_processes([process for process, _ in pairs])
    for process, child in pairs:
        assert process.wait(5) != 0
        assert wait_for_end(child)


def test_kills_what_ignores_sigterm_after_a_while() -> None:
    process, _ = started("trap '' TERM; echo $$; while :; do sleep 60; done")
    end_processes([process], seconds=0.1)
    assert process.wait(5) == -9


def test_a_group_that_has_ended_is_no_error() -> None:
    process = subprocess.Popen(["true"], start_new_session=True)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    end_processes([process])
    assert process.returncode == 0


FORKS = """
import os, threading, time
from megatron_moa.command_line.processes import end_forks_with_this_process
end_forks_with_this_process()
def fork(name):
    if not os.fork():
        os.write(1, f"{name} {os.getpid()}\\n".encode())  # at once: the other fork writes, too
        time.sleep(60)
        os._exit(0)
fork("main")
thread = threading.Thread(target=fork, args=["thread"])
thread.start()
thread.join()
time.sleep(60)
"""


def test_forks_of_the_main_thread_end_with_a_killed_process() -> None:
    process = subprocess.Popen([sys.executable, "-c", FORKS], stdout=subprocess.PIPE, text=True)
    forks = dict(process.stdout.readline().split() for _ in range(2))
    of_main, of_thread = int(forks["main"]), int(forks["thread"])
    try:
        assert is_alive(of_main)
        process.kill()
        process.wait()
        assert wait_for_end(of_main)
        assert is_alive(of_thread)  # it would have ended with its thread, whatever becomes of the process
    finally:
        os.kill(of_thread, signal.SIGKILL)
