"""Writes files of the tools whole or not at all, after checking that they can be written."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from megatron_moa.errors import UserError, one_line


def check_output(flag: str, prefix: str, endings: Sequence[str], overwrite: bool) -> list[str]:
    """The files a prefix stands for; raises UserError if they cannot or must not be written."""
    for ending in endings:
        if ending and prefix.endswith(ending):
            raise UserError(f"{flag} {prefix}: a prefix without ending is wanted: {flag} {prefix.removesuffix(ending)}")
    # Megatron itself makes a folder PREFIX/cache, so that alone is no mistake
    is_folder = os.path.isdir(prefix) and not os.path.isdir(os.path.join(prefix, "cache"))
    if is_folder or not os.path.basename(prefix):
        raise UserError(f"{flag} {prefix}: a folder; add a name, e.g. {flag} {os.path.join(prefix, 'corpus')}")
    targets = [prefix + ending for ending in endings]
    existing = [target for target in targets if os.path.exists(target)]
    if existing and not overwrite:
        raise UserError(f"{flag} {prefix}: {existing[0]} exists; choose another name or add --overwrite")
    parent = os.path.dirname(os.path.abspath(prefix))
    while not os.path.exists(parent):
        parent = os.path.dirname(parent)
    if not os.path.isdir(parent):
        raise UserError(f"{flag} {prefix}: {parent} is a file, not a folder; choose another place")
    if not os.access(parent, os.W_OK):
        raise UserError(f"{flag} {prefix}: the folder {parent} is not writable; choose another or chmod +w it")
    return targets


@contextmanager
def written_whole(flag: str, targets: Sequence[str]) -> Iterator[list[str]]:
    """Yields temporary names, one beside each target, and renames all the files at the end.

    If anything goes wrong no temporary file remains.
    """
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
        for target in targets[1:]:  # so that a crash between two renames never leaves an old file beside a new one
            if os.path.exists(target):
                os.unlink(target)
        for source, target in zip(temporary, targets, strict=True):
            os.replace(source, target)
        created = []
    except OSError as error:
        raise UserError(
            f"{flag} {targets[0]}: cannot be written ({error.strerror or one_line(error)}); free space or "
            "choose another place"
        ) from None
    finally:
        for path in temporary:
            if os.path.exists(path):
                os.unlink(path)
        for path in created:
            if os.path.isdir(path) and not os.listdir(path):
                os.rmdir(path)
