"""Checks that pytorch's MixedFeedForward is the Megatron layer and the reference.

The layer is also used in PyTorch's own surroundings: compilation, export, autocast, accelerate.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_moa import MixedFeedForward
from megatron_moa.errors import UserError
from megatron_moa.mixture import reference
from megatron_moa.mixture.config import BACKENDS, FORMS, GATES, MIXINGS, MixtureConfig, SettingError
from megatron_moa.mixture.start_scale import matching_scale
from tests.support import launch
from tests.support.layers import build_feed_forward, make_config, randn64

EXACT = {"rtol": 1e-11, "atol": 1e-12}


def mixtures() -> list[MixtureConfig]:
    """Every form as LA and MoA, every gate, bias, amplitude and the start at SwiGLU's scale."""
    result = [MixtureConfig(kind, form) for kind in MIXINGS for form in FORMS]
    for gate in GATES:
        result.append(MixtureConfig(gate=gate, gate_bias=True, amplitude="learned"))
        result.append(MixtureConfig(form="quadratic", gate=gate, init_scale="matched"))
    return result


def as_megatron_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A MixedFeedForward's state by the names of Megatron's layer."""
    return {name.replace("fc", "linear_fc") if name.startswith("fc") else name: t for name, t in state.items()}


def moved(layer: nn.Module) -> nn.Module:
    """The layer with parameters that are nowhere neutral."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize("mixture", mixtures(), ids=MixtureConfig.describe)
def test_equals_megatrons_layer_to_the_last_bit(mixture: MixtureConfig) -> None:
    mixture = replace(mixture, backend="eager")
    ours = moved(MixedFeedForward(16, 24, mixture))
    megatrons = build_feed_forward(make_config(mixture.gated), mixture)
    state = as_megatron_names(ours.state_dict())
    megatrons.load_state_dict({**state, **{k: v for k, v in megatrons.state_dict().items() if "_extra" in k}})
    x = torch.randn(5, 2, 16, requires_grad=True)
    expected_x = x.detach().clone().requires_grad_()
    grad = torch.randn(5, 2, 16)
    output, (expected, _) = ours(x), megatrons(expected_x)
    assert torch.equal(output, expected)
    output.backward(grad)
    expected.backward(grad)
    assert torch.equal(x.grad, expected_x.grad)
    gradients = as_megatron_names({name: parameter.grad for name, parameter in ours.named_parameters()})
    for name, parameter in megatrons.named_parameters():
        assert torch.equal(gradients[name], parameter.grad), name


@pytest.mark.usefixtures("megatron")
def test_starts_from_the_values_of_megatrons_layer() -> None:
    for mixture in mixtures():
        ours = MixedFeedForward(16, 24, mixture, init_std=0.2)
        megatrons = build_feed_forward(make_config(mixture.gated), mixture)
        expected = {k: v for k, v in megatrons.state_dict().items() if "coefficients" in k}
        found = {k: v for k, v in ours.state_dict().items() if "coefficients" in k}
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name].shape == value.shape
            if not name.endswith("weight"):  # which is drawn
                assert torch.equal(found[name], value), name


def reference_of(layer: MixedFeedForward, x: Tensor) -> Tensor:
    """The reference layer with a layer's parameters."""
    gates = layer.coefficients
    coefficients = gates.value
    if coefficients is None:
        coefficients = reference.gate(
            nn.functional.linear(x, gates.weight, gates.bias), layer.mixture, gates.amplitude
        ) * (1 if gates.scale is None else gates.scale)
    z = reference.mix(layer.fc1(x), coefficients, layer.mixture)
    return layer.fc2(z)


@pytest.mark.parametrize("mixture", mixtures(), ids=MixtureConfig.describe)
def test_is_the_reference_in_float64(mixture: MixtureConfig) -> None:
    layer = moved(MixedFeedForward(16, 24, mixture, bias=True)).double()
    twin = copy.deepcopy(layer)
    x = randn64(2, 3, 16).requires_grad_()
    expected_x = x.detach().clone().requires_grad_()
    output, expected = layer(x), reference_of(twin, expected_x)
    torch.testing.assert_close(output, expected, **EXACT)
    output.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, expected_x.grad, **EXACT)
    for (name, parameter), other in zip(layer.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, msg=name, **EXACT)


@pytest.mark.parametrize("kind", MIXINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_fused_backend_is_the_reference_in_every_dtype(dtype: torch.dtype, kind: str) -> None:
    layer = MixedFeedForward(16, 24, MixtureConfig(kind, "bi-sided", backend="triton"), init_std=0.3, dtype=dtype)
    exact = copy.deepcopy(layer).double()
    x = torch.randn(7, 16, dtype=dtype, requires_grad=True)
    exact_x = x.detach().double().requires_grad_()
    output, expected = layer(x), exact(exact_x)
    output.sum().backward()
    expected.sum().backward()
    assert output.dtype == dtype
    # Products of 16 and 24 rounded numbers, one after the other.
    tolerance = {"rtol": 0, "atol": 16 * torch.finfo(dtype).eps * expected.abs().max().item()}
    torch.testing.assert_close(output.double(), expected, **tolerance)
    for parameter, other in zip(layer.parameters(), exact.parameters(), strict=True):
        scale = 64 * torch.finfo(dtype).eps * other.grad.abs().max().item()
        torch.testing.assert_close(parameter.grad.double(), other.grad, rtol=0, atol=scale)


def test_same_seed_same_linear_maps_whatever_the_mixture() -> None:
    def drawn(mixture: MixtureConfig) -> tuple[Tensor, Tensor]:
        torch.manual_seed(5)
        layer = MixedFeedForward(16, 24, mixture)
        return layer.fc1.weight, layer.fc2.weight

    first, *others = (drawn(mixture) for mixture in mixtures() if mixture.gated)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_initial_values_are_the_papers() -> None:
    torch.manual_seed(1)
    layer = MixedFeedForward(256, 512, output_init_std=0.005)
    assert layer.mixture == MixtureConfig()
    assert layer.fc1.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert layer.fc2.weight.std().item() == pytest.approx(0.005, rel=0.02)
    assert layer.coefficients.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert layer.fc1.bias is None
    assert layer.fc2.bias is None
    assert torch.equal(MixedFeedForward(8, 8, MixtureConfig("la")).coefficients.value, torch.ones(14))
    matched = MixedFeedForward(16, 24, MixtureConfig(init_scale="matched"), init_std=0.1)
    expected = matching_scale(MixtureConfig(init_scale="matched"), 0.1, 16)
    torch.testing.assert_close(matched.coefficients.scale, torch.tensor([expected]))


def test_parameters_appear_on_the_meta_device_and_elsewhere() -> None:
    mixture = MixtureConfig(gate_bias=True, init_scale="matched")
    layer = MixedFeedForward(16, 24, mixture, bias=True, device="meta", dtype=torch.bfloat16)
    assert all(tensor.is_meta for tensor in layer.state_dict().values())
    assert all(p.dtype == torch.bfloat16 for p in layer.parameters())
    torch.manual_seed(2)
    layer.to_empty(device="cpu").reset_parameters()
    torch.manual_seed(2)
    expected = MixedFeedForward(16, 24, mixture, bias=True, dtype=torch.bfloat16).state_dict()
    for name, value in layer.state_dict().items():
        assert torch.equal(value, expected[name]), name
    with torch.device("meta"):
        assert MixedFeedForward(16, 24).fc1.weight.is_meta


def test_parts_that_are_reset_one_by_one_start_as_the_layer_says() -> None:
    layer = MixedFeedForward(64, 128, bias=True, init_std=0.3, output_init_std=0.01, device="meta").to_empty(
        device="cpu"
    )
    for module in layer.modules():  # as who fills a model that was built on the meta device
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert layer.fc1.weight.std().item() == pytest.approx(0.3, rel=0.05)
    assert layer.fc2.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert not layer.fc1.bias.any()


@pytest.mark.parametrize(
    ("settings", "init_std", "cause"),
    [
        ({}, 0, r"fc1's weights start at 0 \(init_std, "),
        ({"kind": "la", "initial_coefficients": 0}, 0.02, r"coefficients start at 0 \(--moa-init, "),
        ({"gate": "tanh", "gate_init_std": 0}, 0.02, "coefficients start at 0 .*--moa-gate-init-std 0"),
    ],
)
def test_what_starts_at_0_has_no_scale_to_match(settings: dict, init_std: float, cause: str) -> None:
    with pytest.raises(SettingError, match=f"^--moa-init-scale matched: {cause}"):
        MixedFeedForward(8, 16, MixtureConfig(**settings, init_scale="matched"), init_std=init_std)


def test_the_start_at_swiglus_scale_is_float32_whatever_the_default() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer = MixedFeedForward(16, 24, MixtureConfig(init_scale="matched"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert layer.coefficients.scale.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("settings", [{"init_scale": "matched"}, {"kind": "la", "recompute": True}])
@pytest.mark.parametrize("where", ["meta", "fake"])
def test_shapes_alone_are_computed_whatever_the_backend(
    where: str, settings: dict, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with torch.device("meta") if where == "meta" else FakeTensorMode():
        layer = MixedFeedForward(16, 24, MixtureConfig(**settings, backend=backend), bias=True)
        x = torch.randn(2, 3, 16)
        with torch.autocast("cpu", torch.bfloat16):
            layer(x)
        output, coefficients = layer(x), layer.coefficients(x)
        output.sum().backward()
    assert (output.shape, type(output), output.device) == (x.shape, type(x), x.device)
    assert coefficients.shape[-1] == 14
    assert all(parameter.grad.shape == parameter.shape for parameter in layer.parameters())


def test_accelerate_builds_without_memory() -> None:
    accelerate = pytest.importorskip("accelerate")
    with accelerate.init_empty_weights(include_buffers=True):
        layer = MixedFeedForward(16, 24, MixtureConfig(init_scale="matched"), bias=True)
    assert all(tensor.is_meta for tensor in layer.state_dict().values())
    assert layer(torch.empty(3, 16, device="meta")).shape == (3, 16)


def test_frozen_coefficients_want_no_gradients() -> None:
    layer = MixedFeedForward(16, 24, MixtureConfig(gate_bias=True, freeze=True, backend="eager"))
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"fc1.weight", "fc2.weight"}
    layer(torch.randn(3, 16)).sum().backward()
    assert layer.coefficients.weight.grad is None


WRONG_ARGUMENTS = {
    "mixture": ("moa", {}, False, MixtureConfig, nn.Sequential(nn.GELU())),
    "bias": ("no", None, 1, (True,), (True, "no"), (True, True, True), {True, False}),
    "dropout": ("0.1", None, True, -0.1, 1.5, float("nan")),
    "init_std": ("0.02", None, True, -0.1, 1e300, float("nan"), float("inf")),
    "output_init_std": ("0.02", True, -0.1, 1e300, float("nan"), float("inf")),
    "dtype": (torch.int64, torch.complex64, "float32", float),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, them in WRONG_ARGUMENTS.items() for value in them])
def test_wrong_arguments_are_one_line(name: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"^{name}=.*: give [^\n]*$"):
        MixedFeedForward(16, 24, **{name: value})


@pytest.mark.parametrize("width", [-8, "16", True, 16.0, None, [16], torch.ones(40)])
def test_widths_of_another_type_are_one_line(width: object) -> None:
    for widths in ((width, 24), (16, width)):
        with pytest.raises(UserError, match=r"^MixedFeedForward\([^\n]*\): widths are whole numbers from 1$"):
            MixedFeedForward(*widths)


def test_widths_that_do_not_fit_are_said() -> None:
    with pytest.raises(UserError, match=r"MixedFeedForward\(8, 0\): widths are whole numbers from 1"):
        MixedFeedForward(8, 0)
    with pytest.raises(ValueError, match=r"input \[3, 15\]: the layer's hidden_size is 16"):
        MixedFeedForward(16, 24)(torch.randn(3, 15))


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_somebody_may_look_at_the_coefficients(backend: str) -> None:
    layer = MixedFeedForward(16, 24, MixtureConfig(backend=backend))
    x = torch.randn(2, 3, 16)
    expected = layer(x)
    seen = []
    handle = layer.coefficients.register_forward_hook(lambda module, args, output: seen.append(output))
    torch.testing.assert_close(layer(x), expected)
    handle.remove()
    handle = layer.coefficients.register_forward_pre_hook(lambda module, args: seen.append(None))
    layer(x)
    handle.remove()
    assert seen.pop() is None
    assert [tuple(coefficients.shape) for coefficients in seen] == [(2, 3, 14)]
    torch.testing.assert_close(seen[0], layer.coefficients(x))


class Wrapper(nn.Module):
    """What parallel modules do to a part: they hold it, and know its parameters."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def __getattr__(self, name: str) -> object:
        return super().__getattr__(name) if name == "module" else getattr(self.module, name)

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x).clone()


@pytest.mark.parametrize("kind", MIXINGS)
def test_wrapped_coefficients_are_called(kind: str) -> None:
    layer, x = MixedFeedForward(16, 24, MixtureConfig(kind, backend="triton")), torch.randn(3, 16)
    expected, called = layer(x), []
    layer.coefficients = Wrapper(layer.coefficients)
    layer.coefficients.module.forward = lambda x, forward=layer.coefficients.module.forward: (
        called.append(1) or forward(x)
    )
    torch.testing.assert_close(layer(x), expected)
    assert called == [1]


def test_coefficients_that_are_looked_at_are_not_computed_again() -> None:
    layer = MixedFeedForward(16, 24, MixtureConfig(recompute=True, backend="eager"))
    seen = []
    layer.coefficients.register_forward_hook(lambda *_: seen.append(1))
    layer(torch.randn(3, 16)).sum().backward()
    assert seen == [1]


@pytest.mark.parametrize("kind", MIXINGS)
@pytest.mark.parametrize("form", FORMS)
def test_a_part_of_fc1s_columns_is_refused(form: str, kind: str) -> None:
    layer = MixedFeedForward(16, 24, MixtureConfig(kind, form, backend="eager"))
    width = layer.fc1.out_features
    layer.fc1.weight = nn.Parameter(layer.fc1.weight[: width // 2])  # as ColwiseParallel leaves a rank
    layer.fc2.weight = nn.Parameter(layer.fc2.weight[:, :12])
    with pytest.raises(UserError, match=rf"fc1's output \[3, {width // 2}\]: .* all {width} columns.*; take FSDP2"):
        layer(torch.randn(3, 16))


def test_a_whole_layer_of_before_still_computes() -> None:
    layer, x = MixedFeedForward(16, 24, MixtureConfig(backend="eager")), torch.randn(3, 16)
    expected = layer(x)
    vars(layer).pop("width", None)  # as one that was pickled when it had none
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("kind", MIXINGS)
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_autocast_leaves_gates_in_float32(backend: str, kind: str) -> None:
    layer = MixedFeedForward(16, 24, MixtureConfig(kind, backend=backend), init_std=0.3)
    x = torch.randn(4, 16)
    with torch.autocast("cpu", torch.bfloat16):
        output, coefficients = layer(x), layer.coefficients(x)
        output.sum().backward()
    assert output.dtype == torch.bfloat16
    assert torch.equal(coefficients, layer.coefficients(x))
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())
    torch.testing.assert_close(output.float(), layer(x), rtol=0.05, atol=0.05 * layer(x).abs().max().item())


def test_recomputing_keeps_less_and_computes_the_same() -> None:
    def kept_and_gradients(recompute: bool) -> tuple[int, list[Tensor]]:
        torch.manual_seed(3)
        layer = MixedFeedForward(16, 24, MixtureConfig(backend="triton", recompute=recompute), dropout=0.5)
        x = torch.randn(8, 16)
        kept = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.shape == (8, 24)  # the mixture's output
            return tensor

        torch.manual_seed(4)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = layer(x)
        output.square().sum().backward()
        return kept, [p.grad for p in layer.parameters()]

    (kept, expected), (kept_less, found) = kept_and_gradients(False), kept_and_gradients(True)
    assert (kept, kept_less) == (1, 0)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


# torch.compile, torch.export, DDP, FSDP2.


@pytest.mark.parametrize("mixture", [MixtureConfig(), MixtureConfig("la", "quadratic")], ids=MixtureConfig.describe)
def test_compiles_and_exports_as_one_graph(mixture: MixtureConfig) -> None:
    layer = MixedFeedForward(16, 24, mixture, bias=True, init_std=0.3)
    eager = MixedFeedForward(16, 24, replace(mixture, backend="eager"), bias=True)
    eager.load_state_dict(layer.state_dict())
    x = torch.randn(2, 3, 16)
    output, expected = torch.compile(layer, fullgraph=True, backend="aot_eager")(x), eager(x)
    torch.testing.assert_close(output, expected)
    gradients = torch.autograd.grad(output.square().sum(), list(layer.parameters()))
    expected_gradients = torch.autograd.grad(expected.square().sum(), list(eager.parameters()))
    torch.testing.assert_close(gradients, expected_gradients)
    for strict in (False, True):
        length = torch.export.Dim("length", min=2)
        exported = torch.export.export(layer, (x,), dynamic_shapes=({1: length},), strict=strict).module()
        longer = torch.randn(2, 7, 16)
        torch.testing.assert_close(exported(longer), eager(longer))


@pytest.mark.parametrize("kind", MIXINGS)
def test_a_named_backend_stays_outside_of_graphs(kind: str) -> None:
    layer = MixedFeedForward(16, 24, MixtureConfig(kind, "bi-sided", backend="triton"), init_std=0.3)
    x = torch.randn(3, 16)
    compiled = torch.compile(layer, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=0)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="_outside"):
        torch.compile(layer, fullgraph=True, backend="aot_eager")(x)


def test_a_named_backend_is_not_exported() -> None:
    layer = MixedFeedForward(16, 24, MixtureConfig(backend="triton"))
    with pytest.raises(UserError, match="--moa-backend triton: cannot be exported as a graph; take auto or eager"):
        torch.export.export(layer, (torch.randn(3, 16),), strict=False)


@pytest.mark.parametrize("kind", MIXINGS)
def test_a_second_derivative_is_refused_or_right(kind: str) -> None:
    x = torch.randn(3, 16, requires_grad=True)
    layer = MixedFeedForward(16, 24, MixtureConfig(kind, "bi-sided", backend="triton"))
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"--moa-backend triton: .* no second derivatives; take --moa-backend eager"):
        gradient.square().sum().backward()
    exact = MixedFeedForward(4, 6, MixtureConfig(kind, "bi-sided", backend="eager")).double()
    assert torch.autograd.gradgradcheck(exact, randn64(2, 4).requires_grad_())


@pytest.mark.parametrize("kind", MIXINGS)
def test_what_needs_plain_pytorch_is_refused_or_right(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 16)
    # Which torch.jit cannot read where Megatron's stand-ins for CPUs are, and which none of this needs.
    monkeypatch.setattr(torch.autograd.forward_ad, "_maybe_load_decompositions", lambda: None)

    def in_forward_mode(layer: nn.Module) -> Tensor:
        with torch.autograd.forward_ad.dual_level():
            return layer(torch.autograd.forward_ad.make_dual(x, x))

    uses = {
        "grad": lambda layer: torch.func.grad(lambda x: layer(x).sum())(x),
        "vmap": lambda layer: torch.vmap(layer)(x),
        "jvp": lambda layer: torch.func.jvp(layer, (x,), (x,))[0],
        "forward mode": in_forward_mode,
        "trace": lambda layer: torch.jit.trace(layer, (x,))(x),
    }
    fused, eager = (MixedFeedForward(16, 24, MixtureConfig(kind, backend=backend)) for backend in ("triton", "eager"))
    for name, use in uses.items():
        assert use(eager).shape == x.shape, name
        with pytest.raises(
            UserError, match=r"--moa-backend triton: .*torch.func.*torch.jit.trace.*; take --moa-backend"
        ):
            use(fused)


@pytest.mark.usefixtures("megatron")
def test_megatrons_layer_compiles() -> None:
    layer = build_feed_forward(make_config(), MixtureConfig())
    eager = build_feed_forward(make_config(), MixtureConfig(backend="eager"))
    eager.load_state_dict(layer.state_dict())
    x = torch.randn(3, 2, 16)
    # One graph up to fc2, where Megatron 0.19.2 warns, which breaks it.
    first_half = torch.compile(layer.fc1_and_mixture, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(first_half(x), eager.fc1_and_mixture(x))
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager")(x)[0], eager(x)[0])


def train_on_two_ranks(wrapper: str, folder: str) -> None:
    """A target of launch: three steps on a rank's rows; rank 0 writes the losses and the parameters."""
    torch.distributed.init_process_group("gloo")
    train_a_rank(wrapper, folder)
    # A DistributedDataParallel that outlives its gloo group may hang when it goes: it joins the group's thread under
    # the GIL, for which that thread may wait.
    torch.distributed.destroy_process_group()


def train_a_rank(wrapper: str, folder: str) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.manual_seed(7)
    mixture = MixtureConfig(gate_bias=True, amplitude="learned", backend="eager")
    model = nn.Sequential(
        MixedFeedForward(16, 24, mixture),
        MixedFeedForward(16, 24, replace(mixture, kind="la", gate_bias=False, amplitude="fixed")),
    )
    if wrapper == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model)
    else:
        mesh = torch.distributed.init_device_mesh("cpu", (size,))
        for layer in model:
            fully_shard(layer.coefficients, mesh=mesh)
            fully_shard(layer, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.01)
    torch.manual_seed(8)
    rows, targets = torch.randn(2, 8, 16)
    own = slice(rank * 8 // size, (rank + 1) * 8 // size)
    losses = []
    for _ in range(3):
        loss = (wrapped(rows[own]) - targets[own]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        torch.distributed.all_reduce(loss)
        losses.append(loss.item() / size)
    state = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in model.state_dict().items()}
    if rank == 0:
        torch.save((losses, state), Path(folder) / f"{wrapper}-{size}.pt")


@pytest.mark.distributed
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_two_ranks_train_as_one(wrapper: str, tmp_path: Path) -> None:
    for size in (1, 2):
        code, log = launch.launch(train_on_two_ranks, (wrapper, str(tmp_path)), size, tmp_path)
        assert code == 0, log[-2000:]
    (losses, state), (expected, expected_state) = (torch.load(tmp_path / f"{wrapper}-{size}.pt") for size in (2, 1))
    assert losses == pytest.approx(expected, rel=1e-5)
    for name, value in expected_state.items():
        torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5, msg=name)


WITHOUT_MEGATRON = """
import sys, time, torch
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("megatron", "transformers", "scipy", "matplotlib", "sentencepiece", "tensorboard"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
start = time.process_time()
from megatron_moa import MixedFeedForward, MixtureConfig, replace_feed_forward
seconds = time.process_time() - start
layer = MixedFeedForward(16, 24, MixtureConfig(backend="eager"))
layer(torch.randn(2, 16)).sum().backward()
model = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 8)))
assert list(replace_feed_forward(model)) == ["0"]
print(seconds)
"""


def test_needs_torch_alone_and_is_imported_in_under_two_seconds() -> None:
    out = subprocess.run([sys.executable, "-c", WITHOUT_MEGATRON], check=True, capture_output=True, text=True).stdout
    assert float(out) < 2
