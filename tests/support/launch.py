"""Starts scripts in processes that have imported torch and Megatron already.

Imports would be half of a small run otherwise.

A server process imports them once and forks for every process of every run (multiprocessing's fork server); nothing of
Megatron is set up in it. The processes find the environment torchrun would give them.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import IO, Any

from megatron_moa.doctor.processes import LAUNCHER_VARIABLES
from megatron_moa.megatron_fixes.single_process import free_port

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["tests.support.preload"])
_GRACE = 5  # seconds the other ranks have to say why, once one has failed; torchrun gives none


def without_compiler(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment without a C++ compiler in it: eager PyTorch is ready sooner than compiled code."""
    return {**environment, "PATH": os.path.dirname(sys.executable), "CXX": ""}


# Runs shall have one thread a process, which is settled when torch is imported. Megatron and the compiler, while they
# are imported, ask whether there is a GPU; torch's usual answer starts CUDA, which no process forked later can use.
_SERVER_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}


def start_server() -> None:
    """Starts the server, once."""
    before = {name: os.environ.get(name) for name in _SERVER_ENVIRONMENT}
    os.environ.update(_SERVER_ENVIRONMENT)
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def launch(
    target: Callable[..., None], arguments: tuple[Any, ...], processes: int, folder: Path, timeout: float = 280
) -> tuple[int, str]:
    """Runs ``target(*arguments)`` on every rank, in ``folder``.

    With ``processes=0`` it runs in one process that is no rank.

    Returns:
        The first exit code that was not 0, or 0, and everything that was printed. All ranks are killed when one fails,
        and when the time is up (exit code 124, the stacks of the ranks are printed).
    """
    start_server()
    port = str(free_port())
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "log"
        ranks = []
        for rank in range(processes or 1):
            environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
            environment |= {"OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
            if processes:
                environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(processes)}
            process = _SERVER.Process(target=_rank, args=(target, arguments, environment, str(folder), str(log)))
            process.start()
            ranks.append(process)
        returncode = _wait(ranks, time.monotonic() + timeout)
        return returncode, log.read_text(errors="replace")


class Forked:
    """Takes the place of subprocess.Popen where a tool starts another script of ours.

    The script's output goes to a file, and its process has Megatron imported.
    """

    def __init__(
        self, command: list[str], cwd: str | Path, env: Mapping[str, str], stdout: IO[str], **_: object
    ) -> None:
        start_server()
        arguments = (command[1], command[2:], dict(env), str(cwd), stdout.name)
        self._process = _SERVER.Process(target=_session, args=arguments)
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once there is one. Raises subprocess.TimeoutExpired."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout)
        return self._process.exitcode


def _session(path: str, arguments: list[str], environment: dict[str, str], folder: str, log: str) -> None:
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # as in a process that no fork server made
    _rank(script, (path, arguments), environment, folder, log)


def _wait(ranks: list[Any], deadline: float) -> int:
    returncode = 0
    while waiting := [process for process in ranks if process.exitcode is None]:
        connection.wait([process.sentinel for process in waiting], max(0.0, deadline - time.monotonic()))
        failed = [process.exitcode for process in ranks if process.exitcode]
        if failed and not returncode:
            returncode = failed[0]
            deadline = min(deadline, time.monotonic() + _GRACE)
        if time.monotonic() >= deadline:
            if not returncode:
                returncode = 124
                for process in waiting:
                    os.kill(process.pid, signal.SIGABRT)  # faulthandler prints where each of them waits
                    process.join(_GRACE)
            for process in waiting:
                process.kill()
                process.join()
    return returncode


def _rank(
    target: Callable[..., None], arguments: tuple[Any, ...], environment: dict[str, str], folder: str, log: str
) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    faulthandler.enable()
    target(*arguments)


def script(path: str, arguments: list[str]) -> None:
    """A target of :func:`launch`: the script as ``python path arguments...`` runs it."""
    sys.argv = [path, *arguments]
    sys.path[0] = os.path.dirname(os.path.abspath(path))
    runpy.run_path(path, run_name="__main__")
