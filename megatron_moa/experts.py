"""Experts of a MoE layer, each with mixing coefficients of its own."""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP, SharedExpertState, overlap_state_check
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_moa.coefficients import GateCoefficients, gate_random_numbers
from megatron_moa.mlp import MixedMLP, MixedMLPSubmodules


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
        self._start_gates()

    @torch.no_grad()
    def _start_gates(self) -> None:
        """Draws the gate weights of all experts on every rank and keeps the local ones.

        The gates' stream is the same on all ranks of the layer, so experts differ from one another and copies on
        expert-tensor-parallel ranks do not, however the experts are spread.
        """
        first = self.local_experts[0].coefficients
        if not isinstance(first, GateCoefficients) or not self.config.perform_initialization:
            return
        drawn = torch.empty_like(first.weight)
        start = self.ep_group.rank() * self.num_local_experts
        with gate_random_numbers(self.config):
            for expert in range(self.ep_group.size() * self.num_local_experts):
                self.config.init_method(drawn)
                if start <= expert < start + self.num_local_experts:
                    self.local_experts[expert - start].coefficients.weight.copy_(drawn)


class MixedSharedExpertMLP(SharedExpertMLP, MixedMLP):
    """The shared expert: Megatron's SharedExpertMLP over a :class:`MixedMLP`, overlap with the dispatcher included."""

    def input_is_dispatched(self, is_expert: bool) -> bool:
        """With the overlap the dispatcher gathers the input and sums its gradient, as it does for routed experts."""
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
