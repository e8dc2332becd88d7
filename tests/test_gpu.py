"""What only a GPU can show: the same checks as on CPU, on CUDA. Skipped without one."""

from __future__ import annotations

import pytest
import torch

from megatron_moa import reference
from megatron_moa.config import FORMS, MixingConfig
from megatron_moa.functional import mixed_activation
from tests.test_functional import make_inputs, relative_error
from tests.training import MOE, SWIGLU, train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

# As on CPU (test_functional.py); sums over 512 columns are longer there, and TF32 is not used.
TOLERANCES = {torch.float32: 5e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("mixing_name", ["moa", "la"])
@pytest.mark.parametrize("form", FORMS)
def test_compiled_backend_equals_the_float64_reference(form: str, mixing_name: str, dtype: torch.dtype) -> None:
    mixing = MixingConfig(mixing=mixing_name, form=form, backend="compile")
    inputs = make_inputs(mixing, (257,), 512, dtype)
    inputs = {name: tensor.detach().cuda().requires_grad_() for name, tensor in inputs.items()}
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in inputs.items()}
    grad = torch.randn(257, 512, device="cuda").to(dtype)
    out = mixed_activation(mixing=mixing, **inputs)
    out.backward(grad)
    expected = reference.mixed_activation(mixing=mixing, **exact)
    expected.backward(grad.double())
    assert relative_error(out, expected) < TOLERANCES[dtype]
    for name, tensor in inputs.items():
        assert relative_error(tensor.grad, exact[name].grad) < TOLERANCES[tensor.dtype], name


@pytest.mark.parametrize("mixing", ["none", "la", "moa"])
@pytest.mark.parametrize("extra", [[], MOE], ids=["dense", "moe"])
def test_training_in_bf16(mixing: str, extra: list[str]) -> None:
    run = train(*SWIGLU, *extra, "--moa-mixing", mixing, "--bf16", "--train-iters", "12")
    assert run.losses[12] < run.losses[1] - 0.2
