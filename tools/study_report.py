"""Writes a study's report, markdown and pictures, from the lines of its finished runs alone.

    python tools/study_report.py runs/study --out report.md
    python tools/study_report.py docs/results/study docs/results/study-h200 --out docs/evidence.md

A folder holds results.jsonl of tools/study.py; where there are any, timing.jsonl (step times, an arm at a time) and
gates-NAME.json of tools/analyze_gates.py are used too. Folders of several machines go into one report. Pictures go into
a folder named as the report is, beside it. An earlier report and the pictures it shows are replaced, nothing else. A
study that is still running can be reported on: what is missing is named.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from megatron_moa.command_line.output_folder import written_folder
from megatron_moa.errors import OneLineParser, UserError, one_line_errors

PROGRAM = "study_report.py"


@one_line_errors(PROGRAM)
def main(argv: Sequence[str] | None = None) -> None:
    """Reads, draws and writes; a report that is there is replaced."""
    parser = OneLineParser(prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS_FOLDER", help="a folder with results.jsonl")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.md", help="the report")
    flags = parser.parse_args(argv)
    if flags.out.suffix != ".md":
        raise UserError(f"--out {flags.out}: the report is markdown; name a file that ends in .md")
    pictures = flags.out.with_suffix("")
    earlier = _pictures_of(flags.out, pictures.name)
    from megatron_moa.research.study.evidence import read_evidence
    from megatron_moa.research.study.report.write import report

    evidence = read_evidence(flags.results)
    command = shlex.join(["python", "tools/study_report.py", *map(str, flags.results), "--out", str(flags.out)])
    with written_folder(f"--out {flags.out}: its pictures' folder", pictures, replace=earlier) as folder:
        text = report(evidence, command, folder, pictures.name)
        new = folder / flags.out.name  # on the same disk, so that its name can be given at once
        new.write_text(text, encoding="utf-8")
        new.replace(flags.out)
    print(f"{flags.out}, and {len(list(pictures.iterdir()))} pictures in {pictures}")


def _pictures_of(out: Path, folder: str) -> list[str]:
    """Names of the pictures that an earlier report shows; nothing else beside it is replaced.

    Raises:
        UserError: what is there is no report of this tool.
    """
    if out.is_symlink() or out.is_dir():
        raise UserError(f"--out {out}: is a {'folder' if out.is_dir() else 'link'}; name a file")
    try:
        text = out.read_text(encoding="utf-8") if out.exists() else ""
    except (OSError, ValueError):
        text = "another's"
    if text and f"Written by `python tools/{PROGRAM} " not in text:
        raise UserError(f"--out {out}: is there, and no report of {PROGRAM}; name another file")
    return re.findall(rf"\]\({re.escape(folder)}/([^/\n]+?\.png)\)", text)


if __name__ == "__main__":
    main()
