"""Writes out equations 3 to 10 of the paper in float64, number by number.

The package's own maths takes no part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

SIGMA: dict[str, Callable[[float], float]] = {
    "identity": lambda t: t,
    "gelu": lambda t: t * 0.5 * math.erfc(-t / math.sqrt(2)),
    "silu": lambda t: t / (1 + math.exp(-t)),
    "relu": lambda t: max(t, 0.0),
    "leaky_relu": lambda t: t if t > 0 else 0.01 * t,
    "relu2": lambda t: max(t, 0.0) ** 2,
    "tanh": math.tanh,
    "gelu_tanh": lambda t: 0.5 * t * (1 + math.tanh(math.sqrt(2 / math.pi) * (t + 0.044715 * t**3))),
    "elu": lambda t: t if t > 0 else math.expm1(t),
    "selu": lambda t: 1.0507009873554805 * (t if t > 0 else 1.6732632423543772 * math.expm1(t)),
    "mish": lambda t: t * math.tanh(math.log1p(math.exp(t))),
    "sigmoid": lambda t: 1 / (1 + math.exp(-t)),
    "relu3": lambda t: max(t, 0.0) ** 3,
    "one": lambda t: 1.0,
}


def number_of_coefficients(form: str, k: int) -> int:
    """n of a dictionary of k activations: k, k, 2k, k (k + 1) / 2."""
    return {"type1": k, "one-sided": k, "bi-sided": 2 * k, "quadratic": k * (k + 1) // 2}[form]


def phi(gate: str, form: str, logits: Sequence[float]) -> list[float]:
    """Returns the coefficients of one token, computed from its n logits u_k x.

    Softmax is over a branch's K, or over all of quadratic's.
    """
    if gate == "sigmoid":
        return [1 / (1 + math.exp(-value)) for value in logits]
    if gate == "tanh":
        return [math.tanh(value) for value in logits]
    if form == "bi-sided":
        half = len(logits) // 2
        return phi(gate, "one-sided", logits[:half]) + phi(gate, "one-sided", logits[half:])
    powers = [math.exp(value) for value in logits]
    return [power / sum(powers) for power in powers]


def mixed_unit(form: str, names: Sequence[str], c: Sequence[float], y: float, z: float) -> float:
    """One hidden unit of one token, y of W1 x and z of W2 x (type1 has no z), with the n coefficients c."""
    sigma = [SIGMA[name] for name in names]
    k = len(sigma)
    if form == "type1":  # 3, 7
        return sum(c[i] * sigma[i](y) for i in range(k))
    if form == "one-sided":  # 4, 8
        return y / (1 + math.exp(-y)) * sum(c[i] * sigma[i](z) for i in range(k))
    if form == "bi-sided":  # 5, 9
        return sum(c[i] * sigma[i](y) for i in range(k)) * sum(c[k + i] * sigma[i](z) for i in range(k))
    total, index = 0.0, 0  # 6, 10
    for i in range(k):
        for j in range(i, k):
            total += c[index] * sigma[i](y) * sigma[j](z)
            index += 1
    return total


def mixed(form: str, names: Sequence[str], coefficients: Array, preactivation: Array) -> Array:
    """Returns :func:`mixed_unit` of every token and unit, [t, f].

    The preactivation is [t, f] or [t, 2f], y first; the coefficients are [n] or [t, n].
    """
    f = preactivation.shape[1] // (1 if form == "type1" else 2)
    rows = np.broadcast_to(coefficients, (len(preactivation), coefficients.shape[-1]))
    return np.array(
        [
            [mixed_unit(form, names, c, row[i], 0.0 if form == "type1" else row[f + i]) for i in range(f)]
            for c, row in zip(rows.tolist(), preactivation.tolist(), strict=True)
        ]
    ).reshape(len(preactivation), f)


def feed_forward(
    form: str, names: Sequence[str], gate: str | None, x: Array, fc1: Array, fc2: Array, mixing: Array
) -> Array:
    """The layer's output for tokens x [t, h].

    Args:
        gate: phi of an MoA layer, None for LA.
        fc1: W1 [f, h] for type1, else W1 and W2 below it, [2f, h].
        fc2: W2 (type1) or W3, [h, f].
        mixing: LA's coefficients [n], or MoA's gate vectors u, [n, h].
    """
    coefficients = mixing
    if gate is not None:
        coefficients = np.array([phi(gate, form, logits) for logits in (x @ mixing.T).tolist()])
    return mixed(form, names, coefficients, x @ fc1.T) @ fc2.T
