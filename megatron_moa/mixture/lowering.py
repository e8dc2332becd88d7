"""Rewrites a mixture of activations as a sum of the fewer terms that its activations are made of.

activations.py says of each activation which terms those are. Functions here also evaluate them with torch.

With r = max(x, 0), a mixture of a dictionary is

    m(x) = x (a_x + sum_j a_j F_j(x)) + r (a_1 + a_2 r + a_3 r^2) + sum_j a_j G_j(x),

and its coefficients a are linear in the mixture's: a_j = sum_k c_k R_kj with the constant matrix R of the dictionary.
The gradient of c_k is sum_j R_kj times that of a_j. triton_backend/language.py evaluates the same in Triton.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import FunctionType

import torch
from torch import Tensor

from megatron_moa.mixture import activations
from megatron_moa.mixture.activations import ACTIVATIONS, FACTORS, LEVELS, POWERS, Function


@dataclass(frozen=True)
class Basis:
    """The terms of a dictionary of activations.

    Their coefficients a are in this order: that of x, of powers, of factors, of levels.

    Attributes:
        linear: whether x itself is a term.
        powers: of r, ascending.
        factors: F_j.
        levels: G_j.
        matrix: R, a row for each activation, a column for each term.
    """

    linear: bool
    powers: tuple[int, ...]
    factors: tuple[Function, ...]
    levels: tuple[Function, ...]
    matrix: tuple[tuple[float, ...], ...]

    def with_functions(self, stand_in: Callable[[FunctionType], FunctionType]) -> Basis:
        """The same terms, each value and derivative by what stands in for its function."""

        def other(function: Function) -> Function:
            return Function(stand_in(function.value), stand_in(function.derivative))

        return replace(self, factors=tuple(map(other, self.factors)), levels=tuple(map(other, self.levels)))


@functools.cache
def lower(dictionary: tuple[str, ...]) -> Basis:
    """The terms of these activations."""
    used = {term for name in dictionary for term in ACTIVATIONS[name]}
    terms = [term for term in ("x", *POWERS, *FACTORS, *LEVELS) if term in used]
    return Basis(
        linear="x" in used,
        powers=tuple(power for power, term in enumerate(POWERS, 1) if term in used),
        factors=tuple(FACTORS[term] for term in terms if term in FACTORS),
        levels=tuple(LEVELS[term] for term in terms if term in LEVELS),
        matrix=tuple(tuple(ACTIVATIONS[name].get(term, 0.0) for term in terms) for name in dictionary),
    )


def value_and_derivative(x: Tensor, a: Sequence[Tensor], basis: Basis) -> tuple[Tensor, Tensor]:
    """m(x) and m'(x), elementwise; ``a`` broadcasts against x."""
    linear, powers, factors, levels = _split(a, basis)
    values = [c * level.value(x) for c, level in zip(levels, basis.levels, strict=True)]
    derivatives = [c * level.derivative(x) for c, level in zip(levels, basis.levels, strict=True)]
    slopes = [*linear, *(c * factor.value(x) for c, factor in zip(factors, basis.factors, strict=True))]
    if slopes:
        slope = _total(slopes)
        values.append(x * slope)
        derivatives.append(slope)
    if factors:
        rates = [c * factor.derivative(x) for c, factor in zip(factors, basis.factors, strict=True)]
        derivatives.append(x * _total(rates))
    if powers:
        r = activations.relu(x)
        values.append(r * _polynomial(r, {power - 1: c for power, c in powers.items()}))
        if 1 in powers:
            derivatives.append(torch.where(x > 0.0, powers[1], 0.0))
        if higher := {power - 2: power * c for power, c in powers.items() if power > 1}:
            derivatives.append(r * _polynomial(r, higher))
    return _total(values), _total(derivatives)


def terms(x: Tensor, basis: Basis) -> list[Tensor]:
    """Each term's value."""
    r = activations.relu(x)
    return [
        *([x] if basis.linear else ()),
        *(r**power for power in basis.powers),
        *(x * factor.value(x) for factor in basis.factors),
        *(level.value(x) for level in basis.levels),
    ]


def lowered(c: Sequence[Tensor], basis: Basis) -> list[Tensor]:
    """The coefficients a of the terms, from c of the activations."""
    return [_combined(c, column) for column in zip(*basis.matrix, strict=True)]


def raised(term_gradients: Sequence[Tensor], basis: Basis) -> list[Tensor]:
    """The gradients of c, from those of a: :func:`lowered` transposed."""
    return [_combined(term_gradients, row) for row in basis.matrix]


def _combined(tensors: Sequence[Tensor], constants: Sequence[float]) -> Tensor:
    return _total([tensor if k == 1.0 else k * tensor for tensor, k in zip(tensors, constants, strict=True) if k])


def _split(
    a: Sequence[Tensor], basis: Basis
) -> tuple[Sequence[Tensor], dict[int, Tensor], Sequence[Tensor], Sequence[Tensor]]:
    """The coefficients of x, of powers (by power), of factors and of levels."""
    powers = int(basis.linear)
    factors = powers + len(basis.powers)
    levels = factors + len(basis.factors)
    return a[:powers], dict(zip(basis.powers, a[powers:factors], strict=True)), a[factors:levels], a[levels:]


def _polynomial(r: Tensor, coefficients: dict[int, Tensor]) -> Tensor:
    """sum_p c_p r^p, by Horner's rule."""
    highest = max(coefficients)
    total = coefficients[highest]
    for power in range(highest - 1, -1, -1):
        total = total * r
        if power in coefficients:
            total = total + coefficients[power]
    return total


def _total(parts: Sequence[Tensor]) -> Tensor:
    return functools.reduce(operator.add, parts)
