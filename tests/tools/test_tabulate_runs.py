"""tools/tabulate_runs.py: what it counts, what it refuses, what it says of rates that were not tuned."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import tabulate_runs


def write_log(folder: Path, *, loss: float, last: int = 40, total: int = 40, **settings: object) -> None:
    """A log as a run would leave it."""
    values = {"lr": 0.001, "seed": 1, "hidden_size": 64, "moa_mixing": "none", "moa_form": "auto", **settings}
    lines = [f"  {name} ............ {value}" for name, value in values.items()]
    for iteration in range(10, last + 1, 10):
        lines.append(
            f" [x] iteration {iteration:8d}/{total:8d} | elapsed time per iteration (ms): 20.0 | lm loss: 4.0E+00 |"
        )
    if last == total:
        lines.append(f" validation loss at iteration {total} on validation set | lm loss value: {loss:.6E} |")
    folder.mkdir(parents=True)
    (folder / "train.log").write_text("\n".join(lines))


def rows(text: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines() if line.startswith("|")
    ]


def test_seeds_are_averaged_and_arms_compared_at_their_own_best(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moa = {"moa_mixing": "moa", "moa_form": "bi-sided"}
    for rate, base, mixed in ((0.001, 3.4, 3.5), (0.002, 3.2, 3.1), (0.004, 3.3, 3.0)):
        for seed, offset in ((1, 0.0), (2, 0.02)):
            write_log(tmp_path / f"a{rate}{seed}", loss=base + offset, lr=rate, seed=seed)
            write_log(tmp_path / f"b{rate}{seed}", loss=mixed + offset, lr=rate, seed=seed, **moa)
    tabulate_runs.main([str(tmp_path)])
    captured = capsys.readouterr()
    table = rows(captured.out)
    assert [row[0] for row in table[2:]] == ["none"] * 3 + ["moa"] * 3
    assert table[3][1:5] == ["0.002", "1,2", "3.2100 *", "+- 0.0141"]
    assert table[7][1:4] == ["0.004", "1,2", "3.0100 *"]
    assert table[7][6] == "-0.2000"  # to 3.21, not to the baseline at the same rate
    assert table[5][6] == "+0.3000"
    assert "moa: best at the highest learning rate tried, 0.004; try a higher one" in captured.err
    assert "none:" not in captured.err


def test_arms_are_told_apart_by_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_log(tmp_path / "1", loss=3.0, moa_mixing="moa", moa_form="bi-sided", moa_gate="sigmoid")
    write_log(tmp_path / "2", loss=3.1, moa_mixing="moa", moa_form="one-sided", moa_gate="sigmoid")
    write_log(tmp_path / "3", loss=3.2, moa_form="auto", moa_gate="tanh")  # of a baseline the gate is no setting
    tabulate_runs.main([str(tmp_path), "--csv"])
    lines = [line.split(",") for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines[1:]] == ["none", "moa bi-sided", "moa one-sided"]


def test_layers_and_all_settings_of_gates_tell_arms_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gated, other = {"swiglu": True, "squared_relu": False}, {"swiglu": False, "squared_relu": True}
    moa = {"moa_mixing": "moa", "moa_gate_bias": False, "moa_freeze_gates": False}
    write_log(tmp_path / "1", loss=3.0, **gated, ffn_hidden_size=170)
    write_log(tmp_path / "2", loss=3.5, **other, ffn_hidden_size=256)
    write_log(tmp_path / "3", loss=3.1, **gated, **moa, moa_form="bi-sided")
    write_log(tmp_path / "4", loss=3.2, **gated, **moa | {"moa_gate_bias": True}, moa_form="bi-sided")
    write_log(tmp_path / "5", loss=3.3, **gated, **moa | {"moa_freeze_gates": True}, moa_form="bi-sided")
    write_log(tmp_path / "6", loss=3.4, **other, **moa, moa_form="type1")
    tabulate_runs.main([str(tmp_path)])
    found = {row[0]: [*row, ""][6] for row in rows(capsys.readouterr().out)[2:]}
    assert found == {
        "none swiglu 170": "",
        "none squared_relu 256": "",
        "moa bi-sided swiglu": "+0.1000",
        "moa bi-sided gate_bias swiglu": "+0.2000",
        "moa bi-sided freeze_gates swiglu": "+0.3000",
        "moa type1 squared_relu": "-0.1000",
    }


def test_logs_of_format_version_1_have_todays_names_or_are_not_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = {"moa_mixing": "moa", "moa_amplitude": "fixed", "moa_la_init": [0.5], "init_method_std": 0.05}
    write_log(tmp_path / "1", loss=3.0, moa_form="bi-sided", moa_init_scale="swiglu", **old)
    write_log(tmp_path / "2", loss=3.1, moa_form="one-sided", moa_init_scale="swiglu", **old)
    write_log(tmp_path / "3", loss=3.1, moa_form="one-sided", **{**old, "moa_mixing": "none"})
    new = {"moa_mixing": "moa", "moa_amplitude": "fixed", "moa_init": [1.0], "moa_gate_init_std": 0.02}
    write_log(tmp_path / "4", loss=2.9, moa_form="bi-sided", moa_init_scale="matched", **new)
    tabulate_runs.main([str(tmp_path), "--csv"])
    captured = capsys.readouterr()
    lines = [line.split(",") for line in captured.out.splitlines()]
    assert [line[0] for line in lines[1:]] == ["none", "moa 0.05", "moa 0.02"]  # they differ in the gates' std alone
    assert f"not counted: {tmp_path}/2/train.log: its one-sided form is of format version 1" in captured.err


@pytest.mark.parametrize("name", ["moa_form", "moa_amplitude", "init_method_std"])
def test_a_log_of_format_version_1_that_lacks_a_setting_is_not_counted(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = {"moa_mixing": "moa", "moa_amplitude": "fixed", "moa_la_init": [0.5], "init_method_std": 0.05}
    folder = tmp_path / "a\nb"
    write_log(folder, loss=3.0, moa_form="bi-sided", **old)
    log = folder / "train.log"
    log.write_text("".join(line for line in log.read_text().splitlines(True) if f" {name} " not in line))
    with pytest.raises(SystemExit) as caught:
        tabulate_runs.main([str(log)])
    assert caught.value.code == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == rf"not counted: {tmp_path}/a\nb/train.log: its list of arguments is damaged at {name}"
    assert second.endswith("train.log: no run is complete; let one end, or name others")


def test_unfinished_and_diverged_runs_are_named_and_not_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_log(tmp_path / "done", loss=3.0)
    write_log(tmp_path / "half", loss=2.0, last=20, seed=2)
    write_log(tmp_path / "nan", loss=float("nan"), seed=3)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "train.log").write_text("pretrain_gpt_moa.py: error: no\n")
    tabulate_runs.main([str(tmp_path)])
    captured = capsys.readouterr()
    assert rows(captured.out)[2][2:4] == ["1", "3.0000 *"]
    assert "half/train.log: at iteration 20 of 40" in captured.err
    assert "nan/train.log: no finite validation loss" in captured.err
    assert "empty/train.log: no training in it" in captured.err


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"hidden_size": 128, "seed": 2}, "has hidden_size 128, "),
        ({"num_experts": 8, "seed": 2}, "has num_experts 8, "),
        ({"weight_decay": 0.0, "seed": 2}, "has weight_decay 0.0, "),
        ({}, "the same run as "),
    ],
)
def test_what_does_not_belong_into_one_table_is_refused(
    second: dict[str, object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_log(tmp_path / "a", loss=3.0, num_experts=None, weight_decay=0.1)
    write_log(tmp_path / "b", loss=3.0, **{"num_experts": None, "weight_decay": 0.1, **second})
    with pytest.raises(SystemExit) as caught:
        tabulate_runs.main([str(tmp_path)])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_a_missing_path_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, message in ((tmp_path / "no", "there is no such file"), (tmp_path, "holds no train.log")):
        with pytest.raises(SystemExit):
            tabulate_runs.main([str(path)])
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(("name", "value"), [("lr", "0.00No CUDA"), ("seed", "1.0"), ("seed", "9" * 5000)])
def test_a_damaged_list_of_arguments_is_named(
    name: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_log(tmp_path / "a", loss=3.0)
    write_log(tmp_path / "b", loss=3.0, **{name: value})
    tabulate_runs.main([str(tmp_path)])
    captured = capsys.readouterr()
    assert len(rows(captured.out)) == 3
    assert f"not counted: {tmp_path}/b/train.log: its list of arguments is damaged at {name}" in captured.err
