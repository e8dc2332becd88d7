"""Opens the checkpoint of an iteration, whose files must be as its manifest says."""

from __future__ import annotations

from pathlib import Path

from megatron_moa.checkpoints.files import (
    MANIFEST,
    TRACKER,
    DamagedCheckpoint,
    check_files,
    iteration_folder,
    read_manifest,
    read_tracker,
    saved_iterations,
)
from megatron_moa.checkpoints.tensors import CheckpointTensors
from megatron_moa.errors import UserError


def open_checkpoint(path: Path, iteration: int | None) -> CheckpointTensors:
    """Opens the checkpoint of an iteration in a folder of checkpoints, or the folder of one.

    The default is the latest iteration.

    Raises:
        UserError: there is none, or a file of it is missing or has another size than its manifest says.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give what training's --save named")
    if (path / "metadata.json").is_file():
        if iteration is not None:
            raise UserError(f"--iteration {iteration}: {path} is the folder of one checkpoint; give the one above it")
        folder = path
    else:
        folder = _folder_of(path, iteration)
    try:
        manifest = read_manifest(folder) or {}
        for name in manifest:
            if (
                not name.isprintable()
                or not (folder / name).absolute().is_relative_to(folder.absolute())
                or ".." in name
            ):
                raise UserError(f"{folder / MANIFEST}: names the file {name!r}, which does not lie in its folder")
        check_files(folder, manifest, manifest, checksums=False)
    except DamagedCheckpoint as error:
        raise UserError(f"{error}; take a whole checkpoint") from None
    return CheckpointTensors(folder)


def _folder_of(root: Path, iteration: int | None) -> Path:
    there = f"complete ones there: {', '.join(map(str, saved_iterations(root))) or 'none'}"
    named = f"--iteration {iteration}" if iteration is not None else f"{root / TRACKER}"
    if iteration is None:
        try:
            iteration = read_tracker(root)
        except FileNotFoundError:
            raise UserError(f"{root}: names no latest checkpoint; {there} (--iteration takes one)") from None
        except DamagedCheckpoint as error:
            raise UserError(f"{root}: {error}; {there} (--iteration takes one)") from None
    folder = root / "release" if iteration is None else iteration_folder(root, iteration)
    if not folder.is_dir():
        raise UserError(f"{named}: names {folder}, which is not there; {there}")
    return folder
