"""Refuses ``--recompute-modules`` that Megatron would ignore without a word, or fail at in backward."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.core.transformer.transformer_config import TransformerConfig
from torch.utils.cpp_extension import is_ninja_available

from megatron_moa.errors import UserError

# Recomputed by Megatron's CheckpointWithoutOutput, a part of which is compiled when it is first used.
_COMPILED = ("layernorm", "mla_up_proj", "moe_act")


def check_recompute(config: TransformerConfig, modules: Sequence[str] | None) -> None:
    """Refuses modules that could not be recomputed as asked.

    Args:
        config: the model's, made with these modules.
        modules: as given on the command line; None if they were not.

    Raises:
        UserError: the modules are ignored for want of another flag, the model does not have them, the scales of
            ``--fp8-recipe delayed``, or no ninja.
    """
    if not modules:
        return
    shown = f"--recompute-modules {' '.join(modules)}"
    if config.recompute_granularity != "selective":
        raise UserError(f"{shown}: has no effect without --recompute-granularity selective; add it, or drop the flag")
    for name, has in _presence(config).items():
        if name in modules and not has:
            raise UserError(f"{shown}: this model has no layer for {name}; drop {name}")
    if "moe_act" in modules:
        _refuse_delayed_scaling(config, shown)
    compiled = [name for name in _COMPILED if name in modules]
    if compiled:
        _require_ninja(shown, compiled[0])


def check_recompute_mixture(config: TransformerConfig, modules: Sequence[str] | None) -> None:
    """Refuses ``--moa-recompute`` where it would do nothing, or could not.

    Args:
        config: the model's.
        modules: of ``--recompute-modules``, as given.

    Raises:
        UserError: whole layers are recomputed anyway, the shared expert overlaps with the dispatcher, the scales of
            ``--fp8-recipe delayed``, or no ninja.
    """
    if config.recompute_granularity == "full":
        raise UserError(
            "--moa-recompute: --recompute-granularity full recomputes the mixture already; drop one of the two"
        )
    whole = [name for name in ("mlp", "moe", "shared_experts") if name in (modules or ())]
    if whole:
        given = f"--recompute-modules {' '.join(modules)}"
        left = _mixtures_left(config, modules)
        if not left:
            raise UserError(f"--moa-recompute: {given} recomputes the mixture already; drop one of the two")
        raise UserError(
            f"--moa-recompute: {given} recomputes a part of the mixtures already; drop --moa-recompute, and for the "
            f"rest add {' '.join(left)} to --recompute-modules"
        )
    if config.moe_shared_expert_overlap:
        raise UserError("--moa-recompute: not with --moe-shared-expert-overlap; drop one of the two")
    _refuse_delayed_scaling(config, "--moa-recompute")
    _require_ninja("--moa-recompute", "it")


def _refuse_delayed_scaling(config: TransformerConfig, shown: str) -> None:
    """Refuses to compute fc2's input again where Transformer Engine's fc2 keeps it quantized.

    It can keep the input as it is (``save_original_input``), but not with delayed scaling: its first step would fail.
    Megatron's own check of moe_act does not see a mixture's experts (training/model.py).
    """
    if config.fp8 and config.fp8_recipe == "delayed":
        raise UserError(f"{shown}: not with --fp8-recipe delayed; take another, such as tensorwise, or drop the flag")


def _require_ninja(shown: str, name: str) -> None:
    if not is_ninja_available():
        raise UserError(f"{shown}: for {name} Megatron compiles a function with ninja; pip install ninja")


def _presence(config: TransformerConfig) -> dict[str, bool]:
    """Whether the model has what these names recompute: dense feed-forward layers, or parts of MoE layers."""
    moe = config.num_moe_experts is not None
    frequency = config.moe_layer_freq
    dense = not moe or (frequency > 1 if isinstance(frequency, int) else 0 in frequency)
    shared = moe and config.moe_shared_expert_intermediate_size is not None
    return {"mlp": dense, "moe": moe, "moe_act": moe, "shared_experts": shared}


def _mixtures_left(config: TransformerConfig, modules: Sequence[str]) -> list[str]:
    """Which further modules would recompute the mixtures of all kinds of layers."""
    has = _presence(config)
    left = ["mlp"] if has["mlp"] and "mlp" not in modules else []
    if "moe" in modules:
        return left
    left += ["moe_act"] if has["moe"] and "moe_act" not in modules else []
    return left + (["shared_experts"] if has["shared_experts"] and "shared_experts" not in modules else [])
