"""The benchmarks run, their records hold, they refuse on red; the recipes' headers say what is built."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_moa.layers.coefficients import Coefficients
from megatron_moa.mixture import functional, reference
from megatron_moa.mixture.autograd import GateInputs
from megatron_moa.mixture.config import MixtureConfig
from megatron_moa.research.benchmarks import timing
from megatron_moa.research.benchmarks.plain_compile import compiled_reference
from megatron_moa.runs.recipes import recipe_flags
from tests.end_to_end.test_large_worlds import recipe
from tests.support.training import ROOT, Run, run_script
from tools import benchmark_host, benchmark_kernels, benchmark_layer, benchmark_step

CPU = ("--device", "cpu", "--threads", "1", "--rounds", "2")
TINY_LAYER = ("--hidden", "16", "--ffn", "24", "--tokens", "32", "--backend", "eager")
TINY_MODEL = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 48 --seq-length 32 "
    "--max-position-embeddings 32"
).split()


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run_on_wrong_results(tmp_path: Path, tool: str, *arguments: str) -> Run:
    """Runs a tool with a compile backend whose results are 1 % too large."""
    driver = tmp_path / "wrong.py"
    driver.write_text(
        "import runpy, sys, torch\n"
        "torch.compiler.set_stance('force_eager')\n"
        "from megatron_moa.mixture import functional\n"
        "right = functional.mixed_activation\n"
        "def wrong(preactivation, coefficients, mixture, *others, **named):\n"
        "    out = right(preactivation, coefficients, mixture, *others, **named)\n"
        "    reference = mixture.backend == 'eager' or preactivation.dtype is torch.float64\n"
        "    return out if reference else 1.01 * out\n"
        "functional.mixed_activation = wrong\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    return run_script(driver, [str(ROOT / tool), *arguments], check=False)


# One layer.


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    results = tmp_path_factory.mktemp("layer") / "results.jsonl"
    flags = ("--form", "one-sided", "type1", "--mixing", "moa", "--json", str(results))
    run = run_script("tools/benchmark_layer.py", [*CPU, *TINY_LAYER, *flags])
    assert "| MoA one-sided | eager |" in run.log
    assert "goal at most 1.05" in run.log
    return read(results)


def test_layer_records(layer: list[dict[str, Any]]) -> None:
    by_arm = {record["arm"]: record for record in layer}
    assert list(by_arm) == [
        "SwiGLU",
        "SwiGLU fused",
        "SwiGLU compiled here",
        "MoA one-sided",
        "GELU",
        "GELU compiled here",
        "MoA type1",
    ]
    for record in layer:
        assert record["benchmark"] == "layer"
        assert record["ms"].keys() == {"forward", "backward", "total"}
        assert 0 < record["ms"]["forward"] < record["ms"]["total"]
        assert record["rounds"] == 2
        assert record["environment"]["threads"] == 1
        assert record["environment"]["command"].startswith("tools/benchmark_layer.py --device cpu --threads 1")
    moa = by_arm["MoA one-sided"]
    assert moa["stock"] in ("SwiGLU", "SwiGLU fused")
    assert by_arm[moa["stock"]]["ratio_to_stock"]["total"] == 1
    assert moa["ratio_to_stock"]["total"] > 1  # the reference in eager PyTorch
    assert by_arm["SwiGLU compiled here"]["ratio_to_compiled"] == 1
    assert by_arm["MoA type1"]["stock"] == "GELU"


def test_layer_memory(layer: list[dict[str, Any]]) -> None:
    tokens, h, f = 32, 16, 24
    by_arm = {record["arm"]: record for record in layer}
    # Input, fc1's output and fc2's input; SwiGLU unfused also keeps both factors of its product, since Megatron adds
    # --glu-linear-offset, 0, to the second.
    assert by_arm["GELU"]["saved_bytes"] == 4 * tokens * (h + 2 * f)
    assert by_arm["SwiGLU fused"]["saved_bytes"] == 4 * tokens * (h + 3 * f)
    assert by_arm["SwiGLU"]["saved_bytes"] == 4 * tokens * (h + 5 * f)
    assert by_arm["MoA one-sided"]["saved_coefficient_bytes"] == 4 * tokens * 7
    assert by_arm["MoA type1"]["saved_coefficient_bytes"] == 4 * tokens * 5
    assert by_arm["GELU"]["saved_coefficient_bytes"] == 0
    for record in layer:
        assert record["peak_bytes"] > record["saved_bytes"] - 4 * tokens * h  # the input is there before


def test_coefficients_are_held_while_they_are_counted_alone() -> None:
    """What a run leaves behind would be missing from the next one's peak."""

    class Mixing(Coefficients):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            self.observer = None

    x, mixing = torch.ones(4, 3, requires_grad=True), Mixing()

    def forward() -> Tensor:
        coefficients = x.sin()
        mixing._observe(coefficients)
        return x * coefficients

    built = benchmark_layer.Built(mixing, forward, timing.forward_backward(forward, x.detach(), [x]), [x])
    built.run(timing.no_lap)
    assert mixing.observer is None
    assert built.saved() == (2 * x.nbytes, x.nbytes)


@pytest.mark.full
def test_moe_layer_grows_with_experts(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    flags = ("--experts", "4", "--topk", "1", "--grow", "experts", "--execution", "sequential")
    flags += ("--form", "bi-sided", "--mixing", "moa", "--recompute", "--json", str(results))
    run_script("tools/benchmark_layer.py", [*CPU, *TINY_LAYER, *flags])
    records = read(results)
    assert {record["experts"] for record in records} == {2, 4}
    saved = {record["arm"]: record["saved_bytes"] for record in records if record["experts"] == 4}
    tokens, f = 32, 24
    kept = saved["MoA bi-sided, sequential"] - saved["MoA bi-sided recomputed, sequential"]
    assert kept >= 4 * tokens * f  # fc2's input at least, and what the reference keeps


@pytest.mark.full
@pytest.mark.distributed
def test_layer_over_two_processes(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    flags = ("--form", "type1", "--mixing", "moa", "--grow", "tp", "--json", str(results))
    run_script("tools/benchmark_layer.py", [*CPU, *TINY_LAYER, *flags], processes=2)
    records = read(results)
    assert [record["tp"] for record in records] == [1] * 3 + [2] * 3
    one, two = (next(r for r in records if r["arm"] == "GELU" and r["tp"] == tp) for tp in (1, 2))
    tokens, h, f = 32, 16, 24
    assert one["saved_bytes"] - two["saved_bytes"] == 4 * tokens * f  # half of fc1's output, half of fc2's input
    assert two["saved_bytes"] == 4 * tokens * (h + f)


def test_sizes_that_grow() -> None:
    def grown(*flags: str, world: int = 1) -> list[tuple[int | None, int]]:
        options = benchmark_layer.parse([*flags])
        return [(own.experts, tp) for own, tp in benchmark_layer.settings_to_measure(options, world)]

    assert grown("--grow", "tp", world=6) == [(None, 1), (None, 2)]  # 4 does not divide 6 processes
    assert grown("--experts", "8", "--grow", "experts") == [(2, 1), (4, 1), (8, 1)]
    assert grown("--experts", "1", "--topk", "1", "--grow", "experts") == [(1, 1)]
    options = benchmark_kernels.parse(["--grow", "ffn", "--values", "64", "128"])
    assert [sizes.hidden for sizes in benchmark_kernels.series(options, torch.device("cpu"))] == [16, 32]


def test_goals_that_nothing_was_compared_with_are_not_met(capsys: pytest.CaptureFixture[str]) -> None:
    record = {"arm": "MoA type1", "form": "type1", "mixing": "moa", "variant": None, "stock": "GELU", "family": "GELU"}
    record |= {
        "ratio_to_stock": {"total": 1.05},
        "peak_ratio": 1.0,
        "ratio_to_compiled": 1,
        "peak_ratio_to_compiled": 1,
    }
    assert benchmark_layer.check_goals([record])
    assert not benchmark_layer.check_goals([record, {**record, "peak_ratio": 1.02}])
    assert "goal at most 1.01: NOT met" in capsys.readouterr().out
    assert not benchmark_layer.check_goals([])
    assert not benchmark_layer.check_goals([{**record, "ratio_to_stock": None, "peak_ratio": None}])


@pytest.mark.slow
def test_layer_refuses_on_red(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    flags = ("--hidden", "16", "--ffn", "24", "--tokens", "32", "--backend", "compile", "--form", "type1")
    run = run_on_wrong_results(
        tmp_path, "tools/benchmark_layer.py", *CPU, *flags, "--mixing", "la", "--json", str(results)
    )
    assert run.returncode == 1, run.log
    lines = [line for line in run.log.splitlines() if "nothing was timed" in line]
    assert len(lines) == 1
    assert lines[0].startswith("benchmark_layer.py: ")
    assert "Traceback" not in run.log
    assert not results.exists()


# The activation step.


def test_kernels_records(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    flags = ("--tokens", "16", "--ffn", "8", "--hidden", "4", "--backend", "eager", "--form", "quadratic")
    run = run_script("tools/benchmark_kernels.py", [*CPU, *flags, "--json", str(results)])
    assert "copy on this device" in run.log
    by_arm = {record["arm"]: record for record in read(results)}
    assert {"SwiGLU Megatron", "SwiGLU torch.compile", "SwiGLU eager"} < by_arm.keys()
    swiglu, moa, la = by_arm["SwiGLU Megatron"], by_arm["MoA quadratic eager"], by_arm["LA quadratic eager"]
    gate = by_arm["gate n 10 eager"]
    one = 16 * 8 * 4
    assert swiglu["bytes"] == la["bytes"] == {"forward": 3 * one, "backward": 5 * one}
    assert moa["bytes"] == {"forward": 3 * one + 16 * 10 * 4, "backward": 5 * one + 2 * 16 * 10 * 4}
    assert gate["bytes"] == {"forward": 16 * (4 + 10) * 4, "backward": 16 * (2 * 4 + 10) * 4}
    assert swiglu["ratio"] == {"forward": 1, "backward": 1, "total": 1}
    assert moa["baseline"] == "SwiGLU Megatron"
    assert moa["gb_per_s"]["forward"] == pytest.approx(moa["bytes"]["forward"] / moa["ms"]["forward"] / 1e6)
    assert moa["of_copy"]["backward"] == pytest.approx(moa["gb_per_s"]["backward"] / moa["copy_gb_per_s"])


def test_type1_counts_fewer_bytes() -> None:
    maker = benchmark_kernels.Maker(benchmark_kernels.Sizes(16, 8, 4), torch.device("cpu"), torch.bfloat16)
    assert maker.activation_bytes(False) == {"forward": 2 * 16 * 8 * 2, "backward": 3 * 16 * 8 * 2}


def test_kernels_that_do_not_fit_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it is the baseline, or all."""

    def too_large() -> Tensor:
        raise torch.OutOfMemoryError

    x = torch.ones(2, requires_grad=True)
    counted = {"forward": 8, "backward": 8}
    none, one = (benchmark_kernels.Contender(function, [x], counted, {}) for function in (too_large, lambda: 2 * x))
    options = benchmark_kernels.parse(["--rounds", "1", "--dtype", "fp32"])
    sizes = benchmark_kernels.Sizes(1, 2, 1)
    for contenders, left in (({"a": none, "b": one}, ["b"]), ({"a": none}, [])):
        family = benchmark_kernels._family(contenders, "a", sizes, options, torch.device("cpu"), 1.0)
        records = list(family)
        assert [record["arm"] for record in records] == left
        assert all(record["ratio"] is None for record in records)


@pytest.mark.full
def test_kernels_grow(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    flags = ("--tokens", "16", "--ffn", "8", "--backend", "eager", "--form", "type1", "--mixing", "la")
    grow = ("--grow", "activations", "--values", "1", "12")
    run = run_script("tools/benchmark_kernels.py", [*CPU, *flags, *grow, "--json", str(results)])
    assert "|  | 1 | 12 |" in run.log
    mixtures = [record for record in read(results) if record["role"] == "mixture"]
    assert [(record["K"], len(record["activations"])) for record in mixtures] == [(1, 1), (12, 12)]


@pytest.mark.slow
def test_accuracy_alone(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    flags = ("--check", "--device", "cpu", "--dtype", "fp32", "--form", "type1", "--json", str(results))
    run_script("tools/benchmark_kernels.py", [*flags, "--backend", "eager"])
    records = read(results)
    assert [record["arm"] for record in records] == ["la type1 eager", "moa type1 eager"]
    assert all(record["benchmark"] == "accuracy" and not record["failed"] for record in records)
    wrong = run_on_wrong_results(
        tmp_path, "tools/benchmark_kernels.py", *flags, "--backend", "compile", "--mixing", "la"
    )
    assert wrong.returncode == 1
    assert read(results)[-1]["failed"]


# The training step.


@pytest.fixture
def tiny_recipe(tmp_path: Path) -> Path:
    flags = " ".join(recipe("dense-0.12b"))
    path = tmp_path / "tiny.sh"
    path.write_text(f"MODEL_ARGS=({flags} {' '.join(TINY_MODEL)})\n")
    return path


@pytest.mark.slow
def test_step_records(tmp_path: Path, tiny_recipe: Path) -> None:
    results = tmp_path / "results.jsonl"
    flags = ("--arms", "la", "moa", "compiled", "--layers", "1", "--micro-batch-size", "2", "--json", str(results))
    flags += ("--", "--moa-backend", "eager")
    run = run_script("tools/benchmark_step.py", [str(tiny_recipe), *CPU, *flags])
    assert "CUT TO 1 LAYERS" in run.log
    swiglu, la, moa, compiled = read(results)
    assert [record["arm"] for record in (swiglu, la, moa)] == ["SwiGLU", "LA", "MoA"]
    assert compiled["arm"] == "MoA by plain torch.compile"
    assert compiled["parameters"] == moa["parameters"]
    assert compiled["backend"] == "none: the reference by torch.compile"
    assert swiglu["recipe"] == "tiny"
    assert swiglu["mixing"] is None
    assert (la["parameters"] - swiglu["parameters"], moa["parameters"] - swiglu["parameters"]) == (14, 14 * 32)
    assert moa["backend"] == "eager"
    assert swiglu["ratio"] == 1
    for record in (swiglu, la, moa, compiled):
        assert record["flags"] == ["--moa-backend", "eager"]
        assert record["tokens_per_s"] == pytest.approx(2 * 32 / record["ms"]["step"] * 1000)
        assert record["peak_bytes"] > 0


def test_recipe_is_read_as_bash_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "recipe.sh"
    path.write_text("SIZE=${SIZE:-32}\nMODEL_ARGS=(\n    --hidden-size $SIZE  # comment\n    --name 'two words'\n)\n")
    assert benchmark_step.read_recipe(path) == ["--hidden-size", "32", "--name", "two words"]


@pytest.mark.parametrize("name", ["dense-0.12b", "dense-0.5b", "dense-2b", "moe-2b"])
def test_recipes_are_found_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = benchmark_step.parse([name, "--type1"])
    assert benchmark_step.recipe_name(options) == f"{name}, Type I"
    assert "--swiglu" in benchmark_step.read_recipe(options.recipe, baseline=True)
    monkeypatch.setenv("FFN", "type1")
    assert benchmark_step.read_recipe(options.recipe, baseline=True)[-1] == "--squared-relu"
    assert "--squared-relu" not in benchmark_step.read_recipe(options.recipe)


def test_a_step_has_the_recipes_vocabulary() -> None:
    def vocabulary(flags: list[str]) -> int:
        return int(flags[flags.index("--vocab-size") + 1])

    options = benchmark_step.parse(["dense-0.5b", "--dtype", "bf16"])
    recipe = recipe_flags("dense-0.5b", "moa", ["--mock-data"])
    assert vocabulary(benchmark_step.stock_arguments(options, [])) == vocabulary(recipe)


@pytest.mark.slow
@pytest.mark.parametrize("form", [pytest.param("type1", marks=pytest.mark.full), "bi-sided"])
def test_plain_compile_computes_the_reference(form: str) -> None:
    """Compares compiled gate and mixture with the reference, which stands again afterwards.

    They are in bfloat16 and float32, also with a gate a group.
    """
    mixture = MixtureConfig(form=form, backend="eager")
    plain = reference.mixed_activation
    for dtype, groups in ((torch.bfloat16, None), (torch.float32, None), (torch.float32, [3, 3, 12])):
        generator = torch.Generator().manual_seed(0)
        weight = (mixture.num_coefficients, 8) if groups is None else (3, mixture.num_coefficients, 8)
        shapes = ((12, 8), weight, (12, 16))
        x, u, z = (torch.randn(*shape, generator=generator).to(dtype).requires_grad_() for shape in shapes)
        ends = groups and torch.tensor(groups, dtype=torch.int32)

        def results(
            x: Tensor = x, u: Tensor = u, z: Tensor = z, ends: Tensor | None = ends, mixture: MixtureConfig = mixture
        ) -> tuple[Tensor, ...]:
            out, _ = functional.gated_mixture(z, GateInputs(x, u, group_ends=ends), mixture)
            return (out, *torch.autograd.grad(out.float().square().sum(), (x, u, z)))

        expected = results()
        with compiled_reference():
            assert reference.mixed_activation is not plain
            for actual, right in zip(results(), expected, strict=True):
                error = (actual - right).abs().max() / right.abs().max()
                assert error <= 8 * torch.finfo(dtype).eps
    assert reference.mixed_activation is plain


def test_the_stock_arm_gets_none_of_the_mixtures_flags() -> None:
    flags = "--moa-activations silu relu --bf16 --moa-gate-bias --recompute-modules moe_act".split()
    assert benchmark_step.split_moa_flags(flags) == (
        ["--bf16", "--recompute-modules", "moe_act"],
        ["--moa-activations", "silu", "relu", "--moa-gate-bias"],
    )


# Mistakes.

MISTAKES = [
    (benchmark_layer, ["--execution", "grouped"], "--execution grouped: there are no experts; add --experts N"),
    (benchmark_layer, ["--experts", "2", "--topk", "4"], "--topk 4: there are 2 experts"),
    (benchmark_layer, ["--grow", "experts"], "--grow experts: up to how many?"),
    (benchmark_layer, ["--topk", "4"], "--topk 4: there are no experts; add --experts N"),
    (benchmark_layer, ["--router", "initial"], "--router initial: there are no experts; add --experts N"),
    (benchmark_layer, ["--grow", "tp", "--tp", "2"], "--tp 2: has no effect with --grow tp; drop it"),
    (benchmark_layer, ["--require", "--mixing", "la"], "--require: the goals are MoA's; add moa to --mixing"),
    (benchmark_layer, ["--json", "docs"], "--json docs: a folder; add a name"),
    (benchmark_layer, ["--hidden", "0"], "argument --hidden: a number above 0 is wanted, not 0"),
    (benchmark_layer, ["--form", "cubic"], "invalid choice: 'cubic'"),
    (benchmark_kernels, ["--values", "2"], "--values: of what?"),
    (benchmark_kernels, ["--grow", "activations", "--values", "15"], "--values 15: there are 14 activations"),
    (
        benchmark_kernels,
        ["--grow", "ffn", "--ffn", "8"],
        "--ffn 8: has no effect with --grow ffn; give sizes with --val",
    ),
    (benchmark_kernels, ["--check", "--hidden", "8"], "--hidden 8: has no effect with --check, which has sizes of its"),
    (benchmark_kernels, ["--check", "--grow", "tokens"], "--grow tokens: has no effect with --check"),
    (benchmark_kernels, ["--json", "docs"], "--json docs: a folder; add a name"),
    (benchmark_step, ["nowhere.sh"], "nowhere.sh: there is no such recipe"),
    (benchmark_step, ["docs/design/log.md"], "docs/design/log.md: bash finds no array MODEL_ARGS there"),
    (benchmark_step, ["examples/models/dense-2b.sh", "--", "--moa-mixing", "la"], "--moa-mixing: the arms are chosen"),
    (benchmark_step, ["dense-2b", "--", "--moa-mixing=la"], "--moa-mixing=la: the arms are chosen with --arms"),
    (benchmark_step, ["dense-2b", "--json", "docs"], "--json docs: a folder; add a name"),
    (benchmark_host, ["--dtype", "bf16"], "unrecognized arguments: --dtype bf16"),
    (benchmark_host, ["--json", "docs"], "--json docs: a folder; add a name"),
    (benchmark_host, ["--experts", "1"], "give 2 or more"),
]


@pytest.mark.parametrize(("tool", "flags", "message"), MISTAKES, ids=lambda value: str(value)[-40:])
def test_a_mistake_is_one_line(tool: Any, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        tool.main(flags)
    assert left.value.code == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith(f"{tool.PROGRAM}: error: ")
    assert message in line
    assert not printed.out


# The host's part.


def test_host_records(tmp_path: Path) -> None:
    """In a process without the interpreter, whose kernels are compiled and never launched."""
    results = tmp_path / "results.jsonl"
    flags = ["--form", "one-sided", "--experts", "2", "--rounds", "1", "--repetitions", "1", "--json", str(results)]
    command = [sys.executable, "tools/benchmark_host.py", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {(r["family"], r["arm"]): r for r in read(results)}
    arms = [("dense", name) for name in ("identity", "SwiGLU", "GELU", "MoA one-sided", "LA one-sided")]
    assert list(found) == [*arms, *(("experts", name) for name in ("SwiGLU", "MoA one-sided", "LA one-sided"))]
    assert [found[arm]["parameters"] for arm in arms] == [2, 2, 2, 3, 3]
    assert found["dense", "identity"]["beyond_identity_us"] == 0
    assert found["dense", "SwiGLU"]["over_swiglu"] == 1
    mixture = found["dense", "MoA one-sided"]
    assert all(us > 0 for us in mixture["us"].values())
    assert mixture["step_us_a_parameter"] == pytest.approx(mixture["us"]["step"] / 3)
    assert "| experts, MoA one-sided |" in done.stdout


# The suite.


@pytest.mark.full
@pytest.mark.timeout(700)
def test_suite_without_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "suite"
    environment = {**os.environ, "SUITE_DEVICE": "cpu", "SUITE_SCALE": "tiny", "PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", "tools/gpu_suite.sh", str(out)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=650
    )
    assert done.returncode == 0, done.stdout + done.stderr
    records = read(out / "results.jsonl")
    steps = {record["step"]: record["status"] for record in records if record["benchmark"] == "suite"}
    assert set(steps.values()) == {"ok"}
    assert {"accuracy-fp32-eager-type1", "accuracy-fp32-eager-bi-sided"} < steps.keys()
    assert {"kernels", "layer-dense", "layer-moe", "step-dense-0.12b"} < steps.keys()
    kinds = {record["benchmark"] for record in records}
    assert kinds == {"suite", "accuracy", "kernels", "layer", "step", "training"}
    trainings = {record["arm"]: record for record in records if record["benchmark"] == "training"}
    assert trainings.keys() == {"MoA", "SwiGLU"}
    assert trainings["MoA"]["parameters"] - trainings["SwiGLU"]["parameters"] == 14 * 32
    assert all(record["iterations"] == 8 and record["validation_loss"] < 6 for record in trainings.values())
    report = (out / "results.md").read_text()
    for title in ("Accuracy", "The activation step", "One layer", "A training step", "Trainings"):
        assert f"## {title}" in report
    assert "kernels.py --check --device cpu --dtype fp32 --backend eager --form type1|bi-sided\n" in report
    assert all((out / "logs" / f"{name}.log").exists() for name in steps)


@pytest.mark.full
def test_suite_records_failures_and_goes_on(tmp_path: Path) -> None:
    python = tmp_path / "python"
    # Every tool fails but the report's table, and one never ends.
    python.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        f'*"gpu_report.py table"*) exec {sys.executable} "$@" ;;\n'
        "*benchmark_layer*) exec sleep 60 ;;\n"
        "esac\n"
        "exit 3\n"
    )
    python.chmod(0o755)
    out = tmp_path / "suite"
    environment = {**os.environ, "SUITE_DEVICE": "cpu", "SUITE_SCALE": "tiny", "PYTHON": str(python)}
    done = subprocess.run(
        ["bash", "tools/gpu_suite.sh", str(out)],
        cwd=ROOT,
        env={**environment, "SUITE_SECONDS": "8"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    steps = {record["step"]: (record["status"], record["exit_code"]) for record in read(out / "results.jsonl")}
    assert steps["accuracy-fp32-eager-type1"] == steps["kernels"] == ("failed", 3)
    assert steps["layer-dense"] == ("out of time", 124)
    assert steps["training-none"] == ("out of time", 124)  # no time was left
    assert "| layer-dense | out of time | 124 |" in (out / "results.md").read_text()


def test_the_table_of_the_first_gpu_is_that_of_its_records() -> None:
    folder = ROOT / "docs/results/h200"
    table = run_script("tools/gpu_report.py", ["table", str(folder / "results.jsonl")]).log
    assert table == (folder / "results.md").read_text()
    by_arm = {r["arm"]: r for r in read(folder / "results.jsonl") if r.get("recipe") == "dense-2b"}
    assert f"| dense-2b | 8, cut | MoA | 668,207,104 | 4 | {by_arm['MoA']['ms']['step']:.4g} |" in table
    # Processes that differ in dtype, backend and form are one command.
    assert "--dtype bf16|fp16|fp32 --backend triton --form bi-sided|one-sided|quadratic|type1\n" in table
    assert "--json" not in table


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"SUITE_DEVICE": "tpu"}, "SUITE_DEVICE=tpu: say cuda or cpu"),
        ({"SUITE_SCALE": "big"}, "say full or tiny"),
        ({"SUITE_SECONDS": "long"}, "SUITE_SECONDS=long: not a whole number; give one such as 570"),
        ({"PYTHON": "/nowhere/python3"}, "PYTHON=/nowhere/python3: no such program"),
        ({"SUITE_STUDY": "nowhere.toml"}, "/nowhere.toml: no such file; see examples/studies"),
    ],
)
def test_suite_settings(tmp_path: Path, setting: dict[str, str], message: str) -> None:
    command = ["bash", "tools/gpu_suite.sh", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **setting}, capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["thesis.txt", "results.jsonl"])
def test_suite_deletes_nothing(name: str, tmp_path: Path) -> None:
    """A relative path is one from where the command is given."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("all of it")
    command = ["bash", str(ROOT / "tools" / "gpu_suite.sh"), "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHON": "true"})
    assert done.returncode == 2
    assert f"{tmp_path}/out: is there already; name another folder" in done.stderr
    assert (tmp_path / "out" / name).read_text() == "all of it"
