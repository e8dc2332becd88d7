"""Folders that the tools write: one gets its name when everything in it is complete."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_moa.errors import UserError

_UNFINISHED = r"\.\d+\.unfinished"  # how the name ends of a folder that a tool is writing: its process, and this


def is_unfinished(name: str) -> bool:
    """Whether a folder of this name is one that a tool was writing, or still is."""
    return re.search(_UNFINISHED + "$", name) is not None


@contextmanager
def written_folder(flag: str, target: Path, replace: str | None = None) -> Iterator[Path]:
    """Yields a temporary folder beside the target, which gets its name at the end; if anything goes wrong none remains.

    A tool that is killed leaves the temporary folder (:func:`is_unfinished`). It is not deleted, since another process
    may be writing it, but named on stderr by the next one that writes to the same target.

    Args:
        flag: that names the target, for messages.
        target: not there, or an empty folder.
        replace: a pattern of file names; a target that holds nothing but such files is replaced.

    Raises:
        UserError: the target is something else, or cannot be written.
    """
    target = target.absolute()
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(_others(target, replace)))):
        full = "a folder that is not empty" if replace is None else f"a folder with other files than {replace}"
        kind = "a link" if target.is_symlink() else full if target.is_dir() else "a file"
        raise UserError(f"{flag} {target}: is {kind}; name a new folder")
    for left in target.parent.glob("*.unfinished"):
        if re.fullmatch(re.escape(target.name) + _UNFINISHED, left.name):
            print(f"WARNING: {left} was left unfinished; delete it if nothing writes there any more", file=sys.stderr)
    partial = target.with_name(f"{target.name}.{os.getpid()}.unfinished")
    try:
        partial.mkdir(parents=True)
        yield partial
        if replace is not None and target.exists():
            shutil.rmtree(target)  # all of it such files, and what comes in their place is complete
        partial.rename(target)  # over an empty folder, too
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise UserError(f"{flag} {target}: cannot be written ({reason}); free space or choose another place") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _others(folder: Path, pattern: str | None) -> Iterator[Path]:
    """What is in a folder, other than files of these names."""
    return (path for path in folder.iterdir() if pattern is None or path.is_dir() or not path.match(pattern))
