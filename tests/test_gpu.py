"""What only a GPU can show: accuracy at larger sizes, CUDA graphs, training. Skipped without one.

In this order, should time run out: what has not run on a GPU yet first, then what compiles longest; at the end
tanh.approx of every float32. tools/gpu_suite.sh runs the three apart.
"""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch

from megatron_moa import MixedFeedForward
from megatron_moa.mixture.activations import ACTIVATIONS
from megatron_moa.mixture.config import FORMS, GATES, MixtureConfig
from megatron_moa.mixture.functional import gate_coefficients, mixed_activation
from megatron_moa.research.benchmarks import kernel_errors
from tests.support.training import MOE, SWIGLU, train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("mixing_name", ["moa", "la"])
@pytest.mark.parametrize("form", FORMS)
def test_capture_in_a_cuda_graph(form: str, mixing_name: str) -> None:
    """Forward and backward are captured and replayed on other numbers."""
    mixture = MixtureConfig(kind=mixing_name, form=form, backend="triton")
    width = 512 * (2 if mixture.gated else 1)
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(mixture.num_coefficients, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    value = torch.rand(mixture.num_coefficients, device="cuda", requires_grad=True)
    z = torch.randn(64, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    parameter = weight if mixing_name == "moa" else value

    def step() -> tuple[torch.Tensor, ...]:
        coefficients = gate_coefficients(x, weight, mixture) if mixing_name == "moa" else value
        out = mixed_activation(z, coefficients, mixture)
        return (out.detach(), *torch.autograd.grad(out.float().sum(), (z, parameter)))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()  # compiles; capture must not
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        z.copy_(torch.randn_like(z))
        x.copy_(torch.randn_like(x))
    graph.replay()
    for actual, expected in zip(captured, step(), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("kind", ["moa", "la"])
@pytest.mark.parametrize("form", FORMS)
def test_plain_layer_by_kernels_and_compiled(form: str, kind: str) -> None:
    """Compares MixedFeedForward in bfloat16 with float64: by kernels, by torch.compile and under autocast.

    Each is as near to float64 as eager PyTorch is.
    """
    layer = MixedFeedForward(256, 512, MixtureConfig(kind, form), init_std=0.06, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(300, 256, device="cuda", dtype=torch.bfloat16)

    def results(layer: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
        out = layer(x)
        return [out.double(), *(g.double() for g in torch.autograd.grad(out.double().sum(), list(layer.parameters())))]

    eager = MixedFeedForward(256, 512, MixtureConfig(kind, form, backend="eager"), device="cuda", dtype=torch.bfloat16)
    eager.load_state_dict(layer.state_dict())
    exact = results(copy.deepcopy(layer).double(), x.double())
    with torch.autocast("cuda", torch.bfloat16):
        autocast = results(copy.deepcopy(layer).float(), x.float())
    for found in (results(layer, x), results(torch.compile(layer, fullgraph=True), x), autocast):
        for value, plain, expected in zip(found, results(eager, x), exact, strict=True):
            tolerance = 2 * (plain - expected).abs().max() + 1e-3 * expected.abs().max()
            assert (value - expected).abs().max() <= tolerance


@pytest.mark.parametrize("mixing", ["none", "la", "moa"])
@pytest.mark.parametrize("extra", [[], MOE, [*MOE, "--moe-grouped-gemm"]], ids=["dense", "moe", "grouped moe"])
def test_training_in_bf16(mixing: str, extra: list[str]) -> None:
    run = train(*SWIGLU, *extra, "--moa-mixing", mixing, "--bf16", "--train-iters", "12")
    assert run.losses[12] < run.losses[1] - 0.2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", [0, 8])
@pytest.mark.parametrize("gate", GATES)
def test_gates_are_accurate(gate: str, groups: int, dtype: torch.dtype) -> None:
    for form in FORMS:
        mixture = MixtureConfig(form=form, gate=gate, backend="triton")
        kernel_errors.require(kernel_errors.check_gate(mixture, dtype, "cuda", 4097, 768, groups, scale=True))
        learned = dataclasses.replace(mixture, gate_bias=True, amplitude="learned")
        kernel_errors.require(kernel_errors.check_gate(learned, dtype, "cuda", 300, 1000, groups))


@pytest.mark.parametrize("k", [8, 14])
def test_quadratic_sums_in_several_launches(k: int) -> None:
    mixture = MixtureConfig(form="quadratic", activations=tuple(ACTIVATIONS)[:k], backend="triton")
    kernel_errors.require(kernel_errors.check_mixture(mixture, torch.float32, "cuda", 65, 1408, scale=True))
    kernel_errors.require(kernel_errors.check_gate(mixture, torch.bfloat16, "cuda", 300, 768))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mixing_name", ["moa", "la"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ["triton", "compile"])
def test_mixture_is_accurate(backend: str, form: str, mixing_name: str, dtype: torch.dtype) -> None:
    mixture = MixtureConfig(kind=mixing_name, form=form, backend=backend)
    for tokens, width in ((257, 512), (4097, 1408), (3, 127)):
        kernel_errors.require(kernel_errors.check_mixture(mixture, dtype, "cuda", tokens, width, bias=True, scale=True))


def test_tanh_has_eleven_bits_everywhere() -> None:
    """Bounds the error of ``tanh.approx.f32`` on every float32, in 64 parts.

    tests/mixture/test_approximations.py emulates this instruction.
    """
    import triton
    import triton.language as tl

    from megatron_moa.mixture.triton_backend.language import coarse_tanh

    @triton.jit
    def kernel(x, out, BLOCK: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(out + at, coarse_tanh(tl.load(x + at)))

    count = 2**26
    worst = 0.0
    for part in range(-32, 32):
        bits = torch.arange(part * count, (part + 1) * count, dtype=torch.int64, device="cuda")
        x = bits.to(torch.int32).view(torch.float32)
        out = torch.empty_like(x)
        kernel[(count // 1024,)](x, out, BLOCK=1024)
        normal = x.isfinite() & (x.abs() >= torch.finfo(torch.float32).tiny)
        right = torch.tanh(x[normal].double())
        worst = max(worst, ((out[normal].double() - right) / right).abs().max().item() if len(right) else 0.0)
        assert out[x.isnan()].isnan().all()
    print(f"tanh.approx.f32: relative error at most 2^{math.log2(worst):.3f}")
    assert worst <= 2.0**-10.98
