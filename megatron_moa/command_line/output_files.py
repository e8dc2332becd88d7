"""Writes files of the tools whole or not at all, after checking that they can be written."""

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from megatron_moa.errors import UserError, one_line


def check_output(flag: str, prefix: str, endings: Sequence[str], overwrite: bool) -> list[str]:
    """The files a prefix stands for; raises UserError if they cannot or must not be written.

    A link counts as what it points to.
    """
    for ending in endings:
        if ending and prefix.endswith(ending):
            raise UserError(f"{flag} {prefix}: a prefix without ending is wanted: {flag} {prefix.removesuffix(ending)}")
    # Megatron itself makes a folder PREFIX/cache, so that alone is no mistake
    is_folder = os.path.isdir(prefix) and not os.path.isdir(os.path.join(prefix, "cache"))
    if is_folder or not os.path.basename(prefix):
        raise UserError(f"{flag} {prefix}: a folder; add a name, e.g. {flag} {os.path.join(prefix, 'corpus')}")
    targets = [prefix + ending for ending in endings]
    _check_replaceable(f"{flag} {prefix}", targets, overwrite)
    parent = os.path.dirname(os.path.abspath(prefix))
    while not os.path.exists(parent):
        parent = os.path.dirname(parent)
    if not os.path.isdir(parent):
        raise UserError(f"{flag} {prefix}: {parent} is a file, not a folder; choose another place")
    if not os.access(parent, os.W_OK):
        raise UserError(f"{flag} {prefix}: the folder {parent} is not writable; choose another or chmod +w it")
    return targets


def _check_replaceable(where: str, targets: Sequence[str], overwrite: bool) -> None:
    for target in targets:
        if not os.path.exists(target):
            continue
        if not os.path.isfile(target):
            raise UserError(f"{where}: {target} is a folder, a device or a pipe, not a file; choose another name")
        if not overwrite:
            raise UserError(f"{where}: {target} exists; choose another name or add --overwrite")


@contextmanager
def written_whole(flag: str, targets: Sequence[str], overwrite: bool = True) -> Iterator[list[str]]:
    """Yields temporary names, one beside each target, and renames all the files at the end.

    Where a target is a link, the file that it points to is written. If anything goes wrong no temporary file remains.

    Args:
        flag: that named the files, for messages.
        targets: the files.
        overwrite: whether to replace files that another run has written meanwhile.

    Raises:
        UserError: a file cannot, or must not, be written.
    """
    targets = [os.path.realpath(target) for target in targets]
    temporary = [f"{target}.{os.getpid()}.tmp" for target in targets]
    folder = os.path.dirname(os.path.abspath(targets[0]))
    created = []
    try:
        while not os.path.exists(folder):
            created.append(folder)
            folder = os.path.dirname(folder)
        os.makedirs(os.path.dirname(os.path.abspath(targets[0])), exist_ok=True)
        yield temporary
        for source in temporary:  # some errors of a disk show only here
            with open(source, "rb") as stream:
                os.fsync(stream.fileno())
        _check_replaceable(f"{flag} {targets[0]}", targets, overwrite)
        for target in targets[1:]:  # so that a crash between two renames never leaves an old file beside a new one
            if os.path.exists(target):
                os.unlink(target)
        for source, target in zip(temporary, targets, strict=True):
            os.replace(source, target)
        created = []
    except OSError as error:
        remedy = "free space or " if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else ""
        reason = error.strerror or one_line(error)
        raise UserError(f"{flag} {targets[0]}: cannot be written ({reason}); {remedy}choose another place") from None
    finally:
        for path in temporary:
            if os.path.exists(path):
                os.unlink(path)
        for path in created:
            if os.path.isdir(path) and not os.listdir(path):
                os.rmdir(path)
