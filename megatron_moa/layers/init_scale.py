"""Scales a mixture's coefficients so that a layer's output is, at step 0, as large as SwiGLU's (--moa-init-scale).

With the paper's initial values a mixture starts several times larger than SwiGLU, so a comparison of the two compares
scales as well (docs/mixture.md, "Scale at the start").
"""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_moa.errors import UserError
from megatron_moa.mixture.config import MixtureConfig
from megatron_moa.mixture.start_scale import matching_scale


def coefficient_scale(mixture: MixtureConfig, config: TransformerConfig) -> float:
    """The factor on all coefficients that ``--moa-init-scale`` asks for: 1 for ``paper``.

    For ``matched`` the layer's output then has, at step 0, the mean square of SwiGLU's (GELU's for type1).

    Raises:
        UserError: an initialisation whose standard deviation is not ``--init-method-std``.
    """
    if mixture.init_scale == "paper":
        return 1.0
    if config.init_method is torch.nn.init.xavier_uniform_:
        raise UserError(
            "--moa-init-scale matched: reckons with normal weights; drop --init-method-xavier-uniform, "
            "or take --moa-init-scale paper"
        )
    return matching_scale(mixture, config.init_method_std, config.hidden_size)
