"""Counts floating-point operations with gates and mixture, for the TFLOP/s and MFU of the log.

Megatron 0.19.2 counts the stock model (``num_floating_point_operations``): every matrix product once forward and twice
backward, 2 operations a multiply-add: attention's projections (grouped queries as they are), its scores and their
product with the values (half of them: the causal mask), fc1 and fc2 (of SwiGLU's two branches both; of a MoE layer
those of the experts that a token is sent to, and of shared experts), multi-token prediction, and the logits over the
padded vocabulary. Recomputed products are not counted twice. Its only terms that are no matrix product are the norms of
multi-token prediction; left out are all other norms, softmax, activations, the embedding and a MoE layer's router
(6 h E a token; 0.1 to 0.3 % of all in the MoE recipes of examples/models).

What the mixture adds, per token and feed-forward layer (per expert that a token is sent to):

    gates     the matrix product of h with n gate vectors:      6 h n
    mixture   sum_k c_k sigma_k(x), an inner product of length K for each of f elements: 2 K forward, 4 K backward
              type1, one-sided   6 K f
              bi-sided          12 K f
              quadratic          6 (K (K + 1) / 2 + K) f, as sum_k sigma_k(y) (sum_{l >= k} c_kl sigma_l(z))

with f the layer's (the expert's) width. Evaluating the activations, psi, and the product of two branches are not
counted, as SwiGLU's are not. LA has no gates.
"""

from __future__ import annotations

import argparse
import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron_moa.errors import UserError
from megatron_moa.layers.layer_pattern import moe_layers
from megatron_moa.megatron_fixes.patching import patch
from megatron_moa.mixture.config import MixtureConfig

_FORWARD_AND_BACKWARD = 3
_MULTIPLY_ADD = 2


@dataclass(frozen=True)
class Flops:
    """Operations of forward and backward of one token, over all ranks.

    Attributes:
        stock: as Megatron counts them, the model with a fixed activation.
        gates: the products of the hidden states with the gate vectors.
        mixture: the weighted sums of activations.
    """

    stock: float
    gates: float
    mixture: float

    @property
    def total(self) -> float:
        """All three."""
        return self.stock + self.gates + self.mixture


def flops_per_token(args: argparse.Namespace, mixture: MixtureConfig | None) -> Flops:
    """Operations of forward and backward of one token of a full sequence.

    Args:
        args: Megatron's, parsed and validated; left as they are. Before the tokenizer is built the padded vocabulary
            comes from ``vocab_size``.
        mixture: the mixture; None for the stock model.

    Raises:
        UserError: the vocabulary's size is not known yet.
    """
    from megatron.training import training  # when megatron_moa.cpu has replaced what it must

    args = copy.copy(args)  # Megatron's count writes to it
    args.padded_vocab_size = args.padded_vocab_size or _padded_vocab_size(args)
    count = inspect.unwrap(training.num_floating_point_operations)
    gates, sums = _mixture_flops(args, mixture)
    return Flops(stock=count(args, 1) / args.seq_length, gates=gates, mixture=sums)


def install(args: argparse.Namespace, mixture: MixtureConfig | None) -> None:
    """Makes Megatron count the operations of gates and mixture, too.

    They are then in the log's throughput, and in the sum that checkpoints carry.
    ``training.num_floating_point_operations`` of megatron-core 0.19.2 is wrapped in place: it knows the layers from
    ``args`` alone, and the training loop calls it by that name.
    """
    _COUNT.install(sum(_mixture_flops(args, mixture)))


def _with_mixture(stock: Callable, added: float) -> Callable:
    """Wraps Megatron's count, to which a token adds so many operations."""

    @functools.wraps(stock)
    def call(args: argparse.Namespace, batch_size: int, *rest: Any, **options: Any) -> float:
        # The order of stock's parameters: squared lengths, then tokens (None where nothing is packed).
        tokens = options.get("total_real_tokens_in_batch", rest[1] if len(rest) > 1 else None)
        if tokens is None:
            tokens = batch_size * args.seq_length
        return stock(args, batch_size, *rest, **options) + tokens * added

    return call


_COUNT = patch(
    "megatron.training.training.num_floating_point_operations",
    _with_mixture,
    why="it knows the layers from args alone, and counts neither gates nor the sums of activations",
    version="0.19.2",
    remove_when="Megatron's count can be added to by a model",
)


def _mixture_flops(args: argparse.Namespace, mixture: MixtureConfig | None) -> tuple[float, float]:
    """Of gates and of mixtures, a token, forward and backward, over all layers."""
    if mixture is None:
        return 0, 0
    k = mixture.num_activations
    products = {"type1": k, "one-sided": k, "bi-sided": 2 * k, "quadratic": len(mixture.pairs) + k}[mixture.form]
    n = mixture.num_coefficients if mixture.kind == "moa" else 0
    layers = list(_feed_forwards(args))
    gates = sum(hidden_size * n for hidden_size, _ in layers)
    sums = sum(width * products for _, width in layers)
    return _FORWARD_AND_BACKWARD * _MULTIPLY_ADD * gates, _FORWARD_AND_BACKWARD * _MULTIPLY_ADD * sums


def _feed_forwards(args: argparse.Namespace) -> Iterator[tuple[int, int]]:
    """Input size and width of every feed-forward layer and expert that a token passes."""
    for is_moe in moe_layers(args, with_mtp=True):
        if not is_moe:
            yield args.hidden_size, args.ffn_hidden_size
            continue
        for _ in range(args.moe_router_topk):
            yield args.moe_latent_size or args.hidden_size, args.moe_ffn_hidden_size or args.ffn_hidden_size
        if args.moe_shared_expert_intermediate_size:
            yield args.hidden_size, args.moe_shared_expert_intermediate_size


def _padded_vocab_size(args: argparse.Namespace) -> int:
    from megatron.training.vocab_utils import calculate_padded_vocab_size

    if not args.vocab_size:
        raise UserError("--vocab-size: not given, and no tokenizer has been read; add --vocab-size N")
    multiple, tensor_parallel = args.make_vocab_size_divisible_by, args.tensor_model_parallel_size
    return calculate_padded_vocab_size(args.vocab_size, multiple, tensor_parallel, logging_enabled=False)
