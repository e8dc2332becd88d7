"""Checks that tensors read without Megatron are those that Megatron loads, from any split.

Damaged and hostile files are refused.
"""

from __future__ import annotations

import argparse
import io
import json
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from megatron_moa.checkpoints.guard import changed_scales
from megatron_moa.checkpoints.tensors import CheckpointTensors
from megatron_moa.errors import UserError
from tests.support import launch
from tests.support.checkpoints import COMMON, Hostile, append, archive, change_metadata, write_checkpoint
from tests.support.training import MOE, ROOT, SWIGLU, TINY, train

WEIGHT = "decoder.layers.mlp.linear_fc2.weight"
FIRST_CHUNK = MetadataIndex(WEIGHT, (0, 0, 0))


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def folder(tmp_path: Path, weight: torch.Tensor) -> Path:
    """Of a checkpoint with one tensor in three chunks and three files."""
    return write_checkpoint(tmp_path / "checkpoint", {WEIGHT: weight}, {"hidden_size": 8}, pieces=3)


# Reading.


def test_any_box_of_a_tensor(folder: Path, weight: torch.Tensor) -> None:
    checkpoint = CheckpointTensors(folder)
    info = checkpoint.tensors[WEIGHT]
    assert (info.shape, info.dtype, info.numel, len(info.chunks)) == ((2, 3, 8), torch.float32, 48, 3)
    assert torch.equal(checkpoint.read(WEIGHT), weight)
    for offset, shape in (
        ((1, 0, 0), (1, 3, 8)),
        ((0, 1, 2), (2, 2, 3)),
        ((1, 2, 7), (1, 1, 1)),
        ((0, 0, 0), (2, 3, 3)),
    ):
        box = tuple(slice(start, start + length) for start, length in zip(offset, shape, strict=True))
        assert torch.equal(checkpoint.read(WEIGHT, offset, shape), weight[box])
    assert checkpoint.read(WEIGHT, (0, 0, 0), (2, 0, 8)).shape == (2, 0, 8)


def test_reads_only_the_files_that_hold_the_box(folder: Path, weight: torch.Tensor) -> None:
    checkpoint = CheckpointTensors(folder)
    for name in ("__0_0.distcp", "__2_0.distcp"):
        (folder / name).unlink()
    assert torch.equal(checkpoint.read(WEIGHT, (0, 0, 3), (2, 3, 2)), weight[:, :, 3:5])
    with pytest.raises(UserError, match=r"__2_0\.distcp: cannot be read"):
        checkpoint.read(WEIGHT, (0, 0, 3), (2, 3, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64, torch.uint8])
def test_keeps_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.arange(6).to(dtype)
    read = CheckpointTensors(write_checkpoint(tmp_path / "one", {"a": tensor}, {}, pieces=2)).read("a")
    assert read.dtype == dtype
    assert torch.equal(read, tensor)


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ([], False),
        ([None, torch.empty(0, dtype=torch.uint8)], False),
        ([torch.empty(0, dtype=torch.uint8), torch.ones(300, dtype=torch.uint8)], True),
        ([io.BytesIO(b"scales")], True),
    ],
    ids=["no states", "empty", "scales", "scales of Transformer Engine 1"],
)
def test_fp8_scales_are_noticed(tmp_path: Path, states: list[object], expected: bool) -> None:
    folder = write_checkpoint(tmp_path / "one", {}, {})

    def add(index: Metadata) -> None:
        for number, state in enumerate(states):
            key = MetadataIndex(f"decoder.layers.mlp.linear_fc{number}._extra_state/shard_0_1")
            index.state_dict_metadata[key.fqn] = BytesStorageMetadata()
            index.storage_data[key] = append(folder, archive([state]))

    change_metadata(folder, add)
    checkpoint = CheckpointTensors(folder)
    assert checkpoint.has_fp8_scales is expected
    delayed, other, none = (
        SimpleNamespace(fp8=fp8, fp8_recipe=recipe)
        for fp8, recipe in (("hybrid", "delayed"), ("hybrid", "tensorwise"), (None, "delayed"))
    )
    assert ("start anew" in changed_scales(delayed, checkpoint)) is not expected
    for config in (other, none):
        assert ("are dropped" in changed_scales(config, checkpoint)) is expected


def test_settings_without_megatrons_classes(tmp_path: Path) -> None:
    from megatron.core.transformer.enums import AttnBackend

    settings = {"hidden_size": 8, "attention_backend": AttnBackend.flash, "params_dtype": torch.bfloat16}
    args = CheckpointTensors(write_checkpoint(tmp_path / "one", {}, settings)).args
    assert isinstance(args, argparse.Namespace)
    assert (args.hidden_size, args.params_dtype) == (8, torch.bfloat16)
    assert not isinstance(args.attention_backend, AttnBackend)
    assert repr(args.attention_backend) == f"AttnBackend({AttnBackend.flash.value})"
    again = CheckpointTensors(tmp_path / "one").args
    assert again == args  # stand-ins are equal, too
    assert again.attention_backend != AttnBackend.flash
    assert AttnBackend in torch.serialization.get_safe_globals()  # what Megatron admits for itself stays so


def test_settings_of_an_older_megatron(folder: Path) -> None:
    (folder / "common.pt").write_bytes(archive({"args": argparse.Namespace(hidden_size=5)}))
    assert CheckpointTensors(folder).args.hidden_size == 5


def test_does_not_import_megatron(folder: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from megatron_moa.checkpoints.tensors import CheckpointTensors; "
        f"checkpoint = CheckpointTensors(Path(sys.argv[1])); checkpoint.args; checkpoint.read({WEIGHT!r}); "
        "assert not [name for name in sys.modules if name.split('.')[0] == 'megatron']"
    )
    subprocess.run([sys.executable, "-c", program, str(folder)], check=True, cwd=ROOT)


# Damage and mischief.


def _move(**fields: object) -> Callable[[Path, Path], None]:
    """Changes where .metadata says that the first chunk lies."""

    def damage(folder: Path, marker: Path) -> None:
        def change(index: Metadata) -> None:
            where = index.storage_data[FIRST_CHUNK]
            for name, value in fields.items():
                setattr(where, name, value)

        change_metadata(folder, change)

    return damage


def _replace(place: MetadataIndex, content: Callable[[Path], object]) -> Callable[[Path, Path], None]:
    """Another archive in place of one."""

    def damage(folder: Path, marker: Path) -> None:
        where = append(folder, archive(content(marker)))
        change_metadata(folder, lambda index: index.storage_data.update({place: where}))

    return damage


def _hostile_metadata(folder: Path, marker: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Hostile(marker)))


def _hostile_inside_metadata(folder: Path, marker: Path) -> None:
    change_metadata(folder, lambda index: setattr(index, "planner_data", [Hostile(marker)]))


def _hostile_common_pt(folder: Path, marker: Path) -> None:
    (folder / "common.pt").write_bytes(archive({"args": Hostile(marker)}))


def _hostile_plain_pickle(folder: Path, marker: Path) -> None:
    (folder / "common.pt").write_bytes(pickle.dumps({"args": Hostile(marker)}))


def _cut(name: str) -> Callable[[Path, Path], None]:
    def damage(folder: Path, marker: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-20])

    return damage


def _zeroed(folder: Path, marker: Path) -> None:
    path = folder / "__1_0.distcp"
    path.write_bytes(bytes(path.stat().st_size))


def _claims_more_elements(folder: Path, marker: Path) -> None:
    def change(index: Metadata) -> None:
        entry = index.state_dict_metadata[WEIGHT]
        entry.size = torch.Size([2, 3, 10**12])
        entry.chunks[0].sizes = torch.Size([2, 3, 10**12])

    change_metadata(folder, change)


def _reaches_out(folder: Path, marker: Path) -> None:
    change_metadata(
        folder, lambda index: setattr(index.state_dict_metadata[WEIGHT].chunks[2], "sizes", torch.Size([2, 3, 9]))
    )


def _lacks_a_chunk(folder: Path, marker: Path) -> None:
    change_metadata(folder, lambda index: index.state_dict_metadata[WEIGHT].chunks.pop(1))


def _is_said_to_be_huge(folder: Path, marker: Path) -> None:
    change_metadata(
        folder, lambda index: setattr(index.state_dict_metadata[WEIGHT], "size", torch.Size([2, 3, 10**15]))
    )


def _has_a_chunk_twice(folder: Path, marker: Path) -> None:
    """In place of another: there are as many elements as there must be."""

    def change(index: Metadata) -> None:
        chunks = index.state_dict_metadata[WEIGHT].chunks
        chunks[1] = chunks[0]

    change_metadata(folder, change)


def _escape_in_a_name(folder: Path, marker: Path) -> None:
    change_metadata(
        folder, lambda index: index.state_dict_metadata.update({"a\x1b[2J\n": index.state_dict_metadata.pop(WEIGHT)})
    )


def _other_format(folder: Path, marker: Path) -> None:
    (folder / "metadata.json").write_text('{"sharded_backend": "zarr"}')


def _unlink(name: str) -> Callable[[Path, Path], None]:
    return lambda folder, marker: (folder / name).unlink()


DAMAGES: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    ".metadata that runs code": (_hostile_metadata, r"posix\.system"),
    ".metadata that runs code inside": (_hostile_inside_metadata, r"posix\.system"),
    "settings that run code": (_replace(COMMON, lambda marker: [{"args": Hostile(marker)}]), r"posix\.system"),
    "common.pt that runs code": (_hostile_common_pt, r"posix\.system"),
    "common.pt that is no archive": (_hostile_plain_pickle, r"common\.pt: cannot be read"),
    "a tensor that runs code": (_replace(FIRST_CHUNK, lambda marker: [Hostile(marker)]), r"posix\.system"),
    "settings among tensors": (_replace(FIRST_CHUNK, lambda marker: argparse.Namespace()), r"argparse\.Namespace"),
    "no tensor": (_replace(FIRST_CHUNK, lambda marker: [1]), r"has list for decoder"),
    "another shape": (_replace(FIRST_CHUNK, lambda marker: torch.zeros(2, 3, 2)), r"promises \(\(2, 3, 3\)"),
    "another dtype": (_replace(FIRST_CHUNK, lambda marker: torch.zeros(2, 3, 3).half()), r"torch\.float16"),
    "settings that are none": (_replace(COMMON, lambda marker: [[1]]), r"is a list, not Megatron's state"),
    "an offset outside the file": (_move(offset=10**9), r"promises 10\d+; it was cut off"),
    "a negative offset": (_move(offset=-1), r"are no sizes"),
    "a length that is no number": (_move(length="1"), r"are no sizes"),
    "a path that leaves the folder": (_move(relative_path="../secret"), r"does not lie in the checkpoint's folder"),
    "an absolute path": (_move(relative_path="/etc/hostname"), r"does not lie in the checkpoint's folder"),
    "the folder above": (_move(relative_path=".."), r"does not lie in the checkpoint's folder"),
    "the folder itself": (_move(relative_path="."), r"does not lie in the checkpoint's folder"),
    "compressed tensors": (_move(transform_descriptors=["stream.zstd/1"]), r"compressed"),
    "a truncated file": (_cut("__1_0.distcp"), r"__1_0\.distcp: has \d+ bytes, \.metadata promises \d+"),
    "a truncated .metadata": (_cut(".metadata"), r"\.metadata: cannot be read"),
    "zeros": (_zeroed, r"__1_0\.distcp: decoder.*cannot be read"),
    "more elements than bytes": (_claims_more_elements, r"more elements than bytes"),
    "a chunk out of its tensor": (_reaches_out, r"reaches out of the tensor"),
    "a chunk too few": (_lacks_a_chunk, r"lacks chunks of decoder"),
    "a chunk twice": (_has_a_chunk_twice, r"lacks chunks of decoder"),
    "a tensor that is said to be huge": (_is_said_to_be_huge, r"lacks chunks of decoder"),
    "an escape sequence in a name": (_escape_in_a_name, r"a tensor is named 'a\\x1b\[2J\\n'"),
    "another format": (_other_format, r"'zarr'; only torch_dist"),
    "no .metadata": (_unlink(".metadata"), r"was not written to its end"),
    "no metadata.json": (_unlink("metadata.json"), r"no torch_dist checkpoint"),
    "a missing file": (_unlink("__2_0.distcp"), r"__2_0\.distcp: is missing"),
}


def read_all(folder: Path) -> argparse.Namespace:
    checkpoint = CheckpointTensors(folder)
    checkpoint.read(WEIGHT)
    return checkpoint.args


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_one_line_and_runs_nothing(damage: str, folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    (tmp_path / "secret").write_bytes((folder / "__0_0.distcp").read_bytes())
    inflict, pattern = DAMAGES[damage]
    inflict(folder, marker)
    with pytest.raises(UserError) as caught:
        read_all(folder)
    text = str(caught.value)
    assert re.search(pattern, text), text
    assert str(folder) in text
    assert text.isprintable()
    assert not marker.exists()


def test_the_hostile_object_would_run(tmp_path: Path) -> None:
    """Else the tests above could not fail."""
    marker = tmp_path / "executed"
    pickle.loads(pickle.dumps(Hostile(marker)))
    assert marker.exists()


# Against Megatron.


def compare(one: str, others: list[str], results: str) -> None:
    """Runs in a process of its own: Megatron loads the first checkpoint; is that what we read of all?"""
    from megatron.core.utils import unwrap_model

    from megatron_moa.checkpoints.tensors import ModelTensors
    from megatron_moa.trained.from_megatron import load_model

    model = unwrap_model(load_model(one).model)
    expected = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    model.to("meta")
    report: dict[str, object] = {"tensors": len(expected), "equal": []}
    for folder in others:
        read = dict(ModelTensors(Path(folder), model))
        same = all(
            torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in expected.items()
        )
        report["equal"].append(same and read.keys() == expected.keys())

    def error_after(change: Callable[[Metadata], None]) -> str:
        copy = Path(shutil.copytree(others[0], f"{others[0]}.changed"))
        change_metadata(copy, change)
        try:
            list(ModelTensors(copy, model))
        except UserError as error:
            return str(error)
        finally:
            shutil.rmtree(copy)
        return "none"

    norm = "decoder.final_layernorm.weight"

    def copy_entry(index: Metadata, source: str, target: str) -> None:
        index.state_dict_metadata[target] = index.state_dict_metadata[source]
        for place, where in list(index.storage_data.items()):
            if place.fqn == source:
                index.storage_data[MetadataIndex(target, place.offset)] = where

    def take_away(index: Metadata) -> None:
        del index.state_dict_metadata[norm]

    report["missing"] = error_after(take_away)
    report["surplus"] = error_after(lambda index: copy_entry(index, norm, "decoder.third_norm.weight"))
    report["shape"] = error_after(lambda index: copy_entry(index, "embedding.word_embeddings.weight", norm))
    Path(results).write_text(json.dumps(report))


def compared(folders: list[Path], tmp_path: Path) -> dict:
    results = tmp_path / "results.json"
    paths = [str(folder / "iter_0000002") for folder in folders]
    code, log = launch.launch(compare, (str(folders[0]), paths, str(results)), 1, tmp_path)
    assert code == 0, log[-3000:]
    return json.loads(results.read_text())


@pytest.mark.slow
@pytest.mark.distributed
def test_a_split_checkpoint_is_what_megatron_loads_of_a_whole_one(tmp_path: Path) -> None:
    one, four = tmp_path / "one", tmp_path / "four"
    flags = [*SWIGLU, *MOE, *"--moe-shared-expert-intermediate-size 32 --moa-backend eager --train-iters 2".split()]
    train(*flags, "--save", one, "--save-interval", "2")
    # There is nothing left to train: what was loaded is saved again, under another split.
    split = "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2"
    split += " --expert-model-parallel-size 2 --expert-tensor-parallel-size 1 --no-load-optim --no-load-rng"
    train(*flags, *split.split(), "--load", one, "--save", four, "--save-interval", "5", processes=4)
    checkpoint = CheckpointTensors(four / "iter_0000002")
    assert len(checkpoint.files) == 4
    assert checkpoint.tensors["decoder.layers.mlp.experts.experts.linear_fc1.weight"].shape == (2, 4, 64, 32)
    report = compared([one, four], tmp_path)
    assert report["tensors"] > 40
    assert report["equal"] == [True, True]
    assert "has no tensor decoder.final_layernorm.weight" in report["missing"]
    assert "has 1 tensors that the model lacks (decoder.third_norm.weight)" in report["surplus"]
    assert "decoder.final_layernorm.weight is (64, 32) there and (32,) in the model" in report["shape"]


@pytest.mark.slow
def test_layers_that_differ_and_tied_embeddings(tmp_path: Path) -> None:
    """Experts in every second layer only: each layer's tensors have names of their own then."""
    flags = [flag for flag in TINY if flag not in ("--disable-bias-linear", "--untie-embeddings-and-output-weights")]
    flags += "--position-embedding-type learned_absolute --normalization LayerNorm --ffn-hidden-size 48".split()
    flags += [*MOE, *"--moe-layer-freq 2 --moa-mixing la --moa-backend eager --train-iters 2".split()]
    flags += ["--save", str(tmp_path / "one"), "--save-interval", "2"]
    code, log = launch.launch(launch.script, (str(ROOT / "pretrain_gpt_moa.py"), flags), 1, tmp_path)
    assert code == 0, log[-3000:]
    assert compared([tmp_path / "one"], tmp_path)["equal"] == [True]
