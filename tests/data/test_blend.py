"""tools/blend.py: weights, validation data of its own, one-line errors."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from megatron_moa.data import blends, dataset
from megatron_moa.errors import UserError
from tests.support.datasets import (
    make_dataset,
    one_line,
)
from tools import blend


@pytest.mark.parametrize(
    ("flags", "weights"),
    [
        ([], [8 / 9, 1 / 9]),
        (["--temperature", "3"], [2 / 3, 1 / 3]),
        (["--temperature", "1e9"], [1 / 2, 1 / 2]),
        (["--weights", "1", "3"], [1 / 4, 3 / 4]),
    ],
)
def test_blend_weights(
    flags: list[str], weights: list[float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """80 documents of 100 tokens, and 80 of 12 or 13: 90 % of them train."""
    prefixes = [make_dataset(tmp_path / "big", [100] * 80), make_dataset(tmp_path / "small", [12, 13] * 40)]
    output = str(tmp_path / "blend.txt")
    blend.main(["--data", *prefixes, *flags, "--split", "90,10,0", "--tokens", "36e3", "--output", output])
    words = Path(output).read_text().split()
    assert words[1::2] == prefixes
    assert [float(word) for word in words[::2]] == pytest.approx(weights, abs=1e-6)
    assert blends.read_blend_file("--data-args-path", output) == [
        (f"--data-args-path {output}, line {i}:", prefix) for i, prefix in enumerate(prefixes, 1)
    ]
    printed = capsys.readouterr().out
    for prefix, size, weight in zip(prefixes, (7200, 900), weights, strict=True):
        expected = rf"{prefix} +{size:,} +{weight:.4f} +{round(36_000 * weight):,} +{36_000 * weight / size:.2f}\n"
        assert re.search(expected, printed)
    assert f"--data-args-path {output} --split 90,10,0" in printed


def test_blend_with_its_own_validation_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefixes = [make_dataset(tmp_path / name, [10] * (i + 1)) for i, name in enumerate("abc")]
    output = str(tmp_path / "blend.json")
    blend.main(["--data", *prefixes[:2], "--valid", *prefixes[1:], "--output", output])
    assert f"--per-split-data-args-path {output} " in capsys.readouterr().out
    assert json.loads(Path(output).read_text()) == {
        "train": ["0.333333", prefixes[0], "0.666667", prefixes[1]],
        "valid": ["20", prefixes[1], "30", prefixes[2]],
        "test": None,
    }
    found = blends.read_blends_file("--per-split-data-args-path", output)
    assert {part: [prefix for _, prefix in named] for part, named in found.items()} == {
        dataset.TRAIN: prefixes[:2],
        dataset.VALIDATION: prefixes[1:],
    }


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--data", "{tmp}/no"], "--data {tmp}/no: no file {tmp}/no.bin; check the path"),
        (["--data", "{tmp}/a b"], "--data '{tmp}/a b': a blend file is made of words; give the dataset a name without"),
        (["--weights", "1", "2"], "--weights 1 2: 2 weights for 1 datasets; give one for each"),
        (["--weights", "0"], "--weights 0: must be above 0; leave a dataset out that shall give nothing"),
        (["--weights", "1", "--temperature", "2"], "--temperature 2: has no effect with --weights; drop one"),
        (["--temperature", "0"], "--temperature 0: a number above 0 is wanted; 1 weighs by tokens"),
        (["--weights", "nan"], "--weights nan: must be above 0; leave a dataset out"),
        (["--data", "{tmp}/a", "{tmp}/a", "--weights", "1e308", "1e308"], "too large or too far apart; give shares"),
        (["--data", "{tmp}/a", "{tmp}/a", "--weights", "5e-324", "1e9"], "too large or too far apart; give shares"),
        (["--data", "{tmp}/a", "{tmp}/c", "--temperature", "1e-6"], "--temperature 1e-06: gives the smaller datasets"),
        (["--tokens", "nan"], "--tokens: a number above 0 is wanted, not nan"),
        (["--split", "0,1,0"], "--split 0,1,0: leaves nothing of {tmp}/a to training; use e.g. --split 99,1,0"),
        (["--split", "9,1,0", "--valid", "{tmp}/a"], "--split 9,1,0: contradicts --valid and --test"),
        (["--data", "{tmp}/a", "{tmp}/c", "{tmp}/a"], "--data {tmp}/a: is named twice; name it once, a larger weight"),
        (["--data", "{tmp}/a", "{tmp}/link"], "--data {tmp}/link: is named twice; name it once"),
        (["--valid", "{tmp}/c", "{tmp}/./c"], "--valid {tmp}/./c: is named twice; name it once"),
        (["--output", "{tmp}/c.idx", "--overwrite", "--test", "{tmp}/c"], "--output {tmp}/c.idx: is the file {tmp}/c."),
        (["--data", "2024"], "--data 2024: would be a weight in a blend file; write ./2024"),
        (["--valid", "nan"], "--valid nan: would be a weight in a blend file; write ./nan"),
        (["--test", "#1"], "--test #1: would be a comment in a blend file; write ./#1"),
        (["--valid", "{tmp}/no"], "--valid {tmp}/no: no file"),
        (["--output", "{tmp}/there"], "--output {tmp}/there: {tmp}/there exists; choose another name or add --ove"),
    ],
)
def test_mistakes_in_a_blend(
    flags: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_dataset(tmp_path / "a", [10] * 100)
    make_dataset(tmp_path / "a b", [10] * 100)
    make_dataset(tmp_path / "c", [20] * 100)
    for ending in (".bin", ".idx"):
        (tmp_path / f"link{ending}").symlink_to(f"a{ending}")
    (tmp_path / "there").touch()
    before = sorted(os.listdir(tmp_path))
    arguments = ["--data", f"{tmp_path}/a", "--output", f"{tmp_path}/blend"]
    arguments += [flag.replace("{tmp}", str(tmp_path)) for flag in flags]
    assert expected.replace("{tmp}", str(tmp_path)) in one_line(capsys, blend.main, arguments)
    assert sorted(os.listdir(tmp_path)) == before


def test_a_blends_file_that_is_nested_too_deeply_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "blend.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="not a JSON object with the keys train, valid and test"):
        blends.read_blends_file("--per-split-data-args-path", str(tmp_path / "blend.json"))
