"""tools/benchmark_conversion.py, and with it that no conversion holds a model twice."""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path

import pytest

from megatron_moa.runs.tiny_model import SWIGLU, TINY
from tools.benchmark_conversion import conversions, main, measure, size, write_random

_PARAMETERS = 16 * (4 * 1024**2 + 3 * 1024 * 4096 + 2 * 1024) + 1024 + 2 * 64 * 1024
_BASE = 1.6e9  # bytes: the libraries in two processes, one layer's tensors; 1.1e9 to 1.5e9 were measured
_SHAPE = (
    "--num-layers 16 --hidden-size 1024 --num-attention-heads 16 --num-query-groups 16 --ffn-hidden-size 4096 --bf16 "
    "--moa-mixing none"
).split()


def test_memory_of_a_process_and_its_children() -> None:
    child = "import time; block = bytearray(150_000_000); time.sleep(1)"
    parent = f"import subprocess as s, sys; block = bytearray(100_000_000); s.run([sys.executable, '-c', {child!r}])"
    usage = measure([sys.executable, "-c", parent])
    assert usage.returncode == 0
    assert 250e6 < usage.own < 300e6
    assert usage.own < usage.resident < 350e6
    assert 1 < usage.seconds < 30
    failed = measure([sys.executable, "-c", "raise SystemExit('no')"])
    assert (failed.returncode, failed.log) == (1, "no\n")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--folder", "{tmp}/none"], "--folder {tmp}/none: no folder to write in; make it, or name another"),
        (["--folder", "{tmp}/file"], "--folder {tmp}/file: no folder to write in"),
        (["--limit", "nan"], "argument --limit: a number above 0 is wanted, not nan"),
        (["dense-9b"], "dense-9b: there is no such recipe"),  # before minutes are spent on the first
    ],
)
def test_mistakes_are_one_line(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    arguments = ["dense-0.12b", *(flag.replace("{tmp}", str(tmp_path)) for flag in flags)]
    with pytest.raises(SystemExit) as left:
        main(arguments)
    printed = capsys.readouterr()
    assert (left.value.code, printed.out) == (2, "")
    (line,) = printed.err.splitlines()
    assert message.replace("{tmp}", str(tmp_path)) in line


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_no_conversion_holds_a_model_twice(tmp_path: Path) -> None:
    flags = [*TINY, *SWIGLU, *_SHAPE]
    process = multiprocessing.get_context("spawn").Process(target=write_random, args=(flags, tmp_path / "start"))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert size(tmp_path / "start") == pytest.approx(2 * _PARAMETERS, rel=0.01)
    for tool, (arguments, out) in conversions(tmp_path).items():
        usage = measure([sys.executable, str(Path(__file__).parents[2] / "tools" / tool), *arguments])
        assert usage.returncode == 0, usage.log
        assert size(out) == pytest.approx(2 * _PARAMETERS, rel=0.02), tool
        # float32 for the comparison, once; half a copy more fails.
        assert usage.own < 1.2 * 4 * _PARAMETERS + _BASE, f"{tool}: {usage.own / 1e9:.2f} GB"
