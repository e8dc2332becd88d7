"""Measures how large a mixture's output is at step 0, beside SwiGLU's.

This file needs PyTorch only, since exports carry it.
"""

from __future__ import annotations

import functools
import math

import torch
from torch.nn import functional as F

from megatron_moa.mixture.config import MixtureConfig, SettingError
from megatron_moa.mixture.reference import gate, mix

_SAMPLES = 1 << 16  # of each random variable; tests/layers/test_init_scale.py holds the result to real layers
_SEED = 1234


# Must not be named start_scale. Exports of format version 1 try to import that from here; where it is missing they use
# their own copy of the mixture, whose one-sided and quadratic forms are other functions than this package's.
def matching_scale(mixture: MixtureConfig, init_std: float, hidden_size: int) -> float:
    """Returns the factor on all coefficients that gives the output SwiGLU's mean square at step 0.

    For type1 that is GELU's mean square. Arguments are as in :func:`output_scale`.

    Raises:
        SettingError: one of the two is 0, and no factor makes them equal.
    """
    ratio = output_scale(mixture, init_std, hidden_size)
    if not 0 < ratio < math.inf:
        cause = (
            "coefficients start at 0 (--moa-init, --moa-gate tanh with --moa-gate-init-std 0)"
            if init_std
            else "fc1's weights start at 0 (init_std, --init-method-std)"
        )
        raise SettingError(
            f"--moa-init-scale matched: {cause}, and so does the layer's output; "
            "start them elsewhere, or take --moa-init-scale paper"
        )
    # The bi-sided form multiplies two coefficients, so each takes half of the correction.
    return ratio**-0.5 if mixture.form == "bi-sided" else 1 / ratio


@functools.cache
def output_scale(mixture: MixtureConfig, init_std: float, hidden_size: int) -> float:
    """Returns the root mean square of the mixture over that of SwiGLU (GELU for type1) at step 0.

    Both are taken before the down projection. A normalised input makes preactivations and gate logits independent
    normal numbers, whose standard deviations are the weights' times sqrt(h). The reference itself is sampled, with a
    seed of its own: the same on every rank and in every run.

    Args:
        mixture: the mixture; has the standard deviation of its gate vectors.
        init_std: standard deviation of fc1's weights.
        hidden_size: h.
    """
    std, logit_std = (each * math.sqrt(hidden_size) for each in (init_std, mixture.gate_init_std))
    # Sobol points: the squares of squares in it have heavy tails, on which plain sampling is off by per cents.
    uniform = torch.quasirandom.SobolEngine(2 if mixture.gated else 1, scramble=True, seed=_SEED)
    z = std * torch.special.ndtri(uniform.draw(_SAMPLES, dtype=torch.float64).clamp(1e-12, 1 - 1e-12))
    # On the CPU, as the Sobol points are, even while a model is built on the meta device.
    start = torch.tensor(list(mixture.start_values()), dtype=torch.float64, device="cpu")
    if mixture.kind == "la":
        coefficients = start
    else:
        amplitude = start if mixture.amplitude == "learned" else None
        generator = torch.Generator().manual_seed(_SEED)
        shape = (_SAMPLES, mixture.num_coefficients)
        logits = logit_std * torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        coefficients = gate(logits, mixture, amplitude)
    fixed = F.silu(z[:, :1]) * z[:, 1:] if mixture.gated else F.gelu(z)
    mixed = mix(z, coefficients, mixture)
    return math.sqrt((mixed.square().mean() / fixed.square().mean()).item())
