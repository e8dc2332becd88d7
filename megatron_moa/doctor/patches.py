"""Lists what megatron_moa changes in Megatron and torch in place.

For each change it says where, why, for which version, and until when.
"""

from __future__ import annotations

import importlib
import re
from itertools import groupby

from megatron_moa.command_line.tables import markdown_table
from megatron_moa.doctor.processes import ROOT
from megatron_moa.megatron_fixes import expected_warnings  # noqa: F401  before Megatron
from megatron_moa.megatron_fixes.patching import Patch, patches

_DOOR = re.compile(r"^from megatron_moa\.(megatron_fixes|cpu)\.patching import ", re.MULTILINE)


def declaring_modules() -> list[str]:
    """Names the modules that register changes, by a look at their source."""
    return [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sorted((ROOT / "megatron_moa").rglob("*.py"))
        if path.parent.name != "doctor" and _DOOR.search(path.read_text(encoding="utf-8"))
    ]


def all_patches() -> list[Patch]:
    """Imports the modules that register changes, and returns every change; makes none of them."""
    for module in declaring_modules():
        importlib.import_module(module)
    return sorted(patches(), key=lambda change: (*_cells(change), change.path))


def patch_table(changes: list[Patch]) -> str:
    """Returns a Markdown table of the changes; those of one owner that share all other cells are one row."""
    rows = []
    for cells, group in groupby(changes, key=_cells):
        where, owner, version, why, remove_when = cells
        names = [change.path.rsplit(".", 1)[1] for change in group]
        target = f"{owner}.{names[0] if len(names) == 1 else '{' + ', '.join(names) + '}'}"
        rows.append((f"`{target}`", where, version, why, remove_when))
    return markdown_table(("target", "where", "Megatron", "why", "remove when"), rows)


def _cells(change: Patch) -> tuple[str, str, str, str, str]:
    return change.where, change.path.rsplit(".", 1)[0], change.version, change.why, change.remove_when
