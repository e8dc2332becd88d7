"""Compares models of Transformer Engine's layers with models of Megatron's local layers.

They compute, save and learn the same.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
import transformer_engine.pytorch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.extensions import transformer_engine as megatron_te
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

from megatron_moa.checkpoints.names import take_stored_names
from megatron_moa.mixture.config import MixtureConfig
from megatron_moa.training.model import check_mixture
from tests.support.layers import build_model, make_config, moe_settings
from tests.te import emulation

pytestmark = pytest.mark.usefixtures("megatron")

MIXTURES = {
    "none": None,
    "la": MixtureConfig(kind="la", backend="eager"),
    "moa": MixtureConfig(backend="eager", gate_bias=True, amplitude="learned", gate_init_std=0.3),
    "moa that recomputes": MixtureConfig(backend="eager", gate_init_std=0.3, recompute=True),
}
KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "LayerNorm": {"normalization": "LayerNorm"},
    "biases": {"add_bias_linear": True, "add_qkv_bias": True},
    "groups and q/k norm": {"num_query_groups": 2, "qk_layernorm": True},
    "moe": moe_settings(),
    "moe grouped": moe_settings(moe_grouped_gemm=True),
    "moe grouped, shared expert": moe_settings(moe_grouped_gemm=True, moe_shared_expert_intermediate_size=12),
    "moe, shared expert with gate": moe_settings(moe_shared_expert_intermediate_size=12, moe_shared_expert_gate=True),
    "every second layer moe": moe_settings(moe_layer_freq=2, num_layers=4),
    "recompute all": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
    "recompute norms and experts": moe_settings(
        moe_grouped_gemm=True, recompute_granularity="selective", recompute_modules=["layernorm", "moe_act"]
    ),
}
# Both sides' products are torch's: what differs is the order of sums in norms and in gradients of weights.
RELATIVE, ABSOLUTE = 2e-5, 2e-6


Tensors = dict[tuple[str, tuple[int, ...]], ShardedTensor]


def tensors(model: GPTModel, stored: Collection[str] = ()) -> Tensors:
    """Returns what the model saves, by name and place in the whole tensor.

    The data are the parameters' own memory.

    Args:
        stored: names in a checkpoint that it shall load from; none, for the model's own names.
    """
    sharded = model.sharded_state_dict()
    take_stored_names(sharded, stored)
    built = [entry.build() if isinstance(entry, ShardedTensorFactory) else entry for entry in nested_values(sharded)]
    saved = [entry for entry in nested_values(built) if isinstance(entry, ShardedTensor)]
    found = {(entry.key, entry.global_offset): entry for entry in saved}
    assert len(found) == len(saved)
    return found


def gradients(model: GPTModel, stored: Collection[str] = ()) -> dict[tuple[str, tuple[int, ...]], torch.Tensor]:
    """The gradients, by the names of :func:`tensors`; 0 for an expert that has got no token."""
    values = {parameter: parameter.data for parameter in model.parameters()}
    for parameter in values:
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    found = {name: tensor.data.clone() for name, tensor in tensors(model, stored).items()}
    for parameter, value in values.items():
        parameter.data = value
    return found


def loss_of(model: GPTModel) -> torch.Tensor:
    """Of fixed tokens, each with a weight of its own."""
    tokens = torch.randint(32, (2, 8), generator=torch.Generator().manual_seed(3))
    losses = model(tokens, torch.arange(8).expand(2, 8), None, labels=tokens.roll(-1, 1))
    return (losses * torch.linspace(0.5, 1.5, losses.numel()).view_as(losses)).sum()


def models(kind: str, mixture: MixtureConfig | None) -> tuple[GPTModel, GPTModel]:
    """A model of Transformer Engine's layers, and one of local layers with the same weights."""
    model_parallel_cuda_manual_seed(1)
    te, local = (
        build_model(make_config(transformer_impl=implementation, **KINDS[kind]), mixture)
        for implementation in ("transformer_engine", "local")
    )
    check_mixture([te], mixture)
    source = tensors(te)
    target = tensors(local, {name for name, _ in source})
    assert set(source) == set(target)
    with torch.no_grad():
        for name, tensor in target.items():
            tensor.data.copy_(source[name].data)
    return te, local


def compare_what_is_saved(te: GPTModel, local: GPTModel) -> None:
    source = tensors(te)
    assert len({tensor.data.untyped_storage().data_ptr() for tensor in source.values()}) >= len(list(te.parameters()))
    for name, other in tensors(local, {name for name, _ in source}).items():
        tensor = source[name]
        for attribute in ("dtype", "local_shape", "global_shape", "replica_id", "prepend_axis_num"):
            assert getattr(tensor, attribute) == getattr(other, attribute), (name, attribute)
        torch.testing.assert_close(
            tensor.data, other.data, rtol=0, atol=0, msg=lambda text, name=name: f"{name} {text}"
        )


def compare_what_is_computed(te: GPTModel, local: GPTModel) -> None:
    """Loss and every gradient."""
    losses = loss_of(te), loss_of(local)
    torch.testing.assert_close(*losses, rtol=RELATIVE, atol=0)
    for loss in losses:
        loss.backward()
    found = gradients(te)
    for name, expected in gradients(local, {name for name, _ in found}).items():
        largest = expected.abs().max().item()
        torch.testing.assert_close(
            found[name],
            expected,
            rtol=0,
            atol=RELATIVE * largest + ABSOLUTE,
            msg=lambda text, name=name: f"{name} {text}",
        )


@pytest.mark.parametrize("mixing", MIXTURES)
@pytest.mark.parametrize("kind", KINDS)
def test_computes_and_saves_what_local_layers_do(kind: str, mixing: str) -> None:
    te, local = models(kind, MIXTURES[mixing])
    compare_what_is_saved(te, local)
    compare_what_is_computed(te, local)


@pytest.mark.parametrize("kind", ["dense", "LayerNorm", "biases", "moe", "moe grouped, shared expert"])
def test_comparison_fails_if_one_tensor_moves(kind: str) -> None:
    te, local = models(kind, MIXTURES["moa"])
    generator = torch.Generator().manual_seed(8)
    loss_of(te).backward()
    saved = tensors(te)
    used = [name for name, gradient in gradients(te).items() if gradient.any()]
    # An expert may get no token: three of four have to.
    assert len(used) >= 0.8 * len(saved)
    assert all(".experts." in key for key, _ in set(saved) - set(used))
    with torch.no_grad():
        expected = loss_of(te)
        for name in used:
            tensor = saved[name]
            before = tensor.data.clone()
            tensor.data.add_(0.1 * torch.randn(tensor.data.shape, generator=generator))
            with pytest.raises(AssertionError):
                torch.testing.assert_close(loss_of(te), expected, rtol=RELATIVE, atol=0, msg=f"{name} changed nothing")
            with pytest.raises(AssertionError):
                compare_what_is_saved(te, local)
            tensor.data.copy_(before)


# Which modules these are.


def classes(model: GPTModel) -> set[type]:
    return {type(module) for module in model.modules()}


@pytest.mark.parametrize(("mixing", "fused"), [("none", True), ("la", True), ("moa", False)])
def test_dense_layers_are_of_transformer_engine(mixing: str, fused: bool) -> None:
    te, _ = models("dense", MIXTURES[mixing])
    mlp = te.decoder.layers[0].mlp
    linear = megatron_te.TELayerNormColumnParallelLinear if fused else megatron_te.TEColumnParallelLinear
    assert type(mlp.linear_fc1) is linear
    assert type(mlp.linear_fc2) is megatron_te.TERowParallelLinear
    assert isinstance(te.decoder.layers[0].pre_mlp_layernorm, transformer_engine.pytorch.RMSNorm) is not fused
    assert megatron_te.TEDotProductAttention in classes(te)


@pytest.mark.parametrize("mixing", MIXTURES)
def test_experts_are_of_transformer_engine(mixing: str) -> None:
    grouped, _ = models("moe grouped", MIXTURES[mixing])
    linears = megatron_te.TEColumnParallelGroupedLinear, megatron_te.TERowParallelGroupedLinear
    assert set(linears) <= classes(grouped)
    sequential, _ = models("moe", MIXTURES[mixing])
    assert {megatron_te.TEColumnParallelLinear, megatron_te.TERowParallelLinear} <= classes(sequential)


# Whether the emulation still fits this release of Transformer Engine.

SOURCES = Path(transformer_engine.pytorch.__file__).parent
# Kernel, the file that calls it, and the name it has there.
CALLERS = [
    ("generic_gemm", "cpp_extensions/gemm.py", "generic_gemm"),
    ("te_general_grouped_gemm", "cpp_extensions/gemm.py", "te_general_grouped_gemm"),
    ("layernorm_fwd", "module/_common.py", "normalization_func"),
    ("rmsnorm_fwd", "module/_common.py", "normalization_func"),
    ("layernorm_bwd", "module/layernorm_linear.py", "layernorm_bwd"),
    ("rmsnorm_bwd", "module/layernorm_linear.py", "rmsnorm_bwd"),
    ("multi_tensor_adam", "optimizers/fused_adam.py", "multi_tensor_applier"),
]


def _name(argument: ast.expr) -> str | None:
    """The last word of ``x``, ``a.x`` or ``a["x"]``; None for another expression."""
    if isinstance(argument, ast.Subscript) and isinstance(getattr(argument.slice, "value", None), str):
        return argument.slice.value
    return getattr(argument, "id", getattr(argument, "attr", None))


def passed(file: str, function: str) -> tuple[list[str | None], set[str]]:
    """Names of the positional and of the keyword arguments in the first call of a function in a file."""
    tree = ast.parse((SOURCES / file).read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and _name(node.func) == function]
    assigned = {
        node.targets[0].id: node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    assert calls, f"{file} does not call {function}"
    call = calls[0]
    positional, keywords = call.args, {word.arg for word in call.keywords}
    if [type(argument) for argument in positional] == [ast.Starred]:  # generic_gemm(*args, **kwargs)
        positional = assigned[positional[0].value.id].elts
        keywords = {key.value for key in assigned[call.keywords[0].value.id].keys}
    return [None if isinstance(argument, ast.Starred) else _name(argument) for argument in positional], keywords


@pytest.mark.parametrize(("kernel", "file", "function"), CALLERS, ids=[kernel for kernel, *_ in CALLERS])
def test_kernels_take_what_transformer_engine_passes(kernel: str, file: str, function: str) -> None:
    positional, keywords = passed(file, function)
    parameters = inspect.signature(emulation.KERNELS[kernel]).parameters.values()
    names = [parameter.name for parameter in parameters if parameter.kind is not parameter.KEYWORD_ONLY]
    assert keywords == {parameter.name for parameter in parameters} - set(names)
    if function == "normalization_func":  # *inputs stands for input, weight and, of LayerNorm, bias
        names = names[names.index("eps") :]
        positional = positional[1:]
    if function == "multi_tensor_applier":  # the function, the flag and the tensors, and what is empty for fp32 weights
        names, positional = names[names.index("lr") :], positional[3:-2]
    assert len(positional) == len(names)
    differing = [(given, name) for given, name in zip(positional, names, strict=True) if given not in (None, name)]
    assert not differing


def test_edits_ask_for_exactly_one_place() -> None:
    with pytest.raises(AssertionError, match=r"has 'torch.cuda.is_available' 0 times"):
        emulation._edit(TransformerEngineBaseModule, "set_activation_dtype", "torch.cuda.is_available", "")


def test_a_kernel_that_is_not_emulated_fails() -> None:
    import transformer_engine_torch

    with pytest.raises(NotImplementedError, match=r"torch\.swiglu is not emulated"):
        transformer_engine_torch.swiglu(torch.zeros(2))


def test_adam_is_torchs() -> None:
    torch.manual_seed(4)
    parameter = torch.nn.Parameter(torch.randn(3, 5))
    mine, moments = parameter.detach().clone(), [torch.zeros(3, 5), torch.zeros(3, 5)]
    optimizer = torch.optim.AdamW([parameter], lr=0.02, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in (1, 2, 3):
        parameter.grad = torch.randn(3, 5)
        lists = [[parameter.grad], [mine], [moments[0]], [moments[1]]]
        emulation.multi_tensor_adam(2048, torch.zeros(1), lists, 0.02, 0.9, 0.95, 1e-8, step, True, True, 0.1)
        optimizer.step()
    torch.testing.assert_close(mine, parameter.detach(), rtol=1e-6, atol=1e-7)
