"""megatron_moa/command_line/processes.py: what was started ends, whatever it does about SIGTERM."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

from megatron_moa.command_line.processes import end_processes


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
