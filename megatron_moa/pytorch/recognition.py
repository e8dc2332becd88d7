"""Finds out what a feed-forward layer of somebody else's computes.

The functions here look at its linear layers and try it. Names do not say what a layer computes: in Gemma's layer act_fn
is GELU, and Phi's gate_up_proj holds two matrices. So every reading of the layer that its shapes allow, with every
activation of the dictionary, is computed and compared with the layer's output.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from megatron_moa.errors import UserError, one_line, printable
from megatron_moa.mixture.config import DICTIONARIES, MixtureConfig
from megatron_moa.mixture.reference import DEFINITIONS

# What a layer is tried on: texts of tokens on which the activation sees numbers of these standard deviations. Small
# ones do not tell GELU from its approximation, and large ones tell an activation that is clipped.
_STANDARD_DEVIATIONS = (0.5, 2.0, 8.0, 40.0)
_TOKENS = 4  # in a text
_TOLERANCE = 1e-5  # of a token's largest output, in float32; GELU and its approximation are 1e-4 apart
_DROPOUT_TRIALS = 8
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class NotFeedForwardError(UserError):
    """A module that does not map one tensor [b, s, h] to another, whatever linear layers it has."""


class Weights(NamedTuple):
    """A linear layer's weight [out, in], its bias [out] or None, and whether each wants gradients."""

    weight: Tensor
    bias: Tensor | None
    weight_trains: bool
    bias_trains: bool


class Reading(NamedTuple):
    """One way to read a layer.

    Attributes:
        first: the names of the linear layers that make fc1: one, or gate and up.
        down: the name of fc2.
        gated: whether fc1 holds two branches.
        swapped: whether the linear branch comes first in a layer that holds both.
    """

    first: tuple[str, ...]
    down: str
    gated: bool
    swapped: bool = False

    def fc1(self, module: nn.Module) -> Weights:
        """Returns fc1's weights [f, h], gated [2f, h] with the activated branch first.

        A bias of only one branch is 0 for the other.
        """
        parts = [_weights(module.get_submodule(name)) for name in self.first]
        if self.swapped:
            linear, activated = _halves(parts[0])
            parts = [activated, linear]
        if len(parts) == 1:
            return parts[0]
        weight = torch.cat([part.weight for part in parts])
        bias = None
        if any(part.bias is not None for part in parts):
            bias = torch.cat(
                [part.weight.new_zeros(len(part.weight)) if part.bias is None else part.bias for part in parts]
            )
        return Weights(weight, bias, any(part.weight_trains for part in parts), any(part.bias_trains for part in parts))

    def fc2(self, module: nn.Module) -> Weights:
        """Of [h, f]."""
        return _weights(module.get_submodule(self.down))


@dataclass(frozen=True)
class Recognised:
    """A feed-forward layer as what it computes: down(σ(up(x))), or down(σ(gate(x)) ⊙ up(x)).

    Attributes:
        name: the layer's, for messages.
        module: the layer.
        reading: what its linear layers are.
        activation: σ, a name of the dictionary.
        dropout: the probability of dropout on the output.
    """

    name: str
    module: nn.Module
    reading: Reading
    activation: str
    dropout: float


def require(is_right: bool, remedy: str, **given: object) -> None:
    """Raises UserError with the name and value of an argument that is not right, and what to give instead."""
    if not is_right:
        ((name, value),) = given.items()
        raise UserError(f"{name}={printable(repr(value))[:200]}: give {remedy}")


def linear_layers(module: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of a module whose parameters are theirs alone; empty for any other module."""
    linears = {name: child for name, child in module.named_children() if _is_linear(child)}
    own = {id(parameter) for child in linears.values() for parameter in child.parameters()}
    return linears if all(id(parameter) in own for parameter in module.parameters()) else {}


def _is_linear(module: nn.Module) -> bool:
    """Whether it is nn.Linear, or transformers' Conv1D of GPT-2, and not quantized."""
    if not (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"):
        return False
    return module.weight.dim() == 2 and module.weight.dtype in _DTYPES


def _weights(linear: nn.Module) -> Weights:
    weight = linear.weight if isinstance(linear, nn.Linear) else linear.weight.t()
    bias = linear.bias
    if bias is None:
        return Weights(weight.detach(), None, weight.requires_grad, False)
    return Weights(weight.detach(), bias.detach(), weight.requires_grad, bias.requires_grad)


def _halves(both: Weights) -> tuple[Weights, Weights]:
    weights = both.weight.chunk(2)
    biases = (None, None) if both.bias is None else both.bias.chunk(2)
    return tuple(both._replace(weight=weight, bias=bias) for weight, bias in zip(weights, biases, strict=True))


def readings(module: nn.Module, names: Mapping[str, str | None] | None = None) -> list[Reading]:
    """Lists the ways in which the shapes of linear layers make a module a feed-forward layer.

    For other modules there are none. With ``names`` of roles, the list has those ways in which each role that is named
    is played by the layer of that name.
    """
    shapes = {name: tuple(_weights(linear).weight.shape) for name, linear in linear_layers(module).items()}
    roles = {3: ("gate", "up", "down"), 2: ("up", "down")}.get(len(shapes), ())
    fixed = {role: name for role, name in (names or {}).items() if name is not None}
    found = []
    for order in itertools.permutations(shapes) if roles else ():
        *first, down = order
        h, f = shapes[down]
        if not fixed.items() <= dict(zip(roles, order, strict=True)).items():
            continue
        if [shapes[name] for name in first] == [(f, h), (f, h)]:
            found.append(Reading(tuple(first), down, gated=True))
        elif shapes[first[0]] == (f, h) and len(first) == 1:
            found.append(Reading(tuple(first), down, gated=False))
        elif shapes[first[0]] == (2 * f, h) and len(first) == 1:  # either branch may come first
            found += [Reading(tuple(first), down, gated=True, swapped=swapped) for swapped in (False, True)]
    return found


def recognise(
    module: nn.Module, name: str = "module", names: Mapping[str, str | None] | None = None, gated: bool | None = None
) -> Recognised:
    """What a feed-forward layer computes.

    Args:
        module: the layer, [..., h] -> [..., h]; a copy of it is tried on a few tokens.
        name: for messages.
        names: of its linear layers by role (``gate``, ``up``, ``down``); None for a role that is to be found.
        gated: which kind is asked for; None for either.

    Raises:
        UserError: what the layer is instead.
    """
    require(isinstance(module, nn.Module), "a torch.nn.Module", module=module)
    what = f"{name} ({type(module).__name__})"
    linears = linear_layers(module)
    have = ", ".join(f"{key} {list(_weights(linear).weight.shape)}" for key, linear in linears.items())
    have = f"linear layers [out, in]: {have or 'none, or other parameters beside them'}"
    for role, given in (names or {}).items():
        require(isinstance(given, str | None), "the name of a linear layer", **{role: given})
        if given is not None and given not in linears:
            raise UserError(f'{what}: {role}="{given}" is no linear layer of it; {have}')
    _refuse_what_would_be_lost(module, linears, what)
    ways = [way for way in readings(module, names) if gated in (None, way.gated)]
    if not ways:
        kind = {
            True: "gated feed-forward layer (gate and up from h to f, down from f to h)",
            False: "MLP (up from h to f, down from f to h)",
            None: "feed-forward layer (two or three linear layers, from h to f and back)",
        }
        raise UserError(f"{what}: is no {kind[gated]}; {have}")
    weight = next(module.parameters())
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False), _exact_products():
        twin = _twin(module, torch.promote_types(weight.dtype, torch.float32), what)
        x, output = _run(twin.eval(), ways, what)
        error, activation, way = min(_errors(twin, ways, x, output), key=lambda attempt: attempt[0])
        if not error <= _TOLERANCE:
            raise UserError(
                f"{what}: computes neither down(σ(up(x))) nor down(σ(gate(x)) * up(x)) with σ one of "
                f"{', '.join(DEFINITIONS)}; the nearest, {activation}, is off by {error:.1e} of the largest output"
            )
        dropout = _output_dropout(twin.train(), x, output, what)
    _refuse_half_frozen(module, way, what)
    return Recognised(what, module, way, activation, dropout)


def _refuse_half_frozen(module: nn.Module, way: Reading, what: str) -> None:
    """Raises UserError where gate and up, which fc1 holds both, do not want gradients alike."""
    for name in ("weight", "bias"):
        parts = [getattr(module.get_submodule(first), name) for first in way.first]
        trains = [part.requires_grad for part in parts if part is not None]
        if len(set(trains)) > 1:
            raise UserError(
                f"{what}: the {name} of {way.first[trains.index(False)]} is frozen, that of "
                f"{way.first[trains.index(True)]} is not, and one parameter becomes of both; freeze both or neither"
            )


def _refuse_what_would_be_lost(module: nn.Module, linears: Mapping[str, nn.Module], what: str) -> None:
    """Raises UserError for what a MixedFeedForward of the same weights would not have."""
    if any(parameter.is_meta for parameter in module.parameters()):
        raise UserError(f"{what}: is on the meta device, where nothing can be computed; load its weights first")
    dtypes = {parameter.dtype for parameter in module.parameters()}
    if len(dtypes) > 1:
        raise UserError(
            f"{what}: has weights of {' and '.join(sorted(map(str, dtypes)))}; cast them to one dtype first"
        )
    for name, part in {"": module, **linears}.items():
        where = f"{what}: its {name}" if name else what
        if parametrize.is_parametrized(part):
            raise UserError(f"{where} is parametrized, which would be lost; remove its parametrizations first")
        if any((part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks)):
            raise UserError(f"{where} has hooks, which would be lost; remove them first")
    if len({id(linear.weight) for linear in linears.values()}) < len(linears):
        raise UserError(f"{what}: two of its linear layers share their weight, which a mixture's cannot")


def _twin(module: nn.Module, dtype: torch.dtype, what: str) -> nn.Module:
    try:
        return copy.deepcopy(module).to(dtype)
    except Exception as error:  # as those of FSDP, and of modules that keep what they computed
        raise UserError(f"{what}: cannot be copied, to be tried: {one_line(error, typed=True)}") from None


@contextlib.contextmanager
def _exact_products() -> Iterator[None]:
    """Inside, products of float32 are not rounded to fewer bits, whatever was allowed."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _texts_for(way: Reading, module: nn.Module) -> Tensor:
    """Input [texts, tokens, h] for :data:`_STANDARD_DEVIATIONS`."""
    weight = way.fc1(module).weight
    stds = torch.tensor(_STANDARD_DEVIATIONS, device="cpu")
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(len(stds), _TOKENS, weight.shape[1], generator=generator, device="cpu").to(weight)
    std = F.linear(x, weight).std()
    return x * (stds.to(weight) / std)[:, None, None] if std > 0 else x


def _run(module: nn.Module, ways: list[Reading], what: str) -> tuple[Tensor, Tensor]:
    """Returns an input that the module takes, and the module's output.

    Of two linear layers either may be the first, so h may have two values.
    """
    why = ""
    for way in ways:
        x = _texts_for(way, module)
        try:
            output = module(x)
        except Exception as error:  # whatever somebody else's module raises
            why = why or one_line(error, typed=True)
            continue
        if isinstance(output, Tensor) and output.shape == x.shape:
            return x, output
        why = f"gives {list(output.shape) if isinstance(output, Tensor) else type(output).__name__}"
    raise NotFeedForwardError(f"{what}: is called with one tensor [b, s, h] to get another, and does not do: {why}")


def _errors(module: nn.Module, ways: list[Reading], x: Tensor, output: Tensor) -> Iterator[tuple[float, str, Reading]]:
    """Yields how far the output is from every activation in every reading.

    Distances are in parts of the largest number that fc2, without its bias, gives a token.
    """
    for way in ways:
        fc1, fc2 = way.fc1(module), way.fc2(module)
        if fc1.weight.shape[1] != x.shape[-1]:
            continue
        first = F.linear(x, fc1.weight, fc1.bias)
        activated, linear = first.chunk(2, dim=-1) if way.gated else (first, None)
        inner = torch.stack([function(activated) for function in DEFINITIONS.values()])
        outputs = F.linear(inner if linear is None else inner * linear, fc2.weight, fc2.bias)
        largest = (output - (0 if fc2.bias is None else fc2.bias)).abs().amax(-1)
        # Where all is 0 but the bias nothing can be said: not a number, which no tolerance allows.
        errors = ((outputs - output).abs().amax(-1) / largest).flatten(1).nan_to_num(nan=torch.inf).amax(1)
        for name, error in zip(DEFINITIONS, errors.tolist(), strict=True):
            yield error, name, way


def _output_dropout(module: nn.Module, x: Tensor, output: Tensor, what: str) -> float:
    """The probability of dropout on the output of a module in training mode, 0 for none.

    Raises:
        UserError: training differs by something else: dropout inside, or of whole tokens or texts.
    """
    with torch.random.fork_rng([x.device] if x.is_cuda else []):
        trained = torch.stack([module(x) for _ in range(_DROPOUT_TRIALS)])
    if torch.equal(trained, output.expand_as(trained)):
        return 0.0
    kept = trained != 0
    expected = output.expand_as(trained)
    # Each entry is dropped on its own, so no token is without any; and as many are as the factor on the others says.
    factor = (trained[kept] / expected[kept]).median() if kept.any() else output.new_zeros(())
    p = 1 - 1 / factor.item() if factor >= 1 else math.nan
    spread = math.sqrt(max(p * (1 - p), 0) / kept.numel()) if p == p else 0.0
    if (
        not kept.any(-1).all()
        or not abs((~kept).float().mean().item() - p) <= 6 * spread
        or not torch.allclose(trained[kept], expected[kept] * factor, rtol=1e-5, atol=0)
    ):
        raise UserError(
            f"{what}: computes something else in training than in evaluation, which is no dropout of its output's "
            "entries; set the probability of dropout in it to 0"
        )
    return round(p, 6)


def starting_as(layer: Recognised, mixture: MixtureConfig | None) -> MixtureConfig:
    """The mixture with initial coefficients with which it computes the layer's function.

    Those are 1 for the layer's activation, in its branch, and for identity in the other one; all others are 0. Gates of
    MoA get learned amplitudes, whose initial values these then are. A form's default dictionary has GELU's tanh
    approximation in the place of GELU where the layer has it.

    Args:
        mixture: None for MoA, bi-sided for a gated layer and type1 for another.

    Raises:
        UserError: no coefficients of this form and dictionary do.
    """
    activation, gated = layer.activation, layer.reading.gated
    require(isinstance(mixture, MixtureConfig | None), "a MixtureConfig, or None", mixture=mixture)
    if mixture is None:
        mixture = MixtureConfig(form="bi-sided" if gated else "type1")
    if mixture.gated != gated:
        has, form = ("two branches", "bi-sided") if gated else ("one branch", "type1")
        raise UserError(f'{layer.name}: has {has}, which form="{mixture.form}" has not; take form="{form}"')
    names = mixture.activations
    if activation == "gelu_tanh" and names == DICTIONARIES[mixture.form]:
        names = tuple(activation if name == "gelu" else name for name in names)
    mixture = replace(
        mixture,
        activations=names,
        amplitude="learned" if mixture.kind == "moa" else "fixed",
        gate_init_std=0.0 if mixture.kind == "moa" else mixture.gate_init_std,  # where psi_hat is 1
        initial_coefficients=(1.0,),
        init_scale="paper",
    )
    if mixture.form == "one-sided" and activation != "silu":
        raise UserError(
            f'{layer.name}: has {activation} on its first branch, where form="one-sided" has silu; take '
            'form="bi-sided" or "quadratic"'
        )
    ones = {
        "type1": (activation,),
        "one-sided": ("linear.identity",),
        "bi-sided": (activation, "linear.identity"),
        "quadratic": (f"{activation}*identity",),
    }[mixture.form]
    missing = [name for name in ones if name not in mixture.coefficient_names]
    if missing:
        needed = dict.fromkeys((activation, "identity") if gated else (activation,))
        order = ", in this order" if mixture.form == "quadratic" and len(needed) > 1 else ""
        raise UserError(
            f"{layer.name}: is {' and '.join(ones)}, and the mixture has no {' and '.join(missing)}; name "
            f"{' and '.join(needed)} among the activations{order}"
        )
    return replace(mixture, initial_coefficients=tuple(float(name in ones) for name in mixture.coefficient_names))
