"""Replaces the feed-forward layers of a model by mixtures that compute the same function to begin with."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from megatron_moa.errors import UserError
from megatron_moa.mixture.config import MixtureConfig
from megatron_moa.pytorch.feed_forward import MixedFeedForward
from megatron_moa.pytorch.recognition import NotFeedForwardError, Recognised, readings, recognise

# What chooses layers: a name, "mlp" for every "….mlp" or a pattern such as "encoder.*.mlp"; a class; or a function of
# name and module.
Match = str | type[nn.Module] | Callable[[str, nn.Module], bool]

_RECORD = "mixed_feed_forward"  # in a transformers model's config
_NAMED = 4  # layers that a message names


def replace_feed_forward(
    model: nn.Module, mixture: MixtureConfig | None = None, match: Match | None = None
) -> dict[str, nn.Module]:
    """Replaces feed-forward layers in place by :class:`MixedFeedForward`; the model computes what it did.

    Args:
        model: any; of transformers' Llama, Qwen, Gemma, Phi, GPT-2, ViT and others are known to work.
        mixture: of all layers. Default: what an earlier replacement noted in ``model.config``, else MoA, bi-sided for
            gated layers and type1 for others.
        match: which layers; default: all that compute a feed-forward layer's function.

    Returns:
        The layers that were replaced, by name. Put back with ``model.set_submodule(name, layer)``.

    Raises:
        UserError: nothing to replace, or a layer that matches and cannot be; the model is as it was.
    """
    noted = getattr(getattr(model, "config", None), _RECORD, None)
    if mixture is None and match is None and noted:
        chosen = _noted(model, noted)
    else:
        chosen = {name: (layer, mixture) for name, layer in _matching(model, match).items()}
    new = {name: MixedFeedForward.from_recognised(layer, its) for name, (layer, its) in chosen.items()}
    old = {name: model.get_submodule(name) for name in new}
    _swap(model, {id(old[name]): layer for name, layer in new.items()})
    _note(model, {name: layer.mixture for name, layer in new.items()})
    return old


def _matching(model: nn.Module, match: Match | None) -> dict[str, Recognised]:
    """The layers to replace, by name."""
    named = {name: module for name, module in model.named_modules() if name}
    candidates = [name for name, module in named.items() if next(readings(module), None) is not None]
    found = {}
    for name in candidates if match is None else [name for name, module in named.items() if _fits(match, name, module)]:
        try:
            found[name] = recognise(named[name], name)
        except NotFeedForwardError:
            if match is not None:
                raise
    if not found:
        shown = ", ".join(candidates[:_NAMED]) + (" and others" if len(candidates) > _NAMED else "")
        raise UserError(
            f"{type(model).__name__}: no feed-forward layer; those that are quantized, wrapped or spread over several "
            "modules, and experts in one tensor, cannot be replaced"
            if match is None
            else f"{type(model).__name__}: no layer matches {_shown(match)}; feed-forward layers by their shapes: "
            f"{shown or 'none'}"
        )
    return found


def _fits(match: Match, name: str, module: nn.Module) -> bool:
    if isinstance(match, str):
        return fnmatchcase(name, match) or fnmatchcase(name, f"*.{match}")
    return isinstance(module, match) if isinstance(match, type) else match(name, module)


def _shown(match: Match) -> str:
    return f'match="{match}"' if isinstance(match, str) else f"match={getattr(match, '__name__', match)}"


def _swap(model: nn.Module, new: dict[int, nn.Module]) -> None:
    """Puts layers in the place of others, by the others' ids: everywhere, since layers may be shared."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if id(child) in new:
                setattr(parent, name, new[id(child)])


def _note(model: nn.Module, mixtures: dict[str, MixtureConfig]) -> None:
    """Notes the replacement in a transformers config, so that config.json says what the saved weights are for."""
    config = getattr(model, "config", None)
    if not hasattr(config, "save_pretrained"):
        return
    noted = [] if getattr(config, _RECORD, None) is None else list(getattr(config, _RECORD))
    for mixture in dict.fromkeys(mixtures.values()):
        layers = [name for name, its in mixtures.items() if its == mixture]
        noted.append({"layers": layers, "mixture": mixture.to_json()})
    setattr(config, _RECORD, noted)


def _noted(model: nn.Module, noted: list[dict[str, Any]]) -> dict[str, tuple[Recognised, MixtureConfig]]:
    """The layers that a config's note speaks of, each with its mixture."""
    named = dict(model.named_modules())
    chosen = {}
    for entry in noted:
        mixture = MixtureConfig.from_json(entry["mixture"])
        for name in entry["layers"]:
            if name not in named:
                raise UserError(f"{type(model).__name__}: has no {name}, which config.{_RECORD} says was replaced")
            if isinstance(named[name], MixedFeedForward):
                raise UserError(f"{name}: is a mixture already, as config.{_RECORD} says; nothing was replaced")
            chosen[name] = recognise(named[name], name), mixture
    return chosen
