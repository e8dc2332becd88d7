"""tools/plot_runs.py: what is drawn, by its numbers, and that it is drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_moa.runs.curves import Course, Curve
from tests.runs.test_curves import TOKENS, steps, write_events
from tools import plot_runs


def curve(tokens: list[float], values: list[float]) -> Curve:
    """Of one value a second."""
    return Curve(np.array(tokens, float), np.arange(len(tokens), dtype=float), np.array(values, float))


def test_smoothing_is_a_running_mean_over_what_there_is() -> None:
    line = curve(list(range(10)), [0, 0, 0, 0, 10, 0, 0, 0, 0, 5])
    assert plot_runs.smoothed(line, 0.4).values == pytest.approx([0, 0, 2, 2, 2, 2, 2, 1, 5 / 4, 5 / 3])
    assert plot_runs.smoothed(line, 0.0) is line
    straight = curve(list(range(10)), list(range(10)))
    assert plot_runs.smoothed(straight, 0.4).values[2:-2] == pytest.approx(straight.values[2:-2])


def test_seeds_are_put_at_the_places_that_all_reach() -> None:
    places, values = plot_runs.stacked([curve([0, 10, 20, 30], [4, 3, 2, 1]), curve([5, 25], [6, 2])], "tokens")
    assert places.tolist() == [10, 20]
    assert values.tolist() == [[3, 2], [5, 3]]


def test_the_difference_is_taken_at_the_same_number_of_tokens() -> None:
    baseline = [curve([0, 10, 20, 30], [4, 3, 2, 1]), curve([0, 10, 20, 30], [6, 5, 4, 3])]  # mean 5 4 3 2
    places, values = plot_runs.difference([curve([5, 15, 25], [4, 3, 2.5])], baseline)
    assert places.tolist() == [10, 20]
    assert values == pytest.approx(np.array([[3.5 - 4, 2.75 - 3]]))
    places, _ = plot_runs.difference([curve([40, 50], [1, 1])], baseline)
    assert not len(places)


def test_units() -> None:
    assert plot_runs.token_unit(4.6e9) == (1e9, "tokens (billions)")
    assert plot_runs.token_unit(640) == (1.0, "tokens")
    assert plot_runs.time_unit(90) == (1.0, "time (seconds)")
    assert plot_runs.time_unit(5 * 3600) == (3600.0, "time (hours)")


def test_labels_are_as_long_as_they_must_be(tmp_path: Path) -> None:
    folders = [tmp_path / "sweep" / arm / "1" for arm in ("none", "moa")]
    for folder in folders:
        (folder / "tensorboard").mkdir(parents=True)
        (folder / "train.log").touch()
    assert plot_runs.default_labels(folders) == ["none/1", "moa/1"]
    assert plot_runs.default_labels([folder / "tensorboard" for folder in folders]) == ["none/1", "moa/1"]
    assert plot_runs.default_labels([folder / "train.log" for folder in folders]) == ["none/1", "moa/1"]
    assert plot_runs.default_labels([folders[0].parent, folders[1].parent]) == ["none", "moa"]


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, Path]:
    """Two seeds of a baseline, two of an arm with coefficients and validation."""
    folders = {}
    for arm, loss in (("none", 4.0), ("moa", 3.5)):
        for seed in (1, 2):
            folders[f"{arm}-{seed}"] = folder = tmp_path / f"{arm}-{seed}"
            points = steps(1, 100, loss + 0.1 * seed)
            points += [("lm loss validation", step, step, loss - 0.01 * step) for step in (50, 100)]
            if arm == "moa":
                points += [(f"moa/layer_{n}/silu/{what}", 100, 99, 0.5) for n in (1, 2) for what in ("mean", "std")]
            write_events(folder / "tensorboard", 1e9, points)
    return folders


def test_figures_are_written(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    output = runs["none-1"].parent / "new" / "plots"
    labels = ["--labels", "SwiGLU", "SwiGLU", "MoA, all seven", "MoA, all seven"]
    plot_runs.main([*map(str, runs.values()), *labels, "--baseline", str(runs["none-2"]), "--output", str(output)])
    names = ["loss-tokens.png", "loss-time.png", "validation.png", "difference.png", "coefficients-MoA-all-seven.png"]
    assert capsys.readouterr().out.split() == [str(output / name) for name in names]
    for name in names:
        data = (output / name).read_bytes()
        assert data.startswith(b"\x89PNG")
        assert len(data) > 10_000  # an empty pair of axes has less


def test_labels_that_look_alike_in_a_file_name_keep_their_figures(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [str(runs["moa-1"])] * 5
    labels = ["--labels", "a b", "a-b", "a-b-2", "a/b", "x" * 300]
    plot_runs.main([*folders, *labels, "--output", str(tmp_path / "plots")])
    names = [Path(line).name for line in capsys.readouterr().out.splitlines()][3:]
    ends = ("a-b", "a-b-2", "a-b-2-2", "a-b-3", "x" * 100)
    assert names == [f"coefficients-{end}.png" for end in ends]
    assert all((tmp_path / "plots" / name).is_file() for name in names)


def test_what_the_axes_show(runs: dict[str, Path], tmp_path: Path) -> None:
    arms, baseline = plot_runs.arms_of(list(runs.values()), ["a", "a", "b", "b"], runs["none-1"])
    assert [(arm.title, len(arm.runs)) for arm in arms] == [("a (2 runs)", 2), ("b (2 runs)", 2)]
    assert baseline is arms[0]
    page = plot_runs.Page(arms, tmp_path)
    plot_runs.draw_difference(page, arms, baseline, 0.0)
    ((_, figure),) = page.pending
    training, validation = figure.axes
    line = next(line for line in training.lines if line.get_label() == "b (2 runs)")
    assert line.get_xdata() == pytest.approx(TOKENS * np.arange(1, 101) / 1e3)
    assert line.get_ydata() == pytest.approx(np.full(100, -0.5), abs=1e-6)
    assert validation.get_xlabel() == "tokens (thousands)"
    assert "validation loss less that of\na" in validation.get_ylabel()
    (band,) = training.collections
    spread = band.get_paths()[0].vertices[:, 1]
    assert (spread.min(), spread.max()) == pytest.approx((-0.5 - 0.1 / 2**0.5, -0.5 + 0.1 / 2**0.5), abs=1e-6)


def test_a_baseline_beside_the_runs_is_drawn_too(runs: dict[str, Path]) -> None:
    arms, baseline = plot_runs.arms_of([runs["moa-1"]], None, runs["none-1"])
    assert [arm.label for arm in arms] == ["none-1", "moa-1"]
    assert baseline is arms[0]
    assert all(isinstance(run, Course) for arm in arms for run in arm.runs)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["none-1", "moa-1", "--labels", "a"], "--labels: 1 for 2 runs; give one for each RUN"),
        (["none-1", "absent"], "absent: there is no such file or folder"),
        (["none-1", "--baseline", "none-1"], "every run is the baseline's"),
        (["none-1", "--smooth", "1.5"], "--smooth 1.5: not a part of a run"),
        (["none-1", "later", "--baseline", "none-1"], "later: no number of tokens in common with none-1, the baseline"),
        (["none-1", "--output", "a-file"], "is a file; give a folder"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(
    arguments: list[str],
    words: str,
    runs: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(runs["none-1"].parent)
    write_events(Path("later"), 1e9, steps(1001, 1100, 2.0))
    Path("a-file").touch()
    with pytest.raises(SystemExit) as leaving:
        plot_runs.main(arguments)
    assert leaving.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("plot_runs.py: error: ")
    assert words in line
    assert not Path("plots").exists()


STAMP = " [2026-01-01 00:00:{:02d}.000000]"
STEP = (
    STAMP + " iteration {:8d}/       4 | consumed samples: {:12d} | elapsed time per iteration (ms): 10.0 | "
    "learning rate: 1.0E-03 | global batch size:     4 | lm loss: {:.6E} |"
)
CELLS = " coefficients at iteration {} | layer {} | silu 0.5000 +- 0.1000 | linear.tanh 0.2500 +- 0.0500"


def write_damaged(path: Path, tail: str) -> None:
    """A run of two steps that was killed while it wrote ``tail``, and its second start behind that."""
    first = ["  seq_length ............ 32", *(STEP.format(step, step, 4 * step, 5.0) for step in (1, 2))]
    first += [CELLS.format(2, layer) for layer in (1, 2)]
    second = ["No CUDA device found", "  seq_length ............ 32"]
    second += [STEP.format(10 + step, step, 4 * step, 4.0) for step in (3, 4)]
    path.write_bytes("\n".join([*first, tail + "\n".join(second)]).encode("utf-8", "surrogateescape") + b"\n")


@pytest.mark.parametrize(
    "tail",
    [
        "",
        " validation loss at iteration 2 on validation set | lm loss value: 5.1",
        " validation loss at iteration 2 on validation set | lm loss value: 5.1E",
        STEP.format(3, 3, 12, 9.0)[:-4],
        " [2026-13-41 99:00:00.1] iteration        3/       4 | elapsed time per ite",
        CELLS.format(3, 1)[:-3],
        CELLS.format(3, 1)[:-20],
        CELLS.format(3, "")[:-3],
        "  seq_length ............ 3",
        "\0" * 4096,
        "\udcff\udcfe",
    ],
)
def test_a_log_that_was_cut_off_is_read(tail: str, tmp_path: Path) -> None:
    write_damaged(tmp_path / "train.log", tail)
    course = plot_runs.read_course(tmp_path)
    assert course.loss.values.tolist() == [5.0, 5.0, 4.0, 4.0]
    assert course.loss.tokens.tolist() == [128, 256, 384, 512]
    assert len(course.validation) == 0
    assert course.coefficients.iteration == 2
    assert course.coefficients.mean.tolist() == [[0.5, 0.25]] * 2


def test_a_log_that_was_cut_off_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_damaged(Path("train.log"), " validation loss at iteration 2 on validation set | lm loss value: 5.1")
    plot_runs.main(["train.log"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == ["plots/loss-tokens.png", "plots/loss-time.png"]
    assert printed[2].startswith("plots/coefficients-")


def test_plots_that_cannot_be_written_are_one_line(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(runs["none-1"].parent)
    with pytest.raises(SystemExit) as leaving:
        plot_runs.main(["none-1", "--output", "/proc/plots"])
    assert leaving.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("plot_runs.py: error: --output /proc/plots: cannot be written to (")
