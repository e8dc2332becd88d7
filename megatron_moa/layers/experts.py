"""Mixes activations in the experts of a MoE layer, each with coefficients of its own."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from megatron.core.dist_checkpointing.mapping import ReplicaId, ShardedStateDict, ShardedTensor, ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer.moe.experts import GroupedMLPSubmodules, SequentialMLP, TEGroupedMLP
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP, SharedExpertState, overlap_state_check
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from megatron.core.typed_torch import apply_module
from megatron.core.utils import nvtx_range_pop, nvtx_range_push
from torch import Tensor

from megatron_moa.layers.coefficients import Preactivation, build_coefficients, draw_gates_of_experts
from megatron_moa.layers.grouped_linear import TorchGroupedLinear, draw_expert
from megatron_moa.layers.mlp import MixedMLP, MixedMLPSubmodules
from megatron_moa.mixture.config import MixtureConfig
from megatron_moa.mixture.functional import mixed_activation
from megatron_moa.mixture.grouped_products import ends_of_groups


class MixedSequentialMLP(SequentialMLP):
    """Routed experts, one after the other: Megatron's SequentialMLP built of :class:`MixedMLP`.

    State: as SequentialMLP's, with ``coefficients`` in each expert; a checkpoint stacks them over all experts.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: MixedMLPSubmodules,
        pg_collection: ProcessGroupCollection | None = None,
        name: str | None = None,
    ) -> None:
        # SequentialMLP builds stock MLPs itself: let it build none, and add ours.
        super().__init__(0, config, submodules, pg_collection, name)
        self.num_local_experts = num_local_experts
        for index in range(num_local_experts):
            self.local_experts.append(
                MixedMLP(
                    self.config,
                    submodules,
                    ffn_hidden_size=self.config.moe_ffn_hidden_size,
                    is_expert=True,
                    tp_group=pg_collection.expt_tp,
                    name=f"{name}.local_experts.{index}" if name is not None else None,
                )
            )
        draw_gates_of_experts([expert.coefficients for expert in self.local_experts], self.ep_group)


@dataclass(kw_only=True)
class MixedGroupedMLPSubmodules(GroupedMLPSubmodules):
    """Megatron's submodules of grouped experts plus the mixture's settings.

    As :class:`megatron_moa.layers.mlp.MixedMLPSubmodules`.
    """

    mixture: MixtureConfig


class MixedGroupedMLP(TEGroupedMLP):
    """Computes routed experts at once, with the mixture as activation step.

    For ``--moe-grouped-gemm``; the rest is Megatron's TEGroupedMLP. One grouped gate and one mixture serve all experts'
    tokens. The grouped linears are Transformer Engine's or those of megatron_moa.layers.grouped_linear, as the
    submodules say.

    State: TEGroupedMLP's ``linear_fc1`` and ``linear_fc2``, and ``coefficients`` of all of the rank's experts. A
    checkpoint has the keys and the layout of :class:`MixedSequentialMLP`'s. Arguments are those of TEGroupedMLP.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: MixedGroupedMLPSubmodules,
        pg_collection: ProcessGroupCollection | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(num_local_experts, config, submodules, pg_collection, name)
        self.mixture = submodules.mixture
        self.activation_recompute = self.activation_recompute or self.mixture.recompute
        self.dp_group = pg_collection.expt_dp
        for expert in range(num_local_experts):
            draw_expert(self, expert)
        self.coefficients = build_coefficients(
            self.mixture,
            self.config,
            self.tp_group,
            is_expert=True,
            dispatched=True,
            input_size=self.config.moe_latent_size or self.input_size,
            experts=num_local_experts,
        )
        draw_gates_of_experts([self.coefficients], self.ep_group)

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, None]:
        """fc1, mixture, fc2.

        Args:
            permuted_local_hidden_states: [t, h], sorted by expert.
            tokens_per_expert: [experts], with the sum t.
            permuted_probs: [t], the router's probabilities; multiplied inside the mixture.

        Returns:
            [t, h], and None for a bias.
        """
        hidden_states, per_token_scale = permuted_local_hidden_states, permuted_probs
        if self.config.moe_apply_probs_on_input:
            hidden_states = (per_token_scale.unsqueeze(-1) * hidden_states).to(hidden_states.dtype)
            per_token_scale = torch.ones_like(per_token_scale)
        group_ends = ends_of_groups(tokens_per_expert, hidden_states.device)
        # Transformer Engine takes the sizes from the host.
        ours = isinstance(self.linear_fc1, TorchGroupedLinear)
        sizes = tokens_per_expert if ours else tokens_per_expert.tolist()

        nvtx_range_push(suffix="linear_fc1")
        preactivation, _ = apply_module(self.linear_fc1)(hidden_states, sizes)  # [t, f/p], gated [t, 2f/p]
        nvtx_range_pop(suffix="linear_fc1")
        nvtx_range_push(suffix="mixture")
        checkpoint = CheckpointWithoutOutput() if self.activation_recompute else None
        if checkpoint is None and not self.coefficients.is_watched:
            inputs = Preactivation(preactivation, None, per_token_scale)
            activated = self.coefficients(hidden_states, group_ends, inputs)  # [t, f/p]
        else:
            coefficients = self.coefficients(hidden_states, group_ends)  # [t, n] or [experts, n]
            mix = self._mix if checkpoint is None else functools.partial(checkpoint.checkpoint, self._mix)
            activated = mix(preactivation, coefficients, per_token_scale, group_ends)
        nvtx_range_pop(suffix="mixture")
        nvtx_range_push(suffix="linear_fc2")
        output, _ = apply_module(self.linear_fc2)(activated, sizes)  # [t, h]
        nvtx_range_pop(suffix="linear_fc2")
        if checkpoint is not None:
            checkpoint.discard_output_and_register_recompute(output)
        return output, None

    def _mix(self, preactivation: Tensor, coefficients: Tensor, per_token_scale: Tensor, group_ends: Tensor) -> Tensor:
        # Gates give every token its own coefficients already.
        ends = group_ends if self.mixture.kind == "la" else None
        return mixed_activation(preactivation, coefficients, self.mixture, None, per_token_scale, ends)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Returns the linears as TEGroupedMLP places them, the coefficients as SequentialMLP does.

        SequentialMLP has the coefficients one by one and stacked over all experts.
        """
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        entries = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        for name, tensor in self.coefficients.state_dict(keep_vars=True).items():
            name = f"coefficients.{name}"
            entries[f"{prefix}{name}"] = self._split_by_expert(prefix, name, tensor, sharded_offsets, metadata)
        return entries

    def _split_by_expert(
        self, prefix: str, name: str, tensor: Tensor, sharded_offsets: tuple, metadata: dict
    ) -> ShardedTensorFactory:
        """Splits a tensor of all of the rank's experts into each expert's part.

        This holds for the optimizer's state as for the parameter.
        """
        shape, experts = tensor.shape, self.num_local_experts
        first, every = self.ep_group.rank() * experts, self.ep_group.size() * experts
        replica_id = (0, self.tp_group.rank(), self.dp_group.rank())

        def split(key: str, data: Tensor, replica_id: ReplicaId, _: slice | None) -> dict[int, ShardedTensor]:
            parts = {}
            for local, part in enumerate(data if data.dim() > 1 else data.view(experts, -1)):
                number = first + local
                own, offsets = key, (*sharded_offsets, (len(sharded_offsets), number, every))
                if metadata.get("singleton_local_shards", False):  # each expert's under a name of its own
                    own, offsets = f"{key.removesuffix(name)}{number}.{name}", sharded_offsets
                parts[local] = ShardedTensor.from_rank_offsets(
                    own, part, *offsets, replica_id=replica_id, prepend_axis_num=len(offsets)
                )
            return parts

        def join(parts: dict[int, Tensor]) -> Tensor:
            return torch.stack([parts[local] for local in range(experts)]).view(shape)

        return ShardedTensorFactory(f"{prefix}experts.{name}", tensor, split, join, replica_id)


class MixedSharedExpertMLP(SharedExpertMLP, MixedMLP):
    """Computes the shared expert: Megatron's SharedExpertMLP over a :class:`MixedMLP`.

    The overlap with the dispatcher is included.
    """

    def input_is_dispatched(self, is_expert: bool) -> bool:
        """Tells whether the dispatcher gathers the input and sums the input's gradient.

        With the overlap it does, as for routed experts.
        """
        return is_expert or self.config.moe_shared_expert_overlap

    @overlap_state_check(SharedExpertState.PRE_FORWARD_COMM_DONE, SharedExpertState.FC1_FORWARD_DONE)
    def linear_fc1_forward_and_act(self, overlapped_comm_output: Tensor | None = None) -> None:
        """fc1 and the mixture, on the shared expert's own stream."""
        with torch.cuda.stream(self.stream):
            self.cached_fc2_input = self.fc1_and_mixture(self.cached_fc1_input)
            self.cached_fc1_input = None
        if overlapped_comm_output is not None and overlapped_comm_output.grad_fn is not None:
            self._run_backward_after(overlapped_comm_output)

    def _run_backward_after(self, overlapped: Tensor) -> None:
        """Orders this expert's backward behind that of the communication it overlaps, as Megatron's does."""
        # Imported here: both are private to Megatron's module, and needed only for the overlap.
        from megatron.core.transformer.moe.shared_experts import _BackwardStreamWait, set_tensor_grad_fn_sequence_sr

        set_tensor_grad_fn_sequence_sr(self.cached_fc2_input, overlapped.grad_fn._sequence_nr() - 1)
        self.cached_fc2_input = _BackwardStreamWait.apply(self.cached_fc2_input, self.stream)
