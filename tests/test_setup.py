"""The set-up that `make` does: which Python is chosen, and that constraints.txt fits setup.py."""

import importlib
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from megatron_moa.hf.export import TRANSFORMERS

ROOT = Path(__file__).resolve().parents[1]
FIND_PYTHON = ROOT / "scripts" / "find_python.sh"
BASH = shutil.which("bash")

pytestmark = pytest.mark.skipif(BASH is None, reason="needs bash")


def write_script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{BASH}\n{body}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def fake_shim(path: Path) -> Path:
    """What pyenv leaves for a version that is installed but not active."""
    return write_script(path, f'echo "pyenv: {path.name}: command not found" >&2; exit 127')


def fake_python(path: Path, minor: int) -> Path:
    """A Python that calls itself 3.``minor`` and lies at ``path``, but is the one that runs this test."""
    pretend = f"import sys; sys.version_info = (3, {minor}, 1); sys.executable = {str(path)!r}; exec(sys.argv[1])"
    return write_script(path, f'exec "{sys.executable}" -c "{pretend}" "$2"')


def find_python(path: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs the script with nothing but ``path`` on PATH and an empty HOME."""
    home = path.parent / "home"
    home.mkdir(exist_ok=True)
    return subprocess.run(
        [BASH, str(FIND_PYTHON)], env={"PATH": str(path), "HOME": str(home), **env}, capture_output=True, text=True
    )


def assert_one_sentence(result: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert result.returncode == 2
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert lines[0].endswith((".", "…"))
    for part in parts:
        assert part in lines[0]


def test_prefers_tested_version_over_newer(tmp_path: Path) -> None:
    fake_python(tmp_path / "bin" / "python3.13", 13)
    fake_python(tmp_path / "bin" / "python3", 14)
    expected = fake_python(tmp_path / "bin" / "python3.12", 12)
    assert find_python(tmp_path / "bin").stdout.strip() == str(expected)


def test_passes_over_failing_shim_and_old_python(tmp_path: Path) -> None:
    fake_shim(tmp_path / "bin" / "python3.12")
    fake_python(tmp_path / "bin" / "python3", 11)
    expected = fake_python(tmp_path / "bin" / "python3.13", 13)
    assert find_python(tmp_path / "bin").stdout.strip() == str(expected)


def test_takes_newer_python_where_nothing_else_is(tmp_path: Path) -> None:
    expected = fake_python(tmp_path / "bin" / "python3", 14)
    assert find_python(tmp_path / "bin").stdout.strip() == str(expected)


def test_looks_at_every_python3_on_path(tmp_path: Path) -> None:
    fake_python(tmp_path / "first" / "python3", 11)
    expected = fake_python(tmp_path / "second" / "python3", 12)
    result = find_python(tmp_path / "first", PATH=f"{tmp_path / 'first'}:{tmp_path / 'second'}")
    assert result.stdout.strip() == str(expected)


@pytest.mark.parametrize("hint", ["PYENV_ROOT", "HOME", "command", "shim"])
def test_finds_pyenv_versions(tmp_path: Path, hint: str) -> None:
    home = tmp_path / "home"
    root = home / ".pyenv" if hint == "HOME" else tmp_path / "my pyenv"
    fake_python(root / "versions" / "3.11.7" / "bin" / "python3", 11)
    expected = fake_python(root / "versions" / "3.12.1" / "bin" / "python3", 12)
    fake_python(root / "versions" / "3.13.0" / "bin" / "python3", 13)
    path, env = tmp_path / "bin", {}
    path.mkdir()
    if hint == "PYENV_ROOT":
        env["PYENV_ROOT"] = str(root)
    elif hint == "command":
        path = write_script(root / "bin" / "pyenv", "exit 1").parent
    elif hint == "shim":
        path = fake_shim(root / "shims" / "python3").parent
    result = find_python(path, HOME=str(home), **env)
    assert result.stdout.strip() == str(expected), result.stderr


def test_asks_uv(tmp_path: Path) -> None:
    expected = fake_python(tmp_path / "uv-managed" / "python3.12", 12)
    write_script(tmp_path / "bin" / "uv", f'[ "$1 $2" = "python find" ] && echo "{expected}"')
    assert find_python(tmp_path / "bin").stdout.strip() == str(expected)


def test_none_found_is_one_sentence(tmp_path: Path) -> None:
    fake_shim(tmp_path / "bin" / "python3.12")
    fake_python(tmp_path / "bin" / "python3", 11)
    assert_one_sentence(find_python(tmp_path / "bin"), "no Python >= 3.12", "install", "PYTHON=")


def test_given_python_wins(tmp_path: Path) -> None:
    fake_python(tmp_path / "bin" / "python3.12", 12)
    expected = fake_python(tmp_path / "mine" / "python", 13)
    assert find_python(tmp_path / "bin", PYTHON=str(expected)).stdout.strip() == str(expected)


def test_given_python_is_never_replaced_by_another(tmp_path: Path) -> None:
    fake_python(tmp_path / "bin" / "python3.12", 12)
    old = write_script(
        tmp_path / "old",
        f'exec "{sys.executable}" -c "import sys; sys.version_info = (3, 11, 9); exec(sys.argv[1])" "$2"',
    )
    assert_one_sentence(find_python(tmp_path / "bin", PYTHON=str(old)), str(old), "Python 3.11", ">= 3.12")
    missing = tmp_path / "missing"
    assert_one_sentence(find_python(tmp_path / "bin", PYTHON=str(missing)), str(missing), "does not run")
    without_venv = write_script(
        tmp_path / "without-venv",
        f'exec "{sys.executable}" -c "import sys; sys.modules[\'ensurepip\'] = None; exec(sys.argv[1])" "$2"',
    )
    assert_one_sentence(find_python(tmp_path / "bin", PYTHON=str(without_venv)), "ensurepip", "apt install")


@pytest.fixture(scope="module")
def packaging_arguments() -> dict:
    """The keyword arguments that setup.py hands to setuptools."""
    import setuptools

    seen: dict = {}
    original = setuptools.setup
    setuptools.setup = seen.update
    try:
        runpy.run_path(str(ROOT / "setup.py"))
    finally:
        setuptools.setup = original
    return seen


@pytest.fixture(scope="module")
def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    matches = [re.fullmatch(r"([A-Za-z0-9._-]+)==(\S+)", line) for line in lines if line and not line.startswith("#")]
    assert all(matches), "constraints.txt has a line that is not NAME==VERSION"
    return {canonicalize_name(match[1]): match[2] for match in matches}


def test_version_is_the_package_version(packaging_arguments: dict) -> None:
    text = (ROOT / "megatron_moa" / "__init__.py").read_text(encoding="utf-8")
    assert f'__version__ = "{packaging_arguments["version"]}"' in text


def test_model_cards_name_the_range_of_transformers(packaging_arguments: dict) -> None:
    (bounds,) = (word for word in packaging_arguments["extras_require"]["hf"] if word.startswith("transformers"))
    first, last = (tuple(map(int, version.split("."))) for version in TRANSFORMERS.split(" to "))
    assert bounds == f"transformers>={first[0]}.{first[1]},<{last[0]}.{last[1] + 1}"


def test_constraints_pin_every_requirement_within_its_range(packaging_arguments: dict, pins: dict[str, str]) -> None:
    wanted = packaging_arguments["install_requires"] + packaging_arguments["extras_require"]["dev"]
    for requirement in map(Requirement, wanted):
        version = pins.get(canonicalize_name(requirement.name))
        assert version is not None, f"constraints.txt lacks {requirement.name}"
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement} excludes {version}"


@pytest.mark.parametrize("name", ["torch", "megatron-core"])
def test_constraints_are_what_runs_here(pins: dict[str, str], name: str) -> None:
    """In the project's own .venv; an environment made by hand may differ."""
    if Path(sys.prefix).resolve() != (ROOT / ".venv").resolve():
        pytest.skip("not in the project's .venv")
    from importlib.metadata import version

    assert version(name).split("+")[0] == pins[name]  # "+cpu" and the like name a build, not a version


def test_make_names_its_targets() -> None:
    if shutil.which("make") is None:
        pytest.skip("needs make")
    result = subprocess.run(["make", "-C", str(ROOT), "help"], capture_output=True, text=True, env={**os.environ})
    for target in ("demo", "test", "lint", "format", "clean"):
        assert f"make {target}" in result.stdout


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("arguments", "training.arguments"),
        ("model", "training.model"),
        ("quiet", "megatron_fixes.expected_warnings"),
    ],
)
def test_a_module_of_version_0_1_is_found_by_its_old_name(old: str, new: str) -> None:
    assert importlib.import_module(f"megatron_moa.{old}") is importlib.import_module(f"megatron_moa.{new}")
