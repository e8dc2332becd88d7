"""Writes docs/flags.md: every flag of this project's programs, from their own parsers.

    python tools/write_flags.py            writes it
    python tools/write_flags.py --check    changes nothing; exit code 1 and the first difference if it is not current

The programs are the training script, the tools and the modules. Each program is started with --help in this process and
stopped where its parser would print, so what is written is what runs. New files in tools/, examples/ and modules that
can be run are found by themselves.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import runpy
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_moa.command_line.tables import markdown_table
from megatron_moa.errors import OneLineParser, UserError, one_line_errors

PROGRAM = "write_flags.py"
ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "docs" / "flags.md"
_CORES = (
    986_543  # what a default that counts cores is given, to be known again: the text must not depend on the machine
)
_NOT_OURS = {  # modules whose --help is not a parser of ours
    "megatron_moa.cpu": "takes a script of Megatron's and its flags",
    "megatron_moa.launch": "takes torchrun's flags",
}
_STARTED_BY_OTHERS = (  # without flags: other modules run them in processes of their own
    "megatron_moa.hf.source_logits",
    "megatron_moa.hf.standalone",
    "megatron_moa.research.fault_drill.poison",
    "megatron_moa.research.study.timing",
)

_HEAD = """# Flags

`python tools/write_flags.py` writes this page from the programs' own parsers, and a test checks that it is current.
An unknown flag or an invalid value is answered by one line and exit code 2, in every program.
"""


class _Parser(BaseException):
    """Carries a parser out of a program that was asked for --help; no ``except Exception`` stops it."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


def _carry_out(action: argparse.Action, parser: argparse.ArgumentParser, *_: object) -> None:
    raise _Parser(parser)


def parser_of(path: Path, module: str | None = None) -> argparse.ArgumentParser:
    """The parser that answers ``path --help``, or ``python -m module --help``.

    Raises:
        UserError: the program ends without one.
    """
    before = sys.argv, list(sys.path)
    sys.argv = [str(path), "--help"]
    sys.path.insert(0, str(path.parent if module is None else ROOT))
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Megatron's on what is not installed
            if module is None:
                runpy.run_path(str(path), run_name="__main__")
            else:
                runpy.run_module(module, run_name="__main__", alter_sys=True)
    except _Parser as found:
        return found.parser
    except SystemExit:
        pass
    finally:
        sys.argv, sys.path[:] = before
    last = (printed.getvalue().strip().splitlines() or ["it printed nothing"])[-1]
    raise UserError(
        f"{path.relative_to(ROOT)}: --help reaches no parser of argparse ({last}); give it one, or name it in _NOT_OURS"
    )


def _programs() -> Iterator[tuple[str, Path, str | None]]:
    """How to call it, file and module of whatever can be run, except the training script."""
    for path in sorted((ROOT / "tools").glob("*.py")):
        yield f"python tools/{path.name}", path, None
    modules = {}
    for path in (ROOT / "megatron_moa").rglob("*.py"):
        if '__name__ == "__main__"' in path.read_text(encoding="utf-8"):
            named = path.parent if path.name == "__main__.py" else path.with_suffix("")
            modules[".".join(named.relative_to(ROOT).parts)] = path
    for module, path in sorted(modules.items()):
        if module not in _STARTED_BY_OTHERS:
            yield f"python -m {module}", path, module


def _scripts() -> list[Path]:
    found = [*(ROOT / "tools").glob("*.sh"), *(ROOT / "examples").glob("*.sh"), *(ROOT / "examples/slurm").glob("*.s*")]
    return sorted(found)


def flags_document() -> str:
    """The whole text of docs/flags.md."""
    original = argparse._HelpAction.__call__
    affinity, count = getattr(os, "sched_getaffinity", None), os.cpu_count
    argparse._HelpAction.__call__ = _carry_out
    os.sched_getaffinity, os.cpu_count = lambda _: range(_CORES), lambda: _CORES
    try:
        parsers = [
            (call, None if module in _NOT_OURS else parser_of(path, module), module)
            for call, path, module in _programs()
        ]
        training = parser_of(ROOT / "pretrain_gpt_moa.py")
    finally:
        argparse._HelpAction.__call__ = original
        os.cpu_count = count
        if affinity is not None:
            os.sched_getaffinity = affinity
    parts = [_HEAD, *_training_script(training)]
    for call, parser, module in parsers:
        parts.append(f"## `{call}`\n")
        if parser is None:
            parts.append(f"It {_NOT_OURS[module]}; `--help` lists them.\n")
            continue
        parts.append(_summary(parser.description or "") + "\n")
        parts += _tables(parser, parser._actions)
    parts.append("## Shell scripts\n")
    for path in _scripts():
        parts.append(f"`{path.relative_to(ROOT)}`\n\n{_header(path)}\n")
    return "\n".join(parts)


def _training_script(parser: argparse.ArgumentParser) -> list[str]:
    """Returns the section on pretrain_gpt_moa.py.

    The section has our flags, Megatron's defaults that change, and Megatron's flags that a CPU cannot serve.
    """
    with warnings.catch_warnings(action="ignore"):  # Megatron's on what is not installed
        from megatron.training.arguments import add_megatron_arguments

        from megatron_moa.cpu.flags import CPU_DEFAULTS, GPU_FLAGS
        from megatron_moa.megatron_fixes.kernel_defaults import KERNEL_DEFAULTS

    stock = (
        add_megatron_arguments.__wrapped__ if hasattr(add_megatron_arguments, "__wrapped__") else add_megatron_arguments
    )
    known = {option for action in stock(argparse.ArgumentParser())._actions for option in action.option_strings}
    ours = [action for action in parser._actions if not known.issuperset(action.option_strings)]
    parts = [
        "## `pretrain_gpt_moa.py`\n",
        "Megatron's flags (`python pretrain_gpt_moa.py --help-megatron` explains them), and ours:\n",
        *_tables(parser, ours),
        "Settings of Megatron's with other defaults here; a flag that is given stays:\n",
    ]
    kernels = {default.name: default.kernel for default in KERNEL_DEFAULTS}
    reason, settings = "", []
    for dest, value, why in CPU_DEFAULTS:
        reason = reason if why == "as above" else why
        where = f"without {kernels[dest]}" if dest in kernels else "on CPU"
        value = value() if callable(value) else value
        because = "Megatron's default needs that kernel" if dest in kernels else reason
        settings.append([f"`{dest}`", where, f"`{getattr(value, 'name', value)}`", because])
    parts.append(markdown_table(["setting", "where", "default", "why not Megatron's"], settings))
    parts.append("\nRefused on CPU, in one line, with values that need a GPU:\n")
    parts.append(markdown_table(["flag", "instead"], [(f"`{flag}`", remedy) for _, flag, _, remedy in GPU_FLAGS]))
    return [*parts, ""]


def _tables(parser: argparse.ArgumentParser, actions: Sequence[argparse.Action]) -> list[str]:
    """A table for each group that has any of these actions."""
    parts = []
    for group in parser._action_groups:
        own = [a for a in group._group_actions if a in actions and a.help != argparse.SUPPRESS and a.dest != "help"]
        for commands in (a for a in own if isinstance(a, argparse._SubParsersAction)):
            for name, command in commands.choices.items():
                parts += [f"With `{name}`:\n", *_tables(command, command._actions)]
        own = [a for a in own if not isinstance(a, argparse._SubParsersAction)]
        if not own:
            continue
        if group.title not in ("options", "positional arguments"):
            parts.append(f"{group.title[0].upper()}{group.title[1:]}:\n")
        rows = [[cell.replace("|", "\\|") for cell in _row(parser, action)] for action in own]
        parts.append(markdown_table(("flag", "values", "default", "meaning"), rows) + "\n")
    return parts


def _row(parser: argparse.ArgumentParser, action: argparse.Action) -> tuple[str, str, str, str]:
    """Flag, values, default and meaning."""
    name = ", ".join(f"`{option}`" for option in action.option_strings) or f"`{action.metavar or action.dest}`"
    values = ""
    if action.nargs != 0 and not isinstance(action, argparse.BooleanOptionalAction):
        values = action.metavar or (action.dest.upper() if action.choices is None else "")
        values = " ".join(values) if isinstance(values, tuple) else values
        if action.choices is not None:
            values = " ".join(map(str, action.choices))
        values = values.strip("{}").replace(",", " ") + {"+": " …", "*": " …"}.get(action.nargs, "")
    default = action.default
    if default is None or default is False or default == argparse.SUPPRESS or default == "":
        text = "required" if action.required and action.option_strings else ""
    elif default == _CORES:
        text = "the CPU cores"
    else:
        listed = default if isinstance(default, list | tuple) else [default]
        text = " ".join(str(value).replace(f"{ROOT}/", "") for value in listed)
    meaning = parser._get_formatter()._expand_help(action) if action.help else ""
    meaning = " ".join(meaning.replace(str(_CORES), "the CPU cores").replace(f"{ROOT}/", "").split())
    return name, f"`{values}`" if values else "", text, meaning


def _summary(description: str) -> str:
    """The first paragraph, without an example that ends it."""
    return " ".join(description.strip().split("\n\n")[0].split())


def _header(path: Path) -> str:
    """The comment at the start of a shell script, indented as code."""
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    comment = []
    for line in lines:
        if not line.startswith("#"):
            break
        if not re.match(r"#(SBATCH|!|\s*shellcheck)", line):
            comment.append(("    " + line[1:].removeprefix(" ")).rstrip())
    return "\n".join(comment)


@one_line_errors(PROGRAM)
def main(argv: Sequence[str] | None = None) -> int:
    """Writes, or checks, and returns the exit code."""
    parser = OneLineParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if it is not current")
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FILE", help="the file")
    options = parser.parse_args(argv)
    if not options.output.parent.is_dir():  # before the minute that the parsers take
        raise UserError(f"--output {options.output}: no such folder; name a file in a folder that is there")
    text = flags_document()
    if not options.check:
        try:
            options.output.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"--output {options.output}: {error.strerror}; name a file in a folder that is there"
            ) from None
        return 0
    there = options.output.read_text(encoding="utf-8").splitlines() if options.output.is_file() else []
    wanted = text.splitlines()
    if there == wanted:
        return 0
    line = next(
        (i for i, (old, new) in enumerate(zip(there, wanted, strict=False)) if old != new), min(len(there), len(wanted))
    )
    print(f"{options.output}: not current from line {line + 1}; run python tools/write_flags.py. It should have:")
    print("\n".join(wanted[line : line + 1]) or "(its end)")
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
