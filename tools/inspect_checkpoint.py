"""Shows what is in a checkpoint, and how two of them differ, without Megatron, a model or a GPU.

    python tools/inspect_checkpoint.py runs/a/checkpoints                     the latest one there
    python tools/inspect_checkpoint.py runs/a/checkpoints --iteration 2000 --json
    python tools/inspect_checkpoint.py runs/a/checkpoints --diff runs/b/checkpoints

The split it was saved under does not matter. Nothing a file says is executed. With --diff, exit code 1 means that
parameters differ, in names, shapes, dtypes or values; the optimizer's state is not compared.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
from megatron_moa.checkpoints.settings import upgrade_saved_settings
from megatron_moa.checkpoints.tensors import OPTIMIZER, CheckpointTensors
from megatron_moa.command_line.megatron_flags import as_typed
from megatron_moa.command_line.tables import markdown_table
from megatron_moa.command_line.tool_flags import add_iteration_flag
from megatron_moa.errors import OneLineParser, UserError, one_line_errors
from megatron_moa.mixture import reference
from megatron_moa.mixture.config import ARGS, MixtureConfig

PROGRAM = "inspect_checkpoint.py"
_PART = 1 << 22  # elements compared at a time
KINDS = ("embedding", "attention", "feed-forward", "experts", "norms", "mixture", "other")
_MIXTURE = " ".join(ARGS.values())
_SHAPE = """num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels swiglu normalization
    position_embedding_type max_position_embeddings add_bias_linear add_qkv_bias qk_layernorm
    untie_embeddings_and_output_weights padded_vocab_size num_experts moe_ffn_hidden_size moe_layer_freq moe_router_topk
    moe_shared_expert_intermediate_size params_dtype"""
_SPLIT = {
    "TP": "tensor_model_parallel_size",
    "PP": "pipeline_model_parallel_size",
    "EP": "expert_model_parallel_size",
    "expert TP": "expert_tensor_parallel_size",
    "DP": "data_parallel_size",
}


def kind_of(key: str) -> str:
    """Which of :data:`KINDS` a parameter is, by its name in the checkpoint; ``optimizer`` for the optimizer's state."""
    if key.startswith(OPTIMIZER):
        return "optimizer"
    patterns = {
        "mixture": r"\.coefficients\.",
        "norms": r"norm",
        "embedding": r"^(embedding|output_layer)\.",
        "attention": r"attention\.",
        "experts": r"\.(shared_)?experts\.|\.router\.",
        "feed-forward": r"\.mlp\.",
    }
    return next((kind for kind, pattern in patterns.items() if re.search(pattern, key)), "other")


def open_checkpoint(path: Path, iteration: int | None) -> CheckpointTensors:
    """The checkpoint of an iteration, by default the latest, in a folder of checkpoints; or the folder of one.

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


# One checkpoint.


def settings_of(checkpoint: CheckpointTensors) -> tuple[argparse.Namespace, str | None]:
    """A checkpoint's settings under today's names, and why its mixture is none that this version computes, or None.

    Settings that this version does not understand are as they were saved.
    """
    saved = checkpoint.args
    args = argparse.Namespace(**vars(saved))
    try:
        upgrade_saved_settings(args, checkpoint.folder)
    except UserError as error:
        return saved, str(error).removeprefix(f"{checkpoint.folder}: ")
    except (AttributeError, TypeError) as error:
        raise UserError(f"the checkpoint's settings of its mixture cannot be read ({error})") from None
    return args, None


def mixing_of(args: argparse.Namespace) -> MixtureConfig | None:
    """The mixture a checkpoint's settings mean; None for stock layers.

    Raises:
        UserError: they mean none.
    """
    try:
        return MixtureConfig.from_args(args)
    except (AttributeError, TypeError) as error:
        raise UserError(f"the checkpoint's settings of its mixture cannot be read ({error})") from None


@dataclass(frozen=True)
class Coefficients:
    """The coefficients of one layer; of routed experts the mean over them.

    Attributes:
        layer: from 0.
        place: ``mlp``, ``shared experts``, ``mean of 8 experts``.
        rows: by name, n numbers each. LA has ``value``. MoA has ``at zero``, the coefficient of a token that the gate's
            vector is orthogonal to (psi of the bias, or of 0, with amplitude and scale); ``amplitude``, where it is
            learned; ``gate norm``, the length of the vector.
    """

    layer: int
    place: str
    rows: dict[str, list[float]]


def coefficients(checkpoint: CheckpointTensors, mixing: MixtureConfig) -> Iterator[Coefficients]:
    """All layers' coefficients, in the layers' order."""
    found = []
    for module in {key.rpartition(".")[0] for key in checkpoint.tensors if kind_of(key) == "mixture"}:
        keys = {key.rpartition(".")[2]: key for key in checkpoint.tensors if key.rpartition(".")[0] == module}
        # Layers that are alike are one tensor; else each has its own, with its number in the name.
        numbered = re.search(r"layers\.(\d+)\.", module)
        try:
            shape = checkpoint.tensors[next(iter(keys.values()))].shape
            for layer in [int(numbered[1])] if numbered else range(shape[0]):
                tensors = {
                    name: checkpoint.read(key) if numbered else read_layer(checkpoint, key, layer)
                    for name, key in keys.items()
                }
                place = "shared experts" if ".shared_experts." in module else "mlp"
                if ".experts." in module:
                    place = f"mean of {shape[0 if numbered else 1]} experts"
                found.append(Coefficients(layer, place, _rows(tensors, mixing)))
        except (KeyError, IndexError, RuntimeError, TypeError):
            raise UserError(
                f"{checkpoint.folder}: {module} is not what its settings mean, {mixing.describe()}"
            ) from None
    return iter(sorted(found, key=lambda entry: (entry.layer, entry.place)))


def read_layer(checkpoint: CheckpointTensors, key: str, layer: int) -> Tensor:
    """One layer of a tensor that holds all layers', without that axis."""
    shape = checkpoint.tensors[key].shape
    return checkpoint.read(key, (layer, *(0 for _ in shape[1:])), (1, *shape[1:]))[0]


def _rows(tensors: dict[str, Tensor], mixing: MixtureConfig) -> dict[str, list[float]]:
    """Tensors of one layer, [..., n] or [..., n, h], experts in front."""
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    if mixing.kind == "la":
        rows = {"value": tensors["value"]}
    else:
        norms = tensors["weight"].norm(dim=-1)  # [..., n]
        logits = tensors.get("bias", torch.zeros_like(norms))
        rows = {"at zero": reference.gate(logits, mixing, tensors.get("amplitude")) * tensors.get("scale", 1.0)}
        if "amplitude" in tensors:
            rows["amplitude"] = tensors["amplitude"]
        rows["gate norm"] = norms
    return {name: row.reshape(-1, mixing.num_coefficients).mean(0).tolist() for name, row in rows.items()}


def parameters_by_kind(checkpoint: CheckpointTensors) -> dict[str, dict[str, Any]]:
    """Of each kind that is there: how many tensors, parameters, bytes, chunks and files, and which dtypes."""
    kinds: dict[str, dict[str, Any]] = {}
    for kind in (*KINDS, "optimizer"):
        infos = [info for key, info in checkpoint.tensors.items() if kind_of(key) == kind]
        if infos:
            kinds[kind] = {
                "tensors": len(infos),
                "parameters": sum(info.numel for info in infos),
                "bytes": sum(info.numel * info.dtype.itemsize for info in infos),
                "dtypes": sorted({_dtype(info.dtype) for info in infos}),
                "shards": sum(len(info.chunks) for info in infos),
                "files": len({chunk.file for info in infos for chunk in info.chunks}),
            }
    return kinds


def optimizer_state(checkpoint: CheckpointTensors, args: argparse.Namespace) -> str:
    """Whether the optimizer's state is there, and under which splits it can be gone on with (docs/checkpoints.md)."""
    if not any(kind_of(key) == "optimizer" for key in checkpoint.tensors):
        return "not there"
    sharding = checkpoint.content_metadata.get("distrib_optim_sharding_type")
    split = ", ".join(f"{name} {getattr(args, arg, '?')}" for name, arg in _SPLIT.items())
    if not getattr(args, "use_distributed_optimizer", False) or sharding == "fully_reshardable":
        return f"there, for any split (saved under {split})"
    return f"there, for {split.rpartition(', ')[0]} and any DP ({sharding or 'distributed'}; saved under {split})"


def describe(checkpoint: CheckpointTensors) -> dict[str, Any]:
    """Everything this program has to say about a checkpoint, as JSON has it."""
    args, unknown = settings_of(checkpoint)
    mixing = None if unknown else mixing_of(args)
    return {
        "checkpoint": str(checkpoint.folder),
        "iteration": _plain(checkpoint.common_state.get("iteration")),
        "format_version": _plain(getattr(args, "moa_format_version", 1)),
        "mixture": mixing.describe() if mixing else f"not computed here: {unknown}" if unknown else "none",
        "coefficient_names": list(mixing.coefficient_names) if mixing else [],
        "settings": {name: _plain(value) for name, value in sorted(vars(args).items())},
        "files": checkpoint.files,
        "has_manifest": read_manifest(checkpoint.folder) is not None,
        "parameters": parameters_by_kind(checkpoint),
        "tensors": {
            key: {
                "kind": kind_of(key),
                "shape": list(info.shape),
                "dtype": _dtype(info.dtype),
                "shards": len(info.chunks),
                "files": sorted({chunk.file for chunk in info.chunks}),
            }
            for key, info in checkpoint.tensors.items()
        },
        "optimizer": optimizer_state(checkpoint, args),
        "coefficients": [vars(entry) for entry in coefficients(checkpoint, mixing)] if mixing else [],
    }


def report(about: dict[str, Any]) -> str:
    """The same for reading."""
    settings, kinds = about["settings"], about["parameters"]
    parameters = sum(entry["parameters"] for kind, entry in kinds.items() if kind != "optimizer")
    files, size = len(about["files"]), sum(about["files"].values())
    manifest = "sizes as in its manifest" if about["has_manifest"] else "no manifest"
    lines = [
        f"{about['checkpoint']}: iteration {about['iteration']}, format version {about['format_version']}",
        f"files:     {files} with tensors, {size / 1e6:,.1f} MB, {manifest}",
        f"mixture:   {_printable(about['mixture'])}",
        *([f"           {_typed(settings, _MIXTURE)}"] if about["mixture"] != "none" else []),
        f"model:     {parameters:,} parameters",
        f"           {_typed(settings, _SHAPE)}",
        f"optimizer: {about['optimizer']}",
        "",
        markdown_table(
            ("kind", "tensors", "elements", "bytes", "dtypes", "shards", "files"),
            ([kind, *(_cell(value) for value in entry.values())] for kind, entry in kinds.items()),
        ),
        "",
        markdown_table(
            ("tensor", "shape", "dtype", "shards", "files"),
            (
                [key, "×".join(map(str, entry["shape"])), entry["dtype"], entry["shards"], len(entry["files"])]
                for key, entry in about["tensors"].items()
                if entry["kind"] != "optimizer"
            ),
        ),
    ]
    if about["coefficients"]:
        rows = (
            [entry["layer"], entry["place"], name, *(f"{value:.4g}" for value in values)]
            for entry in about["coefficients"]
            for name, values in entry["rows"].items()
        )
        lines += ["", markdown_table(("layer", "place", "what", *about["coefficient_names"]), rows)]
    return "\n".join(lines)


def _typed(settings: dict[str, Any], names: str) -> str:
    """Some of the settings as one would type them, without those that are off or belong to what is off."""
    flags = [
        as_typed(name, settings[name])
        for name in names.split()
        if name in settings and (settings.get("num_experts") or not name.startswith("moe_"))
    ]
    return _printable(" ".join(flag for flag in flags if not flag.startswith("no ")))


def _printable(text: str) -> str:
    """Nothing in it moves the cursor of a terminal, or starts another line."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def _cell(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else ", ".join(value)


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _plain(value: Any) -> Any:
    """A setting as JSON has it; what JSON has not becomes its repr."""
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return _dtype(value) if isinstance(value, torch.dtype) else repr(value)


# Two checkpoints.


@dataclass(frozen=True)
class Difference:
    """The largest difference among tensors.

    Attributes:
        absolute: of any element; infinite where one has NaN and the other has not.
        relative: of any tensor (one layer's of a tensor of several layers), its largest absolute difference beside its
            largest element in either.
        tensor: where the absolute one is.
        tensors: how many were compared.
        different: how many of those have a difference.
    """

    absolute: float = 0.0
    relative: float = 0.0
    tensor: str = ""
    tensors: int = 0
    different: int = 0

    def __or__(self, other: Difference) -> Difference:
        return Difference(
            max(self.absolute, other.absolute),
            max(self.relative, other.relative),
            other.tensor if other.absolute > self.absolute else self.tensor,
            self.tensors + other.tensors,
            self.different + other.different,
        )


def difference(first: Tensor, second: Tensor) -> tuple[float, float]:
    """Largest absolute and relative difference of two tensors of one shape; equal infinities and NaNs do not differ."""
    absolute = largest = 0.0
    # In parts: an embedding in float64, twice, is more memory than the rest of this program.
    for one, two in zip(first.flatten().split(_PART), second.flatten().split(_PART), strict=True):
        if one.numel() == 0:
            continue
        one, two = one.double(), two.double()
        same = (one == two) | (one.isnan() & two.isnan())
        apart = (one - two).abs().masked_fill(same, 0.0).nan_to_num(nan=math.inf, posinf=math.inf)
        absolute = max(absolute, apart.max().item())
        largest = max(largest, one.nan_to_num().abs().max().item(), two.nan_to_num().abs().max().item())
    return absolute, absolute / largest if largest else absolute and math.inf


def compare_tensors(first: CheckpointTensors, second: CheckpointTensors, key: str) -> Difference:
    """The difference of a tensor that both have, in one shape; layer by layer, so that one is in memory at a time."""
    stacked = re.search(r"layers\.(?!\d)", key) is not None
    layers = range(first.tensors[key].shape[0]) if stacked else [None]
    absolute = relative = 0.0
    for layer in layers:
        pair = (each.read(key) if layer is None else read_layer(each, key, layer) for each in (first, second))
        of_layer = difference(*pair)
        absolute, relative = max(absolute, of_layer[0]), max(relative, of_layer[1])
    return Difference(absolute, relative, key if absolute else "", 1, int(absolute > 0))


def compare(first: CheckpointTensors, second: CheckpointTensors) -> dict[str, Any]:
    """In what two checkpoints differ, as JSON has it: settings, tensors, and parameters' values by kind."""
    settings = [{name: _plain(value) for name, value in vars(settings_of(each)[0]).items()} for each in (first, second)]
    tensors = [{key for key in each.tensors if kind_of(key) != "optimizer"} for each in (first, second)]
    other_shapes, differences = {}, {}
    for key in sorted(tensors[0] & tensors[1]):
        one, two = first.tensors[key], second.tensors[key]
        if (one.shape, one.dtype) != (two.shape, two.dtype):
            other_shapes[key] = [f"{_dtype(info.dtype)} {'×'.join(map(str, info.shape))}" for info in (one, two)]
        if one.shape == two.shape:
            kind = kind_of(key)
            differences[kind] = differences.get(kind, Difference()) | compare_tensors(first, second, key)
    overall = Difference()
    for entry in differences.values():
        overall |= entry
    ordered = [*_MIXTURE.split(), *_SHAPE.split(), *sorted(settings[0].keys() | settings[1].keys())]
    return {
        "checkpoints": [str(first.folder), str(second.folder)],
        "iterations": [_plain(each.common_state.get("iteration")) for each in (first, second)],
        "settings": {
            name: [each.get(name) for each in settings]
            for name in dict.fromkeys(ordered)
            if settings[0].get(name) != settings[1].get(name)
        },
        "only_in_first": sorted(tensors[0] - tensors[1]),
        "only_in_second": sorted(tensors[1] - tensors[0]),
        "other_shapes_or_dtypes": other_shapes,
        "optimizer": [optimizer_state(each, each.args) for each in (first, second)],
        "differences": {kind: vars(differences[kind]) for kind in KINDS if kind in differences}
        | {"all": vars(overall)},
    }


def is_same(compared: dict[str, Any]) -> bool:
    """Whether all parameters are the same, to the last bit but for the sign of zeros and the payload of NaNs."""
    names = ("only_in_first", "only_in_second", "other_shapes_or_dtypes")
    return not any(compared[name] for name in names) and compared["differences"]["all"]["different"] == 0


def report_difference(compared: dict[str, Any]) -> str:
    """The same for reading."""
    lines = [
        f"{name}: {checkpoint}, iteration {iteration}"
        for name, checkpoint, iteration in zip(
            ("first", "second"), compared["checkpoints"], compared["iterations"], strict=True
        )
    ]
    lines.append(f"optimizer's state: {' | '.join(compared['optimizer'])} (not compared)")
    if compared["settings"]:
        rows = (
            [_printable(name), *(_printable(str(value)) for value in pair)]
            for name, pair in compared["settings"].items()
        )
        lines += ["", markdown_table(("setting", "first", "second"), rows)]
    for name in ("first", "second"):
        lines += [f"only in the {name}: {key}" for key in compared[f"only_in_{name}"]]
    lines += [f"{key}: {one} | {two}" for key, (one, two) in compared["other_shapes_or_dtypes"].items()]
    header = ("kind", "largest difference", "relative", "where", "tensors that differ")
    rows = (
        [kind, entry["absolute"], entry["relative"], entry["tensor"], f"{entry['different']} of {entry['tensors']}"]
        for kind, entry in compared["differences"].items()
    )
    return "\n".join([*lines, "", markdown_table(header, rows)])


def parse_flags(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags."""
    parser = OneLineParser(PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="what training's --save named, or the folder of one checkpoint")
    add_iteration_flag(parser)
    parser.add_argument("--diff", type=Path, metavar="OTHER", help="compare with another checkpoint")
    parser.add_argument("--diff-iteration", type=int, metavar="N", help="which one of OTHER; default: the latest")
    parser.add_argument("--json", action="store_true", help="print one JSON object, with all settings and tensors")
    flags = parser.parse_args(argv)
    if flags.diff_iteration is not None and flags.diff is None:
        raise UserError(f"--diff-iteration {flags.diff_iteration}: of which checkpoint? add --diff OTHER")
    return flags


def main(argv: list[str] | None = None) -> None:
    """Reads and prints."""
    with one_line_errors(PROGRAM):
        flags = parse_flags(argv)
        checkpoint = open_checkpoint(flags.checkpoint, flags.iteration)
        try:
            if flags.diff is None:
                result = describe(checkpoint)
            else:
                result = compare(checkpoint, open_checkpoint(flags.diff, flags.diff_iteration))
        except RecursionError:
            raise UserError(f"{checkpoint.folder}: has settings within settings without end; take another") from None
    if flags.json:
        print(json.dumps(result, indent=1))
    else:
        print(report(result) if flags.diff is None else report_difference(result))
    if flags.diff is not None and not is_same(result):
        sys.exit(1)


if __name__ == "__main__":
    main()
