"""Writes folders of the tools whole or not at all, and checks those that a training writes to."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_moa.command_line.megatron_flags import as_typed
from megatron_moa.errors import UserError, one_line, printable

# Settings of Megatron's that name a folder to write to; --save is checked when the ranks can talk.
_WRITTEN = (
    "tensorboard_dir",
    "wandb_save_dir",
    "non_persistent_global_ckpt_dir",
    "non_persistent_local_ckpt_dir",
    "config_logger_dir",
    "moe_routing_trace_path",
    "logits_save_dir",
)
_UNFINISHED = r"\.\d+\.unfinished"  # how the name ends of a folder that a tool is writing: its process, and this


def check_output_folders(args: argparse.Namespace) -> None:
    """Raises UserError for a folder that a training is to write to and cannot.

    It makes no folder that was not there.

    Args:
        args: Megatron's, parsed.
    """
    if int(os.environ.get("RANK", "0")) != 0:
        return
    # Real data's cache may be complete and read-only (training/index_cache.py); mock data's is always written.
    for name in (*_WRITTEN, *(("data_cache_path",) if args.mock_data else ())):
        folder = getattr(args, name, None)
        if not folder or "://" in str(folder):
            continue
        problem = _why_not_writable(Path(folder).absolute())
        if problem is not None:
            raise UserError(f"{as_typed(name, folder)}: cannot be written to ({problem}); name a folder that can")


def _why_not_writable(folder: Path) -> str | None:
    """Why no file can be made in a folder, which may have to be made; None where one can.

    Nothing but a file is made and removed: another rank may be about to write into a new folder.
    """
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(folder)  # whether it can be a name
        there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        probe = there / f".probe.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        return error.strerror or str(error)
    return None


def is_unfinished(name: str) -> bool:
    """Whether a folder of this name is one that a tool was writing, or still is."""
    return re.search(_UNFINISHED + "$", name) is not None


@contextmanager
def written_folder(flag: str, target: Path, replace: Collection[str] | None = None) -> Iterator[Path]:
    """Yields a temporary folder beside the target, which gets its name at the end.

    If anything goes wrong no temporary folder remains; only a tool that is killed leaves one (:func:`is_unfinished`).
    It is not deleted, since another process may be writing it, but named on stderr by the next one that writes to the
    same target.

    Args:
        flag: that names the target, for messages.
        target: not there, or an empty folder.
        replace: names of files that the tool wrote; a target that holds nothing but such files is replaced.

    Raises:
        UserError: the target is something else, or cannot be written.
    """
    typed, target = f"{flag} {target}", target.absolute()
    _check_replaceable(typed, target, replace)
    for left in target.parent.glob("*.unfinished"):
        if re.fullmatch(re.escape(target.name) + _UNFINISHED, left.name):
            print(f"WARNING: {left} was left unfinished; delete it if nothing writes there any more", file=sys.stderr)
    partial = target.with_name(f"{target.name}.{os.getpid()}.unfinished")
    try:
        partial.mkdir(parents=True)
    except FileExistsError:  # of a process with this number on another machine, or before this one started
        raise UserError(
            f"{typed}: {partial} is there, which another process writes or left; delete it if nothing writes there"
        ) from None
    except OSError as error:
        raise _unwritable(typed, error) from error
    try:
        yield partial
        _check_replaceable(typed, target, replace)  # writing may have taken long
        for name in replace or ():  # what comes in their place is complete
            (target / name).unlink(missing_ok=True)
        partial.rename(target)  # over an empty folder, too
    except OSError as error:
        raise _unwritable(typed, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _unwritable(typed: str, error: OSError) -> UserError:
    reason = error.strerror or one_line(error)
    return UserError(f"{typed}: cannot be written ({reason}); free space or choose another place")


def _check_replaceable(typed: str, folder: Path, replace: Collection[str] | None) -> None:
    """Raises UserError for what is there already, other than a folder of nothing but files of these names."""
    if folder.is_symlink():
        raise UserError(f"{typed}: is a link; name a new folder")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{typed}: is a file; name a new folder")
    for path in sorted(folder.iterdir()):
        if replace is None:
            raise UserError(f"{typed}: is a folder that is not empty; name a new folder")
        if path.name not in replace or path.is_symlink() or not path.is_file():
            raise UserError(f"{typed}: holds {printable(path.name)}, which is not of an earlier run; name another")
