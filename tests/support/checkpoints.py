"""Checkpoints of the format torch_dist made by hand: any chunks, any settings, and any mischief."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

COMMON = MetadataIndex("common_state/shard_0_1")


class Hostile:
    """When a pickle with it is read, a file is made; a harmless stand-in for worse."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.marker}",)


def archive(value: object) -> bytes:
    """As torch.save writes it."""
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def append(folder: Path, content: bytes, file: str = "__0_0.distcp") -> _StorageInfo:
    """Adds bytes to a file of a checkpoint; what .metadata says of them."""
    with open(folder / file, "ab") as stream:
        position = stream.seek(0, os.SEEK_END)
        stream.write(content)
    return _StorageInfo(file, position, len(content))


def change_metadata(folder: Path, change: Callable[[Metadata], None]) -> None:
    """Rewrites .metadata after a change to it."""
    path = folder / ".metadata"
    index = pickle.loads(path.read_bytes())
    change(index)
    path.write_bytes(pickle.dumps(index))


def write_checkpoint(
    folder: Path, tensors: dict[str, Tensor], settings: dict[str, object], pieces: int = 1, iteration: int = 7
) -> Path:
    """Writes one.

    Args:
        tensors: by name; each is cut along its last axis.
        settings: what its args hold.
        pieces: of a tensor, in as many files, at most.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True)
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    index = Metadata({COMMON.fqn: BytesStorageMetadata()}, storage_data={})
    common = {"args": argparse.Namespace(**settings), "iteration": iteration, "checkpoint_version": 3.0}
    index.storage_data[COMMON] = append(folder, archive([common]))
    for key, tensor in tensors.items():
        chunks, start = [], 0
        for number, part in enumerate(tensor.chunk(pieces, dim=-1)):
            offset = torch.Size([*(0 for _ in tensor.shape[1:]), start])
            chunks.append(ChunkStorageMetadata(offset, part.shape))
            place = MetadataIndex(key, offset)
            index.storage_data[place] = append(folder, archive(part.clone()), f"__{number}_0.distcp")
            start += part.shape[-1]
        properties = TensorProperties(dtype=tensor.dtype)
        index.state_dict_metadata[key] = TensorStorageMetadata(properties, tensor.shape, chunks)
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    return folder
