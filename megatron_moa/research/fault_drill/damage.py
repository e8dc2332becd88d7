"""Damages files, writes the data of a run, and mounts small or read-only file systems."""

from __future__ import annotations

import os
import subprocess
import warnings
from pathlib import Path

import torch


def cut(file: Path) -> None:
    """Takes away a file's second half."""
    os.truncate(file, file.stat().st_size // 2)


def flip(file: Path) -> None:
    """Turns over one bit of a file, of the sign and exponent of some number in the middle."""
    with file.open("r+b") as stream:
        stream.seek(file.stat().st_size // 2 | 3)
        (byte,) = stream.read(1)
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 0x40]))


def write_data(prefix: Path) -> None:
    """Writes a corpus of random tokens in Megatron's format."""
    with warnings.catch_warnings(action="ignore"):  # of Transformer Engine and Apex, which may not be there
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    generator = torch.Generator().manual_seed(1)
    builder = IndexedDatasetBuilder(f"{prefix}.bin")
    for _ in range(200):
        builder.add_document(torch.randint(0, 62, (64,), generator=generator), [64])
    builder.finalize(f"{prefix}.idx")


def in_namespace(before: str, after: str = "true") -> tuple[str, ...]:
    """Returns a command that runs its arguments among mounts of its own.

    Args:
        before: the shell command that makes the mounts.
        after: a shell command that follows.
    """
    script = f'{before} && {{ "$@"; code=$?; {after}; exit $code; }}'
    return ("unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh")


def can_mount() -> bool:
    """Returns whether this user may mount something in a namespace of its own."""
    try:
        command = [*in_namespace("mount -t tmpfs tmpfs /mnt"), "true"]
        return subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0
    except FileNotFoundError:
        return False
