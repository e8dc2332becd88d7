"""Gates of a trained mixture: recorded coefficients, losses with others in their place, and the reports of both.

research/gates/probe.py on models made by hand; then tools/analyze_gates.py and examples/studies/continue_frozen.sh.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.image
import pytest
import torch
from matplotlib.axes import Axes
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megatron_moa.checkpoints.tensors import CheckpointTensors
from megatron_moa.errors import UserError
from megatron_moa.layers.coefficients import Coefficients
from megatron_moa.mixture import reference
from megatron_moa.mixture.config import MixtureConfig
from megatron_moa.research.gates import continued
from megatron_moa.research.gates.collapse import collapsed_mixing
from megatron_moa.research.gates.pictures import draw_curves, quadratic_map
from megatron_moa.research.gates.probe import (
    DENSE,
    ROUTED,
    SHARED,
    Ablation,
    GateProbe,
    Recording,
    Windows,
    ablations,
    find_sites,
)
from megatron_moa.trained.from_megatron import LoadedModel
from tests.data.test_checks import make_dataset
from tests.hf.test_convert_to_hf import EAGER, train_sentencepiece
from tests.research.test_study_report import report_of, study, write
from tests.support import launch
from tests.support.layers import build_model, make_config, moe_settings
from tests.support.training import MOE, ROOT, SWIGLU, TINY
from tools import analyze_gates

CONTEXT, END = 8, 31
MOA = MixtureConfig(
    form="bi-sided",
    activations=("silu", "relu2", "tanh"),
    gate_bias=True,
    amplitude="learned",
    gate_init_std=0.1,
    backend="eager",
)
KINDS: dict[str, dict[str, Any]] = {"dense": {}, "moe": moe_settings(moe_shared_expert_intermediate_size=12)}


# Models made by hand.


def documents(count: int = 30, seed: int = 1) -> list[list[int]]:
    """Of 4 to 40 tokens each; the end is none of them."""
    draw = random.Random(seed)
    return [[draw.randrange(END) for _ in range(draw.randrange(4, 40))] for _ in range(count)]


def load(kind: str, mixing: MixtureConfig = MOA, **settings: Any) -> LoadedModel:
    """A model whose gates differ from token to token, and its biases and amplitudes from gate to gate."""
    torch.manual_seed(3)
    model = build_model(make_config(**KINDS[kind], **settings), mixing).eval()
    for module in owners(model):
        for name, parameter in module.named_parameters():
            parameter.data = torch.randn_like(parameter) * (0.6 if name == "weight" else 0.3) + (name == "amplitude")
    args, tokenizer = SimpleNamespace(max_position_embeddings=CONTEXT), SimpleNamespace(vocab_size=32, eod=END)
    return LoadedModel(model, args, mixing, tokenizer, 7)


def owners(model: GPTModel) -> list[Coefficients]:
    """The modules that own coefficients."""
    return [module for module in model.modules() if isinstance(module, Coefficients)]


def probed(loaded: LoadedModel) -> GateProbe:
    return GateProbe(loaded, Windows.of(documents(), END, CONTEXT, 400, seed=2))


def tried(probe: GateProbe, recording: Recording) -> dict[str, Ablation]:
    """The ablations by name."""
    return {ablation.name: ablation for ablation in ablations(probe, recording.first, seed=5)}


def ablated(probe: GateProbe, ablation: Ablation) -> Tensor:
    """The losses of the second half's windows."""
    with probe.changed(ablation.change):
        return probe.losses(probe.windows.half, len(probe.windows.tokens))


@torch.no_grad()
def loss_without_probe(model: GPTModel, tokens: Tensor) -> Tensor:
    """Of windows [windows, context + 1], [windows]."""
    logits = model(tokens[:, :-1], torch.arange(CONTEXT).expand(len(tokens), -1), None)
    return -logits.double().log_softmax(-1).gather(2, tokens[:, 1:, None]).mean((1, 2))


def edited(loaded: LoadedModel, edit: Callable[[int, Coefficients], object]) -> GPTModel:
    """Another model of the same weights, without hooks, after an edit of each module that owns coefficients."""
    model = build_model(loaded.model.config, loaded.mixing).eval()
    model.load_state_dict(loaded.model.state_dict())
    for number, module in enumerate(owners(model)):
        edit(number, module)
    return model


def constant(module: Coefficients, values: Tensor) -> None:
    """Makes a gate say these coefficients [n], whatever it sees: psi_hat(0) is 1."""
    for parameter, value in ((module.weight, 0.0), (module.bias, 0.0), (module.amplitude, values)):
        parameter.data = torch.zeros_like(parameter) + value


def close(found: Tensor, expected: Tensor) -> None:
    """Losses, computed in float32 in batches of other sizes."""
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize(
    ("kind", "mixing"),
    [
        ("dense", MOA),
        ("dense", dataclasses.replace(MOA, form="quadratic", gate="softmax")),
        ("dense", MixtureConfig(form="one-sided", activations=("gelu", "relu"), init_scale="matched", backend="eager")),
        ("moe", MOA),
        ("moe", dataclasses.replace(MOA, gate="tanh", amplitude="fixed")),
    ],
)
def test_recorded_coefficients_are_those_of_the_reference(kind: str, mixing: MixtureConfig) -> None:
    """From each layer's input and the router's choice, which are taken without the probe."""
    loaded = load(kind, mixing)
    probe = probed(loaded)
    windows = probe.windows
    inputs: dict[int, Tensor] = {}
    routed: dict[int, Tensor] = {}
    handles = []
    for layer in loaded.model.decoder.layers:
        number = layer.layer_number
        handles.append(layer.mlp.register_forward_pre_hook(lambda _, args, i=number: inputs.__setitem__(i, args[0])))
        if kind == "moe":
            router = layer.mlp.router
            handles.append(router.register_forward_hook(lambda _, __, out, i=number: routed.__setitem__(i, out[1])))
    sampled = [(0, 0), (3, 5), (len(windows.tokens) - 1, 7)]
    # One window at a time, so that nothing here depends on how the probe lays out a batch.
    seen: dict[tuple[int, str], list[tuple[Tensor, int, int, int, int]]] = {}
    for window, tokens in enumerate(windows.tokens):
        with torch.no_grad():
            loaded.forward(tokens[None, :-1])
        for site in probe.sites:
            entries = seen.setdefault((site.layer, site.kind), [])
            for expert, module in enumerate(site.modules):
                names = ("weight", "bias", "amplitude", "scale")
                state = {name: tensor.double() for name, tensor in module.state_dict().items() if name in names}
                x = inputs[site.layer][:, 0].double()
                rows = reference.gate_coefficients(x, mixing=mixing, **state)
                for position in range(CONTEXT):
                    if site.kind != ROUTED or routed[site.layer].view(CONTEXT, -1)[position, expert]:
                        entries.append((rows[position], window, position, int(tokens[position]), expert))
    for handle in handles:
        handle.remove()
    recording = probe.record(sampled)
    assert [site.kind for site in probe.sites] == ([DENSE] * 2 if kind == "dense" else [ROUTED, SHARED] * 2)
    for site, statistics, samples in zip(probe.sites, recording.whole, recording.samples, strict=True):
        entries = seen[site.layer, site.kind]
        rows = torch.stack([entry[0] for entry in entries])
        assert rows.std(0).min() > 0.01  # they vary, so that a mistake would show
        same = {"atol": 1e-6, "rtol": 1e-5}
        assert statistics.count == len(rows)
        torch.testing.assert_close(statistics.mean, rows.mean(0), **same)
        torch.testing.assert_close(statistics.covariance, torch.cov(rows.T, correction=0), **same)
        for groups, column in ((statistics.by_position, 2), (statistics.by_type, 3), (statistics.by_expert, 4)):
            keys = windows.vocabulary if column == 3 else torch.arange(len(groups.counts))
            for group, key in enumerate(keys.tolist()):
                members = [row for row, entry in zip(rows, entries, strict=True) if entry[column] == key]
                assert groups.counts[group] == len(members)
                if members:
                    torch.testing.assert_close(groups.means()[group], torch.stack(members).mean(0), **same)
        # A token's sample is of its first expert.
        firsts = [next(row for row, w, p, *_ in entries if (w, p) == place) for place in sampled]
        torch.testing.assert_close(torch.stack(samples), torch.stack(firsts), **same)
    close(recording.losses, loss_without_probe(edited(loaded, lambda *_: None), windows.tokens))


@pytest.fixture(params=KINDS)
def recorded(request: pytest.FixtureRequest, megatron: None) -> tuple[GateProbe, Recording]:
    """A dense model and a MoE with a shared expert, and what is known of their gates."""
    probe = probed(load(request.param))
    return probe, probe.record([])


def test_means_in_place_of_gates_are_the_collapsed_la(recorded: tuple[GateProbe, Recording]) -> None:
    probe, recording = recorded
    means = [mean for statistics in recording.first for mean in statistics.expert_means()]
    la = build_model(probe.loaded.model.config, collapsed_mixing(probe.mixing)).eval()
    state = {name: value for name, value in probe.loaded.model.state_dict().items() if ".coefficients." not in name}
    for name, module in la.named_modules():
        if isinstance(module, Coefficients):
            state[f"{name}.value"] = means[len([key for key in state if key.endswith(".value")])].float()
    la.load_state_dict(state)
    tokens = probe.windows.tokens[probe.windows.half :]
    found = ablated(probe, tried(probe, recording)["every coefficient at its mean (LA)"])
    close(found, loss_without_probe(la, tokens))
    constants = edited(probe.loaded, lambda number, module: constant(module, means[number]))
    close(found, loss_without_probe(constants, tokens))
    assert (found - recording.losses[probe.windows.half :]).abs().max() > 1e-3


def test_one_layer_at_its_mean_leaves_the_others(recorded: tuple[GateProbe, Recording]) -> None:
    probe, recording = recorded
    names = tried(probe, recording)
    tokens = probe.windows.tokens[probe.windows.half :]
    first = 0  # of the site's modules among all
    for site, statistics in zip(probe.sites, recording.first, strict=True):
        means = statistics.expert_means()

        def one(number: int, module: Coefficients, first: int = first, means: Tensor = means) -> None:
            if first <= number < first + len(means):
                constant(module, means[number - first])

        found = ablated(probe, names[f"{site.title} alone at its mean"])
        close(found, loss_without_probe(edited(probe.loaded, one), tokens))
        assert (found - recording.losses[probe.windows.half :]).abs().max() > 1e-4, site.title
        first += len(means)


@pytest.mark.parametrize("branch", ["activated", "linear", "both"])
def test_an_activation_left_out_has_coefficient_zero(recorded: tuple[GateProbe, Recording], branch: str) -> None:
    probe, recording = recorded
    size = probe.mixing.num_activations
    numbers = {"activated": [1], "linear": [size + 1], "both": [1, size + 1]}[branch]
    model = edited(probe.loaded, lambda _, module: module.amplitude.data.index_fill_(0, torch.tensor(numbers), 0.0))
    ablation = tried(probe, recording)[f"without relu2, {branch} branch{'es' * (branch == 'both')}"]
    assert ablation.about == {"activation": "relu2", "branch": branch}
    found = ablated(probe, ablation)
    close(found, loss_without_probe(model, probe.windows.tokens[probe.windows.half :]))
    assert (found - recording.losses[probe.windows.half :]).abs().max() > 1e-3


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize(
    ("form", "branch", "title", "zeroed"),
    [
        ("type1", "activated", "without relu2", {"relu2"}),
        ("one-sided", "linear", "without relu2", {"linear.relu2"}),
        ("quadratic", "activated", "without relu2, activated branch", {"relu2*relu2", "relu2*tanh"}),
        ("quadratic", "linear", "without relu2, linear branch", {"silu*relu2", "relu2*relu2"}),
        ("quadratic", "both", "without relu2, both branches", {"silu*relu2", "relu2*relu2", "relu2*tanh"}),
    ],
)
def test_an_activation_left_out_of_the_other_forms(form: str, branch: str, title: str, zeroed: set[str]) -> None:
    probe = probed(load("dense", dataclasses.replace(MOA, form=form), gated=form != "type1"))
    ablation = tried(probe, probe.record([]))[title]
    assert ablation.about == {"activation": "relu2", "branch": branch}
    numbers = [number for number, name in enumerate(probe.mixing.coefficient_names) if name in zeroed]
    assert len(numbers) == len(zeroed)

    def without(_: int, module: Coefficients) -> None:
        module.amplitude.data[numbers] = 0.0

    tokens = probe.windows.tokens[probe.windows.half :]
    close(ablated(probe, ablation), loss_without_probe(edited(probe.loaded, without), tokens))


def test_permuting_hands_the_same_coefficients_to_other_tokens(recorded: tuple[GateProbe, Recording]) -> None:
    probe, recording = recorded
    handed: list[tuple[Tensor, Tensor]] = []
    ablation = tried(probe, recording)["coefficients permuted among tokens"]

    def change(*place: Any) -> Tensor:
        handed.append((place[2], ablation.change(*place)))
        return handed[-1][1]

    found = ablated(probe, dataclasses.replace(ablation, change=change))
    assert (found - recording.losses[probe.windows.half :]).abs().max() > 1e-3
    for own, others in handed:
        moved = (own != others).any(1).double().mean()
        assert moved > 0.8 or len(own) < 10  # by chance one of them stays where it is
        assert sorted(map(tuple, own.tolist())) == sorted(map(tuple, others.tolist()))


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize("kind", KINDS)
def test_gates_that_are_constant_lose_nothing(kind: str) -> None:
    loaded = load(kind)
    for number, module in enumerate(owners(loaded.model)):
        constant(module, torch.linspace(0.2, 1.0 + number / 10, MOA.num_coefficients))
    probe = probed(loaded)
    recording = probe.record([])
    half = probe.windows.half
    for statistics in recording.whole:
        shares = statistics.share_between(statistics.by_type)
        if len(statistics.by_expert.counts) == 1:  # experts differ from one another
            assert statistics.variance.tolist() == [0] * MOA.num_coefficients
            assert shares.isnan().all()
    for name, ablation in tried(probe, recording).items():
        difference = (ablated(probe, ablation) - recording.losses[half:]).abs().max()
        # Types' means of a MoE mix experts, and an expert's coefficient follows from the token's type only in part.
        if ablation.kind == "without":
            assert difference > 1e-3, name
        elif not (kind == "moe" and ablation.kind == "type mean"):
            assert difference < 2e-6, name
    assert max(probe.output_changes([statistics.expert_means() for statistics in recording.first])) < 1e-6


@pytest.mark.usefixtures("megatron")
def test_gates_that_see_the_token_alone_keep_their_loss_at_its_types_means() -> None:
    loaded = load("dense")
    for layer in loaded.model.decoder.layers:
        layer.self_attention.linear_proj.weight.data.zero_()  # no context reaches a token
    probe = probed(loaded)
    recording = probe.record([])
    names = tried(probe, recording)
    for statistics in recording.whole:
        one = torch.ones(MOA.num_coefficients, dtype=torch.float64)
        torch.testing.assert_close(statistics.share_between(statistics.by_type), one, atol=1e-6, rtol=0)
    seen = probe.windows.types[: probe.windows.half].unique()
    assert len(seen) == probe.windows.kinds  # so the first half knows all means
    unchanged = recording.losses[probe.windows.half :]
    close(ablated(probe, names["every coefficient at its token type's mean"]), unchanged)
    assert (ablated(probe, names["every coefficient at its mean (LA)"]) - unchanged).abs().max() > 1e-3


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize("kind", KINDS)
def test_output_change_is_that_of_one_layer_on_its_own_input(kind: str) -> None:
    loaded = load(kind)
    probe = probed(loaded)
    means = [statistics.expert_means() for statistics in probe.record([]).first]
    found = probe.output_changes(means)
    inputs: dict[int, tuple[Tensor, Tensor | None]] = {}
    for mlp in (mlp for site in probe.sites for mlp in site.mlps):
        mlp.register_forward_pre_hook(lambda mlp, args: inputs.__setitem__(id(mlp), (args[0], (*args, None)[1])))
    with torch.no_grad():
        loaded.forward(probe.windows.tokens[probe.windows.half :, :-1])
    for site, site_means, change in zip(probe.sites, means, found, strict=True):
        squares = torch.zeros(2)
        for mlp, own, mean in zip(site.mlps, site.modules, site_means, strict=True):
            x, probabilities = inputs[id(mlp)]
            scale = 1.0 if probabilities is None else probabilities[:, None]
            gates = {"gate_weight": own.weight, "gate_bias": own.bias, "amplitude": own.amplitude}
            weights = (mlp.linear_fc1.weight, mlp.linear_fc2.weight, MOA)
            ours = scale * reference.feed_forward(x, *weights, **gates)
            other = scale * reference.feed_forward(x, *weights, coefficients=mean.float())
            squares += torch.stack([(ours - other).square().sum(), ours.square().sum()]).detach()
        assert change == pytest.approx((squares[0] / squares[1]).sqrt().item(), rel=1e-4)
        assert change > 0.01


@pytest.mark.usefixtures("megatron")
def test_layers_of_multi_token_prediction_take_no_part() -> None:
    loaded = load("dense", mtp_num_layers=1, mtp_loss_scaling_factor=0.1)
    assert len(owners(loaded.model)) == 3
    assert [(site.layer, site.kind, len(site.modules)) for site in find_sites(loaded)] == [(1, DENSE, 1), (2, DENSE, 1)]


def test_windows_are_the_text_as_training_sees_it() -> None:
    texts = [[1, 2, 3], [], [4, 5], [6, 7, 8, 9, 10], [11] * 40]
    order = torch.randperm(5, generator=torch.Generator().manual_seed(5)).tolist()
    windows = Windows.of(texts, END, 4, 40, seed=5)
    bodies = [(number, [*texts[number], END]) for number in order if texts[number]]
    stream = [END] + [token for _, body in bodies for token in body]
    assert windows.tokens[:, :-1].flatten().tolist() == stream[:40]
    assert windows.tokens[:, -1].tolist() == stream[4:44:4]
    assert torch.equal(windows.vocabulary[windows.types], windows.tokens[:, :-1])
    owners = [number for number, body in bodies for _ in body]
    assert list(windows.documents) == owners[:40:4]
    assert owners[0] != 0
    assert windows.taken == len(set(owners[:40])) > 1
    with pytest.raises(UserError, match=r"TEXT: 9 tokens are fewer than 4 windows of the model's context of 4; give "):
        Windows.of([[1] * 8], END, 4, 400, seed=1)
    with pytest.raises(UserError, match=r"TEXT: 15 tokens .* and --tokens of at least 16"):
        Windows.of([[1] * 80], END, 4, 15, seed=1)


# Pictures.


def test_a_map_of_the_quadratic_form_is_the_reference() -> None:
    mixing = MixtureConfig(form="quadratic", activations=("silu", "relu2", "tanh"))
    coefficients = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    basis = torch.stack([reference.DEFINITIONS[name](x) for name in mixing.activations])
    y, z = torch.meshgrid(x, x, indexing="ij")
    expected = reference.mix(torch.stack((y, z), -1), coefficients, mixing)[..., 0]
    torch.testing.assert_close(quadratic_map(basis, coefficients), expected)
    torch.testing.assert_close(quadratic_map(basis, torch.stack((coefficients, -coefficients))[1]), -expected)


@pytest.mark.parametrize(
    ("form", "titles"),
    [
        ("type1", ["layer 1, activated branch"]),
        ("one-sided", ["layer 1, linear branch"]),
        ("bi-sided", ["layer 1, activated branch", "layer 1, linear branch"]),
        ("quadratic", ["layer 1, mean coefficients", "layer 1, std over 2 random tokens"]),
    ],
)
def test_every_mixed_branch_has_a_picture_of_its_own(
    form: str, titles: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixing = MixtureConfig(form=form, activations=("relu", "tanh"))
    n = mixing.num_coefficients
    sampled = [[0.5 + k for k in range(n)], [0.1 * k for k in range(n)]]
    gates = [{"name": name, "mean": 1.0 + k} for k, name in enumerate(mixing.coefficient_names)]
    site = {"title": "layer 1", "gates": gates, "sampled": sampled}
    curves: dict[int, list[Tensor]] = {}
    shown: list[str] = []
    monkeypatch.setattr(Axes, "plot", lambda axes, _, y, **__: curves.setdefault(id(axes), []).append(y))
    monkeypatch.setattr(Axes, "set_title", lambda _, title, **__: shown.append(title))
    model = {"form": form, "activations": list(mixing.activations)}
    draw_curves({"sites": [site], "mixing": model}, tmp_path / "curves.png")
    assert shown == titles
    assert (tmp_path / "curves.png").is_file()
    if form != "quadratic":
        x = torch.linspace(-4, 4, 161, dtype=torch.float64)
        for number, drawn in enumerate(curves.values()):
            first, second = (1.0 + number * 2 + k for k in range(2))  # the means of this branch
            torch.testing.assert_close(drawn[-1], first * x.relu() + second * x.tanh())
            assert len(drawn) == 3


# The tool.


def tool(*arguments: str | Path, code: int = 0) -> str:
    """What tools/analyze_gates.py prints."""
    target = (str(ROOT / "tools" / "analyze_gates.py"), list(map(str, arguments)))
    returncode, log = launch.launch(launch.script, target, 1, ROOT)
    assert returncode == code, log[-4000:]
    return log


GROUPED = [*MOE, "--moe-grouped-gemm"]
MODELS = {
    "dense": [*SWIGLU, *"--moa-mixing moa --moa-activations silu tanh".split(), *EAGER],
    "moe": [*SWIGLU, *GROUPED, *"--moa-mixing moa --moa-form one-sided --moa-activations silu relu2".split(), *EAGER],
    "stock": [*SWIGLU, "--moa-mixing", "none"],
}
CONTINUED = [
    {"way": way, "seed": seed, "loss": loss + seed / 10 + odd * seed, "iterations": 100, "tokens": 5000, "lr": 1e-3}
    for way, loss, odd in (("gates", 3.0, 0.0), ("frozen", 3.001, -0.001), ("la", 3.02, 0.001))
    for seed in (1, 2, 3)
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of :data:`MODELS` after two steps, a tokenizer, a text of documents, and a dataset."""
    folder = tmp_path_factory.mktemp("gates")
    train_sentencepiece(folder / "tok.model")
    for name, flags in MODELS.items():
        tokenizer = ("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(folder / "tok.model"))
        steps = "--init-method-std 0.3 --train-iters 2 --save-interval 2 --save".split()
        flags = [*TINY, *flags, *tokenizer, *steps, str(folder / name)]
        code, log = launch.launch(launch.script, (str(ROOT / "pretrain_gpt_moa.py"), flags), 1, folder)
        assert code == 0, log[-3000:]
    texts = (ROOT / "megatron_moa/mixture/reference.py").read_text().split("\n\n")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "continued.jsonl").write_text("".join(json.dumps(line) + "\n" for line in CONTINUED))
    make_dataset(folder / "corpus", [80] * 120, highest=40)
    return folder


@pytest.fixture(scope="module")
def analysed(trained: Path) -> tuple[dict[str, Any], str]:
    """The JSON and the output of the tool's run on ``dense``, into the folder ``out``, with an LA in ``la``."""
    flags = ["--tokens", "2000", "--fewest", "5", "--continued", trained / "continued.jsonl"]
    flags += ["--write-la", trained / "la", "--out", trained / "out"]
    log = tool(trained / "dense", trained / "text.jsonl", *flags)
    return json.loads((trained / "out" / "analysis.json").read_text()), log


@pytest.mark.slow
def test_a_run_says_the_same_in_table_json_and_pictures(analysed: tuple[dict[str, Any], str], trained: Path) -> None:
    analysis, log = analysed
    assert sorted(path.name for path in (trained / "out").iterdir()) == [
        "analysis.json",
        "curves.png",
        "gates.png",
        "report.md",
    ]
    for picture in ("curves.png", "gates.png"):
        assert matplotlib.image.imread(trained / "out" / picture)[..., :3].std() > 0.05  # something is drawn
    assert analysis["text"]["tokens"] == 1984  # 62 windows of 32
    assert (analysis["iteration"], analysis["text"]["window"]) == (2, 32)
    assert len(analysis["sampled_tokens"]) == 10
    assert [len(site["sampled"]) for site in analysis["sites"]] == [10, 10]
    assert [gate["name"] for gate in analysis["sites"][0]["gates"]] == ["silu", "tanh", "linear.silu", "linear.tanh"]
    for site in analysis["sites"]:
        for gate in site["gates"]:
            assert 0 < gate["std"] < 1
            assert gate["type_share"] + gate["context_share"] == pytest.approx(1, abs=1e-5)
            assert gate["type_share"] <= gate["type_share_naive"]
            assert all(entry["count"] >= 5 for entry in gate["most"])
            assert gate["most"][0]["mean"] > gate["mean"] > gate["least"][0]["mean"]
        # No gate has been trained much: four directions that vary.
        assert 1 < site["participation_ratio"] <= site["effective_rank"] <= 4
        assert 0 < site["output_change"] < 1
    rows = {row["name"]: row for row in analysis["ablation"]["rows"]}
    assert [row["kind"] for row in rows.values()] == [
        *("mean", "type mean", "permuted"),
        *["without"] * 6,
        *["layer mean"] * 2,
    ]
    report = (trained / "out" / "report.md").read_text()
    for row in rows.values():
        line = f"| {row['name']} | {row['difference']:+.4f} | {row['interval'][0]:+.4f} to {row['interval'][1]:+.4f} |"
        assert line in log
        assert line in report
        assert row["interval"][0] < row["difference"] < row["interval"][1]
        assert row["loss"] - analysis["ablation"]["loss"] == pytest.approx(row["difference"], abs=2e-5)
    assert "| layer 2 | linear.tanh | " in report
    assert "| its gates frozen | 3 | 3.1990 | -0.0010 | -0.0035 to +0.0015 |" in log
    assert "from rate 0.001" in log


@pytest.mark.slow
def test_the_la_that_is_written_has_the_means_and_nothing_else_is_new(
    analysed: tuple[dict[str, Any], str], trained: Path
) -> None:
    analysis, log = analysed
    assert float(re.search(r"> wrote the LA, .* largest difference of logits (\S+) of", log)[1]) < 1e-5
    la, moa = CheckpointTensors(trained / "la" / "release"), CheckpointTensors(trained / "dense" / "iter_0000002")
    owner = "decoder.layers.mlp.coefficients."
    values = la.read(f"{owner}value")
    for site, row in zip(analysis["sites"], values, strict=True):
        assert [gate["mean"] for gate in site["gates"]] == pytest.approx(row.tolist(), rel=1e-5)
    model = {key for key in moa.tensors if not key.startswith(("optimizer.", "chained_", "rng_state"))}
    assert la.tensors.keys() - model == {f"{owner}value"}
    for key in la.tensors.keys() & model:
        if not key.endswith("_extra_state"):
            assert torch.equal(la.read(key), moa.read(key)), key
    # An LA has no gates to analyse, and says so.
    log = tool(trained / "la", trained / "text.jsonl", "--tokens", "2000")
    assert "there is no gate to analyse" in log
    assert "| without tanh, linear branch |" in log
    assert "at its mean" not in log
    assert re.search(
        r"\| layer 1 \| activated \| \S+ to \S+ \| 0\.00 \| - \| - \| - \| 0\.0 / 0\.0 of 4 \| 0 % \|", log
    )


@pytest.mark.slow
def test_grouped_experts_and_a_dataset(trained: Path) -> None:
    """Experts that were trained at once, on the part of a dataset that is asked for."""
    out = trained / "moe-out"
    flags = ["--part", "training", "--tokens", "1024", "--out", out, "--write-la", trained / "moe-la"]
    log = tool(trained / "moe", trained / "corpus", *flags)
    analysis = json.loads((out / "analysis.json").read_text())
    # Two of its experts see each token; --split was 90,5,5.
    assert [(site["title"], site["experts"], site["tokens"]) for site in analysis["sites"]] == [
        ("layer 1, routed experts", 4, 2048),
        ("layer 2, routed experts", 4, 2048),
    ]
    assert analysis["text"]["source"] == f"training part of {trained / 'corpus'}"
    assert "| between experts |" in log
    # One-sided: SiLU is fixed on W1's branch.
    assert [gate["name"] for gate in analysis["sites"][0]["gates"]] == ["linear.silu", "linear.relu2"]
    assert re.search(r"\| layer 2, routed experts \| linear \| \S+ to ", log)
    assert "| without relu2 |" in log
    assert "activated" not in log
    assert float(re.search(r"> wrote the LA, .* largest difference of logits (\S+) of", log)[1]) < 1e-5
    assert all(gate["expert_share"] > 0.01 for site in analysis["sites"] for gate in site["gates"])
    log = tool(trained / "moe", trained / "corpus", "--no-ablate")
    assert "validation part of" in log
    assert "Loss as it is" not in log


def test_a_report_of_a_study_has_the_real_analysis(
    analysed: tuple[dict[str, Any], str], trained: Path, tmp_path: Path
) -> None:
    analysis, _ = analysed
    folder = write(tmp_path / "study", study())
    (folder / "gates-tiny.json").write_text((trained / "out" / "analysis.json").read_text())
    text = report_of(tmp_path, folder)
    rows = {row["kind"]: row for row in analysis["ablation"]["rows"]}
    low, high = rows["mean"]["interval"]
    change = f"{rows['mean']['difference']:+.4f} [{low:+.4f}, {high:+.4f}]"
    in_short = text.split("## What was run")[0]
    assert f"- [Trained gates](#trained-gates) replaced by their means: tiny {change}.\n" in in_short
    trained_on = "- tiny trained on with frozen gates, against training on as it is: "
    assert f"{trained_on}-0.0010 [-0.0035, +0.0015], 3 seeds.\n" in in_short
    section = text.split("## Trained gates")[1].split("\n## ")[0]
    assert "### tiny\n" in section
    for row in analysis["ablation"]["rows"]:
        assert f"| {row['name']} | {row['difference']:+.4f} |" in section
    assert "| collapsed to LA, which trains on | 3 | 3.2220 | +0.0220 | +0.0195 to +0.0245 |" in section
    assert f"`{analysis['command']}`" in section
    assert "was not run for this model" not in section


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["stock", "text.jsonl"], r"stock: was trained with --moa-mixing none and has no coefficients; give one of"),
        (["dense", "nowhere.txt"], r"TEXT \S*nowhere.txt: no such file; check the path"),
        (["dense", "text.jsonl", "--tokens", "100"], r"TEXT: 100 tokens are fewer than 4 windows .* at least 128"),
        (["dense", "text.jsonl", "--part", "training"], r"--part training: \S*text.jsonl is no dataset's prefix"),
        (["dense", "corpus", "--write-la", "dense"], r"--write-la \S*dense: is a folder that is not empty"),
        (["la", "text.jsonl", "--write-la", "new"], r"--write-la \S*new: \S*la is an LA already; drop the flag"),
        (["dense", "text.jsonl", "--continued", "text.jsonl"], r"--continued \S*: is not what \S*continue_frozen.sh"),
        (["dense", "text.jsonl", "--continued", os.devnull], r"--continued /dev/null: is empty; give it when "),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], words: str, trained: Path, analysed: tuple[dict[str, Any], str]
) -> None:
    before = sorted(trained.iterdir())
    places = {"stock", "dense", "la", "text.jsonl", "nowhere.txt", "corpus", "new"}
    log = tool(*(trained / word if word in places else word for word in arguments), code=2)
    (line,) = [line for line in log.splitlines() if line.startswith("analyze_gates.py: error: ")]
    assert re.search(words, line), line
    assert "Traceback" not in log
    assert sorted(trained.iterdir()) == before


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["export", "t.txt"], "export: is a Hugging Face folder; give the checkpoint that it was made of"),
        (["export", "t.txt", "--tokens", "0"], "argument --tokens: a number above 0 is wanted, not 0; see"),
        (["export", "t.txt", "--part", "test"], "argument --part: invalid choice: 'test'"),
        (["export"], "the following arguments are required: TEXT; see analyze_gates.py --help"),
    ],
)
def test_mistakes_that_need_no_checkpoint(
    flags: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        analyze_gates.main(flags)
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("analyze_gates.py: error: ")
    assert words in error
    assert error.count("\n") == 1


# Training on.

SCRIPT = ROOT / "examples" / "studies" / "continue_frozen.sh"


def continue_frozen(*arguments: str | Path, code: int = 0, **variables: str) -> str:
    """What examples/studies/continue_frozen.sh prints, stdout and stderr."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("DATA_PATH", "LR", "SEEDS", "OUT")}
    result = subprocess.run(
        [SCRIPT, *map(str, arguments)],
        env={**inherited, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == code, result.stdout
    return result.stdout


def test_a_dry_run_prints_what_would_be_run(tmp_path: Path) -> None:
    variables = {"DATA_PATH": "data/corpus", "LR": "4e-4", "SEEDS": "5", "OUT": str(tmp_path / "new")}
    printed = continue_frozen("runs/moa", "--dry-run", "--clip-grad", "0.5", **variables).replace("\\\n", "")
    collapse, *trainings = [line.split() for line in printed.splitlines()]
    assert collapse[1:] == [
        *(str(ROOT / "tools" / "analyze_gates.py"), "runs/moa", "data/corpus"),
        *("--part", "training", "--no-ablate", "--write-la", str(tmp_path / "new" / "la-start")),
    ]
    starts = ["runs/moa", "runs/moa", str(tmp_path / "new" / "la-start")]
    assert [words[words.index("--pretrained-checkpoint") + 1] for words in trainings] == starts
    assert ["--moa-freeze-gates" in words for words in trainings] == [False, True, False]
    differing = ("--moa-freeze-gates", "--pretrained-checkpoint", *starts)
    rest = [[word for word in words if word not in differing and "-seed5" not in word] for words in trainings]
    assert rest[0] == rest[1] == rest[2]
    assert rest[0][-2:] == ["--clip-grad", "0.5"]
    assert rest[0][rest[0].index("--lr") + 1] == "4e-4"
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "variables", "words"),
    [
        ([], {}, "needs a CHECKPOINT, such as: "),
        (["--dry-run"], {}, "needs a CHECKPOINT, such as: "),
        (["runs/moa"], {"LR": "1e-3"}, "DATA_PATH is not set: set it to the prefix of what tools/preprocess_data.py"),
        (["runs/moa"], {"DATA_PATH": "d"}, "LR is not set: set it to the peak learning rate of training on, such as"),
        (["runs/moa"], {"DATA_PATH": "d", "LR": "1", "ITERATIONS": "0"}, "ITERATIONS 0: give a whole number above 0"),
    ],
)
def test_mistakes_before_training_on_are_one_line(
    arguments: list[str], variables: dict[str, str], words: str, tmp_path: Path
) -> None:
    printed = continue_frozen(*arguments, code=2, **{"OUT": str(tmp_path / "new"), **variables})
    assert printed.startswith(f"continue_frozen.sh: {words}")
    assert printed.count("\n") == 1
    assert not (tmp_path / "new").exists()


def write_log(folder: Path, loss: float, complete: bool = True) -> None:
    """What gate_continued reads of a training's log."""
    folder.mkdir(parents=True)
    settings = {"global_batch_size": 16, "lr": 0.0008, "seq_length": 128}
    text = "".join(f"  {name} {'.' * (48 - len(name))} {value}\n" for name, value in settings.items())
    text += " iteration       20/      20 | elapsed time per iteration (ms): 3.0 | lm loss: 3.5E+00 |\n"
    if complete:
        text += f" validation loss at iteration 20 on validation set | lm loss value: {loss:E} | lm loss PPL: 1E+01 |\n"
    (folder / "train.log").write_text(text)


def test_ends_of_trainings_are_paired_by_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (1, 2):
        for way, loss in (("la", 3.2), ("gates", 3.0), ("frozen", 3.0 + 0.01 * seed)):
            write_log(tmp_path / f"{way}-seed{seed}", loss + seed)
    write_log(tmp_path / "la-seed3", 9.0)  # its partners are still to be trained
    continued.main([str(tmp_path)])
    lines = [json.loads(line) for line in (tmp_path / "continued.jsonl").read_text().splitlines()]
    assert [(line["way"], line["seed"]) for line in lines] == [
        *((way, seed) for seed in (1, 2) for way in ("gates", "frozen", "la")),
        ("la", 3),
    ]
    assert lines[1] == {
        "way": "frozen",
        "seed": 1,
        "loss": 4.01,
        "iterations": 20,
        "tokens": 20 * 16 * 128,
        "lr": 8e-4,
        "difference": 0.01,
    }
    assert "difference" not in lines[-1]
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert printed[:7] == lines
    assert printed[8]["difference"] == pytest.approx(0.015)
    # Student's t with one degree of freedom: 12.706 standard errors, 0.005 each.
    assert printed[8]["interval"] == pytest.approx([0.015 - 12.706 * 0.005, 0.015 + 12.706 * 0.005], abs=1e-5)
    assert (printed[9]["difference"], printed[9]["loss"]) == (pytest.approx(0.2), pytest.approx((4.2 + 5.2 + 9) / 3))


def test_trainings_that_have_not_ended_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ("has no training of examples/studies/continue_frozen.sh", "has no validation loss after the last"):
        with pytest.raises(SystemExit) as left:
            continued.main([str(tmp_path)])
        assert left.value.code == 2
        assert words in capsys.readouterr().err
        if not (tmp_path / "la-seed1").exists():
            write_log(tmp_path / "la-seed1", 3.0, complete=False)
    assert not (tmp_path / "continued.jsonl").exists()


@pytest.mark.slow
@pytest.mark.full
def test_a_checkpoint_trains_on_in_three_ways(trained: Path, tmp_path: Path) -> None:
    variables = {"DATA_PATH": str(trained / "corpus"), "LR": "1e-2", "SPLIT": "90,10,0", "SEEDS": "1", "BATCH": "2"}
    variables |= {"OUT": str(tmp_path / "new"), "ITERATIONS": "20", "EVAL_ITERS": "2"}
    flags = ["--tokenizer-model", str(trained / "tok.model")]
    printed = continue_frozen(trained / "dense", *flags, **variables)
    lines = [json.loads(line) for line in printed.splitlines()[:3]]
    assert [(line["way"], line["tokens"]) for line in lines] == [
        (way, 20 * 2 * 32) for way in ("gates", "frozen", "la")
    ]
    assert len({line["loss"] for line in lines}) == 3
    logs = [(tmp_path / "new" / f"{way}-seed1" / "train.log").read_text() for way in ("gates", "frozen", "la")]
    assert [bool(re.search(r"moa_freeze_gates \.+ True", log)) for log in logs] == [False, True, False]
    assert re.search(r"moa_mixing \.+ la", logs[2])
    # Started again it trains nothing: it says the same, in the time of one start of Python.
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "new").glob("*/*.log")}
    assert continue_frozen(trained / "dense", *flags, **variables) == printed
    assert {path: path.stat().st_mtime_ns for path in times} == times
