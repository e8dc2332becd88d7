"""Mixes activations in the dense feed-forward layer: Megatron's MLP with its activation step replaced."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from megatron.core.extensions.transformer_engine import set_save_original_input
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.typed_torch import apply_module
from megatron.core.utils import nvtx_range_pop, nvtx_range_push
from torch import Tensor

from megatron_moa.layers.coefficients import Preactivation, build_coefficients
from megatron_moa.mixture.config import MixtureConfig
from megatron_moa.mixture.functional import mixed_activation


@dataclass(kw_only=True)
class MixedMLPSubmodules(MLPSubmodules):
    """Megatron's submodules plus the mixture's settings.

    The spec carries the settings, so constructors stay Megatron's.
    """

    mixture: MixtureConfig


class MixedMLP(MLP):
    """MLP whose activation mixes a dictionary of activations (docs/mixture.md).

    State: Megatron's ``linear_fc1`` and ``linear_fc2`` unchanged, and ``coefficients`` (layers/coefficients.py).
    Arguments are those of Megatron's MLP.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MixedMLPSubmodules,
        is_expert: bool = False,
        input_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, submodules, is_expert=is_expert, input_size=input_size, **kwargs)
        self.mixture = submodules.mixture
        self.coefficients = build_coefficients(
            self.mixture,
            self.config,
            self.tp_group,
            is_expert=is_expert,
            dispatched=self.input_is_dispatched(is_expert),
            input_size=self.config.moe_latent_size if is_expert and self.config.moe_latent_size else self.input_size,
        )
        # Megatron's meaning of moe_act: keep the output of a routed expert's fc1, not that of its activation step.
        self.recompute_mixture = self.mixture.recompute or (
            is_expert
            and self.config.recompute_granularity == "selective"
            and "moe_act" in self.config.recompute_modules
        )
        if self.recompute_mixture and (self.config.fp8 or self.config.fp4):
            # Else Transformer Engine's fc2 keeps a quantized copy of what is to be computed again.
            set_save_original_input(self.linear_fc2)

    def input_is_dispatched(self, is_expert: bool) -> bool:
        """Whether the input is gathered, and its gradient summed over ranks, outside this layer."""
        return is_expert

    def forward(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """fc1, mixture, fc2.

        Args:
            hidden_states: [s, b, h], or an expert's tokens [t, h]; the normalised input.
            per_token_scale: [t], a router's probabilities; multiplied inside the mixture.
            kwargs: what Megatron passes to every MLP and a dense one ignores (``padding_mask``).

        Returns:
            The output, shaped as hidden_states, and fc2's bias, still to be added (None where there is none).
        """
        del kwargs
        checkpoint = CheckpointWithoutOutput(fp8=self.config.fp8) if self.recompute_mixture else None
        activated = self.fc1_and_mixture(hidden_states, per_token_scale, checkpoint)  # [s, b, f/p]
        nvtx_range_push(suffix="linear_fc2")
        output, output_bias = apply_module(self.linear_fc2)(activated)  # [s, b, h]
        nvtx_range_pop(suffix="linear_fc2")
        if checkpoint is not None:
            checkpoint.discard_output_and_register_recompute(output)
        if per_token_scale is not None and output_bias is not None:
            # An expert's bias is weighted by the router too, so it is added here rather than with the residual.
            output = output + output_bias * per_token_scale.unsqueeze(-1).to(output.dtype)
            output_bias = None
        return output, output_bias

    def fc1_and_mixture(
        self,
        hidden_states: Tensor,
        per_token_scale: Tensor | None = None,
        checkpoint: CheckpointWithoutOutput | None = None,
    ) -> Tensor:
        """The input of fc2: [s, b, f/p] for hidden_states [s, b, h] ([s/p, b, h] under sequence parallelism).

        With a checkpoint the mixture keeps its inputs only; the caller discards the output once fc2 has used it.
        """
        nvtx_range_push(suffix="linear_fc1")
        preactivation, bias = apply_module(self.linear_fc1)(hidden_states)  # [s, b, f/p], gated [s, b, 2f/p]
        nvtx_range_pop(suffix="linear_fc1")
        nvtx_range_push(suffix="mixture")
        if checkpoint is None and not self.coefficients.is_watched:
            activated = self.coefficients(hidden_states, None, Preactivation(preactivation, bias, per_token_scale))
        else:
            coefficients = self.coefficients(hidden_states)  # [s, b, n] or [n]
            mix = self._mix if checkpoint is None else functools.partial(checkpoint.checkpoint, self._mix)
            activated = mix(preactivation, coefficients, bias, per_token_scale)
        nvtx_range_pop(suffix="mixture")
        return activated

    def _mix(
        self, preactivation: Tensor, coefficients: Tensor, bias: Tensor | None, per_token_scale: Tensor | None
    ) -> Tensor:
        return mixed_activation(preactivation, coefficients, self.mixture, bias, per_token_scale)
