"""Computes norms and core attention in plain PyTorch, without Transformer Engine and Apex.

They run on GPUs too. Megatron's own plain modules fall short in two places: its torch norm refuses sequence
parallelism, and its DotProductAttention keeps [b, np, s, s] scores. State dicts have the layout of Megatron's modules.

Letters in shapes: s sequence, b batch, n heads, p tensor-parallel ranks, hn size of a key head, hv of a value head.
"""

import contextlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from megatron_moa.errors import UserError


class _MegatronParameters:
    """What both norms add to torch's: where and how parameters are made, and their gradients' reduction."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        # With a meta device or CPU initialisation Megatron moves the module itself.
        here = config.use_cpu_initialization or config.init_model_with_meta_device or not torch.cuda.is_available()
        device = None if here else torch.cuda.current_device()
        super().__init__(hidden_size, eps=eps, device=device, dtype=config.params_dtype)
        for parameter in self.parameters():
            # With sequence parallelism each rank normalises its part of the sequence, so its gradient is a part of
            # the sum: finalize_model_grads adds up those of marked parameters over the tensor-parallel ranks.
            parameter.sequence_parallel = config.sequence_parallel


class TorchLayerNorm(_MegatronParameters, torch.nn.LayerNorm):
    """``(x - mean) / sqrt(var + eps) * weight + bias`` over the last dimension, see :class:`TorchNorm`."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if x.dtype == weight.dtype:
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)
        return F.layer_norm(x.float(), self.normalized_shape, weight.float(), bias.float(), self.eps).to(weight.dtype)


class TorchRMSNorm(_MegatronParameters, torch.nn.RMSNorm):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, see :class:`TorchNorm`."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype:
            return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).to(self.weight.dtype)


_NORMS = {"LayerNorm": TorchLayerNorm, "RMSNorm": TorchRMSNorm}


class TorchNorm:
    """Builds torch's LayerNorm or RMSNorm for any norm slot of a Megatron spec.

    ``config.normalization`` says which. Unlike Megatron's WrappedTorchNorm it works with sequence parallelism.
    Parameters are ``weight`` and, for LayerNorm, ``bias``, of ``config.params_dtype``; inside, torch's kernels compute
    in fp32. The output has the parameters' dtype also where the input is fp32 (``--fp32-residual-connection``).

    Further keywords that Megatron passes to norms choose kernels of Apex and are ignored.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> torch.nn.Module:
        if config.layernorm_zero_centered_gamma:
            raise UserError(
                "--apply-layernorm-1p needs Transformer Engine or Apex; leave it out or install one of them"
            )
        if config.memory_efficient_layer_norm:
            # For which Megatron has no flag.
            raise UserError(
                "TransformerConfig(memory_efficient_layer_norm=True): needs Apex; leave it out, or install Apex"
            )
        if config.normalization not in _NORMS:
            raise UserError(f"--normalization {config.normalization} is not known: say {' or '.join(_NORMS)}")
        return _NORMS[config.normalization](config, hidden_size, eps)


class TorchAttention(MegatronModule):
    """Core attention on ``torch.nn.functional.scaled_dot_product_attention``: softmax(q k' * scale) v.

    Takes the place of Megatron's DotProductAttention, with the same results, but without its [b, n/p, s, s] scores
    wherever torch has a fused kernel: on GPUs always, on CPUs without attention dropout.  It has no parameters.

    Raises UserError, naming the flag, for what the torch function cannot do: sliding windows, attention sinks,
    logging or clipping of logits, attention biases, packed sequences, context parallelism.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
    ) -> None:
        super().__init__(config=config)
        _refuse_unsupported(config, layer_number)
        self.layer_number = max(1, layer_number)
        self.attn_mask_type = attn_mask_type
        # apply_query_key_layer_scaling divides the scores by the layer number and multiplies them again in fp32, lest
        # they overflow in fp16; the fused kernels keep scores in fp32, so there is nothing to do for it here.
        self.softmax_scale = (
            1.0 / math.sqrt(k_channels or config.kv_channels) if softmax_scale is None else softmax_scale
        )
        self.attention_dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attends.

        Args:
            query: [sq, b, n/p, hn]
            key: [sk, b, groups/p, hn]
            value: [sk, b, groups/p, hv]
            attention_mask: [b or 1, 1, sq, sk], True where attention is forbidden.  If given, it alone decides, as in
                Megatron's module; a query with every key forbidden gets zeros.
            attn_mask_type: overrides the one the module was built with.  Without a mask, the causal types let query i
                see keys up to i + sk - sq (a cache may hold earlier keys), the others let it see all.

        Returns:
            [sq, b, n/p * hv]
        """
        if attention_bias is not None:
            raise UserError(
                "an attention bias needs Transformer Engine's attention: --transformer-impl transformer_engine"
            )
        if packed_seq_params is not None:
            raise UserError(
                "packed sequences (--dataloader-inter-document-masking, --sft) need Transformer Engine's attention: "
                "leave the flag out or use --transformer-impl transformer_engine"
            )
        mask, is_causal = self._mask(query, key, attention_mask, attn_mask_type or self.attn_mask_type)
        key_size, value_size = query.size(3), value.size(3)
        if key_size != value_size:
            # The fused kernels want one head size. Zeros change neither scores nor the columns that are kept.
            query, key, value = (F.pad(x, (0, max(key_size, value_size) - x.size(3))) for x in (query, key, value))
        # [s, b, n/p, hn] -> [b, n/p, s, hn], as views
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        dropout = self.attention_dropout if self.training else 0.0
        with self._dropout_stream(dropout):
            # [b, n/p, sq, hn]
            context = F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=is_causal,
                scale=self.softmax_scale,
                enable_gqa=key.size(1) != query.size(1),
            )
        # [b, n/p, sq, hv] -> [sq, b, n/p * hv]
        return context[..., :value_size].permute(2, 0, 1, 3).flatten(2)

    @staticmethod
    def _mask(
        query: Tensor, key: Tensor, attention_mask: Tensor | None, mask_type: AttnMaskType
    ) -> tuple[Tensor | None, bool]:
        """Returns a mask for the torch function, and whether attention is causal.

        The mask has True where attention is allowed.
        """
        if attention_mask is not None:
            return attention_mask.logical_not(), False
        causal = (AttnMaskType.causal, AttnMaskType.padding_causal, AttnMaskType.causal_bottom_right)
        queries, keys = query.size(0), key.size(0)
        # A single query comes last and sees every key.
        if mask_type not in causal or queries == 1:
            return None, False
        if queries == keys:
            return None, True
        if queries > keys:
            raise ValueError(f"causal attention of {queries} queries to {keys} keys leaves queries without any key")
        return causal_lower_right(queries, keys), False

    def _dropout_stream(self, dropout: float) -> contextlib.AbstractContextManager:
        """Heads differ between tensor-parallel ranks, so must their dropout: Megatron's rule for which stream."""
        if dropout == 0.0 or self.config.sequence_parallel:
            return contextlib.nullcontext()
        return tensor_parallel.get_cuda_rng_tracker().fork()


def _refuse_unsupported(config: TransformerConfig, layer_number: int) -> None:
    """Raises for settings that the torch function cannot honour."""
    remedy = "leave it out or use Transformer Engine's attention (--transformer-impl transformer_engine)"
    if config.context_parallel_size > 1:
        raise UserError(f"--context-parallel-size {config.context_parallel_size} is not in plain PyTorch: {remedy}")
    if is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number):
        raise UserError(f"--window-size {config.window_size} is not in plain PyTorch's attention: {remedy}")
    if config.softmax_type != "vanilla":
        raise UserError(f"--softmax-type {config.softmax_type} is not in plain PyTorch's attention: {remedy}")
    if config.qk_clip:
        raise UserError(f"--qk-clip needs the attention logits, which plain PyTorch does not give: {remedy}")
    if config.log_max_attention_logit:
        raise UserError(f"--log-max-attention-logit is not in plain PyTorch's attention: {remedy}")
