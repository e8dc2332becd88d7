"""megatron_moa/trained/upcycling.py, tools/convert_mixing.py: another mixture, the same function."""

from __future__ import annotations

import argparse
import dataclasses
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import activations as megatron_activations
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional as F

from megatron_moa.checkpoints.files import TRACKER
from megatron_moa.checkpoints.tensors import CheckpointTensors
from megatron_moa.errors import UserError
from megatron_moa.layers.coefficients import Coefficients
from megatron_moa.load import load
from megatron_moa.mixture import reference
from megatron_moa.mixture.config import FORMS, GATES, MixtureConfig
from megatron_moa.trained import upcycling
from megatron_moa.trained.compare_logits import Comparison
from megatron_moa.trained.upcycling import Conversion, stock_as_mixture, target_mixture
from tests.support import launch
from tests.support.checkpoints import Hostile, write_checkpoint
from tests.support.layers import build_model, logits_of, make_config, moe_settings
from tests.support.training import MOE, ROOT, SWIGLU, TINY, recorded
from tools import convert_mixing

# Coefficients.

SILU_RELU2 = ("silu", "relu2")


def la(form: str, activations: tuple[str, ...] = ()) -> MixtureConfig:
    return MixtureConfig(kind="la", form=form, activations=activations)


def moa(form: str, activations: tuple[str, ...] = (), **settings: object) -> MixtureConfig:
    return MixtureConfig(
        **{"kind": "moa", "form": form, "activations": activations, "amplitude": "learned", **settings}
    )


def stock(**settings: object) -> MixtureConfig:
    """A stock model's layer as a mixture, SwiGLU if nothing else is said."""
    return stock_as_mixture(argparse.Namespace(**{"swiglu": True, "add_bias_linear": False, **settings}))


@pytest.mark.parametrize(
    ("settings", "form", "activations", "one"),
    [
        ({}, "bi-sided", "gelu silu relu2 leaky_relu tanh relu identity", {"silu", "linear.identity"}),
        ({"routed_experts": True}, "one-sided", "gelu silu relu2 leaky_relu tanh relu identity", {"linear.identity"}),
        ({"form": "quadratic"}, "quadratic", "gelu silu relu2 identity", {"silu*identity"}),
        (
            {"form": "bi-sided", "activations": ("identity", "relu", "silu")},
            *("bi-sided", "identity relu silu", {"silu", "linear.identity"}),
        ),
    ],
)
@pytest.mark.parametrize("mixing", ["la", "moa"])
def test_swiglu_is_one_coefficient_in_each_branch_that_has_them(
    settings: dict[str, Any], form: str, activations: str, one: set[str], mixing: str
) -> None:
    target = target_mixture(stock(), mixing, stock=True, **settings)
    assert (target.kind, target.form, target.activations) == (mixing, form, tuple(activations.split()))
    starts = dict(zip(target.coefficient_names, target.initial_coefficients, strict=True))
    assert starts == {name: float(name in one) for name in target.coefficient_names}
    amplitude = {"la": "fixed", "moa": "learned"}[mixing]
    assert (target.amplitude, target.gate, target.init_scale) == (amplitude, "sigmoid", "paper")


@pytest.mark.parametrize(
    ("settings", "activation", "dictionary"),
    [
        ({"bias_gelu_fusion": True, "add_bias_linear": True}, "gelu_tanh", "gelu_tanh silu relu2 leaky_relu relu"),
        ({"bias_gelu_fusion": False, "add_bias_linear": True}, "gelu", "gelu silu relu2 leaky_relu relu"),
        ({"bias_gelu_fusion": True}, "gelu", "gelu silu relu2 leaky_relu relu"),  # there is no bias to fuse with
        ({"squared_relu": True}, "relu2", "gelu silu relu2 leaky_relu relu"),
    ],
)
def test_stock_activation_without_a_linear_branch(settings: dict[str, bool], activation: str, dictionary: str) -> None:
    source = stock(swiglu=False, **settings)
    assert (source.form, source.activations) == ("type1", (activation,))
    target = target_mixture(source, "moa", stock=True, routed_experts=True)
    assert (target.form, " ".join(target.activations)) == ("type1", dictionary)
    starts = zip(target.activations, target.initial_coefficients, strict=True)
    assert {name for name, start in starts if start} == {activation}


def test_megatrons_fused_gelu_is_the_tanh_approximation() -> None:
    from megatron.core.fusions.fused_bias_gelu import bias_gelu_impl

    x, bias = torch.linspace(-4, 4, 101).unsqueeze(0), torch.full((101,), 0.1)
    with torch.compiler.set_stance("force_eager"):  # Megatron compiles it
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
    "both orders of a pair": (
        la("bi-sided", SILU_RELU2),
        {"mixing": "la", "form": "quadratic"},
        r"--form quadratic: .* pairs \(k, l\) and \(l, k\), the quadratic form those of k <= l only$",
    ),
    "products of gates": (SIGMOID, {"mixing": "moa", "form": "quadratic"}, "--form quadratic: .* k <= l only$"),
    "sums that are no product": (la("quadratic"), {"mixing": "la", "form": "bi-sided"}, "which can become quadratic$"),
    "softmax of another size": (
        moa("one-sided", SILU_RELU2, gate="softmax"),
        {"mixing": "moa", "activations": ("silu", "relu2", "tanh")},
        "softmax over 3 entries where the checkpoint's is over 2",
    ),
    "softmax of another form": (
        moa("one-sided", SILU_RELU2, gate="softmax"),
        {"mixing": "moa", "form": "quadratic"},
        "--form quadratic: softmax over 3 entries where the checkpoint's is over 2",
    ),
    "less than there is": (la("bi-sided", SILU_RELU2), {"mixing": "la", "form": "one-sided"}, "--form one-sided: "),
    "other units": (la("type1", ("gelu",)), {"mixing": "la", "form": "bi-sided"}, "--form bi-sided: .*form is type1"),
    "an activation left out": (SIGMOID, {"mixing": "moa", "activations": ("silu",)}, "--activations silu: relu2 must"),
    "no silu": (la("one-sided", ("tanh",)), {"mixing": "moa", "form": "bi-sided"}, "--activations tanh: silu must"),
    "SwiGLU without identity": (
        stock(),
        {"mixing": "la", "form": "one-sided", "activations": ("silu",), "stock": True},
        "--activations silu: identity must",
    ),
    "SwiGLU without both": (
        stock(),
        {"mixing": "la", "form": "quadratic", "activations": ("relu",), "stock": True},
        "--activations relu: identity, silu must",
    ),
    "unknown activation": (SIGMOID, {"mixing": "moa", "activations": ("swish",)}, "^--activations swish: unknown"),
    "unknown form": (stock(), {"mixing": "la", "form": "both", "stock": True}, "^--form both: unknown"),
    "gates of la": (la("type1", ("gelu",)), {"mixing": "la", "gate": "tanh"}, "^--gate tanh: --mixing la has no gates"),
    "nothing new": (
        la("quadratic"),
        {"mixing": "la"},
        "^--mixing la: the checkpoint is la, quadratic, .* already; ask",
    ),
    "nothing new, frozen and scaled": (
        dataclasses.replace(SIGMOID, freeze=True, init_scale="matched", initial_coefficients=(0.3,)),
        {"mixing": "moa"},
        "^--mixing moa: the checkpoint is moa, bi-sided, .* already; ask",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_cannot_be_exact(case: str) -> None:
    source, settings, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as error:
        target_mixture(source, **settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "activations", "pair", "remedy"),
    [
        (stock(), "identity gelu silu", "(silu, identity)", "silu gelu identity"),
        (la("one-sided", ("relu2", "tanh")), "relu2 silu one tanh", "(silu, relu2)", "silu relu2 one tanh"),
        (la("one-sided", ("relu2", "silu")), "tanh relu2 silu", "(silu, relu2)", "tanh silu relu2"),
        (
            la("quadratic", ("gelu", "silu", "tanh")),
            "one tanh gelu relu silu",
            "(gelu, tanh)",
            "one gelu silu relu tanh",
        ),
    ],
)
def test_an_order_that_loses_a_pair_is_named_with_one_that_does_not(
    source: MixtureConfig, activations: str, pair: str, remedy: str
) -> None:
    settings = {"mixing": "moa", "form": "quadratic", "stock": source == stock()}
    with pytest.raises(UserError) as error:
        target_mixture(source, activations=activations.split(), **settings)
    line = str(error.value)
    assert line.startswith(f"--activations {activations}: the checkpoint has the pair {pair}, and the quadratic form ")
    assert line.endswith(f"; take --activations {remedy}")
    assert "\n" not in line
    assert target_mixture(source, activations=remedy.split(), **settings).activations == tuple(remedy.split())


def test_refuses_a_stock_activation_that_no_mixture_has() -> None:
    with pytest.raises(UserError, match="--quick-geglu"):
        stock(swiglu=False, quick_geglu=True)


# Whole models in this process.

FORMS_OF_SWIGLU = ("one-sided", "bi-sided", "quadratic")
RELU2_ID, GROWN = ("relu2", "identity"), ("tanh", "silu", "relu2", "one", "identity")
# source, and what is asked for: of one gate each, for those that every gate has
CONVERSIONS = {
    "la type1, grown, reordered": (
        la("type1", ("gelu", "relu")),
        {"mixing": "la", "activations": ("relu", "one", "gelu")},
    ),
    "la one-sided, grown, reordered": (
        la("one-sided", RELU2_ID),
        {"mixing": "la", "activations": ("identity", "tanh", "relu2")},
    ),
    "la one-sided to bi-sided": (la("one-sided", RELU2_ID), {"mixing": "la", "form": "bi-sided", "activations": GROWN}),
    "la one-sided to quadratic": (
        la("one-sided", RELU2_ID),
        {"mixing": "la", "form": "quadratic", "activations": GROWN},
    ),
    "la one-sided with silu to quadratic": (la("one-sided", SILU_RELU2), {"mixing": "la", "form": "quadratic"}),
    "la bi-sided, grown": (la("bi-sided", SILU_RELU2), {"mixing": "la", "activations": ("relu2", "one", "silu")}),
    "la quadratic, grown": (
        la("quadratic", ("gelu", "tanh", "silu")),
        {"mixing": "la", "activations": ("one", "gelu", "tanh", "relu", "silu")},
    ),
    **{
        f"la {form} to moa, {gate}": (la(form), {"mixing": "moa", "gate": gate, "gate_bias": gate == "tanh"})
        for form, gate in zip(FORMS, ("softmax", "tanh", "softmax", "sigmoid"), strict=True)
    },
    **{
        f"moa one-sided to bi-sided, {gate}": (
            moa("one-sided", SILU_RELU2, gate=gate),
            {"mixing": "moa", "form": "bi-sided"},
        )
        for gate in GATES
    },
    **{
        f"moa one-sided to quadratic, {gate}": (
            moa("one-sided", RELU2_ID, gate=gate, gate_bias=True),
            {"mixing": "moa", "form": "quadratic", "activations": GROWN},
        )
        for gate in ("sigmoid", "tanh")
    },
    "moa quadratic, grown": (moa("quadratic", SILU_RELU2), {"mixing": "moa", "activations": ("silu", "gelu", "relu2")}),
    "moa type1, with biases": (moa("type1", SILU_RELU2, gate="softmax"), {"mixing": "moa", "gate_bias": True}),
    "fixed sigmoid one-sided with a scale to bi-sided": (
        moa("one-sided", SILU_RELU2, amplitude="fixed", init_scale="matched"),
        {"mixing": "moa", "form": "bi-sided"},
    ),
    "fixed softmax quadratic": (moa("quadratic", SILU_RELU2, amplitude="fixed", gate="softmax"), {"mixing": "moa"}),
}
KINDS: dict[str, dict[str, Any]] = {"dense": {}, "moe": moe_settings(moe_shared_expert_intermediate_size=12)}


def converted_logits(
    config: TransformerConfig, source: MixtureConfig, target: MixtureConfig, is_stock: bool
) -> tuple[Tensor, Tensor]:
    """Of a model whose coefficients are drawn, or which has none, and of the model it is converted to."""
    torch.manual_seed(3)
    eager = dataclasses.replace(source, backend="eager"), dataclasses.replace(target, backend="eager")
    model = build_model(config, None if is_stock else eager[0]).eval()
    for module in model.modules():
        if isinstance(module, Coefficients):
            for parameter in module.parameters():
                parameter.data = torch.randn_like(parameter)
    state = model.state_dict()
    if not config.gated_linear_unit:
        config = dataclasses.replace(config, activation_func=F.gelu)  # as mixture_flags does: the mixture has the other
    result = build_model(config, eager[1]).eval()
    read = upcycling.upcycled(state.__getitem__, result, source, target, is_stock)
    result.load_state_dict({name: read(name) for name in result.state_dict()})
    with torch.no_grad():
        return logits_of(model), logits_of(result)


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS_OF_SWIGLU)
@pytest.mark.parametrize("mixing", ["la", *GATES])
def test_swiglu_keeps_its_logits_bit_for_bit(mixing: str, form: str, kind: str) -> None:
    gates = {"mixing": "la"} if mixing == "la" else {"mixing": "moa", "gate": mixing}
    target = target_mixture(stock(), form=form, stock=True, **gates)
    expected, found = converted_logits(make_config(**KINDS[kind]), stock(), target, is_stock=True)
    # Softmax over K times K is 1 but for rounding.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 if mixing == "softmax" else 0)


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize("mixing", ["la", "moa"])
@pytest.mark.parametrize("name", ["gelu", "relu2"])
def test_gelu_and_squared_relu_keep_their_logits_bit_for_bit(name: str, mixing: str) -> None:
    function = F.gelu if name == "gelu" else megatron_activations.squared_relu  # as it is now: nothing compiled
    source = stock(swiglu=False, squared_relu=name == "relu2")
    assert source.activations == (name,)
    target = target_mixture(source, mixing, stock=True)
    config = make_config(gated=False, activation_func=function)
    expected, found = converted_logits(config, source, target, is_stock=True)
    assert torch.equal(found, expected)


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize("case", CONVERSIONS)
def test_a_mixture_keeps_its_logits(case: str) -> None:
    source, settings = CONVERSIONS[case]
    target = target_mixture(source, **settings)
    kind = "moe" if list(CONVERSIONS).index(case) % 2 else "dense"
    expected, found = converted_logits(make_config(source.gated, **KINDS[kind]), source, target, is_stock=False)
    # float32 sums in another order
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


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
        (["--iteration", "0"], "--iteration: a number above 0 is wanted, not 0"),
        (["--ckpt-step", "7"], "--ckpt-step: is for training; which checkpoint is taken here, --iteration N says"),
    ):
        with pytest.raises(SystemExit) as end:
            convert_mixing.main(["--load", str(root), "--out", str(tmp_path / "out"), "--mixing", "moa", *flags])
        assert end.value.code == 2
        assert message in capsys.readouterr().err
    with pytest.raises(UserError, match="metadata: cannot be read"):
        load(root)
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
        [
            *SWIGLU,
            *MOE,
            *SHARED,
            *LA,
            *"--moa-form one-sided --moa-activations relu2 identity --moa-init .7 .4".split(),
        ],
        "--mixing moa --form quadratic --activations silu relu2 tanh identity",
    ),
    "MoE, SwiGLU, grouped, to la": ([*SWIGLU, *MOE, "--moe-grouped-gemm", *STOCK], "--mixing la"),
    "exact GELU to moa, biases, tied": ([*GPT2, *STOCK, "--no-bias-gelu-fusion"], "--mixing moa --gate softmax"),
    "fused GELU to moa, biases, tied": ([*GPT2, *STOCK], "--mixing moa"),
    "squared ReLU to la": (["--squared-relu", *GPT2, *STOCK], "--mixing la"),
    "SwiGLU to quadratic moa": ([*SWIGLU, *STOCK], "--mixing moa --form quadratic"),
    "fixed sigmoid gates with a scale, grown": (
        [*SWIGLU, *MOA, *"--moa-activations silu tanh --moa-init-scale matched --moa-gate-bias".split()],
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
_OFTEN = next(iter(CASES))


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
    "case", [pytest.param(case, marks=() if case == _OFTEN else pytest.mark.full) for case in CASES]
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
    if case == _OFTEN:
        log = _run(_wrongly, arguments, code=1)
        assert "differ by more than" in log
        assert [path.name for path in tmp_path.iterdir()] == ["source"]
    log = _run(launch.script, tool, arguments)
    steps = f"> computing logits of {source}", "> converting to ", "> reading back and computing logits"
    assert all(step in log for step in steps), log
    difference = float(re.search(r"largest difference of logits (\S+) of", log)[1])
    assert difference <= (0 if "SwiGLU" in case else 1e-5)
    assert "same likeliest token at 100.00% of 64 positions" in log
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]

    before, after = _others(source / "iter_0000002"), _others(out / "release")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype == (torch.bfloat16 if case == "bf16" else torch.float32), key
        assert torch.equal(tensor, after[key]), key

    go_on = ["--use-checkpoint-args", "--train-iters", "3", *(["--bf16"] if case == "bf16" else [])]
    processes, split = (2, ["--tensor-model-parallel-size", "2"]) if case == _OFTEN else (1, [])
    model = {"model": [*base, *(GPT2 if "--normalization" in architecture else [])]}
    expected = recorded(tmp_path / "a", *go_on, "--pretrained-checkpoint", source, **model)
    go_on += [*EAGER, *split]
    converted = recorded(tmp_path / "b", *go_on, "--pretrained-checkpoint", out, processes=processes, **model)
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


@pytest.mark.slow
def test_a_checkpoint_of_format_version_1(tmp_path: Path) -> None:
    """Its dictionary is in the order of version 0.1, and its LA coefficients started at 0.5."""
    source, out = ROOT / "tests" / "support" / "version1" / "bi-sided-la", tmp_path / "out"
    tool = str(ROOT / "tools" / "convert_mixing.py")
    arguments = ["--load", str(source), "--out", str(out), "--mixing"]
    log = _run(launch.script, tool, [*arguments, "la", "--form", "quadratic"], code=2)
    (line,) = log.splitlines()  # and nothing of Megatron's
    assert line.startswith("convert_mixing.py: error: --form quadratic: the checkpoint's form is bi-sided")
    assert not any(tmp_path.iterdir())

    names = "identity gelu silu relu leaky_relu relu2 tanh".split()
    log = _run(launch.script, tool, [*arguments, "moa", "--activations", *names[::-1], "one", "--seed", "4"])
    assert "WARNING" not in log  # no training goes on
    assert f"> from la, bi-sided, {'+'.join(names)}" in log
    assert float(re.search(r"largest difference of logits (\S+) of", log)[1]) < 1e-5
    owner = "decoder.layers.mlp.coefficients."
    values = CheckpointTensors(source / "iter_0000003").read(f"{owner}value")  # [layers, 14]
    assert values.std() > 0.01
    amplitudes = CheckpointTensors(out / "release").read(f"{owner}amplitude")
    first, second = values.chunk(2, dim=1)
    zero = values.new_zeros(len(values), 1)
    assert torch.equal(amplitudes, torch.cat((first.flip(1), zero, second.flip(1), zero), 1))
