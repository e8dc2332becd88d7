"""The scale that makes a mixture's output, at step 0, as large as SwiGLU's.

Seven activations at 0.5 give a branch about twice its preactivation, so a mixture starts several times larger than
SwiGLU: a comparison that leaves that alone compares scales as well (docs/mixture.md, "Scale at the start").
"""

from __future__ import annotations

import math

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_moa.config import MixingConfig
from megatron_moa.errors import UserError
from megatron_moa.output_scale import start_scale


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
    return start_scale(mixing, preactivation_std(config))


def preactivation_std(config: TransformerConfig) -> float:
    """Standard deviation of fc1's output (and of gate logits) at step 0: normalised input, normal weights."""
    return config.init_method_std * math.sqrt(config.hidden_size)
