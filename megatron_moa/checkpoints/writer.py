"""Writes a checkpoint tensor by tensor, as Megatron's own saving would, without a model in memory.

The mirror of ``tensors.py``. Megatron saves what a model holds; here the model is empty, and each tensor is
asked for when its turn comes. Where it lies in the checkpoint, and under which key, the model says
(``sharded_state_dict``); the files are those of torch.distributed.checkpoint, as Megatron's format torch_dist has them.
That library's own writer keeps a tensor of every key until its file is complete, so it is not used.
"""

from __future__ import annotations

import argparse
import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.training import checkpointing
from torch import Tensor
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_moa.checkpoints.files import TRACKER, write_manifest
from megatron_moa.command_line.progress_bar import counting_bar
from megatron_moa.errors import UserError

# How training goes on from what write_release wrote; {} is its folder.
TRAIN_ON = "python pretrain_gpt_moa.py --pretrained-checkpoint {} --use-checkpoint-args "
TRAIN_ON += "--load RUN --save RUN --save-interval N …"
_FILE = "__0_0.distcp"  # Megatron's name for the first file of rank 0


def sharding_metadata(args: argparse.Namespace) -> dict[str, Any]:
    """How a run of these args lays its tensors out: what ``sharded_state_dict`` is given."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return checkpointing._build_sharded_state_dict_metadata(args, dp_cp_group=group)


def write_release(model: GPTModel, args: argparse.Namespace, root: Path, read: Callable[[str], Tensor]) -> Path:
    """Writes Megatron's ``release``: a checkpoint without iteration, optimizer or random states.

    A run starts from it at iteration 0. One tensor is in memory at a time; a line on stderr says how far it is.

    Args:
        model: the whole model, on one process and without memory (``PreparedCheckpoint.build_empty``).
        args: what the checkpoint carries. Parameters are written in the dtype they are trained in
            (``args.params_dtype``), buffers in the one they are read in.
        root: as ``--save`` names it.
        read: gives the parameter or buffer of a name in ``model.state_dict()``; called once for each, in their order.

    Returns:
        The checkpoint's own folder.

    Raises:
        UserError: a tensor is of another shape than the model's; what ``read`` raises.
    """
    folder = root / "release"
    folder.mkdir(parents=True)
    metadata = sharding_metadata(args)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    parameters = {name for name, _ in model.named_parameters()}
    places = model.sharded_state_dict(metadata=metadata)
    tensors = {name for name, place in places.items() if not isinstance(place, ShardedObject)}
    assert tensors == shapes.keys(), tensors.symmetric_difference(shapes)
    common = {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": checkpointing._clean_metadata_for_serialization(metadata),
    }
    index = Metadata({}, storage_data={}, storage_meta=StorageMeta(str(folder)), version=CURRENT_DCP_VERSION)
    with open(folder / _FILE, "wb") as stream, counting_bar(len(tensors), "written", " tensors") as progress:
        for name, place in places.items():
            if isinstance(place, ShardedObject):
                _write_object(index, stream, place)
                continue
            tensor = read(name).detach()
            if tensor.shape != shapes[name]:
                raise UserError(f"{name}: is {tuple(tensor.shape)}, the model's is {tuple(shapes[name])}")
            if name in parameters:
                tensor = tensor.to(args.params_dtype)
            _write_tensor(index, stream, place, tensor)
            progress.set_postfix_str(f"{stream.tell() / 1e6:,.1f} MB", refresh=False)
            progress.update()
        _write_object(index, stream, ShardedObject("common_state", common, (1,), (0,)))
    with open(folder / ".metadata", "wb") as stream:
        pickle.dump(index, stream)
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))
    write_manifest(folder)
    (root / TRACKER).write_text("release")
    return folder


def _write_tensor(
    index: Metadata, stream: BinaryIO, place: ShardedTensor | ShardedTensorFactory, tensor: Tensor
) -> None:
    """A tensor where the model places it; a factory makes several of it (the halves of a gated fc1)."""
    if isinstance(place, ShardedTensorFactory):
        parts = nested_values([dataclasses.replace(place, data=tensor).build()])
    else:
        parts = [dataclasses.replace(place, data=tensor, dtype=tensor.dtype)]
    for part in parts:
        # The axes of layers and experts, which a layer's tensor lacks.
        data = part.data.reshape((1,) * part.prepend_axis_num + tuple(part.local_shape))
        key = part.key
        entry = index.state_dict_metadata.setdefault(
            key, TensorStorageMetadata(TensorProperties(data.dtype), torch.Size(part.global_shape), [])
        )
        assert entry.properties.dtype == data.dtype, f"{key}: {data.dtype} beside {entry.properties.dtype}"
        place_of_chunk = MetadataIndex(key, part.global_offset)
        entry.chunks.append(ChunkStorageMetadata(place_of_chunk.offset, data.shape))
        if data.untyped_storage().nbytes() != data.nbytes or not data.is_contiguous():
            data = data.clone(memory_format=torch.contiguous_format)  # torch.save writes the whole storage of a view
        index.storage_data[place_of_chunk] = _append(stream, data)


def _write_object(index: Metadata, stream: BinaryIO, place: ShardedObject) -> None:
    index.state_dict_metadata[place.unique_key] = BytesStorageMetadata()
    index.storage_data[MetadataIndex(place.unique_key)] = _append(stream, [place.data])


def _append(stream: BinaryIO, value: object) -> _StorageInfo:
    position = stream.tell()
    try:
        torch.save(value, stream)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # a full disk, hidden by what torch's writer makes of it
            raise error.__context__ from None
        raise
    return _StorageInfo(_FILE, position, stream.tell() - position)
