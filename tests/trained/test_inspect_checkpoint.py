"""tools/inspect_checkpoint.py: what it says of a checkpoint, and of two."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch

from megatron_moa.mixture.config import MixtureConfig
from megatron_moa.mixture.reference import gate_coefficients
from megatron_moa.trained.inspection import differences
from megatron_moa.trained.inspection.differences import difference
from megatron_moa.trained.inspection.kinds import kind_of
from tests.support.checkpoints import COMMON, Hostile, append, archive, change_metadata, write_checkpoint
from tests.support.training import SWIGLU, train
from tools.inspect_checkpoint import main

LAYERS = "decoder.layers."
SETTINGS = {
    "moa_mixing": "moa",
    "moa_form": "one-sided",
    "moa_activations": ["silu", "relu2"],
    "moa_gate": "softmax",
    "moa_gate_bias": True,
    "moa_amplitude": "learned",
    "moa_init": [1.0],
    "moa_gate_init_std": 0.02,
    "moa_init_scale": "paper",
    "moa_freeze_gates": False,
    "moa_format_version": 2,
    "num_layers": 2,
    "hidden_size": 4,
    "num_experts": 3,
    "moe_router_topk": 2,
    "add_bias_linear": False,
    "swiglu": True,
    "qk_layernorm": False,
    "params_dtype": torch.bfloat16,
    "tensor_model_parallel_size": 2,
    "lr": 1e-3,
}
LA = {"moa_mixing": "la", "moa_gate": "sigmoid", "moa_gate_bias": False, "moa_amplitude": "fixed"}


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def moe_tensors() -> dict[str, torch.Tensor]:
    """Two layers, h 4; three experts of f 6 with gates of two activations."""
    experts = f"{LAYERS}mlp.experts.experts."
    return {
        "embedding.word_embeddings.weight": numbers(10, 4).bfloat16(),
        f"{LAYERS}self_attention.linear_qkv.layer_norm_weight": numbers(2, 4),
        f"{LAYERS}self_attention.linear_qkv.weight": numbers(2, 12, 4),
        f"{LAYERS}self_attention.q_layernorm.weight": numbers(2, 4),
        f"{LAYERS}mlp.router.weight": numbers(2, 3, 4),
        f"{experts}linear_fc1.weight": numbers(2, 3, 12, 4),
        f"{experts}linear_fc2.weight": numbers(2, 3, 4, 6),
        f"{experts}coefficients.weight": numbers(2, 3, 2, 4),
        f"{experts}coefficients.bias": numbers(2, 3, 2),
        f"{experts}coefficients.amplitude": numbers(2, 3, 2) + 1,
        "decoder.final_layernorm.weight": numbers(4),
        "output_layer.weight": numbers(10, 4),
        f"optimizer.state.exp_avg.{LAYERS}mlp.router.weight": numbers(2, 3, 4),
    }


@pytest.fixture
def moe(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "moe", moe_tensors(), SETTINGS, pieces=2)


def inspect(capsys: pytest.CaptureFixture[str], *flags: str | Path) -> dict:
    main([*map(str, flags), "--json"])
    return json.loads(capsys.readouterr().out)


def compare(capsys: pytest.CaptureFixture[str], one: Path, other: Path) -> tuple[dict, int]:
    """What --diff says as JSON, and its exit code."""
    code = 0
    try:
        main([str(one), "--diff", str(other), "--json"])
    except SystemExit as left:
        code = left.code
    return json.loads(capsys.readouterr().out), code


def error_of(capsys: pytest.CaptureFixture[str], *flags: str | Path) -> str:
    """The one line it leaves with."""
    with pytest.raises(SystemExit) as left:
        main([*map(str, flags)])
    assert left.value.code == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("inspect_checkpoint.py: error: ")
    assert error.count("\n") == 1
    return error


# One checkpoint.


def test_parameters_by_kind(moe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    about = inspect(capsys, moe)
    kinds = about["parameters"]
    assert {kind: (entry["tensors"], entry["parameters"]) for kind, entry in kinds.items()} == {
        "embedding": (2, 80),
        "attention": (1, 96),
        "experts": (3, 24 + 288 + 144),
        "norms": (3, 20),
        "mixture": (3, 48 + 12 + 12),
        "optimizer": (1, 24),
    }
    assert kinds["embedding"] == {
        "tensors": 2,
        "parameters": 80,
        "bytes": 40 * 2 + 40 * 4,
        "dtypes": ["bfloat16", "float32"],
        "shards": 4,
        "files": 2,
    }
    assert about["tensors"][f"{LAYERS}mlp.router.weight"] == {
        "kind": "experts",
        "shape": [2, 3, 4],
        "dtype": "float32",
        "shards": 2,
        "files": ["__0_0.distcp", "__1_0.distcp"],
    }
    assert (about["iteration"], about["format_version"], about["has_manifest"]) == (7, 2, False)
    assert about["settings"]["params_dtype"] == "bfloat16"
    assert about["mixture"] == "moa, one-sided, silu+relu2, softmax gates with bias and learned amplitude"


@pytest.mark.parametrize(
    ("settings", "key", "expected"),
    [
        ({}, "chained_0.optimizer.state.exp_avg.x", "any split that splits experts otherwise than dense layers ("),
        ({"expert_model_parallel_size": 1}, "chained_0.optimizer.state.exp_avg.x", "any split that splits experts as "),
        ({"num_experts": None}, "chained_0.optimizer.state.exp_avg.x", "any split (saved"),
        ({"num_experts": None}, "optimizer.distributed.dp_group_idx_0", "TP 1, PP 1, EP 2, expert TP 1 and any DP ("),
    ],
)
def test_splits_of_muons_state(
    settings: dict, key: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    muon = {"optimizer": "muon", "use_distributed_optimizer": False, "num_experts": 4}
    sizes = dict.fromkeys(("tensor_model_parallel_size", "pipeline_model_parallel_size", "data_parallel_size"), 1)
    sizes |= {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}
    folder = write_checkpoint(tmp_path / "muon", {key: numbers(4)}, {**SETTINGS, **muon, **sizes, **settings})
    assert inspect(capsys, folder)["optimizer"].startswith(f"there, for {expected}")


def test_coefficients_are_those_of_the_reference(moe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    about = inspect(capsys, moe)
    mixture = MixtureConfig("moa", "one-sided", ("silu", "relu2"), gate="softmax", gate_bias=True, amplitude="learned")
    prefix = f"{LAYERS}mlp.experts.experts.coefficients."
    weight, bias, amplitude = (moe_tensors()[prefix + name] for name in ("weight", "bias", "amplitude"))
    assert about["coefficient_names"] == ["linear.silu", "linear.relu2"]
    assert [(entry["layer"], entry["place"]) for entry in about["coefficients"]] == [
        (0, "mean of 3 experts"),
        (1, "mean of 3 experts"),
    ]
    for layer, entry in enumerate(about["coefficients"]):
        at_zero = [
            gate_coefficients(torch.zeros(4), weight[layer, e], mixture, bias[layer, e], amplitude[layer, e])
            for e in range(3)
        ]
        assert entry["rows"]["at zero"] == pytest.approx(torch.stack(at_zero).mean(0).tolist(), rel=1e-5)
        assert entry["rows"]["amplitude"] == pytest.approx(amplitude[layer].mean(0).tolist(), rel=1e-5)
        assert entry["rows"]["gate norm"] == pytest.approx(weight[layer].norm(dim=-1).mean(0).tolist(), rel=1e-5)


def test_layers_with_names_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where experts are in some layers only, Megatron stacks none; LA, and a scale of gates."""
    settings = {**SETTINGS, **LA, "moa_form": "quadratic"}
    tensors = {
        f"{LAYERS}10.mlp.coefficients.value": torch.tensor([0.5, 1.5, -1.0]),
        f"{LAYERS}9.mlp.experts.experts.coefficients.value": torch.tensor([[1.0, 2, 3], [3.0, 2, 1]]),
        f"{LAYERS}9.mlp.shared_experts.coefficients.value": torch.zeros(3),
    }
    about = inspect(capsys, write_checkpoint(tmp_path / "la", tensors, settings))
    assert about["coefficient_names"] == ["silu*silu", "silu*relu2", "relu2*relu2"]
    assert about["coefficients"] == [
        {"layer": 9, "place": "mean of 2 experts", "rows": {"value": [2, 2, 2]}},
        {"layer": 9, "place": "shared experts", "rows": {"value": [0, 0, 0]}},
        {"layer": 10, "place": "mlp", "rows": {"value": [0.5, 1.5, -1.0]}},
    ]


def test_constant_scale_of_gates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {**SETTINGS, **LA, "moa_mixing": "moa"}
    settings["moa_init_scale"] = "matched"
    tensors = {
        f"{LAYERS}mlp.coefficients.weight": numbers(1, 2, 4),
        f"{LAYERS}mlp.coefficients.scale": torch.full((1, 1), 0.25),
    }
    about = inspect(capsys, write_checkpoint(tmp_path / "scaled", tensors, settings))
    assert about["coefficients"][0]["rows"]["at zero"] == [0.125, 0.125]


def test_text_has_settings_as_one_would_type_them(moe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(moe)])
    text = capsys.readouterr().out
    assert "--moa-mixing moa --moa-form one-sided --moa-activations silu relu2 --moa-gate softmax" in text
    assert "--num-layers 2 --hidden-size 4 --swiglu --disable-bias-linear --num-experts 3 --moe-router-topk 2" in text
    assert "--moa-init 1.0 --moa-gate-init-std 0.02 --moa-init-scale paper" in text
    assert text.index("--moa-mixing") < text.index("--num-layers")
    assert "--qk-layernorm" not in text
    assert re.search(r"model: +724 parameters", text)
    assert "| experts | 3 | 456 | 1,824 | float32 | 6 | 2 |" in text
    assert "| decoder.layers.mlp.experts.experts.linear_fc1.weight | 2×3×12×4 | float32 | 2 | 2 |" in text
    assert "optimizer.state" not in text


def test_stock_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_checkpoint(tmp_path / "stock", {"output_layer.weight": numbers(4, 4)}, {"num_layers": 1})
    about = inspect(capsys, folder)
    assert (about["mixture"], about["coefficients"], about["optimizer"]) == ("none", [], "not there")
    main([str(folder)])
    assert "mixture:   none\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("embedding.position_embeddings.weight", "embedding"),
        (f"{LAYERS}self_attention.linear_proj.bias", "attention"),
        (f"{LAYERS}3.mlp.linear_fc1.layer_norm_bias", "norms"),
        (f"{LAYERS}mlp.linear_fc1.bias", "feed-forward"),
        (f"{LAYERS}mlp.shared_experts.gate_weight", "experts"),
        (f"{LAYERS}mlp.shared_experts.coefficients.weight", "mixture"),
        (f"{LAYERS}mlp.router.expert_bias", "experts"),
        ("chained_0.optimizer.distributed.dp_group_idx_0.param", "optimizer"),
        ("something.weight", "other"),
    ],
)
def test_kinds(key: str, kind: str) -> None:
    assert kind_of(key) == kind


# Two.


def test_equal_checkpoints(moe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Other pieces, another place; a NaN and an infinity that both have."""
    tensors = moe_tensors()
    tensors["output_layer.weight"][0] = torch.tensor([math.nan, math.inf, -math.inf, 0.0])
    one = write_checkpoint(tmp_path / "one", tensors, SETTINGS, pieces=1)
    two = write_checkpoint(tmp_path / "two", tensors, {**SETTINGS, "lr": 2e-3}, pieces=3, iteration=8)
    compared, code = compare(capsys, one, two)
    assert code == 0
    assert compared["settings"] == {"lr": [1e-3, 2e-3]}
    assert compared["iterations"] == [7, 8]
    assert compared["differences"]["all"] == {
        "absolute": 0.0,
        "relative": 0.0,
        "tensor": "",
        "tensors": 12,
        "different": 0,
    }


def test_differences_by_kind(moe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = moe_tensors()
    router, fc2 = f"{LAYERS}mlp.router.weight", f"{LAYERS}mlp.experts.experts.linear_fc2.weight"
    tensors[router][1, 2, 3] += 0.5
    tensors[fc2][0, 1, 1, 1] -= 0.25
    tensors["decoder.final_layernorm.weight"] *= 0
    tensors["decoder.new_norm.weight"] = tensors.pop(f"{LAYERS}self_attention.q_layernorm.weight")
    tensors["output_layer.weight"] = numbers(12, 4)
    tensors["embedding.word_embeddings.weight"] = tensors["embedding.word_embeddings.weight"].float()
    other = write_checkpoint(tmp_path / "other", tensors, {**SETTINGS, "moa_gate": "tanh"}, pieces=2)
    compared, code = compare(capsys, moe, other)
    assert code == 1
    assert compared["settings"] == {"moa_gate": ["softmax", "tanh"]}
    assert compared["only_in_first"] == [f"{LAYERS}self_attention.q_layernorm.weight"]
    assert compared["only_in_second"] == ["decoder.new_norm.weight"]
    assert compared["other_shapes_or_dtypes"] == {
        "embedding.word_embeddings.weight": ["bfloat16 10×4", "float32 10×4"],
        "output_layer.weight": ["float32 10×4", "float32 12×4"],
    }
    found = compared["differences"]
    largest = max(moe_tensors()[router][1].abs().max().item(), tensors[router][1].abs().max().item())
    assert found["experts"]["absolute"] == pytest.approx(0.5)
    assert found["experts"]["relative"] == pytest.approx(max(0.5 / largest, 0.25 / tensors[fc2][0].abs().max().item()))
    assert found["experts"]["tensor"] == router
    assert (found["experts"]["different"], found["experts"]["tensors"]) == (2, 3)
    assert found["norms"]["relative"] == 1.0  # against zeros
    assert found["embedding"]["different"] == 0
    assert found["mixture"]["absolute"] == 0
    assert found["all"]["different"] == 3
    with pytest.raises(SystemExit):
        main([str(moe), "--diff", str(other)])
    text = capsys.readouterr().out
    assert "| moa_gate | softmax | tanh |" in text
    assert "only in the second: decoder.new_norm.weight" in text
    assert re.search(r"\| experts \| 0\.5 \| [\d.]+ \| decoder\.layers\.mlp\.router\.weight \| 2 of 3 \|", text)


def test_difference_of_what_is_not_finite() -> None:
    finite, infinite, missing = (torch.tensor([1.0, value]) for value in (2.0, math.inf, math.nan))
    assert difference(finite, finite + 1) == (1.0, 1 / 3)
    assert difference(missing, missing) == (0.0, 0.0)
    assert difference(finite, missing)[0] == math.inf
    assert difference(infinite, -infinite)[0] == math.inf
    assert difference(torch.empty(0), torch.empty(0)) == (0.0, 0.0)


def test_difference_is_found_in_every_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(differences, "_PART", 4)
    zeros = torch.zeros(3, 3)
    for position in range(9):
        other = zeros.clone()
        other.view(-1)[position] = -2.0
        assert difference(zeros, other) == (2.0, 1.0)


# Mistakes, damage, mischief.


def test_mistakes(moe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such folder" in error_of(capsys, tmp_path / "nowhere")
    assert "names no latest checkpoint" in error_of(capsys, tmp_path)
    assert "--iteration 3: names" in error_of(capsys, tmp_path, "--iteration", "3")
    assert "is the folder of one checkpoint" in error_of(capsys, moe, "--iteration", "3")
    assert "--diff-iteration 3: of which checkpoint?" in error_of(capsys, moe, "--diff-iteration", "3")
    assert "no such folder" in error_of(capsys, moe, "--diff", tmp_path / "nowhere")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("soon")
    assert "holds 'soon' instead of an iteration" in error_of(capsys, tmp_path)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
    assert f"iteration.txt: names {tmp_path / 'release'}, which is not there" in error_of(capsys, tmp_path)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a\0b"])
def test_manifest_that_leaves_its_folder(name: str, moe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (moe / "manifest.json").write_text(json.dumps({"files": {name: {"size": 1, "crc32": ""}}}))
    assert "which does not lie in its folder" in error_of(capsys, moe)


def test_settings_without_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    endless: list = []
    endless.append(endless)
    folder = write_checkpoint(tmp_path / "endless", moe_tensors(), {**SETTINGS, "blend": endless})
    assert "without end" in error_of(capsys, folder)


@pytest.mark.parametrize("place", ["settings", "tensor"])
def test_hostile_files_run_nothing(place: str, moe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    marker = tmp_path / "executed"
    content = [{"args": Hostile(marker)}]
    where = append(moe, archive(content))

    def change(index) -> None:
        key = f"{LAYERS}mlp.router.weight"
        for entry in [COMMON] if place == "settings" else [entry for entry in index.storage_data if entry.fqn == key]:
            index.storage_data[entry] = where

    change_metadata(moe, change)
    # The router's weights are read where they are compared, not where they are counted.
    assert "posix.system" in error_of(capsys, moe, *([] if place == "settings" else ["--diff", str(moe)]))
    assert not marker.exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"moa_gate": "softplus"}, "--moa-gate softplus: unknown"),
        ({"moa_activations": 3}, "settings of its mixture cannot be read"),
        ({"moa_activations": ["silu", "relu2", "tanh"]}, "is not what its settings mean"),
        (LA, "is not what its settings mean"),
    ],
)
def test_settings_that_do_not_fit(
    changed: dict, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_checkpoint(tmp_path / "odd", moe_tensors(), {**SETTINGS, **changed})
    assert message in error_of(capsys, folder)


def test_settings_cannot_move_the_cursor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {**SETTINGS, "normalization": "\x1b[2Jgone\n"}
    main([str(write_checkpoint(tmp_path / "odd", moe_tensors(), settings))])
    assert "--normalization \\x1b[2Jgone\\n" in capsys.readouterr().out


# What training writes.


@pytest.mark.slow
def test_a_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "run"
    flags = "--moa-backend eager --train-iters 2 --save-interval 1"
    train(*SWIGLU, *flags.split(), "--save", root)
    about = inspect(capsys, root)
    assert (about["iteration"], about["has_manifest"]) == (2, True)
    assert about["optimizer"] == "there, for any split (saved under TP 1, PP 1, EP 1, expert TP 1, DP 1)"
    kinds = {kind: entry["parameters"] for kind, entry in about["parameters"].items()}
    assert kinds == {
        "embedding": 2 * 64 * 32,
        "attention": 2 * (64 * 32 + 32 * 32),
        "feed-forward": 2 * 3 * 48 * 32,
        "norms": 5 * 32,
        "mixture": 2 * 14 * 32,
        "optimizer": 2 * 20_512,
    }
    assert [entry["rows"]["at zero"] for entry in about["coefficients"]] == [[0.5] * 14] * 2
    compared, code = compare(capsys, root / "iter_0000001", root)
    assert code == 1
    assert compared["differences"]["all"]["different"] == 10
    assert 0 < compared["differences"]["all"]["absolute"] < 0.01
    largest = root / "iter_0000002" / "__0_0.distcp"
    largest.write_bytes(largest.read_bytes()[:-1])
    assert f"{largest} has" in error_of(capsys, root)
