"""Defines MixedFeedForward, a feed-forward layer that mixes activations, as a plain PyTorch module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn import Parameter
from torch.utils.checkpoint import checkpoint

from megatron_moa.errors import UserError, printable
from megatron_moa.mixture.autograd import GateInputs
from megatron_moa.mixture.config import LARGEST, SMALLEST, MixtureConfig, in_range, is_number
from megatron_moa.mixture.functional import gate_coefficients, gated_mixture, mixed_activation
from megatron_moa.mixture.start_scale import matching_scale
from megatron_moa.pytorch.recognition import Recognised, recognise, require, starting_as

DEFAULT_INIT_STD = 0.02  # of fc1 and fc2, as GPT models have it


class MixtureCoefficients(nn.Module):
    """Holds the mixing coefficients of one layer.

    They are gates (MoA), or numbers that are the same for every token (LA). Nothing is filled in before
    :meth:`reset_parameters`.

    State: LA ``value`` [n]. MoA ``weight`` u [n, h]; ``bias`` b [n] with gate_bias; ``amplitude`` a [n] where learned;
    ``scale`` [1], a constant, with init_scale="matched" and fixed amplitude.
    """

    def __init__(
        self,
        hidden_size: int,
        mixture: MixtureConfig,
        init_std: float = DEFAULT_INIT_STD,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.mixture = mixture
        moa, n = mixture.kind == "moa", mixture.num_coefficients
        # The factor on all coefficients, 1 unless the output's scale at step 0 is to be SwiGLU's.
        self.start = 1.0
        if mixture.init_scale == "matched":
            with unset_fake_temporarily():  # it is a number, measured
                self.start = matching_scale(mixture, init_std, hidden_size)

        def parameter(*shape: int) -> Parameter:
            return Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=not mixture.freeze)

        self.value = None if moa else parameter(n)
        self.weight = parameter(n, hidden_size) if moa else None
        self.bias = parameter(n) if moa and mixture.gate_bias else None
        self.amplitude = parameter(n) if moa and mixture.amplitude == "learned" else None
        scale = torch.empty(1, device=device, dtype=torch.float32) if mixture.has_scale else None
        self.register_buffer("scale", scale)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fills in the initial values: the paper's (section 5), unless ``mixture`` says otherwise."""
        values = torch.tensor(list(self.mixture.start_values()), dtype=torch.float32, device="cpu") * self.start
        for vector in (self.value, self.amplitude):
            if vector is not None:
                vector.copy_(values)
        if self.weight is not None and self.mixture.gate_init_std:
            nn.init.normal_(self.weight, std=self.mixture.gate_init_std)
        elif self.weight is not None:
            nn.init.zeros_(self.weight)  # and draws nothing: replace_feed_forward leaves random numbers alone
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if self.scale is not None:
            nn.init.constant_(self.scale, self.start)

    def gate_inputs(self, x: Tensor) -> GateInputs:
        """What the coefficients of MoA for x [..., h] are computed from."""
        return GateInputs(x, self.weight, self.bias, self.amplitude, self.scale)

    @property
    def is_watched(self) -> bool:
        """Whether somebody hooks this module, and so needs it to be called."""
        return any((self._forward_hooks, self._forward_pre_hooks, self._backward_hooks, self._backward_pre_hooks))

    def forward(self, x: Tensor) -> Tensor:
        """Returns the coefficients [..., n] of x [..., h]; for LA [n], whatever x is.

        They are float32 (of float64 parameters float64), under autocast too: a gate's logits are a small product and
        decide over all hidden units.
        """
        if self.value is not None:
            # A copy: who shards the parameter may free its memory after this.
            return self.value.to(torch.promote_types(self.value.dtype, torch.float32), copy=True)
        inputs = self.gate_inputs(x)
        return gate_coefficients(*inputs[:2], self.mixture, *inputs[2:])


class NormalLinear(nn.Linear):
    """An nn.Linear that draws its weight from N(0, std²), whoever resets it; its bias starts at 0."""

    def __init__(self, *sizes: int, std: float, **others: Any) -> None:
        self.std = std  # first: nn.Linear draws
        super().__init__(*sizes, **others)

    def reset_parameters(self) -> None:
        """Fills in the initial values."""
        nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class MixedFeedForward(nn.Module):
    """Computes a feed-forward layer whose activation is a mixture (docs/mixture.md).

    The output is fc2(mix(fc1(x), coefficients(x))), with dropout on it, as many models have.

    State: ``fc1.weight`` [f, h], for gated forms [W1; W2] as [2f, h]; ``fc2.weight`` [h, f]; ``fc1.bias`` and
    ``fc2.bias`` with ``bias``; ``coefficients.…`` as :class:`MixtureCoefficients` has it. All are the same as in the
    Megatron layer, but that there they are called linear_fc1 and linear_fc2.

    Under torch.compile and torch.export plain PyTorch computes the mixture and the compiler fuses it, unless the
    backend ``triton`` or ``compile`` is named.

    Args:
        hidden_size: h.
        ffn_hidden_size: f, the width inside; of a gated form that of each branch.
        mixture: default MoA, bi-sided, over the form's default dictionary.
        bias: whether fc1 and fc2 have biases; two values, where they differ.
        dropout: probability with which an entry of the output is dropped in training.
        init_std: standard deviation of the initial weights.
        output_init_std: fc2's, where it is another (often init_std / sqrt(2 layers)).
        device, dtype: of the parameters, as for torch.nn.Linear.

    Raises:
        UserError: an argument of another type, or out of its range.
    """

    def __init__(
        self,
        hidden_size: int,
        ffn_hidden_size: int,
        mixture: MixtureConfig | None = None,
        bias: bool | Sequence[bool] = False,
        *,
        dropout: float = 0.0,
        init_std: float = DEFAULT_INIT_STD,
        output_init_std: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        widths = hidden_size, ffn_hidden_size
        if not all(isinstance(width, int) and not isinstance(width, bool) and width > 0 for width in widths):
            raise UserError(f"MixedFeedForward{printable(repr(widths))}: widths are whole numbers from 1")
        require(isinstance(mixture, MixtureConfig | None), "a MixtureConfig, or None", mixture=mixture)
        biases = (bias, bias) if isinstance(bias, bool) else bias
        are_biases = isinstance(biases, Sequence) and [type(each) for each in biases] == [bool, bool]
        require(are_biases, "True, False, or two of these, for fc1 and for fc2", bias=bias)
        require(is_number(dropout) and 0 <= dropout <= 1, "a probability from 0 to 1", dropout=dropout)
        output_init_std = init_std if output_init_std is None else output_init_std
        for name, std in (("init_std", init_std), ("output_init_std", output_init_std)):
            is_std = is_number(std) and std >= 0 and in_range(std)
            require(is_std, f"0, or a positive number from {SMALLEST:g} to {LARGEST:g}", **{name: std})
        is_dtype = dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point)
        require(is_dtype, "a dtype of floating point, such as torch.float32", dtype=dtype)
        self.hidden_size = hidden_size
        self.mixture = mixture = MixtureConfig() if mixture is None else mixture
        where = {"device": device, "dtype": dtype}
        width = ffn_hidden_size * (2 if mixture.gated else 1)
        self.fc1 = NormalLinear(hidden_size, width, biases[0], std=init_std, **where)
        self.coefficients = MixtureCoefficients(hidden_size, mixture, init_std, **where)
        self.fc2 = NormalLinear(ffn_hidden_size, hidden_size, biases[1], std=output_init_std, **where)
        self.dropout = nn.Dropout(dropout)
        self.coefficients.reset_parameters()  # last, as below; fc1 and fc2 have drawn

    def reset_parameters(self) -> None:
        """Draws fc1, then fc2, then the gates.

        With the same seed all mixtures start from the same linear maps.
        """
        for part in (self.fc1, self.fc2, self.coefficients):
            part.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """[..., h] -> [..., h].

        Raises:
            ValueError: x of another width.
            UserError: fc1 gives a part of its columns, as under PyTorch's tensor parallelism.
        """
        if x.shape[-1:] != (self.hidden_size,):
            raise ValueError(
                f"input {list(x.shape)}: the layer's hidden_size is {self.hidden_size}, of the last dimension"
            )
        preactivation = self.fc1(x)  # [..., f], gated [..., 2f]
        width = self.fc1.out_features  # the whole layer's, on each rank
        if preactivation.shape[-1] != width:
            raise UserError(
                f"fc1's output {list(preactivation.shape)}: the mixture needs all {width} columns, of which "
                "PyTorch's tensor parallelism gives a rank a part; take FSDP2 or DDP, or Megatron's layer"
            )
        coefficients: Tensor | MixtureCoefficients = self.coefficients
        # Gate and mixture are one function of autograd's, but where somebody hooks or wraps the coefficients.
        if type(coefficients) is not MixtureCoefficients or coefficients.weight is None or coefficients.is_watched:
            coefficients = coefficients(x)
        if self.mixture.recompute and torch.is_grad_enabled():
            # Computes the mixture's output again in backward, where fc2 would keep it.
            output = checkpoint(self._mix_and_project, preactivation, x, coefficients, use_reentrant=False)
        else:
            output = self._mix_and_project(preactivation, x, coefficients)
        return self.dropout(output)

    def _mix_and_project(self, preactivation: Tensor, x: Tensor, coefficients: Tensor | MixtureCoefficients) -> Tensor:
        if isinstance(coefficients, Tensor):
            activated = mixed_activation(preactivation, coefficients, self.mixture)
        else:
            activated, _ = gated_mixture(preactivation, coefficients.gate_inputs(x), self.mixture)
        return self.fc2(activated)

    def extra_repr(self) -> str:
        """The mixture in a few words."""
        return self.mixture.describe()

    @classmethod
    def from_swiglu(
        cls,
        module: nn.Module,
        mixture: MixtureConfig | None = None,
        *,
        gate: str | None = None,
        up: str | None = None,
        down: str | None = None,
    ) -> Self:
        """Takes over a trained gated layer, down(σ(gate(x)) ⊙ up(x)).

        The mixture computes the same function to begin with. Such layers are those of Llama, Qwen, Gemma, Phi and
        others. SwiGLU has σ = SiLU; of other activations the dictionary must have σ.

        Args:
            module: the layer. Its weights are copied, it stays as it is.
            mixture: default MoA, bi-sided. MoA gets gates of learned amplitude, since no others can start at 1 and 0.
            gate, up, down: the names of its linear layers; what is not named is found by what the layer computes.
                Where one layer holds the rows of both, gate's first, it is ``up``.

        Raises:
            UserError: the layer computes something else, or no start of the mixture is the same function.
        """
        names = {"gate": gate, "up": up, "down": down}
        return cls.from_recognised(recognise(module, names=names, gated=True), mixture)

    @classmethod
    def from_mlp(
        cls,
        module: nn.Module,
        mixture: MixtureConfig | None = None,
        *,
        up: str | None = None,
        down: str | None = None,
    ) -> Self:
        """Takes over a trained layer without a second branch, down(σ(up(x))), of GPT-2, ViT and others.

        The mixture is ``type1`` by default; all else as in :meth:`from_swiglu`.
        """
        return cls.from_recognised(recognise(module, names={"up": up, "down": down}, gated=False), mixture)

    @classmethod
    @torch.no_grad()
    def from_recognised(cls, layer: Recognised, mixture: MixtureConfig | None) -> Self:
        """See :meth:`from_swiglu`."""
        module, reading = layer.module, layer.reading
        mixture = starting_as(layer, mixture)
        fc1, fc2 = reading.fc1(module), reading.fc2(module)
        hidden_size, ffn_hidden_size = fc2.weight.shape
        biases = fc1.bias is not None, fc2.bias is not None
        where, dtype = fc1.weight.device, fc1.weight.dtype
        new = cls(hidden_size, ffn_hidden_size, mixture, biases, dropout=layer.dropout, device="meta", dtype=dtype)
        new.to_empty(device=where).coefficients.reset_parameters()
        for linear, old in ((new.fc1, fc1), (new.fc2, fc2)):
            linear.weight.copy_(old.weight).requires_grad_(old.weight_trains)
            if old.bias is not None:
                linear.bias.copy_(old.bias).requires_grad_(old.bias_trains)
        return new.train(module.training)
