"""Checks what is changed in Megatron and torch in place.

All of it goes through one door and is listed, and nothing else is changed.
"""

from __future__ import annotations

import ast
import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, SimpleNamespace

import pytest
import torch

from megatron_moa.doctor import versions
from megatron_moa.doctor.__main__ import main
from megatron_moa.doctor.patches import all_patches, declaring_modules, patch_table
from megatron_moa.megatron_fixes import patching
from megatron_moa.megatron_fixes.patching import RECORDING, Patch, constant
from tests.support import launch
from tests.support.training import ROOT, SWIGLU, TINY

LIBRARIES = ("megatron", "torch", "transformer_engine", "apex")


# The source: nothing but the door sets an attribute of a library's.


def _root(node: ast.expr) -> str | None:
    """The name that an expression of names and attributes begins with."""
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def _parts(node: ast.expr) -> list[ast.expr]:
    return list(node.elts) if isinstance(node, ast.Tuple | ast.List) else [node]


def _of_libraries(tree: ast.AST) -> set[str]:
    """Returns the names that are imported from a library, or that stand for one of these.

    A name stands for another in a loop or an assignment.
    """
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in LIBRARIES:
                    names.add(alias.asname or alias.name.split(".")[0])
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in LIBRARIES:
            names.update(alias.asname or alias.name for alias in node.names)
    for node in ast.walk(tree):
        if isinstance(node, ast.For):
            targets, values = _parts(node.target), _parts(node.iter)
        elif isinstance(node, ast.Assign):
            targets, values = [t for target in node.targets for t in _parts(target)], _parts(node.value)
        else:
            continue
        if any(_root(value) in names for value in values):
            names.update(target.id for target in targets if isinstance(target, ast.Name))
    return names


def changes_in(source: str) -> Iterator[str]:
    """Where a source text sets an attribute of a library's by itself."""
    tree = ast.parse(source)
    names = _of_libraries(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign | ast.Delete):
            targets = node.targets if isinstance(node, ast.Assign | ast.Delete) else [node.target]
            for part in (part for target in targets for part in _parts(target)):
                if isinstance(part, ast.Attribute) and _root(part) in names:
                    yield ast.unparse(part)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "delattr"):
            of = ast.unparse(node.args[0])
            if of not in ("args", "config", "settings", "gate"):  # settings, and marks of our own parameters
                yield ast.unparse(node)


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.zeros = f",
        "from megatron.training import training\ntraining.train, x = f, g",
        "from megatron.core import a, b\nfor m in (a, b):\n    m.f = g",
        "import megatron.core.x\nclass_ = megatron.core.x.C\nclass_.f = g",
        "def g(owner):\n    setattr(owner, 'f', 1)",
        "def g():\n    import torch as t\n    t.cuda.Stream = 1",
    ],
)
def test_a_change_past_the_door_is_seen(source: str) -> None:
    assert len(list(changes_in(source))) == 1


def test_nothing_is_changed_past_the_door() -> None:
    files = [*(ROOT / "megatron_moa").rglob("*.py"), *(ROOT / "tools").glob("*.py"), ROOT / "pretrain_gpt_moa.py"]
    found = {
        (path.name, change)
        for path in files
        if path != Path(patching.__file__)
        for change in changes_in(path.read_text(encoding="utf-8"))
    }
    # The drill breaks a training on purpose.
    assert found - {("poison.py", "training.train_step")} == set()


# The list, and what a training really makes.


@pytest.fixture(scope="module")
def changes() -> list[Patch]:
    return all_patches()


def test_every_change_says_why_and_until_when(changes: list[Patch]) -> None:
    for change in changes:
        assert change.why, change.path
        assert change.remove_when, change.path
        assert "|" not in "".join(change.described().values()), change.path
        # When Megatron moves, each is looked at again, and its version set.
        assert change.version == versions.MEGATRON, change.path


def test_every_change_has_its_target(changes: list[Patch]) -> None:
    for change in changes:
        owner, name = change.place()
        assert hasattr(owner, name), change.path


def _ours(value: object) -> bool:
    """Says whether a function or class was written in megatron_moa.

    Objects are asked nothing, since they may answer anything.
    """
    if type(value) is FunctionType:
        return Path(value.__code__.co_filename).is_relative_to(ROOT / "megatron_moa")
    return issubclass(type(value), type) and value.__module__.startswith("megatron_moa.")


def _in_libraries() -> dict[str, object]:
    """Our functions and classes that stand in modules of the libraries, and in their classes."""
    found = {}
    for module_name, module in list(sys.modules.items()):
        if module is None or module_name.split(".")[0] not in LIBRARIES:
            continue
        classes = [c for c in list(vars(module).values()) if issubclass(type(c), type) and c.__module__ == module_name]
        for owner in (module, *classes):
            for name, value in list(vars(owner).items()):
                if _ours(value):
                    found[f"{owner.__name__}.{name}"] = value
    return found


def _train_and_note(file: str, flags: list[str]) -> None:
    """Trains, in a process of its own, and writes what was changed.

    Written are changes by the parser, those made in the end, and those past the list.
    """
    from megatron_moa import startup
    from megatron_moa.training.arguments import parse_arguments

    def made() -> set[tuple[str, str]]:
        return {(change.path, change.why) for change in all_patches() if change.was_installed}

    startup.prepare()
    before = made()
    sys.argv = ["pretrain_gpt_moa.py", *flags]
    parse_arguments(as_global=False)
    by_parser = made() - before
    launch.script(str(ROOT / "pretrain_gpt_moa.py"), flags)
    listed = [getattr(*change.place()) for change in all_patches()]
    past = [name for name, value in _in_libraries().items() if not any(value is known for known in listed)]
    Path(file).write_text(json.dumps({"parser": sorted(by_parser), "made": sorted(made()), "past": past}))


@pytest.mark.slow
def test_the_list_is_what_a_training_makes(tmp_path: Path, changes: list[Patch]) -> None:
    """With flags that need all of it; a second run, which loads what the first one saved."""
    flags = [*TINY, *SWIGLU, "--moa-mixing", "moa", "--moa-backend", "eager", "--bf16", "--exit-signal-handler"]
    flags += ["--moa-gate-lr-scale", "2", "--save-interval", "2", "--train-iters", "4"]
    flags += ["--save", str(tmp_path / "save"), "--load", str(tmp_path / "save")]
    script = str(ROOT / "pretrain_gpt_moa.py")
    for target, arguments in (
        (launch.script, (script, [*flags, "--exit-interval", "2"])),
        (_train_and_note, (str(tmp_path / "made.json"), flags)),
    ):
        code, log = launch.launch(target, arguments, 1, ROOT)
        assert code == 0, log[-3000:]
    noted = json.loads((tmp_path / "made.json").read_text())
    assert noted["parser"] == []
    assert noted["past"] == []
    # Without a GPU, Transformer Engine and Apex every change is made; there is none for GPUs alone.
    if not torch.cuda.is_available():
        expected = sorted([change.path, change.why] for change in changes if change.where != RECORDING)
        assert noted["made"] == expected


@pytest.mark.slow
def test_the_doctor_lists_them(changes: list[Patch], capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "megatron_moa.doctor", "--patches", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    listed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(listed.stdout) == [change.described() for change in changes]
    with pytest.raises(SystemExit) as left:
        main(["--patches", "--smoke"])
    assert left.value.code == 2
    assert capsys.readouterr().err.splitlines() == [
        "doctor: error: --patches: lists and looks at nothing else; drop --smoke, --save and --recipe"
    ]


def test_table_has_every_target(changes: list[Patch]) -> None:
    rows = patch_table(changes).splitlines()[2:]
    assert all(row.count(" | ") == 4 for row in rows)
    named = " ".join(rows)
    assert all(change.path.rsplit(".", 1)[1] in named for change in changes)
    assert len(rows) < len(changes)  # those of one owner and reason share a row


def test_modules_are_found_by_their_source() -> None:
    modules = declaring_modules()
    assert "megatron_moa.megatron_fixes.te_guard" in modules
    assert "megatron_moa.cpu.factories" in modules
    assert "megatron_moa.training.nan_guard" in modules


# The door itself.


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Builds a module with a function, known to the import system.

    What is registered in a test is forgotten afterwards.
    """
    module = SimpleNamespace(double=lambda x: 2 * x, other=0)
    monkeypatch.setitem(sys.modules, "a_library", module)
    monkeypatch.setattr(patching, "_PATCHES", dict(patching._PATCHES))
    return module


def _plus(original, more=1):
    @functools.wraps(original)
    def call(x):
        return original(x) + more

    return call


def _patch(wrapper=_plus, **options) -> Patch:
    return patching.patch("a_library.double", wrapper, why="w", version="1", remove_when="r", **options)


def test_registering_changes_nothing(library: SimpleNamespace) -> None:
    before = library.double
    change = _patch()
    assert library.double is before
    assert change in patching.patches()
    assert not change.was_installed


def test_made_twice_wraps_once(library: SimpleNamespace) -> None:
    change = _patch()
    change.install()
    change.install()
    assert library.double(3) == 7
    change.remove()
    assert library.double(3) == 6
    change.install()
    assert library.double(3) == 7


def test_another_context_replaces_the_first(library: SimpleNamespace) -> None:
    change = _patch()
    change.install(10)
    change.install(20)
    assert library.double(3) == 26


def test_two_changes_of_one_target(library: SimpleNamespace) -> None:
    first = _patch()
    second = patching.patch("a_library.double", _plus, why="other", version="1", remove_when="r")
    first.install(10)
    second.install(100)
    first.install(10)  # it is there, below the second one
    assert library.double(3) == 116
    with pytest.raises(RuntimeError, match=r"a_library\.double has been changed again since"):
        first.install(20)


def test_for_a_time(library: SimpleNamespace) -> None:
    with _patch().installed(5):
        assert library.double(3) == 11
    assert library.double(3) == 6


def test_constants_and_further_places(library: SimpleNamespace) -> None:
    _patch(constant(abs), also_sets=lambda: [(library, "other", 4)]).install()
    assert library.double is abs
    assert library.other == 4
