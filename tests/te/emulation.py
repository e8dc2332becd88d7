"""Runs Transformer Engine's own Python without a GPU, its compiled kernels replaced by plain torch.

Transformer Engine is Python over a compiled module ``transformer_engine_torch``. Only that module, the attention and
two checks for a CUDA device are replaced here. So layers, parameters, names and autograd functions are Transformer
Engine's. Kernels, attention backends, fp8 and speed are not, and no test with this module shows anything about them.

:func:`install` comes before anything imports Megatron, which asks once whether Transformer Engine is there.
"""

from __future__ import annotations

import enum
import inspect
import os
import sys
import textwrap
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch.nn import functional as F

from megatron_moa.cpu import flags as cpu_flags
from megatron_moa.megatron_fixes import te_guard

# Members that Transformer Engine's Python compares its own enums with.
_ENUMS = {
    "DType": "kByte kInt32 kFloat32 kFloat16 kBFloat16 kFloat8E4M3 kFloat8E5M2 kFloat4E2M1",
    "NVTE_Fused_Attn_Backend": "NVTE_No_Backend NVTE_F16_arbitrary_seqlen NVTE_FP8",
}


def _torch_dtype(dtype: int) -> torch.dtype:
    from transformer_engine.pytorch.constants import TE_DType_To_Torch

    return TE_DType_To_Torch[dtype]


# The kernels. Their parameters have the names of what Transformer Engine's Python passes, which the tests compare. What
# no test uses is refused.


def layernorm_fwd(
    inputmat: torch.Tensor,
    ln_weight: torch.Tensor,
    ln_bias: torch.Tensor,
    eps: float,
    ln_out: torch.Tensor | None,
    output_quantizer: None,
    output_dtype: int,
    fwd_ln_sm_margin: int,
    zero_centered_gamma: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalises rows; returns output [n, h], mean [n] and inverse deviation [n]."""
    assert output_quantizer is None
    assert not zero_centered_gamma
    x = inputmat.float()
    y, mu, rsigma = torch.native_layer_norm(x, x.shape[-1:], ln_weight.float(), ln_bias.float(), eps)
    return _into(ln_out, y.to(_torch_dtype(output_dtype))), mu.flatten(), rsigma.flatten()


def layernorm_bwd(
    dgrad: torch.Tensor,
    inputmat: torch.Tensor,
    mu: torch.Tensor,
    rsigma: torch.Tensor,
    ln_weight: torch.Tensor,
    bwd_ln_sm_margin: int,
    zero_centered_gamma: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of input [n, h], weight [h] and bias [h]."""
    assert not zero_centered_gamma
    dz, normal = dgrad.float(), (inputmat.float() - mu[:, None]) * rsigma[:, None]
    inner = dz * ln_weight.float()
    inner = inner - inner.mean(-1, keepdim=True) - normal * (inner * normal).mean(-1, keepdim=True)
    dtype = ln_weight.dtype
    return (rsigma[:, None] * inner).to(inputmat.dtype), (dz * normal).sum(0).to(dtype), dz.sum(0).to(dtype)


def rmsnorm_fwd(
    inputmat: torch.Tensor,
    ln_weight: torch.Tensor,
    eps: float,
    ln_out: torch.Tensor | None,
    output_quantizer: None,
    output_dtype: int,
    fwd_ln_sm_margin: int,
    zero_centered_gamma: bool,
) -> tuple[torch.Tensor, None, torch.Tensor]:
    """Scales rows to a root mean square of 1.

    Returns the output [n, h], None, and the inverse root mean square [n].
    """
    assert output_quantizer is None
    assert not zero_centered_gamma
    x = inputmat.float()
    rsigma = (x.square().mean(-1) + eps).rsqrt()
    y = x * rsigma[:, None] * ln_weight.float()
    return _into(ln_out, y.to(_torch_dtype(output_dtype))), None, rsigma


def rmsnorm_bwd(
    dgrad: torch.Tensor,
    inputmat: torch.Tensor,
    rsigma: torch.Tensor,
    ln_weight: torch.Tensor,
    bwd_ln_sm_margin: int,
    zero_centered_gamma: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of input [n, h] and weight [h]."""
    assert not zero_centered_gamma
    dz, normal = dgrad.float(), inputmat.float() * rsigma[:, None]
    inner = dz * ln_weight.float()
    inner = inner - normal * (inner * normal).mean(-1, keepdim=True)
    return (rsigma[:, None] * inner).to(inputmat.dtype), (dz * normal).sum(0).to(ln_weight.dtype)


def _into(target: torch.Tensor | None, value: torch.Tensor, accumulate: bool = False) -> torch.Tensor:
    if target is None:
        return value
    return target.add_(value) if accumulate else target.copy_(value)


def _product(A: torch.Tensor, transa: bool, B: torch.Tensor, transb: bool) -> torch.Tensor:
    """What cuBLAS, whose matrices are column-major, calls A @ B: B @ A of torch's rows."""
    return (B.t() if transb else B) @ (A.t() if transa else A)


def generic_gemm(
    A: torch.Tensor,
    transa: bool,
    B: torch.Tensor,
    transb: bool,
    out: torch.Tensor | None,
    quantization_params: None,
    out_dtype: int | None,
    bias: torch.Tensor | None,
    bias_dtype: int,
    gelu: bool,
    gelu_in: torch.Tensor | None,
    grad: bool,
    workspace: torch.Tensor,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    *,
    comm_overlap: None,
    comm_type: None,
    extra_output: None,
    bulk_overlap: bool,
    alpha: float,
    beta: float,
) -> tuple[torch.Tensor, torch.Tensor | None, None, None]:
    """Multiplies matrices and adds a bias; with ``grad`` sums the bias's gradient instead."""
    assert quantization_params is comm_overlap is extra_output is None
    assert not gelu
    assert (alpha, beta) == (1, 1 if accumulate else 0)
    rows = B.reshape(-1, B.shape[-1])
    product = _product(A.reshape(-1, A.shape[-1]), transa, rows, transb)
    bias_grad = rows.sum(0).to(bias.dtype) if bias is not None and grad else None
    if bias is not None and not grad:
        product = product + bias
    product = product.to(A.dtype if out_dtype is None else _torch_dtype(out_dtype))
    if not transb:
        product = product.view(*B.shape[:-1], product.shape[-1])
    return _into(out, product, accumulate), bias_grad, None, None


def te_general_grouped_gemm(
    A: list[torch.Tensor],
    transa: bool,
    B: list[torch.Tensor],
    transb: bool,
    out: list[torch.Tensor],
    out_dtype: int,
    m_splits: list[int],
    bias: list[torch.Tensor],
    bias_dtype: int,
    single_output: bool,
    gelu_input: list[torch.Tensor],
    grad: bool,
    workspaces: list[torch.Tensor],
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    sm_count: int,
) -> list[torch.Tensor]:
    """Multiplies each expert's matrices, into its own output or its rows of a common one."""
    # The compiled function takes a list of whole numbers, and no tensor.
    assert type(m_splits) is list
    assert all(type(rows) is int for rows in m_splits)
    if single_output:
        out = list(out[0].view(-1, out[0].shape[-1]).split(m_splits))
    for a, b, target, expert_bias in zip(A, B, out, bias, strict=True):
        product = _product(a, transa, b, transb)
        if expert_bias.numel() and grad:
            expert_bias.copy_(b.sum(0))
        elif expert_bias.numel():
            product = product + expert_bias
        _into(target, product, accumulate)
    return bias


def multi_tensor_scale(chunk_size: int, noop_flag: torch.Tensor, tensors: list[list[torch.Tensor]], scale: Any) -> None:
    """Writes each of the first tensors, times ``scale``, into the second."""
    for source, target in zip(*tensors, strict=True):
        target.copy_(source * scale)


def multi_tensor_l2norm(
    chunk_size: int, noop_flag: torch.Tensor, tensors: list[list[torch.Tensor]], per_tensor: bool = False
) -> tuple[torch.Tensor, None]:
    """Returns the norm of all the tensors together, [1]."""
    assert not per_tensor
    return torch.stack([tensor.float().norm() for tensor in tensors[0]]).norm().view(1), None


def multi_tensor_adam(
    chunk_size: int,
    noop_flag: torch.Tensor,
    tensors: list[list[torch.Tensor]],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    adam_w_mode: bool,
    bias_correction: bool,
    weight_decay: float,
) -> None:
    """Takes one step of AdamW on gradients, parameters and both moments, in place."""
    assert adam_w_mode
    assert bias_correction
    for grad, parameter, first, second in zip(*tensors, strict=True):
        first.lerp_(grad.float(), 1 - beta1)
        second.lerp_(grad.float().square(), 1 - beta2)
        mean, square = first / (1 - beta1**step), second / (1 - beta2**step)
        parameter.sub_(lr * (mean / (square.sqrt() + eps) + weight_decay * parameter))


KERNELS: dict[str, Callable[..., Any]] = {
    "layernorm_fwd": layernorm_fwd,
    "layernorm_bwd": layernorm_bwd,
    "rmsnorm_fwd": rmsnorm_fwd,
    "rmsnorm_bwd": rmsnorm_bwd,
    "generic_gemm": generic_gemm,
    "te_general_grouped_gemm": te_general_grouped_gemm,
    "multi_tensor_scale": multi_tensor_scale,
    "multi_tensor_scale_tensor": multi_tensor_scale,
    "multi_tensor_l2norm": multi_tensor_l2norm,
    "multi_tensor_adam": multi_tensor_adam,
}


# The module around them.


class _AnyMember(type):
    """A class with every member that is asked of it, each another number: enums of what no test runs."""

    def __getattr__(cls, name: str) -> int:
        if name.startswith("__"):
            raise AttributeError(name)
        value = len(vars(cls))
        setattr(cls, name, value)
        return value


class _Extension(ModuleType):
    """``transformer_engine_torch``: the kernels above; others can be named, and fail when they are called."""

    __file__ = __file__
    __all__ = tuple(KERNELS)  # what `import *` takes

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in _ENUMS:
            value: Any = enum.IntEnum(name, _ENUMS[name].split(), start=0)
        elif name[0].isupper():
            value = _AnyMember(name, (), {})
        else:

            def value(*_: Any, **__: Any) -> None:
                raise NotImplementedError(f"transformer_engine_torch.{name} is not emulated")

        setattr(self, name, value)
        return value


def _edit(owner: type, name: str, old: str, new: str) -> None:
    """Replaces an expression in a method's source, where it has to be exactly once."""
    source = textwrap.dedent(inspect.getsource(getattr(owner, name)))
    assert source.count(old) == 1, f"{owner.__name__}.{name} has {old!r} {source.count(old)} times"
    # Around the method goes a function whose argument is the class that a bare super() looks for.
    source = f"def make(__class__):\n{textwrap.indent(source.replace(old, new), '    ')}\n    return {name}\n"
    scope: dict[str, Any] = {}
    exec(source, vars(sys.modules[owner.__module__]), scope)
    setattr(owner, name, scope["make"](owner))


# What Megatron passes to the attention beyond three tensors, and causal attention does not need.
_UNUSED = {"attention_mask", "attn_mask_type", "qkv_format"}
_TENSORS = ("query_layer", "key_layer", "value_layer")


def _causal(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Puts torch's causal attention behind the parameters of DotProductAttention.forward.

    The parameters are those of Transformer Engine's function.
    """
    signature = inspect.signature(forward)

    def attend(*args: Any, **kwargs: Any) -> torch.Tensor:
        given = signature.bind(*args, **kwargs).arguments
        module = given.pop("self")
        assert given.get("qkv_format", module.qkv_format) == "sbhd"
        assert given.get("attn_mask_type", module.attn_mask_type) == "causal"
        q, k, v = (given.pop(name).permute(1, 2, 0, 3) for name in _TENSORS)  # [s, b, heads, d] to [b, heads, s, d]
        asked = {name for name, value in given.items() if value is not signature.parameters[name].default}
        assert asked <= _UNUSED, f"not emulated: {asked - _UNUSED}"
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=module.softmax_scale, enable_gqa=True)
        return y.permute(2, 0, 1, 3).flatten(2)

    return attend


def install() -> None:
    """Puts the emulation in, imports Transformer Engine, and lets its layers be chosen on a CPU.

    This happens once in a process.
    """
    if "transformer_engine_torch" in sys.modules:
        return
    assert "megatron.core" not in sys.modules, "Megatron has been imported without Transformer Engine"
    os.environ[te_guard.ALLOW] = "1"
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # Transformer Engine's own switch: loads no library of kernels
    os.environ["NVTE_TORCH_COMPILE"] = "0"
    extension = _Extension("transformer_engine_torch")
    for name, kernel in KERNELS.items():
        setattr(extension, name, kernel)
    extension.get_num_cublas_streams = lambda: 4
    extension.get_cudnn_version = lambda: 91900
    sys.modules[extension.__name__] = extension

    with warnings.catch_warnings(action="ignore"):  # that its compiled parts are not there
        import transformer_engine.common

        transformer_engine.common.load_framework_extension = lambda framework: None
        import transformer_engine.pytorch
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

    _edit(TransformerEngineBaseModule, "__init__", "torch.cuda.is_available()", "True")
    _edit(TransformerEngineBaseModule, "prepare_forward", "inp.is_cuda", "True")
    attention = sys.modules["transformer_engine.pytorch"].DotProductAttention
    attention.forward = _causal(attention.forward)
    kept = tuple(row for row in cpu_flags.GPU_FLAGS if row[0] != "transformer_impl")
    assert len(kept) == len(cpu_flags.GPU_FLAGS) - 1, (
        "--transformer-impl is refused by another table than cpu.flags.GPU_FLAGS"
    )
    cpu_flags.GPU_FLAGS = kept
