"""Runs a command on one node of a job, as srun starts it (job.sh): python3 node.py FOLDER COMMAND...

It gives the command its node's rank and a folder for its ranks' logs, passes stop signals on to it, and leaves its exit
code in FOLDER/NODE/exit_code: srun alone tells no more than the largest of all nodes. With the standard library only,
and not in bash: where a signal interrupts bash's wait and the command ends at that moment, bash 5.2 gives -1 or the
signal's code for it, once in three times when tried.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path


def main(folder: str, *command: str) -> int:
    """Returns the command's exit code, 128 + n if signal n ended it, 127 if it cannot be started."""
    own = Path(folder, os.environ["SLURMD_NODENAME"])
    own.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "NODE_RANK": os.environ["SLURM_NODEID"]}
    # Each rank's output into files of its own, and into the job's log.
    environment["LAUNCH_ARGS"] = f"--log-dir {own} --redirects 3 --tee 3 {os.environ.get('LAUNCH_ARGS', '')}"
    if "SLURM_GPUS_ON_NODE" in os.environ:
        environment.setdefault("NPROC_PER_NODE", os.environ["SLURM_GPUS_ON_NODE"])

    stop_signals = (signal.SIGUSR2, signal.SIGTERM)
    # Held back until there is someone to pass them on to.
    signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals)
    try:
        child = subprocess.Popen(
            command, env=environment, preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, stop_signals)
        )
    except OSError as error:
        print(f"node.py: {command[0]}: cannot be started on {own.name}: {error.strerror}", file=sys.stderr)
        (own / "exit_code").write_text("127\n")
        return 127
    for number in stop_signals:
        signal.signal(number, lambda *_: child.send_signal(signal.SIGUSR2))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, stop_signals)

    code = child.wait()
    code = code if code >= 0 else 128 - code
    (own / "exit_code").write_text(f"{code}\n")
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
