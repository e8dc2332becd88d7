"""Checks what the pages say: links lead somewhere, commands and flags exist.

Python snippets run, and maps are complete.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

import megatron_moa
from megatron_moa.command_line.megatron_flags import known_flags
from tools import draw_forms

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "tools").glob("*.md"), *ROOT.glob("examples/**/*.md")]
)
# Pages that tell of the past, or that a program writes from recorded runs: they name what is no longer there.
HISTORY = {"CHANGELOG.md", "docs/evidence.md", "docs/results/h200/results.md", "docs/results/study/README.md"}
PRESENT = [page for page in PAGES if str(page.relative_to(ROOT)) not in HISTORY]
OURS = "pretrain_gpt_moa.py"
# Tools that hand flags on to Megatron's parser, by themselves or behind a "--".
HAND_ON = {
    f"tools/{name}.py" for name in "benchmark_step build_cache compare_parallel convert_from_hf generate plan".split()
}
# Modules of Megatron's and of Python's library.
OTHERS = {"pretrain_gpt.py", "pipeline_parallel/schedules.py"}
OTHERS |= {"pydoc.py", "tarfile.py", "textwrap.py", "threading.py", "timeit.py"}
PROGRAM = re.compile(r"tools/\w+\.(?:py|sh)|-m megatron_moa[\w.]+|pretrain_gpt_moa\.py|examples/[\w/]+\.(?:sh|sbatch)")
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]+")


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def code_blocks(text: str) -> Iterator[str]:
    """Each indented or fenced block of code, without its indentation; blank lines inside belong to it."""
    fenced = re.compile(r"^```[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
    yield from fenced.findall(text)
    block: list[str] = []
    item = False  # a line indented by four may go on with an item of a list instead
    for line in [*fenced.sub("", text).splitlines(), "end"]:
        if line.startswith("    ") and not item:
            block.append(line)
        elif line.strip():
            if block:
                yield textwrap.dedent("\n".join(block)).strip("\n") + "\n"
            block, item = [], bool(re.match(r"\s*(?:[-*]|\d+\.) ", line)) or (item and line.startswith(" "))
        elif block:
            block.append("")
        else:
            item = False


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """Finds each program that code names, with the words behind it.

    The words go up to the next program, a comment or a new command.
    """
    code = [block.replace("\\\n", " ") for block in code_blocks(text)]
    spans = re.findall(r"(?<!`)`([^`]+)`(?!`)", text)
    for line in [line for block in code for line in block.splitlines()] + [" ".join(span.split()) for span in spans]:
        found = list(PROGRAM.finditer(line))
        ends = [match.start() for match in found[1:]] + [len(line)]
        for match, end in zip(found, ends, strict=False):
            rest = line[match.end() : end]
            yield match.group().removeprefix("-m "), re.split(r"[;|]| #| \(", rest)[0].split()


@cache
def flags_by_program() -> dict[str, set[str]]:
    """What docs/flags.md lists: tests/tools/test_write_flags.py holds it to the parsers."""
    sections = re.split(r"^## ", text_of(ROOT / "docs" / "flags.md"), flags=re.MULTILINE)[1:]
    found = {}
    for section in sections:
        title, _, body = section.partition("\n")
        program = re.sub(r"python (?:-m )?", "", title.strip("`"))
        rows = [line.split("|")[1] for line in body.splitlines() if line.startswith("| `-")]
        found[program] = {"--help", *(flag for cell in rows for flag in FLAG.findall(cell))}
    return found


@cache
def flags_of(program: str) -> set[str]:
    """Every flag that ``program`` takes."""
    listed = flags_by_program()
    training = listed[OURS] | known_flags()
    if program == "megatron_moa.launch":
        from torch.distributed.run import get_args_parser

        return {option for action in get_args_parser()._actions for option in action.option_strings}
    if program.endswith((".sh", ".sbatch")):  # recipes hand on what they do not know
        return training | set(FLAG.findall(text_of(ROOT / program)))
    if program == OURS or program in HAND_ON:
        return training | listed.get(program, set())
    return listed[program]


@cache
def modules() -> list[str]:
    """Every Python file of the project, as "/folder/name.py"."""
    folders = [ROOT / folder for folder in ("megatron_moa", "tools", "tests", "examples")]
    found = [*ROOT.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))]
    return ["/" + path.relative_to(ROOT).as_posix() for path in found]


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", text_of(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


@pytest.mark.parametrize("page", PRESENT, ids=name_of)
def test_files_that_are_named_exist(page: Path) -> None:
    kinds = r"(?:py|md|sh|sbatch|toml|svg|jsonl)"
    named = re.findall(rf"\b((?:megatron_moa|tools|tests|docs|examples|scripts)/[\w/.-]+\.{kinds})\b", text_of(page))
    tests = {path.name for path in (ROOT / "tests").rglob("*.*")}
    for name in named:  # which folder a test is in is for the tests to choose
        assert Path(name).name in tests if name.startswith("tests/") else (ROOT / name).is_file(), name


@pytest.mark.parametrize("page", [page for page in PRESENT if page.name != "flags.md"], ids=name_of)
def test_commands_exist_with_their_flags(page: Path) -> None:
    recipes = {path.stem for path in (ROOT / "examples" / "models").glob("*.sh")}
    for program, words in commands(text_of(page)):
        if program.startswith("megatron_moa"):
            assert program in flags_by_program(), program
        else:
            assert (ROOT / program).is_file(), program
        unknown = set(FLAG.findall(" ".join(words))) - flags_of(program)
        assert not unknown, (program, words)
        if words and re.match(r"(?:dense|moe|gpt2)-", words[0]):
            assert words[0] in recipes, (program, words)


@pytest.mark.parametrize("page", PRESENT, ids=name_of)
def test_our_flags_and_make_targets_exist(page: Path) -> None:
    text = text_of(page)
    flags = set(re.findall(r"--moa-[a-z][a-z-]*[a-z](?![a-z-]|\.\.\.)", text))  # not one that a message cuts off
    assert flags <= flags_by_program()[OURS], flags - flags_by_program()[OURS]
    code = [*code_blocks(text), *re.findall(r"`([^`]+)`", text)]
    targets = {target for block in code for target in re.findall(r"^make ([a-z][a-z-]*)", block, flags=re.MULTILINE)}
    phony = re.findall(r"^\.PHONY: (.*)$", text_of(ROOT / "Makefile"), flags=re.MULTILINE)
    assert targets <= set(" ".join(phony).split()), targets


def snippets() -> Iterator[tuple[str, str]]:
    """Page and Python code: blocks that begin with an import, and what ``python -c`` is given."""
    for page in PRESENT:
        for block in code_blocks(text_of(page)):
            if re.match(r"(?:import|from) \w", block):
                yield name_of(page), block.replace("…\n", "...\n")
            for quote in "\"'":
                for given in re.findall(rf"python -c {quote}([^{quote}]+){quote}", block):
                    yield name_of(page), textwrap.dedent(given).strip()


def needs_a_model(code: str) -> bool:
    """Whether it takes a trained model, text of the user's or minutes: then its imports alone are run."""
    return bool(re.search(r"runs/|exports/|corpus\.txt|os\.times|\bmodel = (?:get_peft|model)", code))


SNIPPETS = list(snippets())


@pytest.mark.parametrize(("page", "code"), SNIPPETS, ids=[f"{page}-{i}" for i, (page, _) in enumerate(SNIPPETS)])
def test_python_snippets_run(page: str, code: str) -> None:
    tree = ast.parse(code)
    if needs_a_model(code):
        for node in (node for node in ast.walk(tree) if isinstance(node, ast.Attribute)):
            if isinstance(node.value, ast.Name) and node.value.id == "megatron_moa":
                assert hasattr(megatron_moa, node.attr), node.attr
        tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert tree.body, "nothing of it can be tried"
    for module in {node.module for node in tree.body if isinstance(node, ast.ImportFrom)} & {"peft", "transformers"}:
        pytest.importorskip(module)
    # What is compiled is the subject of other tests; here it would take the time.
    with torch._dynamo.config.patch(disable=True):
        exec(compile(tree, page, "exec"), {"__name__": "snippet"})


def test_snippets_are_found() -> None:
    """A pattern that finds nothing would let every page pass."""
    assert len([code for _, code in SNIPPETS if not needs_a_model(code)]) >= 4
    assert {"README.md", "docs/mixture.md", "docs/evaluation.md", "docs/huggingface.md"} <= {
        page for page, _ in SNIPPETS
    }
    assert len({program for page in PRESENT for program, _ in commands(text_of(page))}) > 30


@pytest.mark.parametrize(
    "text", ["    tools/plan.py x --no-such\n", "`python tools/nothing.py`\n", "`tools/plan.py moe-9b`\n"]
)
def test_wrong_commands_are_found(tmp_path: Path, text: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    with pytest.raises(AssertionError):
        test_commands_exist_with_their_flags(page)


def literals() -> Iterator[str]:
    """Every string of the source, with NUL where a value is put in."""
    folders = [ROOT / "megatron_moa", ROOT / "tools"]
    for path in [ROOT / OURS, *(path for folder in folders for path in folder.rglob("*.py"))]:
        for node in ast.walk(ast.parse(text_of(path))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
    for path in (ROOT / "examples").rglob("*.sh"):
        for text in re.findall(r'fail "([^"]*)"', text_of(path)):
            yield re.sub(r"\$\{[^}]*\}|\$\([^()]*\)|\$\w+", "\0", text)


@cache
def said() -> list[re.Pattern[str]]:
    """A pattern for each part of a message that the source can print: what lies between ":" and ";"."""
    pieces = {piece.strip() for text in literals() if "\n" not in text for piece in re.split(r"[:;] ", text)}
    return [re.compile(re.escape(piece).replace("\0", ".+")) for piece in pieces if re.search(r"[a-z]{3}", piece)]


def unsaid(page: str) -> list[str]:
    """The parts of four words or more of a page's messages that nothing in the source prints."""
    spans = re.findall(r"(?<!`)`([^`]+)`(?!`)", page)
    lines = [line for block in code_blocks(page) for line in block.splitlines()] + [" ".join(s.split()) for s in spans]
    messages = [line for line in lines if re.match(r"[a-z_.]+: |--[\w-]+ [^:]*: |this run ", line)]
    assert messages
    # A checkpoint is put in as one value, with a colon of its own.
    whole = [re.sub(r"\(--load \w+: (iteration \d+)\)", r"(\1)", message) for message in messages]
    pieces = [piece.strip() for message in whole for piece in re.split(r"[:;] ", message)]
    long = [piece for piece in pieces if len(piece.split()) > 3 and "…" not in piece]
    return [piece for piece in long if not any(pattern.fullmatch(piece) for pattern in said())]


def test_quoted_messages_are_in_the_source() -> None:
    assert unsaid(text_of(ROOT / "docs" / "troubleshooting.md")) == []
    old = "    plan.py: error: --tp 3: does not divide the 32 attention heads, feed-forward width 8192; take --tp 2\n"
    assert unsaid(old) == ["does not divide the 32 attention heads, feed-forward width 8192"]


def test_the_maps_are_complete() -> None:
    pages = text_of(ROOT / "docs" / "README.md")
    for page in [*(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "design").glob("*.md")]:
        assert f"({page.relative_to(ROOT / 'docs')}" in pages or page.name == "README.md", page
    listed = text_of(ROOT / "tools" / "README.md")
    for tool in [*(ROOT / "tools").glob("*.py"), *(ROOT / "tools").glob("*.sh")]:
        assert f"`{tool.name}`" in listed, tool
    tree = text_of(ROOT / "README.md")
    for folder in (path.parent for path in (ROOT / "megatron_moa").glob("*/__init__.py")):
        assert f"\n      {folder.name}/ " in tree, folder


@pytest.mark.parametrize("page", [page for page in PRESENT if page.name != "README.md"], ids=name_of)
def test_modules_that_are_named_exist(page: Path) -> None:
    """Pages shorten paths, so what they name has to be the end of one."""
    for name in re.findall(r"(?<![\w/*.\]-])((?:\w+/)*\w+\.py)\b", text_of(page)):
        assert any(path.endswith("/" + name) for path in modules()) or name in OTHERS, name


def test_the_readme_is_short() -> None:
    lines = text_of(ROOT / "README.md").splitlines()
    assert len(lines) <= 130
    assert max(map(len, lines)) <= 120


def test_first_lines_of_docstrings_are_short() -> None:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for folder in ("", "megatron_moa/**/", "tools/**/", "examples/**/", "tests/**/"):
        for path in ROOT.glob(f"{folder}*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                text = ast.get_docstring(node) if isinstance(node, documented) else None
                assert text is None or len(text.splitlines()[0]) <= 100, (path, text)


@pytest.mark.parametrize("page", [page for page in PRESENT if page.name != "flags.md"], ids=name_of)
def test_lines_of_prose_are_short(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    prose = [line for line in text.splitlines() if not line.startswith(("|", "    ", "!["))]
    assert max(map(len, prose)) <= 120


def test_the_picture_is_what_its_script_draws(tmp_path: Path) -> None:
    assert draw_forms.main(["--out", str(tmp_path / "forms.svg")]) == 0
    assert (tmp_path / "forms.svg").read_bytes() == (ROOT / "docs" / "pictures" / "forms.svg").read_bytes()
    with pytest.raises(SystemExit) as left:
        draw_forms.main(["--out", str(tmp_path / "nowhere" / "forms.svg")])
    assert left.value.code == 2
