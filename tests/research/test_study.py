"""Tests studies: what is compared, what is run next, what survives a kill.

test_study_report.py tests what is made of their results.
"""

import contextlib
import copy
import datetime
import gzip
import hashlib
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import tomllib
import types
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_moa.command_line.words import flag_values
from megatron_moa.errors import UserError
from megatron_moa.megatron_fixes.single_process import TASK_COUNTS
from megatron_moa.mixture.start_scale import matching_scale, output_scale
from megatron_moa.research.study.arms import ARMS, Size, by_gate
from megatron_moa.research.study.corpora import make_corpus
from megatron_moa.research.study.evidence import read_evidence
from megatron_moa.research.study.grid import Cell, cell_values, pending, read_study
from megatron_moa.research.study.lines import RESULTS, end_last_line, read_results, read_timings
from megatron_moa.research.study.paper import ROWS, TABLE_1, TABLE_2
from megatron_moa.research.study.planned import planned
from megatron_moa.research.study.runner import Runner, command, losses_of
from megatron_moa.research.study.timing import TIMING, WIDER, width_of_equal_time
from tests.research.test_study_statistics import line as any_line
from tests.support import launch
from tests.support.tokenizers import train_sentencepiece
from tools import study as study_tool
from tools import study_report

ROOT = Path(__file__).resolve().parents[2]
SIZE = Size("tiny", layers=2, hidden=48, ffn=128, heads=2, sequence=64, batch=8, init_std=0.0924)
STUDY = """
evaluation = 2
timing = 0
[corpora.python]
source = "python"
glob = "json/*.py"
vocabulary = 400
[sizes.tiny]
layers = 2
hidden = 48
ffn = 128
heads = 2
[[grid]]
arms = ["swiglu", "moa-bi-sided"]
sizes = ["tiny"]
corpora = ["python"]
tokens = [1e5]
rates = [1e-2, 2e-2]
"""
SEEDS = """
[[grid]]
arms = ["swiglu", "moa-bi-sided"]
sizes = ["tiny"]
corpora = ["python"]
tokens = [1e5]
seeds = [1, 2, 3]
"""


def study_of(text, folder):
    path = folder / "study.toml"
    path.write_text(text)
    return read_study(path)


# Arms.


def test_a_scaled_layer_is_as_large_as_the_mixture_it_is_compared_with():
    size = replace(SIZE, gate_init_std=0.2)  # other than the weights'
    for arm in (ARMS["swiglu-scaled"], ARMS["relu2-scaled"]):
        flags = arm.flags(size)
        start = float(flags[flags.index("--moa-init") + 1])
        scaled = replace(arm.mixture, initial_coefficients=(start,))
        mixture = replace(ARMS[arm.as_large_as].mixture, gate_init_std=0.2)
        std, hidden = size.init_std, size.hidden
        assert output_scale(scaled, std, hidden) == pytest.approx(output_scale(mixture, std, hidden), rel=1e-5)
        assert "--moa-freeze-gates" in flags


def test_gate_vectors_start_as_the_weights_unless_the_size_says_otherwise():
    for size, std in ((SIZE, "0.0924"), (replace(SIZE, gate_init_std=0.02), "0.02")):
        flags = ARMS["moa-one-sided"].flags(size)
        assert flags[flags.index("--moa-gate-init-std") + 1] == std
    assert "--moa-gate-init-std" not in ARMS["la-one-sided"].flags(SIZE)


def test_a_type_1_layer_is_4_h_wide_beside_the_papers_swiglu():
    for hidden, ffn in ((768, 2048), (1024, 2730), (1280, 3413), (48, 128)):
        size = replace(SIZE, hidden=hidden, ffn=ffn)
        assert [ARMS[arm].width(size) for arm in ("relu2", "la-type1", "moa-type1-tanh")] == [4 * hidden] * 3
        assert ARMS["swiglu-params"].width(size) == ffn + 5  # as the paper widens it
    assert ARMS["relu2"].width(replace(SIZE, ffn=64)) == 96


def test_where_a_matched_la_starts_from_makes_no_difference():
    """So the earlier runs of it, which started from 0.5, are the same arm."""
    mixture = ARMS["la-bi-sided-matched"].mixture
    old = replace(mixture, activations=("identity", "gelu", "silu", "relu", "leaky_relu", "relu2", "tanh"))
    half = matching_scale(replace(old, initial_coefficients=(0.5,)), 0.0653, 96)
    assert 0.5 * half == pytest.approx(matching_scale(mixture, 0.0653, 96), rel=1e-6)


def test_equal_parameters_are_equal_to_within_a_hidden_unit():
    gates = ARMS["moa-bi-sided"].mixture.num_coefficients * SIZE.hidden
    extra = 3 * SIZE.hidden * (ARMS["swiglu-params"].width(SIZE) - SIZE.ffn)
    assert 0 <= extra - gates < 3 * SIZE.hidden
    ungated, gated = 2 * SIZE.hidden * ARMS["relu2"].width(SIZE), 3 * SIZE.hidden * SIZE.ffn
    assert ungated == gated


def test_only_the_control_has_other_seeds():
    assert {name for name, arm in ARMS.items() if arm.seed(1) != 1} == {"swiglu-again"}
    again, plain = ARMS["swiglu-again"], ARMS["swiglu"]
    assert again.flags(SIZE) == plain.flags(SIZE)


def test_an_arm_says_what_it_is_beside_its_name() -> None:
    for arm in ARMS.values():
        starts_matched = arm.mixture is not None and arm.mixture.init_scale == "matched"
        assert (arm.unmatched is not None) == starts_matched, arm.name
        if starts_matched:
            same = ARMS[arm.unmatched]
            assert (replace(arm.mixture, init_scale="paper"), arm.family) == (same.mixture, same.family)
    assert [ARMS[name].family for name in ("swiglu-scaled", "relu2", "la-type1-half", "moa-quadratic", "polyrelu")] == [
        *("swiglu", "relu2", "la", "moa", "polyrelu")
    ]
    assert by_gate("moa-type1") == {"softmax": "moa-type1-softmax", "tanh": "moa-type1-tanh"}
    assert by_gate("swiglu") == by_gate("la-type1") == {}


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_is_a_command_that_megatron_accepts(name, monkeypatch, tmp_path):
    from megatron_moa.training.arguments import parse_arguments

    study = study_of(STUDY, tmp_path)
    cell = Cell("python", "tiny", 100_000, "adamw", "wsd", name, 1e-2, 1)
    data = ["--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "255"]
    monkeypatch.setattr(sys, "argv", ["pretrain", *command(study, cell, time_width=140), *data])
    args, mixture = parse_arguments(as_global=False)
    expected = ARMS[name].mixture
    assert (mixture is None) == (expected is None)
    assert args.ffn_hidden_size == ARMS[name].width(study.sizes["tiny"], 140)
    assert args.swiglu == ARMS[name].is_gated
    if mixture is not None:
        kept = ("kind", "form", "activations", "gate", "init_scale", "freeze")
        assert mixture.gate_init_std == (study.sizes["tiny"].gate_std if mixture.kind == "moa" else 0.02)
        assert [getattr(mixture, key) for key in kept] == [getattr(expected, key) for key in kept]


def test_the_width_of_equal_time_lies_on_the_line_through_two_widths():
    times = {"swiglu": 10.0, WIDER: 14.0}
    assert width_of_equal_time(times, 100, 150, 12.0) == 125
    with pytest.raises(UserError, match="too busy"):
        width_of_equal_time({"swiglu": 10.0, WIDER: 9.0}, 100, 150, 12.0)


def test_flags_of_mixtures_are_left_out_of_arms_without_one(tmp_path):
    study = study_of(STUDY.replace("timing = 0", "timing = 0\nflags = '--moa-backend eager --bf16'"), tmp_path)
    for cell in pending(study, {}):
        flags = command(study, cell)
        assert ("--moa-backend" in flags) == ("eager" in flags) == (cell.arm == "moa-bi-sided")
        assert "--bf16" in flags


# What is run next.


@pytest.mark.parametrize("more", [SEEDS, "further_seeds = [2, 3]\n"])
def test_rates_come_first_then_seeds_at_each_arms_best(more, tmp_path):
    study = study_of(STUDY + more, tmp_path)
    first = pending(study, {})
    assert {(cell.rate, cell.seed) for cell in first} == {(1e-2, 1), (2e-2, 1)}
    losses = {cell: 3.0 + abs(cell.rate - (2e-2 if cell.arm == "moa-bi-sided" else 1e-2)) for cell in first}
    part = {cell: loss for cell, loss in losses.items() if cell.arm == "swiglu"}
    assert {(cell.arm, cell.rate) for cell in pending(study, part) if cell.seed > 1} == {("swiglu", 1e-2)}
    seeds = pending(study, losses)
    assert {(cell.arm, cell.rate, cell.seed) for cell in seeds} == {
        (arm, rate, seed) for arm, rate in (("swiglu", 1e-2), ("moa-bi-sided", 2e-2)) for seed in (2, 3)
    }
    assert pending(study, losses | dict.fromkeys(seeds, 3.0)) == []


@pytest.mark.parametrize(("best", "tried"), [(4e-2, [5e-3, 1e-2, 2e-2, 4e-2, 8e-2]), (2.5e-3, [1.25e-3, 2.5e-3, 5e-3])])
def test_a_grid_of_rates_goes_on_while_the_best_is_at_its_end(best, tried, tmp_path):
    study = study_of(STUDY + "extend = true\n", tmp_path)
    study = replace(study, grids=(replace(study.grids[0], arms=("swiglu",), rates=(5e-3, 1e-2)),))
    losses = {}
    while cells := pending(study, losses):
        losses |= {cell: abs(math.log(cell.rate / best)) for cell in cells}
    assert set(tried) <= {cell.rate for cell in losses}
    rates = sorted(cell.rate for cell in losses)
    assert rates[0] < best < rates[-1]


def test_a_diverged_rate_is_no_best_one(tmp_path):
    study = study_of(STUDY + SEEDS, tmp_path)
    losses = {cell: math.nan if cell.rate == 2e-2 else 3.0 for cell in pending(study, {})}
    assert {cell.rate for cell in pending(study, losses)} == {1e-2}
    everything = dict.fromkeys(losses, math.nan)
    assert pending(study, everything) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("tokens", "tokenz"), "grid 1: tokenz: unknown key"),
        (("tokens = [1e5]\n", ""), "grid 1: tokens: is missing"),
        (('"moa-bi-sided"', '"mao"'), "grid 1: arms mao: unknown; there are swiglu"),
        (('sizes = ["tiny"]', 'sizes = ["huge"]'), "grid 1: sizes huge: unknown; there are tiny"),
        (("layers = 2", "name = 'a'\nlayers = 2"), "sizes.tiny: name: unknown key; the table's head names a size"),
        (("[sizes.tiny]", "[sizes.'a/b']"), "'a/b': names files of the study; give letters, digits and any of _ . + -"),
        (("[corpora.python]", "[corpora.'..']"), "'..': names files of the study"),
        (("[corpora.python]", '[corpora."a\\tb"]'), "names files of the study"),
        (("heads = 2", "heads = 5"), "sizes.tiny.heads 5: does not divide hidden 48"),
        (("layers = 2", "layers = 2.5"), "sizes.tiny: layers 2.5: must be a whole number"),
        (("layers = 2", 'layers = "two"'), "sizes.tiny: layers 'two': must be a number"),
        (("rates = [1e-2, 2e-2]", 'rates = [1e-2, "x"]'), "grid 1: rates 'x': must be a number"),
        (("tokens = [1e5]", "tokens = []"), "grid 1: tokens: a list is empty"),
        (("evaluation", "evaluatoin"), "evaluatoin: unknown key"),
        (("timing = 0", "save_interval = -1"), "save_interval -1: give 0 or more"),
        (("evaluation = 2", "evaluation = 0"), "evaluation 0: give 1 or more"),
        (("timing = 0", "warmup = 1.5"), "warmup 1.5: give a part of the run"),
        (("heads = 2", "heads = 0"), "sizes.tiny: heads 0: give 1 or more"),
        (("tokens = [1e5]", "tokens = [-5]"), "grid 1: tokens -5: give 1 or more"),
        (("tokens = [1e5]", "tokens = [inf]"), "grid 1: tokens inf: must be a whole number"),
        (("rates = [1e-2, 2e-2]", "rates = [0, 1e-2]"), "grid 1: rates 0: give a positive number"),
        (("rates = [1e-2, 2e-2]", "rates = [nan]"), "grid 1: rates nan: must be a finite number"),
        (("rates = [1e-2, 2e-2]", "seeds = [1, 2]"), "grid 1: swiglu has no rates, here or in a grid of this size"),
        (("rates = [1e-2, 2e-2]", 'rates = "1e-2"'), "grid 1: rates '1e-2': must be a list, such as [1e-2]"),
        (("timing = 0", "flags = '--bf16 --lr 7'"), "flags: --lr: is the study's own"),
        (("timing = 0", "flags = '--weight-deca 0'"), "flags: --weight-deca: neither Megatron 0.19.2 nor megatron_mo"),
        (("[[grid]]", "[[grid]"), "is not TOML"),
        (("[corpora", "#\xe9\n[corpora"), "is not TOML ('utf-8' codec"),
        (("timing = 0", f"timing = 0\nkeep = {'[' * 5000}"), "is not TOML"),
        (("timing = 0", "timing = '0'"), "timing '0': must be a number"),
        (("timing = 0", f"timing = 1{'0' * 400}"), "must be a whole number"),
        (("timing = 0", "grids = []"), "grids: unknown key; there are corpora, evaluation, flags, grid, keep"),
        (("timing = 0", "scales = 3"), "scales 3: must be a table"),
        (("timing = 0", "scales.cpu = 3"), "scales.cpu 3: must be a table"),
        (("timing = 0", "flags = 3"), "flags 3: must be a list"),
        (("[[grid]]", "[grid]"), "grid: must be a list of tables, each with the head [[grid]]"),
        (("[sizes.tiny]", "[sizes]"), "sizes.layers 2: must be a table"),
        (("layers = 2", "recipe = 3"), "sizes.tiny: recipe 3: must be a text"),
        (("layers = 2", "layers = 2\ninit_std = nan"), "sizes.tiny: init_std nan: must be a finite number"),
        (("layers = 2", "layers = 2\nmicro_batch = 3"), "sizes.tiny.micro_batch 3: does not divide batch 16"),
        (("[corpora.python]", "[corpora]\npython = 3\n[other]"), "corpora.python 3: must be a table"),
        (('source = "python"\n', ""), "corpora.python: has neither source nor data"),
        (('"python"', "3"), "corpora.python.source 3: must be a text"),
        (('"python"', '"disk"'), "corpora.python.source disk: unknown; there are python and deb"),
        (("vocabulary = 400\n", ""), "corpora.python: vocabulary: is missing"),
        (("vocabulary = 400", "vocabulary = 20"), "corpora.python: vocabulary 20: give 260"),
        (("vocabulary", "vocabulery"), "corpora.python: vocabulery: unknown key; there are glob, source, vocabulary"),
        (('source = "python"\nglob', 'source = "deb"\nmember'), "corpora.python: url: is missing"),
        (('source = "python"\nglob = "json/*.py"\nvocabulary = 400', "data = 3"), "corpora.python: tokenizer: is mis"),
        (('source = "python"\nglob = "json/*.py"\nvocabulary = 400', "data = 3\ntokenizer = ''"), "data 3: must be a"),
        (("rates = [1e-2, 2e-2]", "extend = true"), "grid 1: extend true: there are no rates to go on from; add rates"),
        (("rates = [", "extend = true\nseeds = [2]\nrates = ["), "grid 1: extend true: its seeds lack 1, the tuning_s"),
        (
            ('"moa-bi-sided"', '"swiglu-time"'),
            "grid 1: arms swiglu-time: is as wide as step times say, of which timing = 0",
        ),
        (
            ("timing = 0", "flags = '--seq-length 64'"),
            "flags: --seq-length: a size says that by its key sequence; leave",
        ),
        (
            ("heads = 2", "heads = 2\nflags = '--num-layers=3'"),
            "sizes.tiny: flags: --num-layers=3: a size says that by",
        ),
        (
            ("heads = 2", "heads = 2\nflags = '--num-experts=8'"),
            "sizes.tiny: flags: --num-experts=8: give the flag and",
        ),
        (
            ("layers = 2", "recipe = 'gpt2-124m'"),
            "recipe gpt2-124m: its layer is not SwiGLU, which arms are built from",
        ),
        (("rates = [1e-2, 2e-2]", "rates = [1e-2]\nextend = 'yes'"), "grid 1: extend 'yes': must be true or false"),
        (("rates = [1e-2, 2e-2]", "rates = [1e-2]\nseeds = [-1]"), "grid 1: seeds -1: give 0 or more"),
        (("rates = [1e-2, 2e-2]", "further_seeds = [2]"), "grid 1: further_seeds 2: there are no rates to"),
        (("rates", "further_seeds = [3]\nseeds = [2]\nrates"), "grid 1: swiglu has no rates, here or in a"),
    ],
)
def test_a_mistake_in_a_studys_file_is_one_line(change, said, tmp_path):
    (tmp_path / "study.toml").write_bytes(STUDY.replace(*change, 1).encode("latin-1"))
    with pytest.raises(UserError, match=r"study\.toml: ") as error:
        read_study(tmp_path / "study.toml")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


PLACES = ["timing", "warmup", "keep", "flags", "scales", "scales.cpu", "scales.cpu.grid", "sizes", "sizes.tiny"]
PLACES += ["sizes.tiny.layers", "sizes.tiny.init_std", "sizes.tiny.recipe", "sizes.tiny.flags", "corpora"]
PLACES += ["corpora.python", "corpora.python.source", "corpora.python.vocabulary", "corpora.python.glob", "grid"]
PLACES += [f"grid.{key}" for key in ("arms", "sizes", "corpora", "tokens", "rates", "seeds", "extend", "optimizer")]
PLACES += ["grid.further_seeds"]
FITTING = [("flags", "a b"), ("flags", []), ("keep", []), ("glob", "a b"), ("extend", True), ("further_seeds", [])]


@pytest.mark.parametrize("place", PLACES)
def test_a_value_of_another_kind_is_one_line(place, tmp_path, monkeypatch):
    *tables, key = place.split(".")
    path, scale = tmp_path / "study.toml", "cpu" if tables[:1] == ["scales"] else "paper"
    path.touch()
    original = tomllib.loads(STUDY + "\n[[scales.cpu.grid]]\ntimed = 2")
    for value in (-0.5, "a b", [], [-3], [[]], {"a": 3}, [{"a": {}}], datetime.date(1979, 5, 27), True):
        content = copy.deepcopy(original)
        table = content
        for name in tables:
            table = table[name][0] if name == "grid" else table[name]
        table[key] = value
        monkeypatch.setattr(tomllib, "loads", lambda _, content=content: content)
        if any(place.endswith(end) and value == fits for end, fits in FITTING):
            read_study(path, scale)
            continue
        with pytest.raises(UserError, match=rf"^{path}: .*\b{key}\b[^\n]*$"):
            read_study(path, scale)


STUDIES = sorted((ROOT / "examples" / "studies").glob("*.toml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_scale_has_the_arms_of_the_study(path):
    scales = tomllib.loads(path.read_text()).get("scales", {})
    arms = {arm for grid in read_study(path).grids for arm in grid.arms}
    assert pending(read_study(path), {})
    for scale in scales:
        study = read_study(path, scale)
        assert {cell.arm for cell in pending(study, {})} == arms
        assert not any(size.recipe for size in study.sizes.values())
    assert ("smoke" in scales) == path.stem.startswith(("paper-", "gpu-"))


def test_the_studies_of_tables_1_and_2_have_their_rows_and_rates():
    for table, rows in (("paper-table1", TABLE_1), ("paper-table2", TABLE_2)):
        path = ROOT / "examples" / "studies" / f"{table}.toml"
        (grid,) = read_study(path).grids
        assert set(grid.arms) == {"swiglu", "relu2", *rows}
        assert grid.rates == (6e-4, 1e-3, 2e-3, 3e-3, 4e-3, 5e-3, 6e-3)
        assert set(grid.arms) <= set(ROWS)


def test_a_papers_model_is_its_recipe():
    study = read_study(ROOT / "examples" / "studies" / "paper-moe.toml")
    cell = next(cell for cell in pending(study, {}) if cell.arm == "moa-one-sided")
    flags = command(study, cell)

    def last(name):
        return flags[len(flags) - flags[::-1].index(name)]

    expected = {
        "--num-layers": "6",
        "--hidden-size": "640",
        "--num-attention-heads": "10",
        "--seq-length": "1024",
        "--global-batch-size": "512",
        "--num-experts": "32",
        "--moe-router-topk": "4",
        "--moe-ffn-hidden-size": "426",
        "--moe-shared-expert-intermediate-size": "1706",
        "--init-method-std": "0.02",
        "--moa-gate-init-std": "0.02",
        "--lr": "0.002",
        "--min-lr": "0",
        "--lr-decay-style": "WSD",
        "--optimizer": "muon",
    }
    assert {name: last(name) for name in expected} == expected
    dense = read_study(ROOT / "examples" / "studies" / "paper-table1.toml")
    flags = command(dense, next(cell for cell in pending(dense, {}) if cell.arm == "relu2" and cell.rate == 2e-3))
    assert [last(name) for name in ("--hidden-size", "--ffn-hidden-size", "--min-lr")] == ["768", "3072", "0.0001"]
    assert "--squared-relu" in flags
    assert "--swiglu" not in flags


def test_a_mistake_about_a_scale_is_one_line(tmp_path, monkeypatch):
    scale = "[scales.small]\ntiming = 3\n[[scales.small.grid]]\nrates = [1e-3]\n"
    path = tmp_path / "study.toml"
    path.write_text(STUDY + scale)
    study = read_study(path, "small")
    assert (study.timing, study.grids[0].rates, study.grids[0].arms) == (3, (1e-3,), ("swiglu", "moa-bi-sided"))
    with pytest.raises(UserError, match=r"--scale smal: .* has no \[scales.smal\]; there are paper, small"):
        read_study(path, "smal")
    path.write_text(STUDY + SEEDS + scale)
    with pytest.raises(UserError, match=r"scales.small: 1 \[\[scales.small.grid\]\] for 2 \[\[grid\]\]"):
        read_study(path, "small")
    path.write_text(STUDY.replace("layers = 2\nhidden = 48\nffn = 128\nheads = 2", 'recipe = "dense-0.12"'))
    with pytest.raises(UserError, match=r"did you mean dense-0.12b"):
        read_study(path)
    monkeypatch.setenv("FFN", "type1")
    with pytest.raises(UserError, match=r"FFN=type1: .* unset FFN"):
        read_study(ROOT / "examples" / "studies" / "paper-table1.toml")


def test_a_plan_is_of_the_studys_size_and_not_of_its_recipe(monkeypatch, tmp_path):
    def plan(request):
        flags = request.flags
        args = {flag: flags[len(flags) - flags[::-1].index(flag)] for flag in shape}
        assert (request.recipe, args) == ("dense-0.12b", shape)
        names = ("SEQ_LENGTH", "GLOBAL_BATCH_SIZE", "MICRO_BATCH_SIZE", "PRECISION")
        assert [request.variables[name] for name in names] == ["2048", "64", "4", "fp32"]
        return types.SimpleNamespace(hours=1.0)

    shape = {"--num-layers": "24", "--hidden-size": "768", "--num-attention-heads": "12", "--ffn-hidden-size": "1000"}
    size = 'recipe = "dense-0.12b"\nlayers = 24\nffn = 1000\nsequence = 2048\nbatch = 64\nmicro_batch = 4'
    study = study_of(STUDY.replace("layers = 2\nhidden = 48\nffn = 128\nheads = 2", size), tmp_path)
    monkeypatch.setattr("megatron_moa.research.study.planned.make_report", plan)
    assert list(planned(study))[-1].startswith("\nAll: 4 runs, 4 GPU hours")
    shape["--moa-activations"] = "identity"  # the arm's own dictionary
    (grid,) = study.grids
    assert "la-one-sided identity" in next(planned(replace(study, grids=(replace(grid, arms=("swiglu-scaled",)),))))


def test_gpu_hours_are_the_planners_times_the_runs(monkeypatch):
    asked = []

    def plan(request):
        names = ("FFN", "TOKENS", "OPTIMIZER", "SCHEDULE")
        asked.append((request.recipe, request.mixing, *(request.variables[name] for name in names)))
        return types.SimpleNamespace(hours=2.0 if request.mixing == "none" else 3.0)

    folder = ROOT / "examples" / "studies"
    full, small = read_study(folder / "paper-table2.toml"), read_study(folder / "paper-table1.toml", "smoke")
    night = read_study(folder / "gpu-dense.toml")  # 6 arms: 3 rates, and 2 further seeds, which are not pending yet
    monkeypatch.setattr("megatron_moa.research.study.planned.make_report", plan)
    assert list(planned(full))[-1].startswith("\nAll: 56 runs, 154 GPU hours")  # 7 rates of 2 baselines and 6 mixtures
    assert sorted(asked) == [
        ("dense-0.12b", mixing, ffn, "2400000000", "adamw", "cosine")
        for mixing, ffn in (("bi-sided", "type2"), ("none", "type1"), ("none", "type2"), ("type1", "type1"))
    ]
    with pytest.raises(UserError, match=r"--plan: the study's file: sizes.tiny: has no recipe, .*; add recipe ="):
        list(planned(small))
    assert len(pending(night, {})) == 18
    assert list(planned(night))[-1].startswith("\nAll: 30 runs, 80 GPU hours, and more where")


# Results.


def line_of(study, cell, **values):
    flags = command(study, cell, 130 if cell.arm == "swiglu-time" else None)
    return {**any_line(cell.arm, 3.0), "cell": cell_values(cell), "flags": flags, **values}


def test_a_line_that_a_kill_cut_off_is_run_anew_and_other_damage_is_refused(tmp_path):
    study = study_of(STUDY, tmp_path)
    cells = pending(study, {})
    path = tmp_path / RESULTS
    whole = json.dumps(line_of(study, cells[0]))
    path.write_text(whole + "\n" + json.dumps(line_of(study, cells[1]))[:-7])
    assert list(losses_of(read_results(path))) == cells[:1]
    assert cells[1] in Runner(study, tmp_path, 1, 1).pending()
    end_last_line(path)
    assert path.read_text() == whole + "\n"
    path.write_text(whole[:-7] + "\n" + whole + "\n")
    with pytest.raises(UserError, match="line 1 is not JSON"):
        read_results(path)


def test_a_whole_last_line_without_its_newline_stays(tmp_path):
    study = study_of(STUDY, tmp_path)
    cells = pending(study, {})[:2]
    path = tmp_path / RESULTS
    text = "\n".join(json.dumps(line_of(study, cell)) for cell in cells)
    path.write_text(text)
    assert list(losses_of(read_results(path))) == cells
    end_last_line(path)
    assert path.read_text() == text + "\n"


def set_in(content, place, value):
    """Sets what a place such as ``cell.rate`` of a line names."""
    *tables, key = place.split(".")
    for name in tables:
        content = content[int(name) if name.isdigit() else name]
    content[key] = value


STEP_TIMES = {"size": "tiny", "optimizer": "adamw", "milliseconds": {"swiglu": 10.0}, "equal_time_width": 130}
STEP_TIMES |= {"rounds": 5, "threads": 1, "machine": "2 cores", "date": "2026-11-24"}
NUMBERS = ["final", "seconds", "iterations", "non_embedding", "cell.tokens", "cell.rate", "cell.seed"]
TEXTS = ["machine", "date", "arm", "corpus", "size", "optimizer", "schedule", "torch"]
CELL = [f"cell.{key}" for key in ("arm", "corpus", "size", "optimizer", "schedule")]
LINE_PLACES = [(RESULTS, place) for place in [*NUMBERS, *CELL, "machine", "date", "versions", "versions.torch", "cell"]]
LINE_PLACES += [(RESULTS, "loss"), (RESULTS, "flags"), (TIMING, "milliseconds.swiglu")]
LINE_PLACES += [(TIMING, place) for place in STEP_TIMES]
LINES_FITTING = [("final", None), ("final", -3), ("flags", []), ("milliseconds", {"a": 1})]


@pytest.mark.parametrize(("name", "place"), LINE_PLACES)
def test_a_foreign_value_in_a_line_is_one_line_of_both_tools(name, place, tmp_path, capsys):
    """In tools/study.py and tools/study_report.py alike."""
    study = study_of(STUDY, tmp_path)
    key = place.split(".")[-1]
    good = line_of(study, pending(study, {})[0]) if name == RESULTS else STEP_TIMES
    (tmp_path / RESULTS).write_text(json.dumps(line_of(study, pending(study, {})[0])) + "\n")
    for value in ("x y", True, None, -3, math.nan, math.inf, 10**400, [], [1], [[1, "x"]], ["x"], {"a": 1}, {"a": []}):
        if (place, value) in LINES_FITTING or (key in TEXTS and value == "x y"):
            continue
        broken = copy.deepcopy(good)
        set_in(broken, place, value)
        (tmp_path / name).write_text(json.dumps(good) + "\n" + json.dumps(broken) + "\n")
        where = rf"error: {tmp_path / name}: line 2: .*\b{key}\b[^\n]*; delete that line, and [^\n]*\n$"
        for main, flags in (
            (study_tool.main, ["--study", tmp_path / "study.toml", "--out", tmp_path, "--list"]),
            (study_report.main, [tmp_path, "--out", tmp_path / "report.md"]),
        ):
            with pytest.raises(SystemExit, match="2"):
                main([str(flag) for flag in flags])
            assert re.search(where, capsys.readouterr().err), value
    del broken[place.split(".")[0]]
    (tmp_path / name).write_text(json.dumps(broken) + "\n")
    with pytest.raises(UserError, match=rf"line 1: {place.split('.')[0]}: is missing; delete"):
        (read_results if name == RESULTS else read_timings)(tmp_path / name)


@pytest.mark.parametrize("content", [b"\xe9", b"7", b"[]", b"null", b"", b"[" * 10**5, b"1" * 10**5])
def test_a_line_that_is_none_is_named(content, tmp_path):
    (tmp_path / TIMING).write_bytes(json.dumps(STEP_TIMES).encode() + b"\n" + content + b"\n")
    with pytest.raises(UserError, match=r"timing.jsonl: line 2 [^\n]*(is not JSON|must be a table)[^\n]*; delete"):
        read_timings(tmp_path / TIMING)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["x"], "flags 'x': must begin with a flag"),
        (["--lr", "x"], "flags: --lr 'x': must be a number"),
        (["--lr", "0", "--min-lr", "0"], "flags: --lr 0: give a positive number"),
        (["--min-lr", "0"], "flags: --lr: is missing"),
        (["--moa-gate-init-std", "0.1"], "flags: --hidden-size: is missing"),
    ],
)
def test_flags_of_a_line_that_no_report_can_read_are_named(flags, said, tmp_path):
    (tmp_path / RESULTS).write_text(json.dumps({**any_line("swiglu", 3.0), "flags": flags}))
    with pytest.raises(UserError, match=rf"results.jsonl: line 1: {said}; delete that line"):
        read_results(tmp_path / RESULTS)


def test_a_curve_may_end_in_nan_where_the_run_diverged(tmp_path):
    line = {**any_line("swiglu", None), "loss": [[512, 9.0], [1024, math.nan]]}
    (tmp_path / RESULTS).write_text(json.dumps(line))
    assert list(map(math.isnan, losses_of(read_results(tmp_path / RESULTS)).values())) == [True]
    (tmp_path / RESULTS).write_text(json.dumps({**line, "final": 3.0}))
    with pytest.raises(UserError, match=r"line 1: loss nan: must be a finite number; delete"):
        read_results(tmp_path / RESULTS)


@pytest.mark.parametrize("out", ["file", "file/below", "link"])
def test_an_output_folder_that_cannot_be_is_one_line(out, tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("/proc/none")
    (tmp_path / "study.toml").write_text(STUDY)
    flags = ["--study", str(tmp_path / "study.toml"), "--out", str(tmp_path / out)]
    for asked in ([], ["--list"]) if out != "link" else ([],):
        with pytest.raises(SystemExit, match="2"):
            study_tool.main([*flags, *asked])
        error = capsys.readouterr().err
        assert re.match(rf"study.py: error: --out {tmp_path / out}: cannot be used \(.*\); name another", error)
        assert error.count("\n") == 1


def test_how_long_is_left_is_told_from_runs_of_the_same_size_and_else_from_flops(tmp_path):
    study = study_of(STUDY.replace("tokens = [1e5]", "tokens = [1e5, 4e5]"), tmp_path)
    first, *others = pending(study, {})
    (tmp_path / RESULTS).write_text(json.dumps(line_of(study, first, seconds=60.0)) + "\n")
    runner = Runner(study, tmp_path, 1, 1)
    assert [round(runner._seconds(cell)) for cell in others] == [60 if cell.tokens == 1e5 else 240 for cell in others]
    assert runner._progress(others) == "1 of 8 runs, about 19 min left"


def test_a_run_is_no_task_of_the_launcher_that_started_the_study(tmp_path, monkeypatch):
    for name in TASK_COUNTS:
        monkeypatch.setenv(name, "8")
    environment = Runner(study_of(STUDY, tmp_path), tmp_path, 1, 1)._environment()
    assert not environment.keys() & set(TASK_COUNTS)
    assert environment["PATH"] == os.environ["PATH"]


def test_results_of_other_settings_are_refused(tmp_path):
    study = study_of(STUDY, tmp_path)
    (tmp_path / RESULTS).write_text(json.dumps(line_of(study, pending(study, {})[0])) + "\n")
    Runner(study, tmp_path, 1, 1)
    with pytest.raises(UserError, match=r"line 1 .* was run with other settings \('2'; now '3'\)"):
        Runner(study_of(STUDY.replace("layers = 2", "layers = 3"), tmp_path), tmp_path, 1, 1)


def test_results_of_another_text_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("OWN", str(tmp_path))
    train_sentencepiece(tmp_path / "tokenizer.model")
    (tmp_path / "text.bin").write_bytes(b"12")
    own = 'data = "$OWN/text"\ntokenizer = "$OWN/tokenizer.model"'
    study = study_of(STUDY.replace('source = "python"\nglob = "json/*.py"\nvocabulary = 400', own), tmp_path)
    text = Runner(study, tmp_path, 1, 1)._corpus("python").content()
    lines = [line_of(study, cell, text=known) for cell, known in zip(pending(study, {}), (None, text), strict=False)]
    (tmp_path / RESULTS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    Runner(study, tmp_path, 1, 1)._corpus("python")
    (tmp_path / "text.bin").write_bytes(b"1234")
    started = []
    monkeypatch.setattr(Runner, "_start", lambda *_: started.append(1))
    with pytest.raises(
        UserError,
        match=r"^the study's file: corpora\.python: .*text is another text, or .*, than line 2 of .*; give that",
    ):
        Runner(study, tmp_path, 1, 1).run()
    assert not started
    other = tmp_path / "other"
    other.mkdir()
    (other / RESULTS).write_text(json.dumps(line_of(study, pending(study, {})[2], text={**text, "bytes": 4})) + "\n")
    with pytest.raises(UserError, match=r"the text or the tokenizer of python is another one than in .*; delete"):
        read_evidence([tmp_path, other])


def test_lost_step_times_are_named(tmp_path):
    study = study_of(STUDY.replace('"moa-bi-sided"', '"swiglu-time"').replace("timing = 0", "timing = 3"), tmp_path)
    cell = next(cell for cell in pending(study, {}) if cell.arm == "swiglu-time")
    (tmp_path / RESULTS).write_text(json.dumps(line_of(study, cell)) + "\n")
    with pytest.raises(UserError, match=r"timing\.jsonl: has no step times of tiny with adamw, by which line 1 of"):
        Runner(study, tmp_path, 1, 1)


@pytest.mark.parametrize("folder", ["study", "study-h200"])
def test_the_committed_results_are_of_the_arms_that_they_are_named_after(folder):
    """Compares the flags of the committed results with the arms that the results are named after.

    They were recorded with flags of version 0.1, in which one-sided, quadratic and LA from 0.5 meant something else.
    """
    lines = read_results(ROOT / "docs" / "results" / folder / RESULTS)
    assert lines
    for line in lines:
        arm, flags = ARMS[line["cell"]["arm"]], line["flags"]
        if arm.mixture is None:
            assert flags[flags.index("--moa-mixing") + 1] == "none"
            continue
        given, mixture = flag_values(flags), arm.mixture
        assert given["--moa-mixing"] == mixture.kind
        assert given["--moa-init-scale"] == {"paper": "mixture", "matched": "swiglu"}[mixture.init_scale]
        if arm.as_large_as:  # c silu(y) z, then one-sided with silu on W1's branch, now with identity on W2's
            assert (given["--moa-form"], given["--moa-activations"]) == ("one-sided", "silu")
        else:
            assert given["--moa-form"] == mixture.form
            assert mixture.form == "bi-sided" or line["cell"]["arm"] == "polyrelu-matched"
            assert sorted(given["--moa-activations"].split()) == sorted(mixture.activations)
        if mixture.kind == "moa":
            assert given["--moa-gate"] == mixture.gate
            assert line["recorded_arm"] != line["cell"]["arm"]
        else:
            assert mixture.init_scale == "matched" or arm.as_large_as  # the start of LA is no longer 0.5
        assert ("--moa-freeze-gates" in flags) == mixture.freeze


# Text.


def debian_package(member, text):
    """An ar archive with a data.tar.xz, as dpkg-deb makes it."""
    content = gzip.compress(text.encode())
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as archive:
        entry = tarfile.TarInfo(member)
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    package = b"!<arch>\n"
    for name, part in (("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), ("data.tar.xz", data.getvalue())):
        package += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(part):<10}`\n".encode() + part + b"\n" * (len(part) % 2)
        )
    return package


def test_a_corpus_from_a_debian_package(tmp_path):
    entries = "".join(f"Word{number}\n   {'meaning ' * 30}\n" for number in range(200))
    package = tmp_path / "words.deb"
    package.write_bytes(debian_package("./usr/share/dictd/words.dict.dz", entries))
    settings = {
        "source": "deb",
        "url": package.as_uri(),
        "sha256": hashlib.sha256(package.read_bytes()).hexdigest(),
        "member": "./usr/share/dictd/words.dict.dz",
        "vocabulary": 300,
    }
    corpus = make_corpus("words", settings, tmp_path / "corpus")
    assert corpus.data.with_suffix(".bin").stat().st_size > 10_000
    assert corpus.padded_vocabulary == 384
    lines = (tmp_path / "corpus" / "documents.jsonl").read_text().splitlines()
    documents = [json.loads(line)["text"] for line in lines]
    assert "".join(documents) == entries
    assert all(document.startswith("Word") for document in documents)
    before = corpus.data.with_suffix(".bin").stat().st_mtime_ns
    make_corpus("words", settings, tmp_path / "corpus")
    assert corpus.data.with_suffix(".bin").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"corpora\.words: .* was made with .*300.*; take another --out"):
        make_corpus("words", settings | {"vocabulary": 400}, tmp_path / "corpus")
    with pytest.raises(UserError, match="is not the file of that sha256"):
        make_corpus("words", settings | {"sha256": "0" * 64}, tmp_path / "other")
    with pytest.raises(UserError, match="cannot be fetched"):
        make_corpus("words", settings | {"url": (tmp_path / "none.deb").as_uri()}, tmp_path / "other")
    with pytest.raises(UserError, match=r"corpora\.words\.source disk: unknown"):
        make_corpus("words", {"source": "disk"}, tmp_path / "other")
    with pytest.raises(UserError, match=r"corpora\.words\.member \./none: is not in file:"):
        make_corpus("words", settings | {"member": "./none"}, tmp_path / "other")
    with pytest.raises(UserError, match=r"corpora\.words\.url none: cannot be fetched \(unknown url type"):
        make_corpus("words", settings | {"url": "none"}, tmp_path / "other")
    with pytest.raises(
        UserError, match=r"corpora\.words: train_tokenizer\.py ended .* \(.*--vocab-size 9000: .*\); see"
    ):
        make_corpus("words", settings | {"vocabulary": 9000}, tmp_path / "other")


def test_a_corpus_of_the_users_own(tmp_path, monkeypatch):
    settings = {"data": "$OWN/text", "tokenizer": "$OWN/tokenizer.model"}
    with pytest.raises(UserError, match=r"corpora\.own\.data '\$OWN/text': OWN is not set; set it so that"):
        make_corpus("own", settings, tmp_path)
    monkeypatch.setenv("OWN", str(tmp_path))
    (tmp_path / "text.bin").touch()
    with pytest.raises(UserError, match=r"corpora\.own\.tokenizer"):
        make_corpus("own", settings, tmp_path)
    (tmp_path / "tokenizer.model").touch()
    corpus = make_corpus("own", settings, tmp_path)
    assert (corpus.data, corpus.tokenizer) == (tmp_path / "text", tmp_path / "tokenizer.model")


# Real runs.


def start_study(*flags):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tools" / "study.py"), *flags],
        env=launch.without_compiler(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    error = process.communicate(timeout=900)[1]
    assert process.returncode == 0, error
    return error


def kill_after(process, results, lines):
    """SIGKILL once so many runs are done and others are going on; what it had started ends with it."""
    limit = time.monotonic() + 600
    while len(read_results(results)) < lines:
        assert process.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.1)
    time.sleep(3.0)
    process.send_signal(signal.SIGKILL)
    process.communicate()


# A fixed layer and a mixture; rates of the baseline; controls; each arm's best with three seeds. Wide enough for
# half the width to lose more than seeds differ (at ffn 128 it does not).
SMOKE = """
evaluation = 20
timing = 5
[corpora.python]
source = "python"
glob = "[aej]*/*.py"
vocabulary = 512
[sizes.tiny]
layers = 2
hidden = 48
ffn = 192
heads = 2
sequence = 64
init_std = 0.0924
""" + "".join(
    f'[[grid]]\narms = {list(arms)}\nsizes = ["tiny"]\ncorpora = ["python"]\ntokens = [4e5]\n{more}\n\n'
    for arms, more in (
        (("swiglu", "moa-bi-sided"), "rates = [1e-2]"),
        (("swiglu",), "rates = [5e-3, 1e-2, 2e-2]"),
        (("swiglu-again", "swiglu-half", "swiglu-scaled", "la-bi-sided-half"), "rates = [1e-2]"),
        (("swiglu", "swiglu-scaled", "la-bi-sided-half", "moa-bi-sided"), "seeds = [1, 2, 3]"),
        (("swiglu", "swiglu-again", "swiglu-half"), "seeds = [1, 2, 3, 4]"),
    )
)


def killed_study(out, text, kills):
    """Runs a study in a folder, killed once so many results are there, and to its end then."""
    (out / "study.toml").write_text(text)
    flags = ("--study", str(out / "study.toml"), "--out", str(out))
    for lines in kills:
        kill_after(start_study(*flags), out / RESULTS, lines)
    finish(start_study(*flags))
    return out


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    return killed_study(tmp_path_factory.mktemp("smoke"), SMOKE, (1, 7))


def wait_until_nobody_writes_to(folder):
    """Until no process has a file in the folder open."""
    limit = time.monotonic() + 10
    while True:
        found = []
        for link in Path("/proc").glob("[0-9]*/fd/*"):
            with contextlib.suppress(OSError):
                found += [link] if os.readlink(link).startswith(f"{folder}/") else []
        if not found:
            return
        assert time.monotonic() < limit, found
        time.sleep(0.1)


def test_a_cut_off_run_goes_on_from_its_checkpoint(tmp_path):
    text = STUDY.replace("timing = 0", "timing = 0\nsave_interval = 10").replace(
        '["swiglu", "moa-bi-sided"]', '["swiglu"]'
    )
    text = text.replace("[1e-2, 2e-2]", "[1e-2]").replace("json", "asyncio")  # 49 iterations
    (tmp_path / "study.toml").write_text(text)
    flags = ("--study", str(tmp_path / "study.toml"), "--out")

    def run_folder(out):
        return out / "runs" / pending(read_study(tmp_path / "study.toml"), {})[0].name

    cut = tmp_path / "cut"
    process = start_study(*flags, str(cut))
    tracker = run_folder(cut) / "checkpoint" / "latest_checkpointed_iteration.txt"
    limit = time.monotonic() + 300
    while not (tracker.exists() and tracker.read_text()):
        assert process.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    wait_until_nobody_writes_to(cut)  # Megatron's server for savings neither
    assert read_results(cut / RESULTS) == []
    finish(start_study(*flags, str(cut)))
    shutil.copytree(cut / "corpora", tmp_path / "whole" / "corpora")
    finish(start_study(*flags, str(tmp_path / "whole")))
    (line,), (expected,) = (read_results(out / RESULTS) for out in (cut, tmp_path / "whole"))
    # Megatron's second line after a start averages the first one's loss in, so one point of the curve differs.
    assert len(line["loss"]) == len(expected["loss"]) == 49
    assert sum(own != other for own, other in zip(line["loss"], expected["loss"], strict=True)) == 1
    measured = ("seconds", "milliseconds", "date", "loss")
    assert {key: line[key] for key in line if key not in measured} == {
        key: expected[key] for key in expected if key not in measured
    }
    log = (run_folder(cut) / "train.log").read_text()
    assert log.count("number of parameters on") == 2  # two starts
    assert "successfully loaded checkpoint" in log
    assert not (run_folder(cut) / "checkpoint").exists()  # nobody asked to keep it


def test_a_run_of_another_command_does_not_go_on(tmp_path, monkeypatch):
    """A checkpoint is taken up by the command that wrote it alone."""
    study = study_of(STUDY.replace("timing = 0", "timing = 0\nsave_interval = 10"), tmp_path)
    started = []
    corpus = types.SimpleNamespace(flags=lambda: ["--data-path", "text"])
    monkeypatch.setattr(Runner, "_corpus", lambda self, name: corpus)
    monkeypatch.setattr(subprocess, "Popen", lambda words, **_: started.append(words))
    cell = pending(study, {})[0]

    def start(of):
        Runner(of, tmp_path, 1, 1)._start(cell)
        return "--load" in started[-1]

    assert not start(study)
    folder = tmp_path / "runs" / cell.name
    (folder / "train.log").write_text("of the first start\n")
    assert not start(study)  # it left no checkpoint
    assert (folder / "train.log").read_text() == ""
    (folder / "checkpoint").mkdir()
    (folder / "checkpoint" / "latest_checkpointed_iteration.txt").write_text("10")
    assert start(study)
    assert not start(replace(study, warmup=0.5))
    assert not (folder / "checkpoint").exists()


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_a_kill_changes_nothing(tmp_path):
    head, first = SMOKE.split("[[grid]]")[:2]
    text = head.replace("timing = 5", "timing = 0") + "[[grid]]" + first.replace("4e5", "1e4")
    (tmp_path / "killed").mkdir()
    check_killed(killed_study(tmp_path / "killed", text, [1]), text, tmp_path)


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_two_kills_change_nothing(smoke, tmp_path):
    head, first = SMOKE.split("[[grid]]")[:2]
    check_killed(smoke, head + "[[grid]]" + first, tmp_path)


def check_killed(killed, again_text, tmp_path):
    """Checks that every cell of a killed study is there once.

    The cells that a second study's text asks for are what that study finds.
    """
    lines = read_results(killed / RESULTS)
    cells = [json.dumps(line["cell"]) for line in lines]
    assert len(set(cells)) == len(cells)
    assert pending(read_study(killed / "study.toml"), losses_of(lines)) == []
    (tmp_path / "again.toml").write_text(re.sub("timing = .", "timing = 0", again_text))
    finish(start_study("--study", str(tmp_path / "again.toml"), "--out", str(tmp_path / "again")))
    measured = ("seconds", "milliseconds", "date")
    again = {json.dumps(line["cell"]): line for line in read_results(tmp_path / "again" / RESULTS)}
    assert len(again) == 2
    for cell, line in again.items():
        killed = lines[cells.index(cell)]
        assert {key: killed[key] for key in line if key not in measured} == {
            key: line[key] for key in line if key not in measured
        }


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_the_controls_and_the_steps_of_the_comparison(smoke):
    from megatron_moa.research.study.statistics import Results

    results = Results(read_results(smoke / RESULTS))
    (setting,) = results.settings
    same = results.difference(setting, "swiglu-again", "swiglu")
    assert same.count == 4
    assert same.low < 0 < same.high
    worse = results.difference(setting, "swiglu-half", "swiglu")
    assert worse.low > 0
    for arm, to in (
        ("swiglu-scaled", "swiglu"),
        ("la-bi-sided-half", "swiglu-scaled"),
        ("moa-bi-sided", "la-bi-sided-half"),
    ):
        assert results.difference(setting, arm, to).count == 3
    (timing,) = read_timings(smoke / TIMING)
    assert set(results.arms(setting)) <= set(timing["milliseconds"])
    assert timing["equal_time_width"] > 0


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_a_report_of_it(smoke, tmp_path):
    report = tmp_path / "report.md"
    tool = [sys.executable, str(ROOT / "tools" / "study_report.py"), str(smoke), "--out", str(report)]
    subprocess.run(tool, check=True, capture_output=True, timeout=300)
    text = report.read_text()
    for title in ("SwiGLU, other seeds", "SwiGLU, half as wide"):
        assert title in text
    assert list((tmp_path / "report").glob("*.png"))


def test_one_process_a_study_and_a_failed_run_is_named(tmp_path):
    (tmp_path / "study.toml").write_text(STUDY.replace("heads = 2", "heads = 2\nflags = '--moa-progress sideways'"))
    out = tmp_path / "out"
    run = start_study("--study", str(tmp_path / "study.toml"), "--out", str(out), "--at-a-time", "1")
    error = run.communicate(timeout=300)[1]
    assert run.returncode == 2
    assert "ended with exit code 2" in error
    assert "--moa-progress sideways: unknown" in error
    assert "train.log" in error
    assert read_results(out / RESULTS) == []
