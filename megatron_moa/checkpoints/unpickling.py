"""Unpickles the metadata and settings of a checkpoint without running anything that stands in them."""

from __future__ import annotations

import argparse
import io
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from reprlib import recursive_repr
from typing import Any

import torch

from megatron_moa.errors import UserError, one_line

# What torch.distributed.checkpoint writes into .metadata.
_METADATA_CLASSES = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorStorageMetadata",
        "TensorProperties",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
}


# Classes beside Megatron's own (enumerations) whose objects stand among the settings.
_SETTINGS_CLASSES = ("signal.Signals", "pathlib.PosixPath", "types.SimpleNamespace")


class StandIn:
    """Stands in for an object whose class is not loaded.

    It has the class's name (``path``), what the object was made of (``args``) and its attributes.
    """

    path = ""

    def __new__(cls, *args: object) -> StandIn:
        """Takes whatever the real class would be given."""
        self = super().__new__(cls)
        self.args = args
        return self

    def __setstate__(self, state: object) -> None:
        """Attributes as pickle has them; another state, such as a tuple, becomes the attribute ``state``."""
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})

    @recursive_repr()
    def __repr__(self) -> str:
        attributes = {name: value for name, value in self.__dict__.items() if name != "args"}
        shown = [*map(repr, self.args), *(f"{name}={value!r}" for name, value in attributes.items())]
        return f"{self.path.rpartition('.')[2]}({', '.join(shown)})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StandIn) and (self.path, self.__dict__) == (other.path, other.__dict__)

    def __hash__(self) -> int:
        return hash((self.path, self.args))


def _stand_in(path: str) -> type[StandIn]:
    return type(path.rpartition(".")[2], (StandIn,), {"path": path})


class MetadataUnpickler(pickle.Unpickler):
    """Makes stand-ins of the classes .metadata needs, and refuses all others."""

    def find_class(self, module: str, name: str) -> Any:
        """What pickle calls for every class and function a file names."""
        if name in _METADATA_CLASSES.get(module, ()):
            return _stand_in(f"{module}.{name}")
        if module == "torch" and name == "Size":
            return torch.Size
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it names {f'{module}.{name}'!r}, which no checkpoint needs")

    def persistent_load(self, pid: object) -> Any:
        """References out of the file: .metadata has none."""
        raise pickle.UnpicklingError("it refers to something outside")


def describe_problem(error: BaseException) -> str:
    """Returns in one line why a pickle cannot be read.

    The reader's own errors are plain without their type.
    """
    return one_line(error)[:200] if isinstance(error, pickle.UnpicklingError) else one_line(error, typed=True)


@contextmanager
def _no_classes_admitted() -> Iterator[None]:
    """Makes torch's reader admit no class but its own inside the block.

    Megatron, once imported, admits more for the process.
    """
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def load_archive(raw: bytes, where: str, settings: bool = False) -> Any:
    """What torch.save wrote, by torch's restricted reader.

    Args:
        where: for the message.
        settings: whether a namespace of settings may be in it.

    Raises:
        UserError: it is damaged, or names a class or function that has no place in it.
    """
    try:
        with _no_classes_admitted():
            stand_ins: list[Any] = []
            for path in torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(raw)):
                if settings and path == "argparse.Namespace":
                    stand_ins.append(argparse.Namespace)
                elif settings and (path.startswith("megatron.") or path in _SETTINGS_CLASSES):
                    stand_ins.append((_stand_in(path), path))
                else:
                    raise pickle.UnpicklingError(f"it names {path!r}, which no checkpoint needs")
            with torch.serialization.safe_globals(stand_ins):
                return torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    # A damaged archive raises whatever it likes.
    except Exception as error:
        problem = describe_problem(error)
    raise UserError(f"{where}: cannot be read ({problem}); take a whole checkpoint from a source you trust")
