"""Sets the flags of Megatron's whose default needs a kernel, where that kernel is not there.

This holds on GPUs and CPUs alike.
"""

import argparse
import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

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


def _attention_backend(name: str) -> Any:
    from megatron.core.transformer.enums import AttnBackend

    return AttnBackend[name]


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


def set_defaults(parser: argparse.ArgumentParser, defaults: Iterable[Default]) -> argparse.ArgumentParser:
    """Sets these defaults of a parser, and returns the parser."""
    parser.set_defaults(**{dest: value() if callable(value) else value for dest, value, _ in defaults})
    return parser


def set_plain_torch_defaults(parser: argparse.ArgumentParser) -> None:
    """Replaces the defaults whose kernels are not there, each by what Megatron itself asks for.

    This is for GPUs too.
    """
    absent = [default for default in KERNEL_DEFAULTS if not default.is_there()]
    set_defaults(parser, [(default.name, default.value, default.kernel) for default in absent])
