"""Scales a mixture's coefficients so that a layer's output starts as large as SwiGLU's.

This is --moa-init-scale, and holds at step 0. With the paper's initial values a mixture starts several times larger
than SwiGLU, so a comparison of the two compares scales as well (docs/mixture.md, "Scale at the start").
"""

from __future__ import annotations

import math

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_moa.errors import UserError
from megatron_moa.mixture.config import MixtureConfig
from megatron_moa.mixture.start_scale import matching_scale


def coefficient_scale(mixture: MixtureConfig, config: TransformerConfig) -> float:
    """The factor on all coefficients that ``--moa-init-scale`` asks for: 1 for ``paper``.

    For ``matched`` the layer's output then has, at step 0, the mean square of SwiGLU's (GELU's for type1).

    Raises:
        UserError: weights or inputs whose standard deviation is not known.
    """
    if mixture.init_scale == "paper":
        return 1.0
    std = initial_std(config)
    if std is None:
        flag = "--moe-latent-size" if config.moe_latent_size else "--init-method-xavier-uniform"
        raise UserError(
            f"--moa-init-scale matched: reckons with normal weights and normalised inputs; drop {flag}, "
            "or take --moa-init-scale paper"
        )
    return matching_scale(mixture, std, config.hidden_size)


def initial_std(config: TransformerConfig) -> float | None:
    """Returns the standard deviation that Megatron draws fc1's weights with, or None.

    The value is that of TransformerConfig.__post_init__. None where preactivations are not known from it: of weights
    that are not normal, and of experts of a latent MoE.
    """
    if config.init_method is torch.nn.init.xavier_uniform_ or config.moe_latent_size:
        return None
    return config.init_method_std / math.sqrt(config.mup_width_mult if config.use_mup else 1)
