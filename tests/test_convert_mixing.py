"""megatron_moa/upcycling.py, tools/convert_mixing.py: another mixture, the same function."""

from __future__ import annotations

import argparse
import pickle
import re
from pathlib import Path

import pytest
import torch

from megatron_moa import inference, reference, upcycling
from megatron_moa.checkpoint_files import TRACKER
from megatron_moa.checkpoint_tensors import CheckpointTensors
from megatron_moa.config import MixingConfig
from megatron_moa.errors import UserError
from megatron_moa.upcycling import Conversion, origins, start_amplitudes, stock_as_mixture, target_mixing
from megatron_moa.verification import Comparison
from tests import launch
from tests.checkpoints import Hostile, write_checkpoint
from tests.training import MOE, ROOT, SWIGLU, TINY, recorded
from tools import convert_mixing

# Coefficients.

SILU_RELU2 = ("silu", "relu2")
# source form and dictionary, target form and dictionary
ARROWS = [
    ("type1", ("gelu", "relu"), "type1", ("relu", "tanh", "gelu")),
    ("one-sided", SILU_RELU2, "one-sided", ("identity", "relu2", "silu")),
    ("one-sided", SILU_RELU2, "bi-sided", ("relu2", "identity", "silu", "tanh")),
    ("one-sided", ("identity", "silu"), "quadratic", ("silu", "tanh", "identity")),
    ("bi-sided", SILU_RELU2, "bi-sided", ("relu2", "one", "silu")),
    ("bi-sided", SILU_RELU2, "quadratic", ("tanh", *SILU_RELU2)),
    ("quadratic", SILU_RELU2, "quadratic", ("relu2", "gelu", "silu")),
]


def la(form: str, activations: tuple[str, ...]) -> MixingConfig:
    return MixingConfig(mixing="la", form=form, activations=activations)


def moa(form: str, activations: tuple[str, ...], **settings: object) -> MixingConfig:
    return MixingConfig(
        **{"mixing": "moa", "form": form, "activations": activations, "amplitude": "learned", **settings}
    )


@pytest.mark.parametrize(("form", "activations", "new_form", "new_activations"), ARROWS)
def test_coefficients_give_the_same_function(
    form: str, activations: tuple[str, ...], new_form: str, new_activations: tuple[str, ...]
) -> None:
    source = la(form, activations)
    target = target_mixing(source, "la", new_form, new_activations)
    generator = torch.Generator().manual_seed(3)
    coefficients = torch.randn(source.num_coefficients, generator=generator, dtype=torch.float64)
    z = torch.randn(50, 1 if form == "type1" else 2, generator=generator, dtype=torch.float64)
    expected = reference.mix(z, coefficients, source)
    converted = start_amplitudes(coefficients, origins(source, target))
    torch.testing.assert_close(reference.mix(z, converted, target), expected, rtol=1e-13, atol=1e-13)


def test_swiglu_is_one_coefficient_in_each_branch() -> None:
    stock = stock_as_mixture(argparse.Namespace(swiglu=True, add_bias_linear=False))
    target = target_mixing(stock, "moa", activations=("relu", "identity", "silu"), stock=True)
    assert (target.form, target.amplitude, target.gate) == ("bi-sided", "learned", "sigmoid")
    assert target.initial_coefficients == (0, 0, 1, 0, 1, 0)


@pytest.mark.parametrize(
    ("settings", "activation"),
    [
        ({"bias_gelu_fusion": True, "add_bias_linear": True}, "gelu_tanh"),
        ({"bias_gelu_fusion": False, "add_bias_linear": True}, "gelu"),
        ({"bias_gelu_fusion": True, "add_bias_linear": False}, "gelu"),  # there is no bias to fuse with
        ({"squared_relu": True, "add_bias_linear": False}, "relu2"),
    ],
)
def test_stock_activation_without_a_linear_branch(settings: dict[str, bool], activation: str) -> None:
    stock = stock_as_mixture(argparse.Namespace(swiglu=False, **settings))
    assert (stock.form, stock.activations) == ("type1", (activation,))
    assert activation in target_mixing(stock, "moa", stock=True).activations


def test_megatrons_fused_gelu_is_the_tanh_approximation() -> None:
    from megatron.core.fusions.fused_bias_gelu import bias_gelu_impl

    x, bias = torch.linspace(-4, 4, 101).unsqueeze(0), torch.full((101,), 0.1)
    fused = bias_gelu_impl(x, bias)
    torch.testing.assert_close(fused, reference.DEFINITIONS["gelu_tanh"](x + bias), rtol=0, atol=1e-6)
    assert (fused - reference.DEFINITIONS["gelu"](x + bias)).abs().max() > 1e-4


SIGMOID = moa("bi-sided", SILU_RELU2)
REFUSED = {
    "gates to constants": (SIGMOID, {"mixing": "la"}, "--mixing la: .* depend on the token"),
    "tanh of fixed amplitude": (
        moa("bi-sided", SILU_RELU2, gate="tanh", amplitude="fixed"),
        {"mixing": "moa"},
        "--mixing moa: .* tanh gates of fixed amplitude",
    ),
    "another gate": (SIGMOID, {"mixing": "moa", "gate": "tanh"}, "--gate tanh: .* sigmoid gates"),
    "products of gates": (
        SIGMOID,
        {"mixing": "moa", "form": "quadratic"},
        "--form quadratic: .* products of two gates",
    ),
    "softmax of another size": (
        moa("one-sided", SILU_RELU2, gate="softmax"),
        {"mixing": "moa", "activations": ("silu", "relu2", "tanh")},
        "softmax over 3 entries where the checkpoint's is over 2",
    ),
    "less than there is": (la("bi-sided", SILU_RELU2), {"mixing": "la", "form": "one-sided"}, "--form one-sided: "),
    "other units": (la("type1", ("gelu",)), {"mixing": "la", "form": "bi-sided"}, "--form bi-sided: .*form is type1"),
    "an activation left out": (SIGMOID, {"mixing": "moa", "activations": ("silu",)}, "--activations silu: relu2 must"),
    "no identity": (la("one-sided", ("silu",)), {"mixing": "moa", "form": "bi-sided"}, "--activations silu: identity"),
    "unknown activation": (SIGMOID, {"mixing": "moa", "activations": ("swish",)}, "^--activations swish: unknown"),
    "gates of la": (la("type1", ("gelu",)), {"mixing": "la", "gate": "tanh"}, "^--gate tanh: --mixing la has no gates"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_cannot_be_exact(case: str) -> None:
    source, settings, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as error:
        target_mixing(source, **settings)
    assert "\n" not in str(error.value)


def test_refuses_a_stock_activation_that_no_mixture_has() -> None:
    with pytest.raises(UserError, match="--quick-geglu"):
        stock_as_mixture(argparse.Namespace(swiglu=False, quick_geglu=True, add_bias_linear=False))


# The tool without a model.


def _tool(out: Path, *flags: str) -> None:
    convert_mixing.main(["--load", "checkpoint", "--out", str(out), "--mixing", "moa", *flags])


def test_refuses_an_out_that_is_not_empty(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(SystemExit) as end:
        _tool(tmp_path / "out")
    assert end.value.code == 2
    assert f"--out {tmp_path / 'out'}: is a folder that is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


@pytest.mark.parametrize(("difference", "code"), [(9e-6, None), (2e-5, 1), (float("nan"), 1)])
def test_leaves_nothing_where_the_models_differ(
    difference: float, code: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def convert(load: str, root: Path, *args: object, **kwargs: object) -> Conversion:
        (root / "written").write_text("half")
        return Conversion(None, SIGMOID, Comparison(difference, 1.0, 64))

    monkeypatch.setattr(upcycling, "convert", convert)
    (tmp_path / "out").mkdir()  # an empty folder may be there
    if code is None:
        _tool(tmp_path / "out")
        assert (tmp_path / "out" / "written").exists()
        assert "same likeliest token at 100.00% of 64 positions" in capsys.readouterr().out
    else:
        with pytest.raises(SystemExit) as end:
            _tool(tmp_path / "out")
        assert end.value.code == code
        assert "more than --tolerance 1e-05" in capsys.readouterr().err
        assert [path.name for path in tmp_path.rglob("*")] == ["out"]


def test_runs_nothing_of_a_strangers_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root, marker = tmp_path / "root", tmp_path / "executed"
    folder = write_checkpoint(root / "iter_0000007", {"weight": torch.zeros(2)}, {})
    (root / TRACKER).write_text("7")
    (folder / ".metadata").write_bytes(pickle.dumps(Hostile(marker)))
    for flags, message in (
        ([], ".metadata: cannot be read"),
        (["--iteration", "7"], ".metadata: cannot be read"),
        (["--iteration", "8"], "--iteration 8: is not in"),
        (["--iteration", "0"], "--iteration: 0: a number above 0 is wanted"),
        (["--ckpt-step", "7"], "--ckpt-step: is for training; which checkpoint is taken here, --iteration N says"),
    ):
        with pytest.raises(SystemExit) as end:
            convert_mixing.main(["--load", str(root), "--out", str(tmp_path / "out"), "--mixing", "moa", *flags])
        assert end.value.code == 2
        assert message in capsys.readouterr().err
    with pytest.raises(UserError, match="metadata: cannot be read"):
        inference.load(root)
    assert [path.name for path in tmp_path.iterdir()] == ["root"]


# Checkpoints.

STOCK, EAGER = ["--moa-mixing", "none"], ["--moa-backend", "eager"]
LA = ["--moa-mixing", "la", *EAGER]
MOA = ["--moa-mixing", "moa", *EAGER]
GPT2 = "--position-embedding-type learned_absolute --normalization LayerNorm --ffn-hidden-size 48".split()
SHARED = "--moe-shared-expert-intermediate-size 32 --moe-shared-expert-gate".split()
# how the source is trained, and the tool's flags
CASES = {
    "SwiGLU to moa": ([*SWIGLU, *STOCK], "--mixing moa --gate-bias"),
    "MoE, shared expert, one-sided la to quadratic moa": (
        [*SWIGLU, *MOE, *SHARED, *LA, *"--moa-form one-sided --moa-activations silu relu2 --moa-la-init .7 .4".split()],
        "--mixing moa --form quadratic --activations relu2 silu identity",
    ),
    "MoE, SwiGLU, grouped, to la": ([*SWIGLU, *MOE, "--moe-grouped-gemm", *STOCK], "--mixing la"),
    "exact GELU to moa, biases, tied": ([*GPT2, *STOCK, "--no-bias-gelu-fusion"], "--mixing moa --gate softmax"),
    "fused GELU to moa, biases, tied": ([*GPT2, *STOCK], "--mixing moa"),
    "squared ReLU to la": (["--squared-relu", *GPT2, *STOCK], "--mixing la"),
    "bi-sided la to quadratic la": (
        [*SWIGLU, *LA, *"--moa-activations silu tanh --moa-la-init .7 .4 .3 .9".split()],
        "--mixing la --form quadratic",
    ),
    "fixed sigmoid gates with a scale, grown": (
        [*SWIGLU, *MOA, *"--moa-activations silu tanh --moa-init-scale swiglu --moa-gate-bias".split()],
        "--mixing moa --activations silu relu tanh",
    ),
    "fixed softmax gates, reordered": (
        [*SWIGLU, *MOA, *"--moa-activations silu tanh --moa-gate softmax".split()],
        "--mixing moa --activations tanh silu",
    ),
    "learned tanh gates, one-sided to quadratic": (
        [
            *SWIGLU,
            *MOA,
            *"--moa-form one-sided --moa-activations silu identity --moa-gate tanh --moa-amplitude learned".split(),
        ],
        "--mixing moa --form quadratic --activations relu silu identity",
    ),
    "bf16": ([*SWIGLU, *STOCK, "--bf16"], "--mixing moa"),
}
_OFTEN = list(CASES)[:2]


def _run(target: object, *arguments: object, code: int = 0) -> str:
    returncode, log = launch.launch(target, arguments, 1, ROOT)
    assert returncode == code, log[-3000:]
    return log


def _others(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint's model but its coefficients."""
    stored = CheckpointTensors(folder)
    left_out = re.compile(r"optimizer\.|chained_|rng_state|.*\.coefficients\.|.*_extra_state")
    return {key: stored.read(key) for key in stored.tensors if not left_out.match(key)}


def _wrongly(flags: list[str]) -> None:
    """The tool with a mistake of one part in a thousand in every coefficient."""
    right = upcycling.start_amplitudes
    upcycling.start_amplitudes = lambda *args: right(*args) * 1.001
    launch.script(str(ROOT / "tools" / "convert_mixing.py"), flags)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in _OFTEN else pytest.mark.full) for case in CASES]
)
def test_converted_checkpoint_goes_on_from_the_same_loss(case: str, tmp_path: Path) -> None:
    architecture, flags = CASES[case]
    source, out = tmp_path / "source", tmp_path / "out"
    tied = "biases, tied" in case
    base = [
        flag
        for flag in TINY
        if not (tied and flag in ("--disable-bias-linear", "--untie-embeddings-and-output-weights"))
    ]
    # Large initial weights, so that a wrong coefficient shows in the logits.
    training = [*base, *architecture, "--init-method-std", "0.3", "--train-iters", "2"]
    saving = ["--save", str(source), "--save-interval", "2"]
    _run(launch.script, str(ROOT / "pretrain_gpt_moa.py"), [*training, *saving])
    tool = str(ROOT / "tools" / "convert_mixing.py")
    arguments = ["--load", str(source), "--out", str(out), *flags.split()]
    if case == _OFTEN[0]:
        log = _run(_wrongly, arguments, code=1)
        assert "differ by more than" in log
        assert [path.name for path in tmp_path.iterdir()] == ["source"]
    log = _run(launch.script, tool, arguments)
    difference = float(re.search(r"largest difference of logits (\S+) of", log)[1])
    assert difference < 1e-5
    assert "same likeliest token at 100.00% of 64 positions" in log
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]

    before, after = _others(source / "iter_0000002"), _others(out / "release")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype == (torch.bfloat16 if case == "bf16" else torch.float32), key
        assert torch.equal(tensor, after[key]), key

    go_on = ["--use-checkpoint-args", "--train-iters", "3", *(["--bf16"] if case == "bf16" else [])]
    processes, split = (2, ["--tensor-model-parallel-size", "2"]) if case == _OFTEN[0] else (1, [])
    expected = recorded(tmp_path / "a", *go_on, "--pretrained-checkpoint", source)
    converted = recorded(tmp_path / "b", *go_on, *EAGER, *split, "--pretrained-checkpoint", out, processes=processes)
    losses = [[step.losses["lm loss"] for step in run.steps] for run in (expected, converted)]
    # A bf16 model's mixture is rounded elsewhere than the stock layer is.
    assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-2 if case == "bf16" else 1e-5)
    assert len(losses[1]) == 3
    moved = [
        before.key
        for before, after in zip(converted.start, converted.end, strict=True)
        if not torch.equal(before.data, after.data)
    ]
    for name in ["value"] if "--mixing la" in flags else ["amplitude", "weight"]:
        assert any(f"coefficients.{name}" in key for key in moved), moved
