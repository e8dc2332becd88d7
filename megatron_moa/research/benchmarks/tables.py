"""Writes records of benchmarks as markdown tables, the same on the screen and in a report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_moa.command_line.tables import markdown_table
from megatron_moa.research.benchmarks.timing import TOTAL

Record = dict[str, Any]


def accuracy_table(records: Sequence[Record]) -> str:
    """One line a mixture and dtype."""
    header = ("mixture", "dtype", "results", "wrong", "furthest off", "error", "PyTorch's in this dtype")
    rows = [
        (r["arm"], r["dtype"], r["results"], len(r["failed"]), r["worst"], r["error"], r["same_dtype_error"])
        for r in records
    ]
    return markdown_table(header, rows)


def kernels_table(records: Sequence[Record]) -> str:
    """One line a contender."""
    header = ("", "forward ms", "backward ms", "forward GB/s", "of copy", "backward GB/s", "of copy")
    header += ("forward to baseline", "backward", "total")
    phases = ("forward", "backward")
    rows = [
        (
            r["arm"],
            *(r["ms"][phase] for phase in phases),
            *(cell for phase in phases for cell in (f"{r['gb_per_s'][phase]:.0f}", f"{r['of_copy'][phase]:.2f}")),
            *(r["ratio"][phase] if r["ratio"] else None for phase in (*phases, TOTAL)),
        )
        for r in records
    ]
    return markdown_table(header, rows)


def layer_table(records: Sequence[Record], with_backend: bool = False) -> str:
    """One line an arm; on request with the backend that it had."""
    header = ("", "forward ms", "backward ms", "total ms", "quartiles", "to stock", "to compiled", "peak MB")
    header += ("to stock", "saved MB", "coefficients MB")
    rows = [
        (
            r["arm"],
            *(r["ms"][phase] for phase in ("forward", "backward", TOTAL)),
            _quartiles(r, TOTAL),
            r["ratio_to_stock"] and r["ratio_to_stock"][TOTAL],
            r["ratio_to_compiled"],
            r["peak_bytes"] / 1e6,
            r["peak_ratio"],
            r["saved_bytes"] / 1e6,
            r["saved_coefficient_bytes"] / 1e6,
        )
        for r in records
    ]
    if with_backend:
        header = (header[0], "backend", *header[1:])
        rows = [(row[0], r["backend"], *row[1:]) for row, r in zip(rows, records, strict=True)]
    return markdown_table(header, rows)


def step_table(records: Sequence[Record]) -> str:
    """One line an arm of a recipe."""
    header = ("recipe", "layers", "arm", "parameters", "sequences", "ms a step", "quartiles", "to stock")
    header += ("tokens/s", "model TFLOP/s", "state MB", "peak MB", "to stock")
    rows = [
        (
            r["recipe"],
            f"{r['layers']}, cut" if r["cut"] else r["layers"],
            r["arm"],
            f"{r['parameters']:,}",
            r["global_batch_size"],
            r["ms"]["step"],
            _quartiles(r, "step"),
            r["ratio"],
            f"{r['tokens_per_s']:.0f}",
            r["tflop_per_s_per_gpu"],
            r["state_bytes"] and r["state_bytes"] / 1e6,
            r["peak_bytes"] / 1e6,
            r["peak_ratio"],
        )
        for r in records
    ]
    return markdown_table(header, rows)


def _quartiles(record: Record, phase: str) -> str:
    first, third = record["ms_quartiles"][phase]
    return f"{first:.4g} to {third:.4g}"
