"""Megatron on CPU over gloo, for machines without a GPU: tests, debugging, small trainings.

Megatron has no CPU path of its own: it asks ``torch.cuda`` for devices, streams, memory and random numbers in some
500 places.  :func:`enable` answers those questions with the CPU.  It never does anything where CUDA is there.

    from megatron_moa import cpu
    cpu.single_process_environment()  # for a start without torchrun
    cpu.enable()                      # before or after importing megatron, but before its arguments are parsed

or, for a script that knows nothing of it:

    python -m megatron_moa.cpu pretrain_something.py --num-layers 2 ...

What is replaced stands in three tables below: ``REPLACED`` and ``WRAPPED`` (functions of torch and Megatron) and
``CPU_DEFAULTS`` (defaults of Megatron's command line that only a GPU, Transformer Engine or Apex can serve).
The replacements last as long as the process.
"""

import argparse
import contextlib
import functools
import importlib.util
import os
import pkgutil
import random
import runpy
import socket
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._device import _device_constructors

from megatron_moa.errors import UserError, fail, one_line_errors
from megatron_moa.megatron_fixes import expected_warnings

_enabled = False


def is_enabled() -> bool:
    """Whether :func:`enable` has switched this process to the CPU."""
    return _enabled


def _print_rank_0(message: str) -> None:
    """Prints on the first rank; torch.distributed is not initialised yet when this is needed."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(message, flush=True)


# Megatron parses its arguments several times.
_print_once = functools.cache(_print_rank_0)


# What torch.cuda is answered with.


def _nothing(*args: Any, **kwargs: Any) -> None:
    """For calls that only steer a GPU."""


def _zero(*args: Any, **kwargs: Any) -> int:
    """For memory counters."""
    return 0


def _no_context(*args: Any, **kwargs: Any) -> contextlib.AbstractContextManager:
    """For ``with torch.cuda.stream(...)`` and ``with torch.cuda.device(...)``."""
    return contextlib.nullcontext()


class CpuStream:
    """Stands in for ``torch.cuda.Stream``: CPU work is done when the call returns, so there is nothing to wait for."""

    cuda_stream = 0
    device = torch.device("cpu")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    wait_stream = wait_event = synchronize = _nothing

    def record_event(self, event: "CpuEvent | None" = None) -> "CpuEvent":
        event = event or CpuEvent()
        event.record(self)
        return event

    def query(self) -> bool:
        return True

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, 0


class CpuEvent:
    """Stands in for ``torch.cuda.Event``: remembers when it was recorded, so that timings are right."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._seconds = 0.0

    wait = synchronize = _nothing

    def record(self, stream: CpuStream | None = None) -> None:
        self._seconds = time.perf_counter()

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "CpuEvent") -> float:
        return (end._seconds - self._seconds) * 1000


_STREAM = CpuStream()


def _get_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    """The state of the CPU generator, as a copy."""
    return torch.default_generator.get_state()


def _set_rng_state(new_state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    """Sets the CPU generator; a state of another size was written by a GPU's generator."""
    if new_state.numel() != torch.default_generator.get_state().numel():
        raise UserError(
            f"the checkpoint holds random number states of {new_state.numel()} bytes, written on a GPU: "
            "they mean nothing to a CPU; add --no-load-rng"
        )
    torch.default_generator.set_state(new_state)


def _manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(int(seed))


def _device_properties(*args: Any, **kwargs: Any) -> SimpleNamespace:
    """Claims the newest architecture: older ones make Megatron ask for CUDA_DEVICE_MAX_CONNECTIONS=1."""
    return SimpleNamespace(name="cpu", major=10, minor=0, total_memory=0, multi_processor_count=os.cpu_count())


def _as_numpy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """The original turns only CUDA tensors into numpy arrays, yet its callers need arrays as split sizes."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


# Wrappers: given the original, they return what replaces it.


def _is_cuda(device: Any) -> bool:
    """True for ``"cuda"``, ``"cuda:1"``, ``torch.device("cuda")`` and the bare index of a GPU."""
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, int) and not isinstance(device, bool)


def _on_cpu(original: Callable) -> Callable:
    """``device=<a GPU>`` becomes the CPU, and memory is not pinned, which needs a GPU's driver.

    The functions are wrapped one by one instead of with one TorchFunctionMode: a mode holds in one thread only, and
    slows every operator down and costs torch.compile a second compilation per thread.
    """

    @functools.wraps(original)
    def factory(*args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs["device"] = "cpu"
        if "pin_memory" in kwargs:
            kwargs["pin_memory"] = False
        return original(*args, **kwargs)

    return factory


def _to_cpu(original: Callable) -> Callable:
    """``tensor.to("cuda")`` stays on the CPU."""

    @functools.wraps(original)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _is_cuda(args[0]):
            args = ("cpu", *args[1:])
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs["device"] = "cpu"
        return original(self, *args, **kwargs)

    return to


def _cuda_type_name(original: Callable) -> Callable:
    """Megatron's optimizers compare ``tensor.type()`` with "torch.cuda.FloatTensor"; only they are told so."""

    @functools.wraps(original)
    def type(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is not None:
            dtype = dtype.replace("torch.cuda.", "torch.") if isinstance(dtype, str) else dtype
            return original(self, dtype, *args, **kwargs)
        name = original(self)
        if sys._getframe(1).f_globals.get("__name__", "").startswith("megatron."):
            name = name.replace("torch.", "torch.cuda.", 1)
        return name

    return type


class _HostStream:
    """A stream of random numbers for what runs on the host beside a GPU: the data loader.

    On a GPU the model's random numbers come from the GPU and the data loader's from the CPU.  Here one generator
    serves both, and only the first rank of a tensor-parallel group has a data loader: without a stream of its own
    that rank's hidden dropout would differ from its peers', and their copies of the model would drift apart.
    """

    state: torch.Tensor | None = None

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        model_state = torch.default_generator.get_state()
        if self.state is None:
            self.state = torch.Generator().manual_seed(torch.initial_seed()).get_state()
        torch.default_generator.set_state(self.state)
        try:
            yield
        finally:
            self.state = torch.default_generator.get_state()
            torch.default_generator.set_state(model_state)


_host_stream = _HostStream()


def _in_host_stream(original: Callable) -> Callable:
    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _host_stream():
            return original(*args, **kwargs)

    return call


def _padded(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """The tensor with zero rows added, up to ``rows``."""
    return torch.cat([tensor, tensor.new_zeros(rows - tensor.shape[0], *tensor.shape[1:])])


def _of_any_sizes(original: Callable) -> Callable:
    """For ``all_gather`` and ``reduce_scatter`` (one tensor a rank in a list): NCCL takes tensors of different lengths,
    as experts' ranks have tokens; gloo wants equal ones.  Megatron uses both without ``async_op``.
    """
    gathers = original.__name__ == "all_gather"

    @functools.wraps(original)
    def collective(*args: Any, **kwargs: Any) -> Any:
        tensors, tensor = args[:2] if gathers else reversed(args[:2])
        rows = {t.shape[0] if t.dim() else None for t in tensors}
        if len(rows) == 1:
            return original(*args, **kwargs)
        own = _padded(tensor, max(rows))
        padded = [_padded(t, max(rows)) for t in tensors]
        original(*((padded, own) if gathers else (own, padded)), *args[2:], **kwargs)
        for target, values in zip(tensors, padded, strict=True) if gathers else [(tensor, own)]:
            target.copy_(values[: target.shape[0]])
        return None

    return collective


def _set_defaults(parser: argparse.ArgumentParser, defaults: "Iterable[Default]") -> argparse.ArgumentParser:
    parser.set_defaults(**{dest: value() if callable(value) else value for dest, value, _ in defaults})
    return parser


def set_plain_torch_defaults(parser: argparse.ArgumentParser) -> None:
    """Replaces the defaults whose kernels are not there, each by what Megatron itself asks for; for GPUs too."""
    absent = [default for default in KERNEL_DEFAULTS if not default.is_there()]
    _set_defaults(parser, [(default.name, default.value, default.kernel) for default in absent])


def _with_cpu_defaults(original: Callable) -> Callable:
    @functools.wraps(original)
    def add_megatron_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return _set_defaults(original(parser), CPU_DEFAULTS)

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
        _print_once("CPU defaults: " + " ".join(f"{dest}={getattr(value, 'name', value)}" for dest, value in values))
        return parsed

    return parse_args


def _keep_fused_gelu_alone(original: Callable) -> Callable:
    """Fused with the addition of a bias, Megatron's GELU is another function (its tanh approximation), so that fusion
    stays on as on GPUs: a model goes on as it was trained on any machine. What Megatron cannot fuse, and raises for, is
    left to run unfused: experts and other activations.
    """

    @functools.wraps(original)
    def validate_args(args: argparse.Namespace, *rest: Any, **settings: Any) -> argparse.Namespace:
        if args.num_experts or args.squared_relu or args.quick_geglu:
            args.bias_gelu_fusion = False
        return original(args, *rest, **settings)

    return validate_args


# The tables.

_CPU = torch.device("cpu")

# Asked for before any function is replaced: torch keeps this set for `with torch.device("meta")`.
FACTORIES = sorted(
    {f.__name__ for f in _device_constructors() if getattr(torch, f.__name__, None) is f}
    | {"empty_like", "full_like", "ones_like", "rand_like", "randint_like", "randn_like", "zeros_like"}
)

REPLACED: tuple[tuple[str, Any, str], ...] = (
    # name, what stands there now, why
    ("torch.cuda.current_device", lambda: _CPU, "Megatron puts it into device=..."),
    ("torch.cuda.device_count", lambda: 1, "with 0 Megatron sets up no process groups and no random number streams"),
    ("torch.cuda.get_device_properties", _device_properties, "checks of the architecture"),
    ("torch.cuda.get_device_capability", lambda *_: (10, 0), "checks of the architecture"),
    ("torch.cuda.get_device_name", lambda *_: "cpu", "logging"),
    ("torch.cuda.set_device", _nothing, "one device"),
    ("torch.cuda.device", _no_context, "one device"),
    ("torch.cuda.synchronize", _nothing, "the CPU is always done"),
    ("torch.cuda.empty_cache", _nothing, "no caching allocator"),
    ("torch.cuda.ipc_collect", _nothing, "no caching allocator"),
    ("torch.cuda.reset_peak_memory_stats", _nothing, "no caching allocator"),
    ("torch.cuda.memory_stats", lambda *_: defaultdict(int), "logging"),
    ("torch.cuda.memory_allocated", _zero, "logging"),
    ("torch.cuda.memory_reserved", _zero, "logging"),
    ("torch.cuda.max_memory_allocated", _zero, "logging"),
    ("torch.cuda.max_memory_reserved", _zero, "logging"),
    ("torch.cuda.device_memory_used", _zero, "logging"),
    ("torch.cuda.mem_get_info", lambda *_: (0, 0), "logging"),
    ("torch.cuda.Stream", CpuStream, "no streams"),
    ("torch.cuda.Event", CpuEvent, "no streams; timers"),
    ("torch.cuda.stream", _no_context, "no streams"),
    ("torch.cuda.set_stream", _nothing, "no streams"),
    ("torch.cuda.current_stream", lambda *_: _STREAM, "no streams"),
    ("torch.cuda.default_stream", lambda *_: _STREAM, "no streams"),
    ("torch.cuda.is_current_stream_capturing", lambda: False, "no CUDA graphs"),
    ("torch.cuda.nvtx.range_push", _nothing, "no profiler ranges"),
    ("torch.cuda.nvtx.range_pop", _nothing, "no profiler ranges"),
    ("torch.cuda.default_generators", (torch.default_generator,), "the CPU generator serves both"),
    ("torch.cuda.get_rng_state", _get_rng_state, "the CPU generator serves both"),
    ("torch.cuda.set_rng_state", _set_rng_state, "the CPU generator serves both"),
    ("torch.cuda.random.get_rng_state", _get_rng_state, "the CPU generator serves both"),
    ("torch.cuda.random.set_rng_state", _set_rng_state, "the CPU generator serves both"),
    ("torch.cuda.manual_seed", _manual_seed, "the CPU generator serves both"),
    ("torch.cuda.manual_seed_all", _manual_seed, "the CPU generator serves both"),
    *(
        (f"torch.cuda.{name}Tensor", getattr(torch, f"{name}Tensor"), "called, and used in isinstance")
        for name in ("Float", "Half", "BFloat16", "Double", "Long", "Int", "Short", "Char", "Byte", "Bool")
    ),
    ("torch.Tensor.cuda", lambda self, *_, **__: self, "one device"),
    ("torch.nn.Module.cuda", lambda self, *_, **__: self, "one device"),
    ("torch.Tensor.pin_memory", lambda self, *_: self, "needs a GPU's driver"),
    ("torch.Tensor.record_stream", _nothing, "no streams"),
    ("megatron.core.tensor_parallel.random._get_cuda_rng_state", _get_rng_state, "the original needs CUDA"),
    ("megatron.core.tensor_parallel.random._set_cuda_rng_state", _set_rng_state, "the original waits for CUDA"),
    ("megatron.core.transformer.moe.token_dispatcher.maybe_move_tensor_to_cpu", _as_numpy, "split sizes as numpy"),
    ("megatron.training.initialize._warmup_jit_function", _nothing, "warms up fusions that do not run here"),
)

WRAPPED: tuple[tuple[str, Callable[[Callable], Callable], str], ...] = (
    # name, wrapper, why
    *((f"torch.{name}", _on_cpu, 'device="cuda"') for name in FACTORIES),
    ("torch.Tensor.to", _to_cpu, '.to("cuda")'),
    ("torch.Tensor.new_tensor", _on_cpu, 'device="cuda"'),
    ("torch.Tensor.new_empty", _on_cpu, 'device="cuda"'),
    ("torch.Tensor.new_zeros", _on_cpu, 'device="cuda"'),
    ("torch.Tensor.new_ones", _on_cpu, 'device="cuda"'),
    ("torch.Tensor.new_full", _on_cpu, 'device="cuda"'),
    ("torch.Tensor.type", _cuda_type_name, "optimizers compare it with CUDA's names"),
    ("torch.utils.data.dataloader._BaseDataLoaderIter.__init__", _in_host_stream, "draws a seed"),
    ("torch.utils.data.dataloader._BaseDataLoaderIter.__next__", _in_host_stream, "data sets may draw numbers"),
    ("torch.distributed.all_gather", _of_any_sizes, "gloo takes equal sizes only"),
    ("torch.distributed.reduce_scatter", _of_any_sizes, "gloo takes equal sizes only"),
    (
        "megatron.core.dist_checkpointing.strategies.filesystem_async.get_write_results_queue",
        lambda original: functools.partial(original, mp_mode="fork"),
        "CUDA does not survive a fork, so it starts anew and imports Megatron for one queue: 8 s of the first save",
    ),
    (
        "megatron.training.initialize.init_persistent_async_worker",
        lambda original: lambda rank, mp_mode: original(rank, "fork"),
        "--async-save's writer, started anew, would look for CUDA devices, fail, and be waited for for ever",
    ),
    ("megatron.training.arguments.add_megatron_arguments", _with_cpu_defaults, "CPU_DEFAULTS"),
    ("megatron.training.arguments.parse_args", _then_refuse_gpu_flags, "GPU_FLAGS"),
    ("megatron.training.arguments.validate_args", _keep_fused_gelu_alone, "the function stays that of GPUs"),
)

Default = tuple[str, Any, str]  # name in Megatron's arguments, value (or a function that gives it), why


def _has_transformer_engine() -> bool:
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return HAVE_TE


def _has_persistent_norm() -> bool:
    from megatron.core.fusions.fused_layer_norm import HAVE_PERSIST_LAYER_NORM

    return HAVE_PERSIST_LAYER_NORM


def _has_gradient_accumulation() -> bool:
    from megatron.core.tensor_parallel.layers import _grad_accum_fusion_available

    return _grad_accum_fusion_available


def _has_masked_softmax() -> bool:
    return importlib.util.find_spec("scaled_upper_triang_masked_softmax_cuda") is not None


def _has_rotary_kernel() -> bool:
    from megatron.core.models.common.embeddings import rope_utils

    return rope_utils.fused_apply_rotary_pos_emb is not None


@dataclass(frozen=True)
class KernelDefault:
    """A setting of Megatron's whose default needs a kernel, and its value where that is not there.

    Attributes:
        name: in Megatron's arguments.
        value: or a function that gives it.
        kernel: whose it is.
        is_there: the question that Megatron asks before it calls the kernel.
    """

    name: str
    value: Any
    kernel: str
    is_there: Callable[[], bool]


KERNEL_DEFAULTS = (
    KernelDefault("transformer_impl", "local", "Transformer Engine's layers", _has_transformer_engine),
    KernelDefault(
        "attention_backend",
        lambda: _attention_backend("unfused"),
        "Transformer Engine's attention",
        _has_transformer_engine,
    ),
    KernelDefault("apply_rope_fusion", False, "Transformer Engine's rotary kernel", _has_rotary_kernel),
    KernelDefault("no_persist_layer_norm", True, "Apex's FastLayerNormFN", _has_persistent_norm),
    KernelDefault(  # of the output layer, which is Megatron's own with Transformer Engine too
        "gradient_accumulation_fusion", False, "Apex's fused_weight_gradient_mlp_cuda", _has_gradient_accumulation
    ),
    KernelDefault("masked_softmax_fusion", False, "Megatron's CUDA softmax", _has_masked_softmax),
)

CPU_DEFAULTS: tuple[Default, ...] = (
    *((default.name, default.value, default.kernel) for default in KERNEL_DEFAULTS),
    ("distributed_backend", "gloo", "NCCL needs CUDA"),
    ("bias_swiglu_fusion", False, "fused by torch.compile, which is switched off for Megatron here"),
    ("bias_dropout_fusion", False, "as above"),
)


def _attention_backend(name: str) -> Any:
    from megatron.core.transformer.enums import AttnBackend

    return AttnBackend[name]


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
)


# Putting them in place.


def _owner(path: str) -> tuple[Any, str]:
    """The module or class that holds ``path``, and the last part of its name."""
    owner, name = path.rsplit(".", 1)
    return pkgutil.resolve_name(owner), name


def _run_fusions_eagerly() -> None:
    """Megatron's ``jit_fuser`` is torch.compile, which takes long on a CPU and needs a C++ compiler: switched off.

    Functions decorated before now get their originals back, later ones are not compiled.  torch.compile itself is
    left alone.
    """
    import megatron.core.jit

    megatron.core.jit.disable_jit_fuser()
    for module_name, module in list(sys.modules.items()):
        if not module_name.startswith("megatron.") or module is None:
            continue
        owners = [module, *(c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module_name)]
        for owner in owners:
            for name, value in list(vars(owner).items()):
                original = getattr(value, "_torchdynamo_orig_callable", None)
                if original is not None and callable(value):
                    setattr(owner, name, original)


def _allow_no_cuda() -> None:
    """Changes the default in place, so that it holds however ``initialize_megatron`` was imported."""
    from megatron.training.initialize import initialize_megatron

    first, *others = initialize_megatron.__defaults__
    assert first in (False, True)
    assert initialize_megatron.__code__.co_varnames[0] == "allow_no_cuda"
    initialize_megatron.__defaults__ = (True, *others)


def skip_dataset_compile() -> None:
    """Skips building Megatron's data set helpers where they are there already; needed on GPUs too.

    Rank 0 runs ``make`` for them at every start and leaves with exit code 1 if that fails; the wheel on PyPI ships
    them compiled and without a Makefile.
    """
    import megatron.core.datasets.utils

    try:
        import megatron.core.datasets.helpers_cpp
    except ImportError:
        return
    megatron.core.datasets.utils.compile_helpers = _nothing


def fix_torch_adam_checkpoints() -> None:
    """Lets the distributed optimizer load its checkpoints with torch's Adam; needed on GPUs without TE and Apex too.

    As of 0.19.2 it fails there: to load, it asks the fresh optimizer for its state, of which there is none yet.  Past
    that it restarts Adam's step counters at 0, so that the steps after loading come out too large, or, with
    --dist-ckpt-optim-fully-reshardable, looks in vain for the counters among the sharded tensors; and a float32 model
    split over data-parallel ranks fails with "a view of a leaf Variable that requires grad".
    """
    from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE, DistributedOptimizer

    if HAVE_APEX_OR_TE or hasattr(DistributedOptimizer.state_dict, "__wrapped__"):
        return
    state_dict, load_state_dict = DistributedOptimizer.state_dict, DistributedOptimizer.load_state_dict
    set_states = DistributedOptimizer._set_main_param_and_optimizer_states

    @functools.wraps(state_dict)
    def state_dict_of_any(self: DistributedOptimizer) -> dict:
        inner = self.optimizer
        if isinstance(inner, torch.optim.Adam | torch.optim.AdamW) and not inner.state:
            for parameter in (p for group in inner.param_groups for p in group["params"]):
                # What Adam itself starts from.
                inner.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        return state_dict(self)

    @functools.wraps(load_state_dict)
    def load_state_dict_with_own_steps(self: DistributedOptimizer, loaded: dict) -> None:
        load_state_dict(self, loaded)
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"] = torch.tensor(float(loaded["optimizer"]["param_groups"][0]["step"]))

    @functools.wraps(set_states)
    @torch.no_grad()  # of a float32 model it writes into views of the parameters themselves
    def set_states_but_steps(self: DistributedOptimizer, model_param: torch.Tensor, tensors: dict) -> None:
        set_states(self, model_param, {**tensors, "step": None})  # it skips what is no tensor

    DistributedOptimizer._set_main_param_and_optimizer_states = set_states_but_steps
    DistributedOptimizer.state_dict = state_dict_of_any
    DistributedOptimizer.load_state_dict = load_state_dict_with_own_steps


def fix_recompute_without_te() -> None:
    """Lets ``--recompute-modules layernorm``, moe_act and mla_up_proj work without Transformer Engine, on GPUs too.

    As of 0.19.2 ``CheckpointWithoutOutput(fp8=False)``, the default, takes itself for an fp8 one (its test is ``fp8 is
    not None``) and asks Transformer Engine about it: NameError in the first forward.
    """
    from megatron.core.tensor_parallel.random import HAVE_TE, CheckpointWithoutOutput

    start = CheckpointWithoutOutput.__init__
    if HAVE_TE or hasattr(start, "__wrapped__"):
        return

    @functools.wraps(start)
    def start_without_fp8(self: CheckpointWithoutOutput, fp8: object = None) -> None:
        start(self, fp8 or None)

    CheckpointWithoutOutput.__init__ = start_without_fp8


def single_process_environment() -> None:
    """Lets ``python script.py`` run as one process, without torchrun, by filling in what torchrun would set."""
    if "RANK" in os.environ:
        return
    world_size = os.environ.get("WORLD_SIZE", "1")
    if world_size != "1":
        raise UserError(f"WORLD_SIZE is {world_size} but RANK is not set: start the script with torchrun")
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))


def prepare() -> None:
    """What a script of ours does before it uses Megatron, on any machine: fills in what torchrun would set, mends
    Megatron from PyPI, and switches to the CPU where there is no CUDA device.
    """
    single_process_environment()
    skip_dataset_compile()
    fix_torch_adam_checkpoints()
    fix_recompute_without_te()
    enable()


def _free_port() -> int:
    """A port that will still be free when it is used, seconds later: drawn from below those that the system hands out
    by itself (from 32768 on Linux), so that no connection takes it meanwhile and two runs hardly ever meet.
    """
    draw = random.Random(os.urandom(8))
    while True:
        port = draw.randrange(20000, 32768)
        with socket.socket() as candidate, contextlib.suppress(OSError):
            candidate.bind(("127.0.0.1", port))
            return port


def _keep_compiler_rules() -> None:
    """torch.compile knows torch's functions by identity, from a list it makes anew after init_process_group: it must
    stay the list of the originals, which our replacements call, not become one of the replacements.
    """
    from torch._dynamo import trace_rules

    originals = trace_rules.get_torch_obj_rule_map()
    trace_rules.get_torch_obj_rule_map = functools.cache(lambda: originals)


def enable() -> bool:
    """Switches this process to the CPU if it has no CUDA device; says whether it did.

    Calling it again changes nothing.  It imports Megatron (about 5 seconds) and may be called before or after the
    caller does, but before Megatron's arguments are parsed.  See :func:`single_process_environment` for starting
    without torchrun.
    """
    global _enabled
    if torch.cuda.is_available():
        return False
    if _enabled:
        return True
    _print_rank_0("No CUDA device found: Megatron runs on CPU over gloo.")
    expected_warnings.expect_no_gpu()
    import megatron.training.training  # noqa: F401

    _keep_compiler_rules()
    for path, value, _ in REPLACED:
        owner, name = _owner(path)
        setattr(owner, name, value)
    for path, wrap, _ in WRAPPED:
        owner, name = _owner(path)
        setattr(owner, name, wrap(getattr(owner, name)))
    _run_fusions_eagerly()
    _allow_no_cuda()
    skip_dataset_compile()
    fix_torch_adam_checkpoints()
    fix_recompute_without_te()
    _enabled = True
    return True


def main(arguments: list[str]) -> None:
    """``python -m megatron_moa.cpu SCRIPT ARGS...`` runs a Megatron script on the CPU."""
    program = "python -m megatron_moa.cpu"
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: {program} SCRIPT [ARGUMENTS OF THE SCRIPT]")
        raise SystemExit(0 if arguments else 2)
    script = arguments[0]
    if not os.path.isfile(script):
        fail(program, f"there is no script {script}")
    if torch.cuda.is_available():
        _print_rank_0(f"{program}: a CUDA device is there, so nothing is changed and {script} runs as it is.")
    else:
        with one_line_errors(program):
            single_process_environment()
        enable()
    with one_line_errors(os.path.basename(script)):
        sys.argv = list(arguments)
        sys.path[0] = os.path.dirname(os.path.abspath(script))
        runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    # The script may import this module by its name: work on that copy, so that there is one state.
    from megatron_moa import cpu

    cpu.main(sys.argv[1:])
