"""Keeps what a run of pretrain_mae.py writes, so that the run can be killed at any moment.

That is settings, losses, checkpoint and the picture of reconstructions.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter

from megatron_moa.command_line.progress_bar import counting_bar
from megatron_moa.errors import UserError, one_line

UNFINISHED = ".unfinished"  # how the name ends of a file that is being written


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file under another name, then renames the file.

    So a run that is killed leaves the old file or the new one.

    Raises:
        UserError: it cannot be written.
    """
    partial = path.with_name(path.name + UNFINISHED)
    try:
        write(partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save has a RuntimeError for a full disk
        reason = one_line(error, typed=True)
        raise UserError(
            f"--out {path.parent}: {path.name} cannot be written ({reason}); free space, then go on"
        ) from None


class RunFolder:
    """Reads and writes the files in the folder of a run.

    The files are ``settings.json``, ``losses.jsonl``, ``checkpoint.pt`` and ``reconstructions.png``.
    """

    def __init__(self, folder: Path) -> None:
        self.path, self.checkpoint = folder, folder / "checkpoint.pt"
        self.settings, self.losses = folder / "settings.json", folder / "losses.jsonl"

    def check(self, settings: dict[str, object]) -> None:
        """Raises UserError unless the folder is new, empty, or that of a run with these settings."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--out {self.path}: is a file; name a folder")
        if not self.settings.is_file():
            if self.path.is_dir() and any(path.suffix != UNFINISHED for path in self.path.iterdir()):
                raise UserError(f"--out {self.path}: holds what is not this program's; name a new or an empty folder")
            return
        of_run = self.read_settings(settings)
        for flag, value in settings.items():
            if of_run[flag] != value:
                raise UserError(
                    f"{flag} {value}: the run in {self.path} has {of_run[flag]}; give that, or another --out"
                )
        if unknown := of_run.keys() - settings.keys():
            raise UserError(
                f"--out {self.path}: settings.json is another version's, with {', '.join(sorted(unknown))}; give "
                "another --out"
            )

    def read_settings(self, flags: Iterable[str]) -> dict[str, object]:
        """What a run was started with, by flag.

        Raises:
            UserError: there is no run, or its settings cannot be read or lack one of ``flags``.
        """
        try:
            settings = json.loads(self.settings.read_text())
            lacking = [flag for flag in flags if flag not in settings]
        except FileNotFoundError:
            raise UserError(f"--out {self.path}: no run is there; name the folder of one") from None
        except (OSError, ValueError, TypeError) as error:
            reason = one_line(error, typed=True)
            raise UserError(
                f"--out {self.path}: settings.json is damaged ({reason}); restore it, or give another --out"
            ) from None
        if lacking or not isinstance(settings, dict):
            raise UserError(
                f"--out {self.path}: settings.json is another version's, or damaged, without {', '.join(lacking)}; "
                "give another --out"
            )
        return settings

    def begin(self, settings: dict[str, object], step: int) -> None:
        """Makes the folder, or takes from its log what came after a checkpoint's step."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {self.path}: cannot be made ({error.strerror}); name another folder") from None
        write_whole(self.settings, lambda path: path.write_text(json.dumps(settings, indent=1) + "\n"))
        lines = self.losses.read_text().splitlines(keepends=True) if self.losses.is_file() else []
        try:
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        except (ValueError, KeyError, TypeError) as error:
            reason = one_line(error, typed=True)
            raise UserError(
                f"--out {self.path}: losses.jsonl has a damaged line ({reason}); delete the line, or give another --out"
            ) from None
        write_whole(self.losses, lambda path: path.write_text("".join(kept)))

    def read_checkpoint(self) -> dict[str, object] | None:
        """``step``, ``model`` and ``optimizer`` of the last checkpoint; None before the first."""
        if not self.checkpoint.is_file():
            return None
        try:
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            return {name: state[name] for name in ("step", "model", "optimizer")}
        except Exception as error:
            reason = one_line(error, typed=True)
            raise UserError(
                f"--out {self.path}: checkpoint.pt is damaged ({reason}); delete it, or the folder"
            ) from None

    def write_checkpoint(self, state: dict[str, object]) -> None:
        """Puts a checkpoint in the place of the one before."""
        write_whole(self.checkpoint, functools.partial(torch.save, state))

    def write_picture(self, write: Callable[[Path], object]) -> None:
        """Puts a picture in the place of the one before."""
        write_whole(self.path / "reconstructions.png", write)


class Journal:
    """Tells how a run goes, by a progress bar and by files.

    The files are ``losses.jsonl`` and TensorBoard's curves in ``tensorboard/``. Times are in the bar and in TensorBoard
    only, so that equal runs have equal files of losses.
    """

    def __init__(self, folder: RunFolder, settings: dict[str, object], done: int, steps: int, title: str) -> None:
        """Begins after ``done`` steps; what was noted after them, by a run that was killed, is taken out."""
        folder.begin(settings, done)
        print(
            title, f"to {folder.path}" if not done else f"{folder.path} goes on after step {done}", sep="; ", flush=True
        )
        self.log = folder.losses.open("a")
        self.board = SummaryWriter(str(folder.path / "tensorboard"), purge_step=done + 1)
        self.bar = counting_bar(steps, "MAE", " steps")
        self.bar.n = self.bar.initial = done

    def _note(self, **values: float) -> None:
        try:
            self.log.write(json.dumps(values) + "\n")
            self.log.flush()
        except OSError as error:
            reason = one_line(error, typed=True)
            raise UserError(f"--out: {self.log.name} cannot be written ({reason}); free space, then go on") from None

    def add_step(self, step: int, loss: float, rate: float, speed: float) -> None:
        """Notes a step's loss and rate, and how many images a second it took."""
        self._note(step=step, loss=loss, rate=rate)
        for name, value in {"loss/train": loss, "rate": rate, "images per second": speed}.items():
            self.board.add_scalar(name, value, step)
        self.bar.set_postfix_str(f"loss {loss:.4f}, rate {rate:.2e}, {speed:.0f} images/s", refresh=False)
        self.bar.update()

    def add_validation(self, step: int, loss: float, validation: float) -> None:
        """Notes a validation loss, and prints it beside the step's."""
        self._note(step=step, validation_loss=validation)
        self.board.add_scalar("loss/validation", validation, step)
        self.bar.write(f"step {step}: loss {loss:.4f}, validation loss {validation:.4f}", file=sys.stdout)

    def close(self) -> None:
        """Ends the bar and the files."""
        for part in (self.bar, self.board, self.log):
            part.close()
