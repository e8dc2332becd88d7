"""Finds, checks and deletes the files of checkpoints.

Its functions say which checkpoints a folder holds, and whether one is whole.

A checkpoint is a folder ``iter_NNNNNNN``. Once all its files are written, ``manifest.json`` is added with the size and
CRC-32 of each; then ``latest_checkpointed_iteration.txt`` beside the folders is replaced. So a manifest says that a
checkpoint is complete, and what it must look like. Functions marked collective are called by all ranks, share the
reading of the files among them, and end the same way on every rank.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import threading
import time
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_moa.errors import UserError

TRACKER = "latest_checkpointed_iteration.txt"
MANIFEST = "manifest.json"
_FOLDER = re.compile(r"iter_(\d{7,})")
_REPLACED, _DELETED = ".replaced", ".deleted"  # endings of folders on their way out
_BLOCK = 1 << 22  # bytes read at a time
_PATIENCE = 300  # seconds for the first rank to start, too


class DamagedCheckpoint(Exception):
    """What is wrong with a checkpoint, in words that go on from its name."""


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint on disk, and the flag that named its folder.

    Attributes:
        flag: ``--load`` or ``--pretrained-checkpoint``.
        root: the folder of checkpoints.
        iteration: None for a ``release`` checkpoint, one that was converted, not trained.
    """

    flag: str
    root: Path
    iteration: int | None

    @property
    def path(self) -> Path:
        """The checkpoint's own folder."""
        return self.root / "release" if self.iteration is None else iteration_folder(self.root, self.iteration)

    def __str__(self) -> str:
        return f"{self.flag} {self.root}: {'the release' if self.iteration is None else f'iteration {self.iteration}'}"


def iteration_folder(root: Path, iteration: int) -> Path:
    """Where Megatron keeps the checkpoint of an iteration."""
    return root / f"iter_{iteration:07d}"


def saved_iterations(root: Path) -> list[int]:
    """The iterations of all complete checkpoints in a folder, those with a manifest, in ascending order."""
    names = (_FOLDER.fullmatch(path.parent.name) for path in root.glob(f"iter_*/{MANIFEST}"))
    return sorted(int(name[1]) for name in names if name)


def read_tracker(root: Path) -> int | None:
    """The iteration that ``latest_checkpointed_iteration.txt`` names; None for ``release``.

    Raises:
        FileNotFoundError: there is none.
        DamagedCheckpoint: it holds something else, or cannot be read.
    """
    try:
        text = (root / TRACKER).read_text(errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(*error.args) from None
    except OSError as error:
        raise DamagedCheckpoint(f"{TRACKER} cannot be read ({error.strerror})") from None
    if text == "release":
        return None
    if not text.isdecimal():
        raise DamagedCheckpoint(f"{TRACKER} holds {text[:40]!r} instead of an iteration")
    return int(text)


HOLDS_ADAPTER = "holds an adapter (adapter_config.json); merge it into its model first"
NO_CHECKPOINT = "no checkpoint there; give the folder that training's --save named"


def mistaken_folder(root: Path) -> str | None:
    """What a folder without checkpoints is taken for, with the remedy, where that can be told."""
    if _FOLDER.fullmatch(root.name) or (root.name == "release" and (root.parent / TRACKER).is_file()):
        return f"a single checkpoint, not the folder of them; give {root.parent}"
    if (root / "config.json").is_file():
        return "a Hugging Face folder; make a checkpoint of it with tools/convert_from_hf.py first"
    if (root / "adapter_config.json").is_file():
        return HOLDS_ADAPTER
    return None


def write_tracker(root: Path, iteration: int) -> None:
    """Replaces ``latest_checkpointed_iteration.txt`` in one step.

    Whoever reads the file finds the old number or the new one.
    """
    _write_atomically(root / TRACKER, str(iteration))


def _write_atomically(path: Path, text: str) -> None:
    beside = path.with_name(f"{path.name}.{os.environ.get('RANK', '0')}.new")
    with open(beside, "w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(beside, path)


# Collectives.


def _rank_and_size() -> tuple[int, int]:
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def gathered(value: object) -> list:
    """Every rank's value, in their order; collective."""
    _, size = _rank_and_size()
    values = [value]
    if size > 1:
        values = [None] * size
        torch.distributed.all_gather_object(values, value)
    return values


def raise_together(problem: str | None) -> None:
    """Raises UserError with the first rank's problem on all of them, if any has one; collective."""
    problem = next((text for text in gathered(problem) if text is not None), None)
    if problem is not None:
        raise UserError(problem)


# Manifest.


def _crc32(path: Path) -> str:
    checksum = 0
    with open(path, "rb") as stream:
        while block := stream.read(_BLOCK):
            checksum = zlib.crc32(block, checksum)
    return f"{checksum:08x}"


def write_manifest(folder: Path) -> int:
    """Adds ``manifest.json`` to a complete checkpoint; collective. Every file is read once, by one rank.

    Returns:
        The checkpoint's size in bytes.

    Raises:
        UserError: on every rank, if one could not read or write.
    """
    rank, size = _rank_and_size()
    # Listed by one rank: the others' view of a network filesystem may be older.
    names = gathered(_files(folder) if rank == 0 else None)[0]
    own, problem = {}, None
    try:
        for name in names[rank::size]:
            own[name] = {"size": (folder / name).stat().st_size, "crc32": _crc32(folder / name)}
    except OSError as error:
        problem = f"--save {folder.parent}: what was just written cannot be read again ({error})"
    raise_together(problem)
    files = {name: entry for part in gathered(own) for name, entry in part.items()}
    try:
        if rank == 0:
            _write_atomically(folder / MANIFEST, json.dumps({"files": dict(sorted(files.items()))}, indent=1))
    except OSError as error:
        problem = f"--save {folder.parent}: the manifest cannot be written ({error}); free some space"
    raise_together(problem)
    return sum(entry["size"] for entry in files.values())


def _files(folder: Path) -> list[str]:
    return sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST
    )


def read_manifest(folder: Path) -> dict[str, dict] | None:
    """Size and CRC-32 of a checkpoint's files by name; None where there is no manifest.

    Raises:
        DamagedCheckpoint: it cannot be read.
    """
    try:
        text = (folder / MANIFEST).read_text()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise DamagedCheckpoint(f"{folder / MANIFEST} cannot be read ({error})") from None
    try:
        files = json.loads(text)["files"]
        if not all(isinstance(entry["size"], int) and isinstance(entry["crc32"], str) for entry in files.values()):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DamagedCheckpoint(f"{folder / MANIFEST} is not a manifest any more") from None
    return files


def check_files(folder: Path, manifest: dict[str, dict], names: Iterable[str], checksums: bool) -> None:
    """Raises DamagedCheckpoint, which names the file, unless the named files are as the manifest says."""
    for name in names:
        path, entry = folder / name, manifest[name]
        try:
            size = path.stat().st_size
            if size != entry["size"]:
                raise DamagedCheckpoint(f"{path} has {size} bytes instead of {entry['size']}")
            if checksums and _crc32(path) != entry["crc32"]:
                raise DamagedCheckpoint(f"{path} has changed since it was written (its CRC-32 differs)")
        except FileNotFoundError:
            raise DamagedCheckpoint(f"{path} is missing") from None
        except OSError as error:
            raise DamagedCheckpoint(f"{path} cannot be read ({error.strerror})") from None


def find_damage(folder: Path, checksums: bool = True) -> str | None:
    """Returns what is wrong with a checkpoint's files, or None; collective.

    Without a manifest nothing is compared.

    Args:
        checksums: read all files (shared among the ranks), not only their sizes.
    """
    rank, size = _rank_and_size()
    problem = None
    try:
        manifest = read_manifest(folder) or {}
        check_files(folder, manifest, sorted(manifest)[rank::size], checksums)
    except DamagedCheckpoint as error:
        problem = str(error)
    return next((text for text in gathered(problem) if text is not None), None)


def last_complete_before(checkpoint: Checkpoint) -> Checkpoint | None:
    """The newest complete checkpoint (manifest there, sizes right) that is older than this one."""
    for iteration in reversed(saved_iterations(checkpoint.root)):
        if checkpoint.iteration is None or iteration < checkpoint.iteration:
            older = Checkpoint(checkpoint.flag, checkpoint.root, iteration)
            with contextlib.suppress(DamagedCheckpoint):
                manifest = read_manifest(older.path)
                check_files(older.path, manifest, manifest, checksums=False)
                return older
    return None


# Saving.


def check_writable(root: Path) -> None:
    """Makes the folder if need be, and raises UserError unless a file can be written there.

    Collective; one rank of every machine tries it.
    """
    problem = None
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        probe = root / f".probe.{os.environ.get('RANK', '0')}"
        try:
            root.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"probe")
            probe.unlink()
        except OSError as error:
            problem = (
                f"--save {root}: cannot be written to ({error.strerror}); name a folder on a writable disk with space"
            )
    raise_together(problem)


def make_way(folder: Path) -> None:
    """Clears the folder of a checkpoint that is about to be written, for one rank to call.

    What a crash left half written is deleted: it must not mix with the new files. A complete one, written again at the
    end of a finished training or after going back to an earlier iteration, is kept beside until the new one is complete
    (:func:`settle`). Where that never happens, the next training that loads from the folder above and saves there puts
    it back as it starts (:func:`put_back`), whichever iteration it loads.
    """
    replaced = folder.with_name(folder.name + _REPLACED)
    if (folder / MANIFEST).is_file():
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)
    elif folder.exists():
        shutil.rmtree(folder)


def settle(folder: Path) -> None:
    """Deletes what :func:`make_way` kept of a checkpoint that is complete again."""
    shutil.rmtree(folder.with_name(folder.name + _REPLACED), ignore_errors=True)


def kept_aside(folder: Path) -> Path | None:
    """The whole checkpoint that :func:`make_way` kept and whose replacement is not complete."""
    replaced = folder.with_name(folder.name + _REPLACED)
    if (folder / MANIFEST).is_file():
        return None
    try:
        manifest = read_manifest(replaced)
        check_files(replaced, manifest or {}, manifest or {}, checksums=False)
    except DamagedCheckpoint:  # or another rank has just put it back
        return None
    return replaced if manifest is not None else None


def all_kept_aside(root: Path) -> dict[int, Path]:
    """What :func:`kept_aside` finds in a folder of checkpoints, by iteration in ascending order."""
    names = (_FOLDER.fullmatch(path.stem) for path in root.glob(f"iter_*{_REPLACED}"))
    iterations = sorted(int(name[1]) for name in names if name)
    kept = {iteration: kept_aside(iteration_folder(root, iteration)) for iteration in iterations}
    return {iteration: path for iteration, path in kept.items() if path is not None}


def put_back(folder: Path, kept: Path) -> bool:
    """Puts back what :func:`kept_aside` found.

    What was half written in its place is deleted. The first rank does, the others wait until it has. They call it
    before they can talk, and those that come later find the folder complete.

    Returns:
        Whether this rank did.

    Raises:
        OSError: it cannot be, or the first rank has not for five minutes.
    """
    if os.environ.get("RANK", "0") == "0":
        half_written = folder.with_name(folder.name + _DELETED)
        shutil.rmtree(half_written, ignore_errors=True)
        if folder.exists():
            folder.rename(half_written)
        kept.rename(folder)
        shutil.rmtree(half_written, ignore_errors=True)
        return True
    deadline = time.monotonic() + _PATIENCE
    while kept.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(errno.ETIMEDOUT, "the first rank has not put it back")
        time.sleep(0.1)
    return False


def delete_superseded(root: Path, newest: int, keep_last: int, keep_every: int | None, pinned: int | None) -> list[int]:
    """Deletes old checkpoints after a new one is complete, for one rank to call.

    Only folders ``iter_NNNNNNN`` with a manifest that are older than the new one, and only if that is whole. They are
    renamed at once and deleted in the background. What cannot be deleted is a warning.

    Args:
        newest: the iteration just saved; newer ones, of a training that went further, are left alone.
        keep_last: how many checkpoints to keep, the newest included.
        keep_every: keeps the iterations divisible by it, too.
        pinned: another iteration to keep.

    Returns:
        The iterations that are being deleted.
    """
    folder = iteration_folder(root, newest)
    manifest = read_manifest(folder)
    if manifest is None:
        return []
    check_files(folder, manifest, manifest, checksums=False)
    older = [iteration for iteration in saved_iterations(root) if iteration < newest]
    superseded = [
        iteration
        for iteration in older[: max(0, len(older) + 1 - keep_last)]
        if iteration != pinned and not (keep_every and iteration % keep_every == 0)
    ]
    deleted = []
    for iteration in superseded:
        path = iteration_folder(root, iteration)
        if path.is_symlink():
            continue
        try:
            path.rename(path.with_name(path.name + _DELETED))  # from now on nobody takes it for a checkpoint
            deleted.append(iteration)
        except OSError as error:
            print(f"WARNING: could not delete the checkpoint {path}: {error.strerror}", flush=True)
    leftovers = sorted(root.glob(f"iter_*{_DELETED}"))  # an earlier run's, too
    if leftovers:
        threading.Thread(target=_delete, args=(leftovers,), name="deletes checkpoints").start()
    return deleted


def _delete(folders: list[Path]) -> None:
    for folder in folders:
        try:
            shutil.rmtree(folder)
        except FileNotFoundError:
            pass  # an earlier deletion was still at it
        except OSError as error:
            print(f"WARNING: could not delete the checkpoint {folder}: {error.strerror}", flush=True)
