"""Replaces the feed-forward layers of a model by mixtures.

The mixtures compute the same function to begin with.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import nn

from megatron_moa.errors import UserError, one_line
from megatron_moa.mixture.config import MixtureConfig
from megatron_moa.pytorch.feed_forward import MixedFeedForward
from megatron_moa.pytorch.recognition import NotFeedForwardError, Recognised, readings, recognise, require

# What chooses layers: a name, "mlp" for every "….mlp" or a pattern such as "encoder.*.mlp"; a class; a function of name
# and module; or several of these.
OneMatch = str | type[nn.Module] | Callable[[str, nn.Module], bool]
Match = OneMatch | Sequence[OneMatch]

_RECORD = "mixed_feed_forward"  # in a transformers model's config
_OF_HUB = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token", "trust_remote_code")
_NAMED = 4  # layers that a message names


def replace_feed_forward(
    model: nn.Module, mixture: MixtureConfig | None = None, match: Match | None = None
) -> dict[str, nn.Module]:
    """Replaces feed-forward layers in place by :class:`MixedFeedForward`; the model computes what it did.

    Args:
        model: any; of transformers' Llama, Qwen, Gemma, Phi, GPT-2, ViT and others are known to work.
        mixture: of all layers; default: MoA, bi-sided for gated layers and type1 for others. MoA gets gates of learned
            amplitude, since no others can start at 1 and 0.
        match: which layers; default: all that compute a feed-forward layer's function.

    Returns:
        The layers that were replaced, by name; ``model.set_submodule(name, layer)`` puts one back. A model of
        transformers notes the mixtures in its config, for :func:`load_replaced`: ``config.mixed_feed_forward``, to be
        deleted if all layers are put back.

    Raises:
        UserError: nothing to replace, or a layer that matches and cannot be; the model is as it was.
    """
    require(isinstance(model, nn.Module), "a torch.nn.Module", model=model)
    found = _matching(model, match)
    new = {name: MixedFeedForward.from_recognised(layer, mixture) for name, layer in found.items()}
    old = {name: model.get_submodule(name) for name in new}
    _swap(model, new)
    _note(model, new)
    return old


def load_replaced(
    folder: str | Path, model_class: type | None = None, backend: str = "auto", **settings: Any
) -> nn.Module:
    """Loads a model of transformers whose layers :func:`replace_feed_forward` replaced.

    The model was saved by ``save_pretrained``. The stock class alone would build its own feed-forward layers and leave
    them as they start.

    Args:
        folder: local, or a name on the Hugging Face Hub.
        model_class: whose ``from_pretrained`` loads; default: transformers' class that config.json names.
        backend: of the mixtures (:class:`MixtureConfig`).
        settings: further arguments of ``from_pretrained``, such as ``dtype`` or ``device_map``. Code in the folder
            runs with ``trust_remote_code=True`` alone; nobody is asked.

    Raises:
        UserError: config.json notes no replacement, names no class of transformers', or does not fit the model or the
            weights.
    """
    import transformers  # here, since nothing else needs it

    require(isinstance(folder, str | os.PathLike), "a folder, or a name on the Hugging Face Hub", folder=folder)
    config = settings.pop("config", None)
    is_config = isinstance(config, transformers.PreTrainedConfig | None)
    require(is_config, "a config of transformers, or None", config=config)
    if settings.get("trust_remote_code") is None:
        settings["trust_remote_code"] = False  # by None transformers asks on the terminal
    if config is None:
        config = _read_config(folder, settings)
    if not getattr(config, _RECORD, None):
        raise UserError(f"{folder}: its config.json notes no {_RECORD}; load it by transformers' from_pretrained")
    model_class = _class_of(folder, config, model_class)
    layers: dict[str, MixedFeedForward] = {}

    def build(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, *args, **kwargs)
        layers.update(_noted(self, getattr(config, _RECORD), backend))
        _swap(self, layers)

    replaced = type(model_class.__name__, (model_class,), {"__init__": build, "__module__": model_class.__module__})
    model, report = replaced.from_pretrained(folder, config=config, output_loading_info=True, **settings)
    model.__class__ = model_class
    wrong = [*report["missing_keys"], *report["unexpected_keys"], *(key[0] for key in report["mismatched_keys"])]
    wrong = sorted(key for key in wrong if key.startswith(tuple(f"{name}." for name in layers)))
    if wrong:
        raise UserError(
            f"{folder}: {wrong[0]} is not there, or not as {_RECORD} in its config.json says; if that layer was put "
            "back, delete it there"
        )
    for layer in layers.values():
        if layer.mixture.freeze:  # transformers makes loaded weights train
            layer.coefficients.requires_grad_(False)
    return model


def _read_config(folder: str | Path, settings: dict[str, Any]) -> Any:
    import transformers

    of_hub = {name: value for name, value in settings.items() if name in _OF_HUB}
    try:
        return transformers.AutoConfig.from_pretrained(folder, **of_hub)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{folder}: its config is code of its own; give trust_remote_code=True if that may run"
            ) from None
        raise UserError(
            f"{folder}: no model that can be read, name a folder that save_pretrained wrote, or a model on the "
            f"Hugging Face Hub: {one_line(error, typed=True)}"
        ) from None


def _class_of(folder: str | Path, config: Any, model_class: type | None) -> type:
    """The class that is given, else the one that config.json names."""
    import transformers

    if model_class is None:
        named = (config.architectures or ["no class"])[0]
        model_class = getattr(transformers, named, None)
        if model_class is None:
            raise UserError(f"{folder}: its config.json names {named}, which transformers has not; give model_class")
    if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
        raise UserError(f"model_class={model_class!r}: is no model's class; give one such as LlamaForCausalLM")
    return model_class


def _matching(model: nn.Module, match: Match | None) -> dict[str, Recognised]:
    """The layers to replace, by name; one that lies in several places by the first that matches."""
    named = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    candidates = [name for name, module in named.items() if readings(module)]
    found: dict[int, tuple[str, Recognised]] = {}
    for name in candidates if match is None else _matches(match, named, candidates, type(model).__name__):
        module = named[name]
        if id(module) in found:
            continue
        try:
            found[id(module)] = name, recognise(module, name)
        except NotFeedForwardError:
            if match is not None:
                raise
        except UserError as error:
            raise (
                error if match is not None else UserError(f"{error}; match= names the layers that are meant")
            ) from None
    found = dict(found.values())
    _refuse_shared_weights(model, found)
    if found:
        return found
    what = type(model).__name__
    if readings(model):
        raise UserError(f"{what}: is a feed-forward layer itself; take MixedFeedForward.from_mlp or from_swiglu")
    if any(isinstance(module, MixedFeedForward) for module in named.values()):
        raise UserError(f"{what}: no feed-forward layer that is no mixture already")
    raise UserError(
        f"{what}: no feed-forward layer; those that are quantized, wrapped or spread over several modules, and experts "
        "in one tensor, cannot be replaced"
    )


def _refuse_shared_weights(model: nn.Module, found: Mapping[str, Recognised]) -> None:
    """Raises UserError if a weight of a layer is another module's, too: they would no longer be one."""
    own = {id(part): name for name, layer in found.items() for part in layer.module.modules()}
    owner: dict[int, str] = {}
    for part_name, part in model.named_modules():
        for parameter in part.parameters(recurse=False):
            layer = own.get(id(part), part_name)
            first = owner.setdefault(id(parameter), layer)
            if first != layer and (first in found or layer in found):
                raise UserError(f"{layer}: shares a weight with {first}, which would be lost; untie them first")


def _matches(match: Match, named: Mapping[str, nn.Module], candidates: Sequence[str], what: str) -> list[str]:
    """The names of what matches; each of several ways to match has to find something."""
    matches: set[str] = set()
    for way in match if isinstance(match, list | tuple) and match else [match]:
        if not (isinstance(way, str) or callable(way)):
            raise UserError(f"match={way!r}: give a name, a class, a function of name and module, or several of these")
        fitting = {name for name, module in named.items() if _fits(way, name, module)}
        if not fitting:
            shown = ", ".join(candidates[:_NAMED]) + (" and others" if len(candidates) > _NAMED else "")
            raise UserError(
                f"{what}: no layer matches {_shown(way)}; feed-forward layers by their shapes: {shown or 'none'}"
            )
        matches |= fitting
    return [name for name in named if name in matches]


def _fits(match: OneMatch, name: str, module: nn.Module) -> bool:
    if isinstance(match, str):
        return fnmatchcase(name, match) or fnmatchcase(name, f"*.{match}")
    return isinstance(module, match) if isinstance(match, type) else match(name, module)


def _shown(match: OneMatch) -> str:
    return f'match="{match}"' if isinstance(match, str) else f"match={getattr(match, '__name__', match)}"


def _swap(model: nn.Module, new: Mapping[str, nn.Module]) -> None:
    """Puts layers in the place of a model's layers of the same names.

    The new layers also take every other place of the old ones, since layers may be shared.
    """
    new_of = {id(model.get_submodule(name)): layer for name, layer in new.items()}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children leaves out what was there before
            if id(child) in new_of:
                parent.register_module(name, new_of[id(child)])


# What config.json says of the layers: all that it takes to build them for the weights beside it.


def _note(model: nn.Module, new: Mapping[str, MixedFeedForward]) -> None:
    config = getattr(model, "config", None)
    if not hasattr(config, "save_pretrained"):
        return  # it is none of transformers'
    earlier = getattr(config, _RECORD, None) or []
    noted = [{**entry, "layers": [name for name in entry["layers"] if name not in new]} for entry in earlier]
    noted = [entry for entry in noted if entry["layers"]]
    for name, layer in new.items():
        settings = {
            "mixture": layer.mixture.to_json(),
            "hidden_size": layer.fc1.in_features,
            "ffn_hidden_size": layer.fc2.in_features,
            "biases": [layer.fc1.bias is not None, layer.fc2.bias is not None],
            "dropout": layer.dropout.p,
            "freeze": layer.mixture.freeze,
            "recompute": layer.mixture.recompute,
        }
        alike = next((entry for entry in noted if settings.items() <= entry.items()), None)
        if alike is None:
            noted.append({"layers": [name], **settings})
        else:
            alike["layers"].append(name)
    config.update({_RECORD: noted})


def _noted(model: nn.Module, noted: list[dict[str, Any]], backend: str) -> dict[str, MixedFeedForward]:
    """New layers by name, without their weights."""
    named = dict(model.named_modules())
    layers = {}
    for entry in noted if isinstance(noted, list) else [noted]:
        try:
            execution = {"freeze": entry["freeze"], "recompute": entry["recompute"], "backend": backend}
            mixture = MixtureConfig.from_json(entry["mixture"], **execution)
            widths, biases, dropout = (
                (entry["hidden_size"], entry["ffn_hidden_size"]),
                entry["biases"],
                entry["dropout"],
            )
            names = entry["layers"]
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"config.{_RECORD}: is not what replace_feed_forward writes: {one_line(error, typed=True)}"
            ) from None
        for name in names:
            layers[_name_here(named, name)] = MixedFeedForward(*widths, mixture, biases, dropout=dropout)
    return layers


def _name_here(named: Mapping[str, nn.Module], noted: str) -> str:
    """Returns the name of the module that a note speaks of.

    The replaced model may have been a part of this model, or this model a part of that.
    """
    if noted in named:
        return noted
    alike = [name for name in named if name and (name.endswith(f".{noted}") or noted.endswith(f".{name}"))]
    longest = max(map(len, alike), default=0)
    alike = [name for name in alike if len(name) == longest]
    if len(alike) != 1:
        raise UserError(f"config.{_RECORD}: {noted} is no module of this model, or several")
    return alike[0]
