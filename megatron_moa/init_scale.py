"""How large a mixture's output is at step 0, beside SwiGLU's, and the scale that makes them equal.

Seven activations at 0.5 give a branch about twice its preactivation, so a mixture starts several times larger than
SwiGLU: a comparison that leaves that alone compares scales as well (docs/mixture.md, "Scale at the start").
"""

from __future__ import annotations

import functools
import math

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional as F

from megatron_moa import reference
from megatron_moa.config import MixingConfig
from megatron_moa.errors import UserError

_SAMPLES = 1 << 16  # of each random variable; tests/test_init_scale.py holds the result to real layers
_SEED = 1234


def coefficient_scale(mixing: MixingConfig, config: TransformerConfig) -> float:
    """The factor on all coefficients that ``--moa-init-scale`` asks for: 1 for ``mixture``.

    For ``swiglu`` the layer's output then has, at step 0, the mean square of SwiGLU's (GELU's for type1).

    Raises:
        UserError: an initialisation whose standard deviation is not ``--init-method-std``.
    """
    if mixing.init_scale == "mixture":
        return 1.0
    if config.init_method is torch.nn.init.xavier_uniform_:
        raise UserError(
            "--moa-init-scale swiglu: reckons with normal weights; drop --init-method-xavier-uniform, "
            "or take --moa-init-scale mixture"
        )
    ratio = output_scale(mixing, preactivation_std(config))
    # The bi-sided form multiplies two coefficients, so each takes half of the correction.
    return ratio**-0.5 if mixing.form == "bi-sided" else 1 / ratio


def preactivation_std(config: TransformerConfig) -> float:
    """Standard deviation of fc1's output (and of gate logits) at step 0: normalised input, normal weights."""
    return config.init_method_std * math.sqrt(config.hidden_size)


@functools.cache
def output_scale(mixing: MixingConfig, std: float) -> float:
    """Root mean square of the mixture before the down projection, over SwiGLU's (GELU's for type1).

    Both at step 0, for preactivations and gate logits that are independent normal numbers of standard deviation
    ``std``. By sampling the reference itself, with a seed of its own: the same on every rank and in every run.
    """
    # Sobol points: the squares of squares in it have heavy tails, on which plain sampling is off by per cents.
    uniform = torch.quasirandom.SobolEngine(2 if mixing.gated else 1, scramble=True, seed=_SEED)
    z = std * torch.special.ndtri(uniform.draw(_SAMPLES, dtype=torch.float64).clamp(1e-12, 1 - 1e-12))
    start = torch.tensor(list(mixing.start_values()), dtype=torch.float64)
    if mixing.mixing == "la":
        coefficients = start
    else:
        amplitude = start if mixing.amplitude == "learned" else None
        generator = torch.Generator().manual_seed(_SEED)
        logits = std * torch.randn(_SAMPLES, mixing.num_coefficients, generator=generator, dtype=torch.float64)
        coefficients = reference.gate(logits, mixing, amplitude)
    fixed = F.silu(z[:, :1]) * z[:, 1:] if mixing.gated else F.gelu(z)
    mixed = reference.mix(z, coefficients, mixing)
    return math.sqrt((mixed.square().mean() / fixed.square().mean()).item())
