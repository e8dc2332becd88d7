"""Tests research/gates/probe.py on models made by hand.

Tested are recorded coefficients, and losses with others in their place.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megatron_moa.errors import UserError
from megatron_moa.layers.coefficients import Coefficients
from megatron_moa.mixture import reference
from megatron_moa.mixture.config import MixtureConfig
from megatron_moa.research.gates.collapse import collapsed_mixture
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
from tests.support.layers import build_model, make_config, moe_settings

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


def documents(count: int = 30, seed: int = 1) -> list[list[int]]:
    """Of 4 to 40 tokens each; the end is none of them."""
    draw = random.Random(seed)
    return [[draw.randrange(END) for _ in range(draw.randrange(4, 40))] for _ in range(count)]


def load(kind: str, mixture: MixtureConfig = MOA, **settings: Any) -> LoadedModel:
    """A model whose gates differ from token to token, and its biases and amplitudes from gate to gate."""
    torch.manual_seed(3)
    model = build_model(make_config(**KINDS[kind], **settings), mixture).eval()
    for module in owners(model):
        for name, parameter in module.named_parameters():
            parameter.data = torch.randn_like(parameter) * (0.6 if name == "weight" else 0.3) + (name == "amplitude")
    args, tokenizer = SimpleNamespace(max_position_embeddings=CONTEXT), SimpleNamespace(vocab_size=32, eod=END)
    return LoadedModel(model, args, mixture, tokenizer, tokenizer.vocab_size, 7)


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
    """Builds another model of the same weights, without hooks, and edits its coefficients.

    ``edit`` is called for each module that owns coefficients.
    """
    model = build_model(loaded.model.config, loaded.mixture).eval()
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
    ("kind", "mixture"),
    [
        ("dense", MOA),
        ("dense", dataclasses.replace(MOA, form="quadratic", gate="softmax")),
        ("dense", MixtureConfig(form="one-sided", activations=("gelu", "relu"), init_scale="matched", backend="eager")),
        ("moe", MOA),
        ("moe", dataclasses.replace(MOA, gate="tanh", amplitude="fixed")),
    ],
)
def test_recorded_coefficients_are_those_of_the_reference(kind: str, mixture: MixtureConfig) -> None:
    """From each layer's input and the router's choice, which are taken without the probe."""
    loaded = load(kind, mixture)
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
                rows = reference.gate_coefficients(x, mixture=mixture, **state)
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
    la = build_model(probe.loaded.model.config, collapsed_mixture(probe.mixture)).eval()
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
    size = probe.mixture.num_activations
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
    numbers = [number for number, name in enumerate(probe.mixture.coefficient_names) if name in zeroed]
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
