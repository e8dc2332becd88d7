"""Sets the defaults of Megatron's flags that a CPU can serve, and refuses values that need a GPU."""

import argparse
import functools
from collections.abc import Callable
from typing import Any

from megatron_moa.cpu.messages import print_once
from megatron_moa.cpu.patching import wrapped
from megatron_moa.errors import UserError
from megatron_moa.megatron_fixes.kernel_defaults import KERNEL_DEFAULTS, Default, set_defaults

CPU_DEFAULTS: tuple[Default, ...] = (
    *((default.name, default.value, default.kernel) for default in KERNEL_DEFAULTS),
    ("distributed_backend", "gloo", "NCCL needs CUDA"),
    ("bias_swiglu_fusion", False, "fused by torch.compile, which is switched off for Megatron here"),
    ("bias_dropout_fusion", False, "as above"),
)


def _is_on(value: Any) -> bool:
    return bool(value)


GPU_FLAGS: tuple[tuple[str, str, Callable[[Any], bool], str], ...] = (
    # name in Megatron's arguments, flag, whether a value needs a GPU, remedy
    ("transformer_impl", "--transformer-impl", lambda v: v != "local", "leave it out or say local"),
    ("distributed_backend", "--distributed-backend", lambda v: v == "nccl", "leave it out or say gloo"),
    (
        "attention_backend",
        "--attention-backend",
        lambda v: getattr(v, "name", v) in ("flash", "fused"),
        "leave it out or say unfused",
    ),
    ("fp8", "--fp8-format", _is_on, "leave it out; --bf16 works"),
    ("fp4", "--fp4-format", _is_on, "leave it out; --bf16 works"),
    ("tp_comm_overlap", "--tp-comm-overlap", _is_on, "leave it out"),
    ("cuda_graph_impl", "--cuda-graph-impl", lambda v: v not in (None, "none"), "leave it out"),
    ("enable_cuda_graph", "--enable-cuda-graph", _is_on, "leave it out"),
    ("external_cuda_graph", "--external-cuda-graph", _is_on, "leave it out"),
    ("optimizer_cuda_graph", "--optimizer-cuda-graph", _is_on, "leave it out"),
    ("optimizer_cpu_offload", "--optimizer-cpu-offload", _is_on, "leave it out, everything is on the CPU"),
    ("use_precision_aware_optimizer", "--use-precision-aware-optimizer", _is_on, "leave it out"),
    ("context_parallel_size", "--context-parallel-size", lambda v: (v or 1) > 1, "use 1"),
    ("moe_permute_fusion", "--moe-permute-fusion", _is_on, "leave it out"),
    ("moe_router_fusion", "--moe-router-fusion", _is_on, "leave it out"),
    ("moe_token_dispatcher_type", "--moe-token-dispatcher-type", lambda v: v == "flex", "say alltoall or allgather"),
    ("use_te_activation_func", "--use-te-activation-func", _is_on, "leave it out"),
    ("nccl_ub", "--use-nccl-ub", _is_on, "leave it out"),
    ("use_torch_fsdp2", "--use-torch-fsdp2", _is_on, "leave it out; --use-distributed-optimizer works"),
    ("use_megatron_fsdp", "--use-megatron-fsdp", _is_on, "leave it out; --use-distributed-optimizer works"),
)


def _with_cpu_defaults(original: Callable) -> Callable:
    @functools.wraps(original)
    def add_megatron_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return set_defaults(original(parser), CPU_DEFAULTS)

    return add_megatron_arguments


def _then_refuse_gpu_flags(original: Callable) -> Callable:
    @functools.wraps(original)
    def parse_args(*args: Any, **kwargs: Any) -> argparse.Namespace:
        parsed = original(*args, **kwargs)
        for dest, flag, needs_gpu, remedy in GPU_FLAGS:
            value = getattr(parsed, dest, None)
            if needs_gpu(value):
                value = "" if isinstance(value, bool) else f" {getattr(value, 'name', value)}"
                raise UserError(f"{flag}{value} cannot work without a GPU: {remedy}")
        values = ((dest, getattr(parsed, dest)) for dest, _, _ in CPU_DEFAULTS)
        print_once("CPU defaults: " + " ".join(f"{dest}={getattr(value, 'name', value)}" for dest, value in values))
        return parsed

    return parse_args


def _keep_fused_gelu_alone(original: Callable) -> Callable:
    """Leaves the fusion of a bias with GELU on, as it is on GPUs, and switches it off for everything else.

    Fused with the addition of a bias, Megatron's GELU is another function (its tanh approximation): a model goes on as
    it was trained on any machine.  Experts and other activations, most of which Megatron cannot fuse and raises for,
    run unfused here; on GPUs they are left as they are, since experts with quick-GEGLU have a fused kernel there.
    """

    @functools.wraps(original)
    def validate_args(args: argparse.Namespace, *rest: Any, **settings: Any) -> argparse.Namespace:
        if args.num_experts or args.squared_relu or args.quick_geglu:
            args.bias_gelu_fusion = False
        return original(args, *rest, **settings)

    return validate_args


PATCHES = (
    wrapped(
        "megatron.training.arguments.add_megatron_arguments",
        _with_cpu_defaults,
        "defaults need a GPU, Transformer Engine or Apex",
    ),
    wrapped(
        "megatron.training.arguments.parse_args", _then_refuse_gpu_flags, "flags that need a GPU end in a traceback"
    ),
    wrapped(
        "megatron.training.arguments.validate_args",
        _keep_fused_gelu_alone,
        "a fused GELU is another function: it stays on",
    ),
)
