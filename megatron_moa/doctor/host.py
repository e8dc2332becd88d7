"""Estimates from a training's flags whether its GPUs will wait for Python.

A run whose GPUs wait is bound by the host. Nothing is measured here. A layer's matrix products are counted for one
micro-batch on one rank, forward and backward, and divided by a rate that GPUs reach. If that takes less time than
Python needs to launch the layer, the GPU waits.

Assumed, from one H200 with 16 CPU cores (docs/results/h200):

- 600 TFLOP/s in bf16 or fp16: a feed-forward layer of h 2048 reached 725, and h 768 reaches less. In float32 the share
  of the peak is the same. A slower GPU waits less than this says, a slower host makes it wait more.
- Of Python's time a layer 2 ms for attention, norms and the optimizer, and 1 ms for a dense feed-forward layer or the
  shared expert. 0.9 ms for an expert computed by itself and 4 ms for grouped ones are the times of layers of 32 small
  experts, bi-sided MoA, which hardly used the GPU. The 2 and the 1 ms are chosen to fit what follows.
- Of the three models measured there, h 2048 then is bound by the GPU; h 768 and the small MoE by the host. So it
  looked from how their times scattered; they were not profiled.

Communication, the embedding, the output layer and the mixture's own kernels are left out.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_moa.command_line.numbers import positive
from megatron_moa.doctor.finding import CHECK, OK, Finding
from megatron_moa.errors import UserError

HALF_PRECISION_RATE = 600e12
FLOAT32_RATE = 40e12
ATTENTION_SECONDS = 2e-3
DENSE_SECONDS = 1e-3
EXPERT_SECONDS = 0.9e-3
GROUPED_SECONDS = 4e-3

_SIZES = (
    "hidden-size",
    "ffn-hidden-size",
    "num-attention-heads",
    "kv-channels",
    "num-query-groups",
    "seq-length",
    "micro-batch-size",
    "num-experts",
    "moe-ffn-hidden-size",
    "moe-shared-expert-intermediate-size",
)
_SIZES_OR_ONE = (
    "moe-router-topk",
    "tensor-model-parallel-size",
    "context-parallel-size",
    "expert-model-parallel-size",
)


@dataclass(frozen=True)
class LayerTimes:
    """What one layer takes for one micro-batch on one rank, forward and backward, in seconds: estimates."""

    gpu: float
    host: float

    @property
    def is_host_bound(self) -> bool:
        """Whether the GPU waits for Python."""
        return self.gpu < self.host


def layer_times(flags: Sequence[str]) -> LayerTimes:
    """Estimates both times of the layer that a training's flags describe; in an MoE, of one with experts."""
    own = _read(flags)
    tokens = own.seq_length * own.micro_batch_size / own.context_parallel_size / own.tensor_model_parallel_size
    weights = 2 * own.hidden_size * own.kv_channels * (own.num_attention_heads + own.num_query_groups)
    matrices = (3 if own.swiglu else 2) * own.hidden_size
    host = ATTENTION_SECONDS
    if own.num_experts is None:
        weights += matrices * own.ffn_hidden_size
        host += DENSE_SECONDS
    else:
        weights += matrices * own.moe_ffn_hidden_size * own.moe_router_topk
        local = own.num_experts // own.expert_model_parallel_size
        host += GROUPED_SECONDS if own.moe_grouped_gemm else EXPERT_SECONDS * local
        if own.moe_shared_expert_intermediate_size:
            weights += matrices * own.moe_shared_expert_intermediate_size
            host += DENSE_SECONDS
    # Causal scores and their product with the values: half of 2 * 2 * s * width a token, three times with backward.
    scores = 6 * own.seq_length * own.num_attention_heads * own.kv_channels
    rate = HALF_PRECISION_RATE if own.bf16 or own.fp16 else FLOAT32_RATE
    return LayerTimes((6 * weights + scores) * tokens / rate, host)


def judge_host(flags: Sequence[str]) -> Finding:
    """Says whether a training with these flags is likely bound by the host, and what helps."""
    own = _read(flags)
    if not (own.hidden_size and own.num_attention_heads and own.seq_length and own.micro_batch_size):
        return Finding("host", OK, "not estimated: hidden size, heads, sequence or micro-batch are not among the flags")
    times = layer_times(flags)
    text = f"a layer takes the GPU about {1e3 * times.gpu:.1f} ms, Python {1e3 * times.host:.1f} ms (an estimate)"
    if not times.is_host_bound:
        return Finding("host", OK, text)
    enough = math.ceil(own.micro_batch_size * times.host / times.gpu)
    helps = [f"a larger --micro-batch-size (from about {enough}, if memory allows)"]
    if own.num_experts is not None and not own.moe_grouped_gemm:
        helps.insert(0, "--moe-grouped-gemm")
    if own.tensor_model_parallel_size > 1:
        helps.append("less --tensor-model-parallel-size")
    return Finding("host", CHECK, f"GPUs likely wait for Python: {text}", f"what helps: {', '.join(helps)}")


def _read(flags: Sequence[str]) -> argparse.Namespace:
    """The flags that decide, with Megatron's defaults.

    Raises:
        UserError: a value that is no number, or no number of ranks.
    """
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False, exit_on_error=False)
    for name in _SIZES:
        parser.add_argument(f"--{name}", type=int)
    for name in _SIZES_OR_ONE:
        parser.add_argument(f"--{name}", type=positive, default=1)
    for name in ("swiglu", "moe-grouped-gemm", "bf16", "fp16"):
        parser.add_argument(f"--{name}", action="store_true")
    try:
        own, _ = parser.parse_known_args(list(flags))
    except argparse.ArgumentError as error:
        raise UserError(f"{error.argument_name}: {error.message}; mend the recipe or its variables") from None
    own.kv_channels = own.kv_channels or (own.hidden_size or 0) // (own.num_attention_heads or 1)
    own.num_query_groups = own.num_query_groups or own.num_attention_heads
    own.ffn_hidden_size = own.ffn_hidden_size or 4 * (own.hidden_size or 0)
    own.moe_ffn_hidden_size = own.moe_ffn_hidden_size or own.ffn_hidden_size
    return own
