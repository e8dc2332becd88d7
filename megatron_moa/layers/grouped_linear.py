"""Multiplies grouped experts in plain PyTorch, where Megatron needs Transformer Engine.

The counterparts of Megatron's TEColumnParallelGroupedLinear and TERowParallelGroupedLinear, and its TEGroupedMLP over
them. Names and layout of checkpoints are those of Megatron's SequentialMLP, which a run can go on with, and back.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import (
    _initialize_affine_weight_cpu,
    _initialize_affine_weight_gpu,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.moe.experts import GroupedMLPSubmodules, TEGroupedMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from megatron.core.utils import divide
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import Parameter

from megatron_moa.layers.coefficients import experts_reduce_apart
from megatron_moa.mixture.grouped_products import (
    ends_of_groups,
    grouped_linear,
    grouped_linear_input_gradient,
    grouped_linear_weight_gradient,
)

logger = logging.getLogger(__name__)


class TorchGroupedLinear(torch.nn.Module):
    """One linear map a local expert, without bias, as one grouped product over tokens sorted by expert.

    State: ``weight0`` ... ``weight{E-1}``, this rank's part of [output_size, input_size] each, as ``weight`` of Column-
    and RowParallelLinear. They are slices of one tensor, so the product needs no copy; see :func:`stacked`. The
    dispatcher communicates, this module does not. The constructor fills in NaN: :func:`draw_expert` draws.

    Args:
        num_gemms: E, the experts on this rank.
        input_size: the whole, before expert-tensor-parallel ranks share one of the two (``partition_dim``).
        output_size: likewise.
        config: Megatron's.
        init_method: draws a weight.
        bias, skip_bias_add, is_expert, tp_comm_buffer_name, name: as for Megatron's modules; only experts, no bias.
        pg_collection: ``ep``, ``expt_tp`` and ``expt_dp`` of it are used.
    """

    partition_dim: ClassVar[int]  # of a weight: what expert-tensor-parallel ranks share out

    def __init__(
        self,
        num_gemms: int,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: Callable[[Tensor], Any],
        bias: bool,
        skip_bias_add: bool,
        is_expert: bool,
        tp_comm_buffer_name: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__()
        assert is_expert, "grouped linears are for routed experts"
        assert not bias, "megatron_moa.layer_specs.check_supported refuses a bias"
        self.config = config
        self.num_gemms = num_gemms
        self.use_bias = False
        self.delay_wgrad_compute = False
        self._init_method = init_method
        self._groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        self._whole_shape = (output_size, input_size)
        # As Megatron's MLP says it: a rank has a part of either half of a gated fc1.
        self._stride = 2 if config.gated_linear_unit and self.partition_dim == 0 else 1
        shape = list(self._whole_shape)
        shape[self.partition_dim] = divide(shape[self.partition_dim], self._groups.expt_tp.size())
        self.out_features, self.in_features = shape
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        weights = torch.full((num_gemms, *shape), torch.nan, dtype=config.params_dtype, device=device)
        # The last one first: the distributed optimizer moves parameters into its buffer in reverse order, and so keeps
        # these in the order that one product over all of them needs.
        for expert in reversed(range(num_gemms)):
            weight = Parameter(weights[expert])
            if not config.perform_initialization:  # else draw() marks it
                set_tensor_model_parallel_attributes(weight, True, self.partition_dim, self._stride)
            weight.allreduce = not experts_reduce_apart(config)
            self.register_parameter(f"weight{expert}", weight)
        self._register_load_state_dict_pre_hook(self._drop_extra_state)

    @property
    def weights(self) -> list[Parameter]:
        """The experts' weights, in the experts' order."""
        return [getattr(self, f"weight{expert}") for expert in range(self.num_gemms)]

    def draw(self, expert: int) -> None:
        """Draws one expert's weight, from the random stream and in the way that Megatron's linear layers do."""
        weight = self.weights[expert]
        if not self.config.use_cpu_initialization:
            _initialize_affine_weight_gpu(weight, self._init_method, self.partition_dim, self._stride, is_expert=True)
            return
        _initialize_affine_weight_cpu(
            weight,
            *self._whole_shape,
            weight.shape[self.partition_dim],
            self.partition_dim,
            self._init_method,
            self._stride,
            rank=self._groups.expt_tp.rank(),
            world_size=self._groups.expt_tp.size(),
        )

    def forward(self, x: Tensor, tokens_per_expert: Tensor | Sequence[int]) -> tuple[Tensor, None]:
        """x[rows of an expert] @ weight.T, for every expert.

        Args:
            x: [t, in_features], sorted by expert; in_features and out_features are this rank's.
            tokens_per_expert: E sizes with the sum t; as a tensor on x's device they stay there, and nothing waits.

        Returns:
            [t, out_features], and None for a bias.
        """
        return _GroupedLinear.apply(x, ends_of_groups(tokens_per_expert, x.device), *self.weights), None

    def backward_dw(self) -> None:
        """Nothing: weight gradients are not delayed (--delay-wgrad-compute is refused)."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Returns tensors stacked over all experts, under the keys of SequentialMLP.

        They are as Megatron's TEGroupedLinear makes them. The layers SequentialMLP is made of have an empty extra state
        each, so these have one too.
        """
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        single = metadata.get("singleton_local_shards", False)
        experts = self._groups.ep.size() * self.num_gemms
        sharded = {}
        for local, weight in enumerate(self.weights):
            expert = self._groups.ep.rank() * self.num_gemms + local
            key = f"{expert}.{prefix}" if single else prefix
            entries = make_sharded_tensors_for_checkpoint(
                {"weight": weight, "_extra_state": None},
                key,
                {"weight": self.partition_dim},
                sharded_offsets if single else (*sharded_offsets, (len(sharded_offsets), expert, experts)),
                tp_group=self._groups.expt_tp,
                dp_cp_group=metadata["dp_cp_group"],
            )
            sharded[f"{prefix}weight{local}"] = entries[f"{key}weight"]
            sharded[f"{prefix}_extra_state{local or ''}"] = entries[f"{key}_extra_state"]
        for entry in sharded.values():
            entry.replica_id = (*entry.replica_id[:2], self._groups.expt_dp.rank())
        return sharded

    def _drop_extra_state(self, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        for local in range(self.num_gemms):
            state_dict.pop(f"{prefix}_extra_state{local or ''}", None)

    def extra_repr(self) -> str:
        """Sizes on this rank."""
        return f"num_gemms={self.num_gemms}, in_features={self.in_features}, out_features={self.out_features}"


class TorchColumnParallelGroupedLinear(TorchGroupedLinear):
    """Each expert-tensor-parallel rank has some of the outputs: fc1."""

    partition_dim = 0


class TorchRowParallelGroupedLinear(TorchGroupedLinear):
    """Splits an expert's inputs over the expert-tensor-parallel ranks: fc2.

    The dispatcher sums the outputs over ranks.
    """

    partition_dim = 1


class TorchGroupedMLP(TEGroupedMLP):
    """Megatron's grouped experts, stock activation step included, over the linears of this module.

    With one seed they start with the weights of SequentialMLP. Arguments are those of TEGroupedMLP.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: GroupedMLPSubmodules,
        pg_collection: ProcessGroupCollection | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(num_local_experts, config, submodules, pg_collection, name)
        for expert in range(num_local_experts):
            draw_expert(self, expert)


def draw_expert(experts: TEGroupedMLP, expert: int) -> None:
    """Draws one expert's weights, if the linears are of this module.

    Called expert after expert, it draws the weights of SequentialMLP.
    """
    if experts.config.perform_initialization and isinstance(experts.linear_fc1, TorchGroupedLinear):
        experts.linear_fc1.draw(expert)
        experts.linear_fc2.draw(expert)


def stacked(weights: Sequence[Tensor]) -> Tensor:
    """E matrices [f, h] as one tensor [E, f, h]: a view where they lie at equal distances in one storage.

    They do in a new module, and in the distributed optimizer's buffer, which pads each to the same size. Otherwise
    (after ``.to(dtype)``, or where a bucket of the buffer ends between two, with padding) it is a copy.
    """
    first, *others = weights
    if not others:
        return first.unsqueeze(0)
    distance = others[0].storage_offset() - first.storage_offset()
    storage = first.untyped_storage().data_ptr()
    in_place = distance >= first.numel() and all(
        weight.untyped_storage().data_ptr() == storage
        and weight.storage_offset() == first.storage_offset() + index * distance
        and weight.is_contiguous()
        for index, weight in enumerate(weights)
    )
    if in_place:
        return first.as_strided((len(weights), *first.shape), (distance, *first.stride()))
    _log_copy()
    return torch.stack(list(weights))


@functools.cache
def _log_copy() -> None:
    logger.info("grouped experts: weights do not lie side by side in memory, so every product copies them first")


class _GroupedLinear(torch.autograd.Function):
    """Saves its input and the parameters themselves: no stacked copy is kept for backward."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, group_ends: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, group_ends, *weights)
        return grouped_linear(x, stacked(weights), group_ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, group_ends, *weights = ctx.saved_tensors
        need_x, _, *need_weights = ctx.needs_input_grad
        grad_x = grouped_linear_input_gradient(grad, stacked(weights), group_ends) if need_x else None
        grad_weights: Sequence[Tensor | None] = [None] * len(weights)
        if any(need_weights):
            grad_weights = grouped_linear_weight_gradient(grad, x, group_ends).unbind()
        return grad_x, None, *grad_weights
