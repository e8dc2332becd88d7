"""Writes what was found in one checkpoint, or in two, for reading."""

from __future__ import annotations

from typing import Any

from megatron_moa.command_line.megatron_flags import as_typed
from megatron_moa.command_line.tables import markdown_table
from megatron_moa.errors import printable
from megatron_moa.trained.inspection.settings import MIXTURE, SHAPE


def report(about: dict[str, Any]) -> str:
    """Returns for reading what :func:`contents.describe` found."""
    settings, kinds = about["settings"], about["parameters"]
    parameters = sum(entry["parameters"] for kind, entry in kinds.items() if kind != "optimizer")
    files, size = len(about["files"]), sum(about["files"].values())
    manifest = "sizes as in its manifest" if about["has_manifest"] else "no manifest"
    lines = [
        f"{about['checkpoint']}: iteration {about['iteration']}, format version {about['format_version']}",
        f"files:     {files} with tensors, {size / 1e6:,.1f} MB, {manifest}",
        f"mixture:   {printable(about['mixture'])}",
        *([f"           {_typed(settings, MIXTURE)}"] if about["mixture"] != "none" else []),
        f"model:     {parameters:,} parameters",
        f"           {_typed(settings, SHAPE)}",
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
    """Returns some of the settings as one would type them.

    Those that are off or belong to what is off are left out.
    """
    flags = [
        as_typed(name, settings[name])
        for name in names.split()
        if name in settings and (settings.get("num_experts") or not name.startswith("moe_"))
    ]
    return printable(" ".join(flag for flag in flags if not flag.startswith("no ")))


def _cell(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else ", ".join(value)


def report_difference(compared: dict[str, Any]) -> str:
    """Returns for reading what :func:`differences.compare` found."""
    lines = [
        f"{name}: {checkpoint}, iteration {iteration}"
        for name, checkpoint, iteration in zip(
            ("first", "second"), compared["checkpoints"], compared["iterations"], strict=True
        )
    ]
    lines.append(f"optimizer's state: {' | '.join(compared['optimizer'])} (not compared)")
    if compared["settings"]:
        rows = (
            [printable(name), *(printable(str(value)) for value in pair)] for name, pair in compared["settings"].items()
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
