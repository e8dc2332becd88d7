"""Owns the parameters of the mixing coefficients, gates (MoA) or numbers (LA), and their parallelism.

They are modules of their own because Megatron saves the parameters of an MLP's children only: one put on the MLP
itself would be missing from every checkpoint. In a half-precision model their parameters are half precision too, with
the optimizer's float32 copy behind them (Megatron 0.19 cannot save float32 parameters beside bf16 ones: KeyError in
Float16OptimizerWithFloat16Params.sharded_state_dict); the gates' arithmetic and the coefficients are float32.

A tensor-parallel rank holds some of the FFN's columns, so the gradient that reaches it for a coefficient is a
partial sum. Where that sum is completed depends on what the layer's input is on each rank (:class:`InputLayout`).
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Callable, Iterator, Sequence
from typing import Self

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn import Parameter

from megatron_moa.layers.init_scale import coefficient_scale
from megatron_moa.megatron_fixes.gates_by_adam import train_by_adam
from megatron_moa.mixture.config import MixtureConfig
from megatron_moa.mixture.functional import gate_coefficients
from megatron_moa.mixture.grouped_products import group_sizes

_GATE_STREAM = "moa-gate-rng"
_GATE_SEED_OFFSET = 40_961  # from the run's seed; Megatron's own streams lie at small offsets


@contextlib.contextmanager
def gate_random_numbers(config: TransformerConfig) -> Iterator[None]:
    """Inside, the default generator is a stream of the gates' own: the same on all ranks of a pipeline stage, so that
    copies of a gate start equal, and apart from all others, so that with the same seed stock, LA and MoA models share
    their other initial weights and their dropout.

    With --use-cpu-initialization Megatron draws everything from one generator, and so do the gates.
    """
    if config.use_cpu_initialization:
        yield
        return
    tracker = get_cuda_rng_tracker()
    if _GATE_STREAM not in tracker.get_states():
        seed = torch.cuda.initial_seed() if torch.cuda.is_available() else torch.initial_seed()
        tracker.add(_GATE_STREAM, seed + _GATE_SEED_OFFSET)
    with tracker.fork(_GATE_STREAM):
        yield


class InputLayout(enum.Enum):
    """What a tensor-parallel rank sees of the layer's input, and who completes the input's gradient."""

    # Every rank has all tokens, fc1 sums the input's gradient itself: a dense layer.
    REPLICATED = "replicated"
    # Every rank has its part of the sequence, fc1 gathers: a dense layer under sequence parallelism.
    SEQUENCE_SHARD = "sequence shard"
    # Every rank has all tokens, and the dispatcher sums the input's gradient over ranks: an expert.
    DISPATCHED = "dispatched"


class Coefficients(torch.nn.Module):
    """Base of :class:`GateCoefficients` and :class:`FreeCoefficients`: one layer's (one expert's) coefficients.

    Args:
        mixing: the mixture's settings.
        config: Megatron's; gives h, the initialisation and sequence parallelism.
        tp_group: the ranks that share the layer's columns (for an expert, its expert-tensor-parallel group).
        layout: how the layer's input lies over those ranks.
        expert_parameters: whether gradients are reduced over the expert-data-parallel group, as the experts' are.
    """

    def __init__(
        self,
        mixing: MixtureConfig,
        config: TransformerConfig,
        tp_group: torch.distributed.ProcessGroup,
        layout: InputLayout,
        expert_parameters: bool = False,
    ) -> None:
        super().__init__()
        self.mixing = mixing
        self.config = config
        self.tp_group = tp_group
        self.layout = layout
        self.expert_parameters = expert_parameters
        # Called with the coefficients, [..., n] or [n]; set by training/coefficient_monitor.py while it records.
        self.observer: Callable[[Tensor], None] | None = None

    @classmethod
    def of_groups(cls, modules: Sequence[Self], hidden_states: Tensor, group_ends: Tensor) -> Tensor:
        """The coefficients of several experts at once, as each one's ``forward`` gives them for its own tokens.

        Args:
            modules: of this class, one an expert, alike but for their parameters' values.
            hidden_states: [t, h], sorted by expert.
            group_ends: [experts] int32, the rows up to and with each (megatron_moa.mixture.grouped_products).

        Returns:
            [t, n] for gates, [experts, n] for LA; float32, or float64 for float64 parameters.
        """
        raise NotImplementedError

    def _new_parameter(self, *shape: int) -> Parameter:
        device = None if self.config.use_cpu_initialization else torch.cuda.current_device()
        parameter = Parameter(torch.empty(shape, dtype=self.config.params_dtype, device=device))
        parameter.requires_grad = not self.mixing.freeze
        parameter.allreduce = not self.expert_parameters
        return parameter

    @torch.no_grad()
    def _fill(self, parameter: Parameter, scale: float) -> None:
        values = torch.tensor(list(self.mixing.start_values()), dtype=torch.float32)
        parameter.copy_(values * scale)

    def _summed_over_ranks(self, tensor: Tensor) -> Tensor:
        """Identity forward; backward sums the gradient over the tensor-parallel ranks. Costs nothing for one rank."""
        if self.tp_group.size() == 1:
            return tensor
        return copy_to_tensor_model_parallel_region(tensor, group=self.tp_group)

    def _observe(self, coefficients: Tensor) -> None:
        # A forward inside backward is one that is recomputed: these tokens have been observed.
        if self.observer is not None and torch._C._current_graph_task_id() == -1:
            self.observer(coefficients.detach())

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """All tensors, as replicas over this layer's own tensor-parallel group (an expert's is not the model's)."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


class FreeCoefficients(Coefficients):
    """LA: the n coefficients are parameters, the same for every token. State: ``value`` [n]."""

    def __init__(self, mixing: MixtureConfig, config: TransformerConfig, *args: object, **kwargs: object) -> None:
        super().__init__(mixing, config, *args, **kwargs)
        self.value = self._new_parameter(mixing.num_coefficients)
        self._fill(self.value, coefficient_scale(mixing, config))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[n] float32, whatever the input; its gradient is summed over the tensor-parallel ranks."""
        del hidden_states
        coefficients = _at_least_float32(self.value)
        self._observe(coefficients)
        return self._summed_over_ranks(coefficients)

    @classmethod
    def of_groups(cls, modules: Sequence[Self], hidden_states: Tensor, group_ends: Tensor) -> Tensor:
        """See :meth:`Coefficients.of_groups`; [experts, n], whatever the input."""
        del hidden_states, group_ends
        coefficients = _at_least_float32(torch.stack([module.value for module in modules]))
        for module, own in zip(modules, coefficients, strict=True):
            module._observe(own)
        return modules[0]._summed_over_ranks(coefficients)


class GateCoefficients(Coefficients):
    """MoA: c(x) = psi(u x + b), or a psi_hat(u x + b) with learned amplitude (reference.gate).

    State: ``weight`` u [n, h]; ``bias`` b [n] with ``--moa-gate-bias``; ``amplitude`` a [n] with
    ``--moa-amplitude learned``; ``scale`` [1], a constant, with ``--moa-init-scale matched`` and fixed amplitude.
    """

    def __init__(
        self,
        mixing: MixtureConfig,
        config: TransformerConfig,
        *args: object,
        input_size: int | None = None,
        **kwargs: object,
    ) -> None:
        super().__init__(mixing, config, *args, **kwargs)
        n = mixing.num_coefficients
        self.weight = train_by_adam(self._new_parameter(n, input_size or config.hidden_size))
        self.bias = self._new_parameter(n) if mixing.gate_bias else None
        self.amplitude = self._new_parameter(n) if mixing.amplitude == "learned" else None
        if config.perform_initialization:
            with gate_random_numbers(config):
                self.draw(self.weight)
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)
        scale = coefficient_scale(mixing, config)
        if self.amplitude is not None:
            self._fill(self.amplitude, scale)
        elif mixing.init_scale == "matched":
            self.register_buffer("scale", torch.tensor([scale], device=self.weight.device))
        if self.layout is InputLayout.SEQUENCE_SHARD:
            # Each rank sees its tokens only; Megatron sums the gradients of parameters marked so.
            for parameter in self.parameters():
                parameter.sequence_parallel = True

    def draw(self, weight: Tensor) -> None:
        """Fills gate vectors with their initial values, whose standard deviation is ``--moa-gate-init-std``."""
        torch.nn.init.normal_(weight, std=self.mixing.gate_init_std)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Coefficients of every token fc1 sees.

        Args:
            hidden_states: fc1's input, [s, b, h] ([s/p, b, h] under sequence parallelism), or [tokens, h].

        Returns:
            [s, b, n] or [tokens, n], float32 (float64 for float64 parameters).
        """
        weight, bias, amplitude = self.weight, self.bias, self.amplitude
        if self.layout is InputLayout.DISPATCHED:
            weight, bias, amplitude = map(self._dispatched, (weight, bias, amplitude))
        coefficients = gate_coefficients(
            hidden_states, weight, self.mixing, bias, amplitude, self._buffers.get("scale")
        )
        self._observe(coefficients)
        if self.layout is InputLayout.REPLICATED:
            return self._summed_over_ranks(coefficients)
        if self.layout is InputLayout.SEQUENCE_SHARD:
            # [s/p, b, n] -> [s, b, n]; backward reduce-scatters, which completes the partial sums.
            return gather_from_sequence_parallel_region(
                coefficients, tensor_parallel_output_grad=True, group=self.tp_group
            )
        return coefficients

    @classmethod
    def of_groups(cls, modules: Sequence[Self], hidden_states: Tensor, group_ends: Tensor) -> Tensor:
        """See :meth:`Coefficients.of_groups`; [t, n], by one grouped gate over all tokens."""
        first = modules[0]
        assert first.layout is InputLayout.DISPATCHED

        def stacked(name: str) -> Tensor | None:
            if getattr(first, name) is None:
                return None
            return first._dispatched(torch.stack([getattr(module, name) for module in modules]))

        weight, bias, amplitude = map(stacked, ("weight", "bias", "amplitude"))
        scale = first._buffers.get("scale")
        coefficients = gate_coefficients(hidden_states, weight, first.mixing, bias, amplitude, scale, group_ends)
        if any(module.observer is not None for module in modules):  # sizes wait for the device
            for module, own in zip(modules, coefficients.split(group_sizes(group_ends)), strict=True):
                module._observe(own)
        return coefficients

    def _dispatched(self, parameter: Tensor | None) -> Tensor | None:
        """A parameter where the dispatcher sums the input's gradient over ranks: so that must stay partial, and it is
        the parameter's own gradient that is summed.
        """
        return None if parameter is None else self._summed_over_ranks(_at_least_float32(parameter))


def _at_least_float32(parameter: Tensor) -> Tensor:
    return parameter.to(torch.promote_types(parameter.dtype, torch.float32))


def experts_reduce_apart(config: TransformerConfig) -> bool:
    """Whether experts' gradients are reduced over a data-parallel group of their own: Megatron's rule for its own
    expert weights (tensor_parallel/layers.py).
    """
    return (
        config.expert_model_parallel_size > 1 or config.expert_tensor_parallel_size != config.tensor_model_parallel_size
    )


def build_coefficients(
    mixing: MixtureConfig,
    config: TransformerConfig,
    tp_group: torch.distributed.ProcessGroup,
    *,
    is_expert: bool,
    dispatched: bool,
    input_size: int | None = None,
) -> Coefficients:
    """The coefficients of one feed-forward layer or one expert, parallel as its fc1 is.

    Args:
        is_expert: a routed expert.
        dispatched: the input was gathered, and its gradient is summed, outside the layer (routed experts, and
            shared experts overlapped with the dispatcher).
        input_size: h, where it is not the model's.
    """
    if dispatched:
        layout = InputLayout.DISPATCHED
    elif config.sequence_parallel and tp_group.size() > 1:
        layout = InputLayout.SEQUENCE_SHARD
    else:
        layout = InputLayout.REPLICATED
    expert_parameters = is_expert and experts_reduce_apart(config)
    if mixing.kind == "la":
        return FreeCoefficients(mixing, config, tp_group, layout, expert_parameters)
    return GateCoefficients(mixing, config, tp_group, layout, expert_parameters, input_size=input_size)
