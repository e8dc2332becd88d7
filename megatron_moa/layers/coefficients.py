"""Owns the parameters of the mixing coefficients, gates (MoA) or numbers (LA), and their parallelism.

They are modules of their own because Megatron saves the parameters of an MLP's children only: one put on the MLP
itself would be missing from every checkpoint. In a half-precision model their parameters are half precision too, with
the optimizer's float32 copy behind them (Megatron 0.19 cannot save float32 parameters beside bf16 ones: KeyError in
Float16OptimizerWithFloat16Params.sharded_state_dict); the gates' arithmetic and the coefficients are float32.

Experts that are computed at once (experts.MixedGroupedMLP) have one module, and one parameter where each has a part: so
many fewer for autograd and the optimizer to walk through. A checkpoint has them one by one, as experts that are
computed one after the other.

A tensor-parallel rank holds some of the FFN's columns, so the gradient that reaches it for a coefficient is a
partial sum. Where that sum is completed depends on what the layer's input is on each rank (:class:`InputLayout`).
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

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
from megatron_moa.mixture.autograd import GateInputs
from megatron_moa.mixture.config import MixtureConfig
from megatron_moa.mixture.functional import gate_coefficients, gated_mixture, mixed_activation

_GATE_STREAM = "moa-gate-rng"
_GATE_SEED_OFFSET = 40_961  # from the run's seed; Megatron's own streams lie at small offsets


@contextlib.contextmanager
def gate_random_numbers(config: TransformerConfig) -> Iterator[None]:
    """Makes a random stream of the gates' own the default generator inside.

    The stream is the same on all ranks of a pipeline stage, so that copies of a gate start equal. It is apart from all
    others, so that with the same seed stock, LA and MoA models share their other initial weights and their dropout.

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


class Preactivation(NamedTuple):
    """What coefficients mix: fc1's output and its companions, as in functional.mixed_activation.

    Attributes:
        z: fc1's output, [..., f] for type1, else [..., 2f].
        bias: [f] or [2f], or None.
        per_token_scale: [...], or None.
    """

    z: Tensor
    bias: Tensor | None = None
    per_token_scale: Tensor | None = None


class Coefficients(torch.nn.Module):
    """Holds the coefficients of a layer, an expert, or a rank's experts.

    Base of :class:`GateCoefficients` and :class:`FreeCoefficients`.

    Args:
        mixture: the mixture's settings.
        config: Megatron's; gives h, the initialisation and sequence parallelism.
        tp_group: the ranks that share the layer's columns (for an expert, its expert-tensor-parallel group).
        layout: how the layer's input lies over those ranks.
        expert_parameters: whether gradients are reduced over the expert-data-parallel group, as the experts' are.
        experts: a rank's number of experts, whose tokens come together; None for one layer or one expert.
    """

    def __init__(
        self,
        mixture: MixtureConfig,
        config: TransformerConfig,
        tp_group: torch.distributed.ProcessGroup,
        layout: InputLayout,
        expert_parameters: bool = False,
        experts: int | None = None,
    ) -> None:
        super().__init__()
        self.mixture = mixture
        self.config = config
        self.tp_group = tp_group
        self.layout = layout
        self.expert_parameters = expert_parameters
        self.experts = experts
        # Called with the coefficients, [..., n]; set by training/coefficient_monitor.py while it records.
        self.observer: Callable[[Tensor], None] | None = None

    def _new_vector(self) -> Parameter:
        """Makes a parameter of one dimension: [n], or [experts * n] of experts.

        Megatron goes by the number of dimensions: a vector has no weight decay.
        """
        return self._new_parameter(self.mixture.num_coefficients * (self.experts or 1))

    def _by_expert(self, vector: Tensor | None) -> Tensor | None:
        """[n] as it is, that of experts as [experts, n]; None as None."""
        return vector if vector is None or self.experts is None else vector.view(self.experts, -1)

    def _new_parameter(self, *shape: int) -> Parameter:
        device = None if self.config.use_cpu_initialization else torch.cuda.current_device()
        parameter = Parameter(torch.empty(shape, dtype=self.config.params_dtype, device=device))
        parameter.requires_grad = not self.mixture.freeze
        parameter.allreduce = not self.expert_parameters
        return parameter

    @property
    def is_watched(self) -> bool:
        """Whether somebody hooks the coefficients, and so needs them as what :meth:`forward` returns."""
        return bool(self._forward_hooks)

    def forward(
        self, hidden_states: Tensor, group_ends: Tensor | None = None, preactivation: Preactivation | None = None
    ) -> Tensor:
        """Returns the coefficients, or the mixture of ``preactivation`` where that is given.

        The mixture is faster than coefficients and mixing one after the other.

        Args:
            hidden_states: fc1's input, [s, b, h] ([s/p, b, h] under sequence parallelism), or [tokens, h].
            group_ends: of experts, by which the tokens are sorted: [experts] int32, the rows up to and with each
                (megatron_moa.mixture.grouped_products).
            preactivation: what the coefficients are for, or None for them alone.

        Returns:
            [s, b, n] or [tokens, n], LA [n] or [experts, n], float32 (float64 for float64 parameters); or the mixture.
        """
        raise NotImplementedError

    @torch.no_grad()
    def _fill(self, parameter: Parameter, scale: float) -> None:
        # On its device: --init-model-with-meta-device has another default, on which nothing has a value.
        values = torch.tensor(list(self.mixture.start_values()), dtype=torch.float32, device=parameter.device)
        parameter.copy_((values * scale).repeat(self.experts or 1))

    def _with_summed_gradient(self, tensor: Tensor) -> Tensor:
        """Returns the tensor itself; backward sums the gradient over the tensor-parallel ranks.

        Costs nothing for one rank.
        """
        if self.tp_group.size() == 1:
            return tensor
        return copy_to_tensor_model_parallel_region(tensor, group=self.tp_group)

    def _mixed(
        self, coefficients: Tensor, preactivation: Preactivation | None, group_ends: Tensor | None = None
    ) -> Tensor:
        """What :meth:`forward` returns; ``group_ends`` where each expert has one row of coefficients."""
        if preactivation is None:
            return coefficients
        z, bias, per_token_scale = preactivation
        return mixed_activation(z, coefficients, self.mixture, bias, per_token_scale, group_ends)

    def _observe(self, coefficients: Tensor) -> None:
        # A forward inside backward is one that is recomputed: these tokens have been observed.
        if self.observer is not None and torch._C._current_graph_task_id() == -1:
            self.observer(coefficients.detach())

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Returns all tensors, as replicas over this layer's own tensor-parallel group.

        An expert's group is not the model's.
        """
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
    """Holds LA's n coefficients: parameters, the same for every token.

    State: ``value`` [n] ([experts * n]).
    """

    def __init__(self, mixture: MixtureConfig, config: TransformerConfig, *args: object, **kwargs: object) -> None:
        super().__init__(mixture, config, *args, **kwargs)
        self.value = self._new_vector()
        self._fill(self.value, coefficient_scale(mixture, config))

    def forward(
        self, hidden_states: Tensor, group_ends: Tensor | None = None, preactivation: Preactivation | None = None
    ) -> Tensor:
        """The same for every input; their gradient is summed over the tensor-parallel ranks."""
        del hidden_states
        coefficients = _at_least_float32(self._by_expert(self.value))
        self._observe(coefficients)
        return self._mixed(self._with_summed_gradient(coefficients), preactivation, group_ends)


class GateCoefficients(Coefficients):
    """MoA: c(x) = psi(u x + b), or a psi_hat(u x + b) with learned amplitude (reference.gate).

    State: ``weight`` u [n, h]; ``bias`` b [n] with ``--moa-gate-bias``; ``amplitude`` a [n] with
    ``--moa-amplitude learned``; ``scale`` [1], a constant, with ``--moa-init-scale matched`` and fixed amplitude. Of
    experts: [experts, n, h], [experts * n] and [experts].
    """

    def __init__(
        self,
        mixture: MixtureConfig,
        config: TransformerConfig,
        *args: object,
        input_size: int | None = None,
        **kwargs: object,
    ) -> None:
        super().__init__(mixture, config, *args, **kwargs)
        shape = (mixture.num_coefficients, input_size or config.hidden_size)
        self.weight = train_by_adam(self._new_parameter(*shape if self.experts is None else (self.experts, *shape)))
        self.bias = self._new_vector() if mixture.gate_bias else None
        self.amplitude = self._new_vector() if mixture.amplitude == "learned" else None
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)
        scale = coefficient_scale(mixture, config)
        if self.amplitude is not None:
            self._fill(self.amplitude, scale)
        elif mixture.has_scale:
            start = torch.full((self.experts or 1,), scale, dtype=torch.float32, device=self.weight.device)
            self.register_buffer("scale", start)
        if self.layout is InputLayout.SEQUENCE_SHARD:
            # Each rank sees its tokens only; Megatron sums the gradients of parameters marked so.
            for parameter in self.parameters():
                parameter.sequence_parallel = True

    def draw(self, weight: Tensor) -> None:
        """Fills gate vectors with their initial values, whose standard deviation is ``--moa-gate-init-std``."""
        torch.nn.init.normal_(weight, std=self.mixture.gate_init_std)

    def forward(
        self, hidden_states: Tensor, group_ends: Tensor | None = None, preactivation: Preactivation | None = None
    ) -> Tensor:
        """See :meth:`Coefficients.forward`."""
        inputs = self._inputs(hidden_states, group_ends)
        if preactivation is not None and self.tp_group.size() == 1:
            z, bias, per_token_scale = preactivation
            activated, coefficients = gated_mixture(z, inputs, self.mixture, bias, per_token_scale)
            self._observe(coefficients)
            return activated
        coefficients = gate_coefficients(*inputs[:2], self.mixture, *inputs[2:])
        self._observe(coefficients)
        if self.layout is InputLayout.REPLICATED:
            # Each rank's columns give a part of the coefficients' gradient; backward sums the parts.
            coefficients = self._with_summed_gradient(coefficients)
        elif self.layout is InputLayout.SEQUENCE_SHARD:
            # [s/p, b, n] -> [s, b, n]; backward reduce-scatters, which completes the partial sums.
            coefficients = gather_from_sequence_parallel_region(
                coefficients, tensor_parallel_output_grad=True, group=self.tp_group
            )
        return self._mixed(coefficients, preactivation)

    def _inputs(self, hidden_states: Tensor, group_ends: Tensor | None) -> GateInputs:
        weight, bias, amplitude = self.weight, self.bias, self.amplitude
        scale = self._buffers.get("scale")
        if self.experts is not None:
            bias, amplitude = self._by_expert(bias), self._by_expert(amplitude)
            scale = None if scale is None else scale[:1]  # all experts' are the same
        if self.layout is InputLayout.DISPATCHED and self.tp_group.size() > 1:
            weight, bias, amplitude = map(self._dispatched, (weight, bias, amplitude))
        return GateInputs(hidden_states, weight, bias, amplitude, scale, group_ends)

    def _dispatched(self, parameter: Tensor | None) -> Tensor | None:
        """Prepares a parameter for a layer whose dispatcher sums the input's gradient over ranks.

        The input's gradient must stay partial, and it is the parameter's own gradient that is summed, in float32.
        """
        return None if parameter is None else self._with_summed_gradient(_at_least_float32(parameter))


def _at_least_float32(parameter: Tensor) -> Tensor:
    return parameter.to(torch.promote_types(parameter.dtype, torch.float32))


def experts_reduce_apart(config: TransformerConfig) -> bool:
    """Tells whether experts' gradients are reduced over a data-parallel group of their own.

    This is Megatron's rule for its own expert weights (tensor_parallel/layers.py).
    """
    return (
        config.expert_model_parallel_size > 1 or config.expert_tensor_parallel_size != config.tensor_model_parallel_size
    )


def build_coefficients(
    mixture: MixtureConfig,
    config: TransformerConfig,
    tp_group: torch.distributed.ProcessGroup,
    *,
    is_expert: bool,
    dispatched: bool,
    input_size: int | None = None,
    experts: int | None = None,
) -> Coefficients:
    """Builds the coefficients of one feed-forward layer, one expert or all of a rank's experts.

    They are parallel as the layer's fc1 is.

    Args:
        is_expert: a routed expert; :func:`draw_gates_of_experts` draws the gates of all.
        dispatched: the input was gathered, and its gradient is summed, outside the layer (routed experts, and
            shared experts overlapped with the dispatcher).
        input_size: h, where it is not the model's.
        experts: see :class:`Coefficients`.
    """
    if dispatched:
        layout = InputLayout.DISPATCHED
    elif config.sequence_parallel and tp_group.size() > 1:
        layout = InputLayout.SEQUENCE_SHARD
    else:
        layout = InputLayout.REPLICATED
    expert_parameters = is_expert and experts_reduce_apart(config)
    if mixture.kind == "la":
        return FreeCoefficients(mixture, config, tp_group, layout, expert_parameters, experts)
    gates = GateCoefficients(mixture, config, tp_group, layout, expert_parameters, experts, input_size=input_size)
    if config.perform_initialization and not is_expert:
        with gate_random_numbers(config):
            gates.draw(gates.weight)
    return gates


@torch.no_grad()
def draw_gates_of_experts(own: Sequence[Coefficients], ep_group: torch.distributed.ProcessGroup) -> None:
    """Draws the gate weights of all experts on every rank and keeps those of this rank's.

    The gates' stream is the same on all ranks of the layer, so experts differ from one another, copies on
    expert-tensor-parallel ranks do not, and each starts alike however the experts are spread and computed.

    Args:
        own: one a local expert, or one of all local experts.
        ep_group: the ranks that the experts are spread over.
    """
    first = own[0]
    if not isinstance(first, GateCoefficients) or not first.config.perform_initialization:
        return
    kept = [weight for gates in own for weight in gates.weight.view(-1, *gates.weight.shape[-2:])]  # [n, h] each
    drawn = torch.empty_like(kept[0])
    start = ep_group.rank() * len(kept)
    with gate_random_numbers(first.config):
        for expert in range(ep_group.size() * len(kept)):
            first.draw(drawn)
            if start <= expert < start + len(kept):
                kept[expert - start].copy_(drawn)
