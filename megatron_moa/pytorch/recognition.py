"""Finds out what a feed-forward layer of somebody else's computes, by its linear layers and by trying it.

Names do not say it: in Gemma's layer act_fn is GELU, and Phi's gate_up_proj holds two matrices. So every reading of the
layer that its shapes allow, with every activation of the dictionary, is computed and compared with the layer's output.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_moa.errors import UserError, one_line
from megatron_moa.mixture.config import DICTIONARIES, MixtureConfig
from megatron_moa.mixture.reference import DEFINITIONS

_ROWS = 16  # tokens that a layer is tried on
_STANDARD_DEVIATION = 2.0  # of what the activation sees: smaller numbers do not tell GELU from its approximation
_TOLERANCE = 1e-5  # of the largest output, in float32; GELU and its approximation are 1e-4 apart


class NotFeedForwardError(UserError):
    """A module that does not map one tensor [b, s, h] to another, whatever linear layers it has."""


_Weights = tuple[Tensor, Tensor | None]  # [out, in], and the bias [out]


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

    def fc1(self, module: nn.Module) -> _Weights:
        """[f, h], gated [2f, h] with the activated branch first, and the bias; one that only one branch has is 0 for
        the other.
        """
        parts = [_weights(module.get_submodule(name)) for name in self.first]
        if self.swapped:
            parts = list(zip(*(_halves(tensor) for tensor in parts[0]), strict=True))[::-1]
        if len(parts) == 1:
            return parts[0]
        weight = torch.cat([weight for weight, _ in parts])
        if all(bias is None for _, bias in parts):
            return weight, None
        return weight, torch.cat([weight.new_zeros(len(weight)) if bias is None else bias for weight, bias in parts])

    def fc2(self, module: nn.Module) -> _Weights:
        """[h, f], and the bias."""
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


def linear_layers(module: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of a module whose parameters are theirs alone; empty for any other module."""
    linears = {name: child for name, child in module.named_children() if _is_linear(child)}
    own = {id(parameter) for child in linears.values() for parameter in child.parameters()}
    return linears if all(id(parameter) in own for parameter in module.parameters()) else {}


def _is_linear(module: nn.Module) -> bool:
    """Whether it is nn.Linear, or transformers' Conv1D of GPT-2, with a matrix of numbers: not a quantized one."""
    if not (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"):
        return False
    return module.weight.dim() == 2 and module.weight.is_floating_point()


def _weights(linear: nn.Module) -> _Weights:
    weight = linear.weight if isinstance(linear, nn.Linear) else linear.weight.t()
    return weight.detach(), None if linear.bias is None else linear.bias.detach()


def _halves(tensor: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if tensor is None else tensor.chunk(2)


def readings(module: nn.Module, names: Mapping[str, str | None] | None = None) -> list[Reading]:
    """The ways in which the shapes of a module's linear layers make it a feed-forward layer; none for other modules.

    With ``names`` of roles, those ways in which each role that is named is played by the layer of that name.
    """
    shapes = {name: tuple(_weights(linear)[0].shape) for name, linear in linear_layers(module).items()}
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
    what = f"{name} ({type(module).__name__})"
    linears = linear_layers(module)
    have = ", ".join(f"{key} {list(_weights(linear)[0].shape)}" for key, linear in linears.items())
    have = f"linear layers [out, in]: {have or 'none, or other parameters beside them'}"
    for role, given in (names or {}).items():
        if given is not None and given not in linears:
            raise UserError(f'{what}: {role}="{given}" is no linear layer of it; {have}')
    if any(parameter.is_meta for parameter in module.parameters()):
        raise UserError(f"{what}: is on the meta device, where nothing can be computed; load its weights first")
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
        tried = copy.deepcopy(module).to(torch.promote_types(weight.dtype, torch.float32))
        x, output = _tried(tried.eval(), ways, what)
        error, activation, way = min(_attempts(tried, ways, x, output), key=lambda attempt: attempt[0])
        if not error <= _TOLERANCE:
            raise UserError(
                f"{what}: computes neither down(σ(up(x))) nor down(σ(gate(x)) * up(x)) with σ one of "
                f"{', '.join(DEFINITIONS)}; the nearest, {activation}, is off by {error:.1e} of the largest output"
            )
        dropout = _output_dropout(tried, x, output, what)
    return Recognised(what, module, way, activation, dropout)


@contextlib.contextmanager
def _exact_products() -> Iterator[None]:
    """Inside, products of float32 are not rounded to fewer bits, whatever was allowed."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _tokens_for(way: Reading, module: nn.Module) -> Tensor:
    """Input [1, rows, h] on which the activation sees numbers of :data:`_STANDARD_DEVIATION`."""
    weight, _ = way.fc1(module)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, _ROWS, weight.shape[1], generator=generator).to(weight)
    std = F.linear(x, weight).std()
    return x * (_STANDARD_DEVIATION / std) if std > 0 else x


def _tried(module: nn.Module, ways: list[Reading], what: str) -> tuple[Tensor, Tensor]:
    """An input, and the module's output; of two linear layers either may be the first, so h may have two values."""
    why = ""
    for way in ways:
        x = _tokens_for(way, module)
        try:
            output = module(x)
        except Exception as error:  # whatever somebody else's module raises
            why = why or one_line(error, typed=True)
            continue
        if isinstance(output, Tensor) and output.shape == x.shape:
            return x, output
        why = f"gives {list(output.shape) if isinstance(output, Tensor) else type(output).__name__}"
    raise NotFeedForwardError(f"{what}: is called with a tensor [1, {_ROWS}, h] to get another, and does not do: {why}")


def _attempts(
    module: nn.Module, ways: list[Reading], x: Tensor, output: Tensor
) -> Iterator[tuple[float, str, Reading]]:
    """How far the output is from every activation in every reading, in parts of what fc2 gives at most."""
    for way in ways:
        fc1, fc2 = way.fc1(module), way.fc2(module)
        if fc1[0].shape[1] != x.shape[-1]:
            continue
        first = F.linear(x, *fc1)
        activated, linear = first.chunk(2, dim=-1) if way.gated else (first, None)
        inner = torch.stack([function(activated) for function in DEFINITIONS.values()])
        errors = (F.linear(inner if linear is None else inner * linear, *fc2) - output).abs().flatten(1).amax(1)
        # An output that is its bias alone says nothing: not a number, which no tolerance allows.
        errors /= (output - (0 if fc2[1] is None else fc2[1])).abs().max()
        for name, error in zip(DEFINITIONS, errors.nan_to_num(nan=torch.inf).tolist(), strict=True):
            yield error, name, way


def _output_dropout(tried: nn.Module, x: Tensor, output: Tensor, what: str) -> float:
    """The probability of dropout on the output in training, 0 for none.

    Raises:
        UserError: training differs by something else, such as dropout inside.
    """
    with torch.random.fork_rng([x.device] if x.is_cuda else []):
        trained = tried.train()(x)
    kept = trained != 0
    if torch.equal(trained, output) or not kept.any():
        return 0.0
    factor = (trained[kept] / output[kept]).median()
    if factor < 1 or not torch.allclose(trained[kept], output[kept] * factor, rtol=1e-5, atol=0):
        raise UserError(
            f"{what}: computes something else in training than in evaluation, which is no dropout of its output; set "
            "the probability of dropout inside it to 0"
        )
    return round(1 - 1 / factor.item(), 6)


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
        initial_coefficients=(1.0,),
        init_scale="paper",
    )
    ones = {
        "type1": {activation},
        "one-sided": {"linear.identity"},
        "bi-sided": {activation, "linear.identity"},
        "quadratic": {f"{activation}*identity"},
    }[mixture.form]
    if mixture.form == "one-sided" and activation != "silu":
        raise UserError(
            f'{layer.name}: has {activation} on its first branch, where form="one-sided" has silu; take '
            'form="bi-sided" or "quadratic"'
        )
    missing = ones.difference(mixture.coefficient_names)
    if missing:
        wanted = " before identity" if mixture.form == "quadratic" else ""
        raise UserError(
            f"{layer.name}: is {', '.join(sorted(ones))}, and the mixture has no {', '.join(sorted(missing))}; name "
            f"activations with {activation}{wanted if activation != 'identity' else ''}"
            f"{' and identity' if gated else ''}"
        )
    return replace(mixture, initial_coefficients=tuple(float(name in ones) for name in mixture.coefficient_names))
