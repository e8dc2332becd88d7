"""Converts a trained MoA model to LA by replacing each gate with its mean over a text."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_moa.checkpoints.tensors import ModelTensors
from megatron_moa.checkpoints.writer import write_release
from megatron_moa.errors import UserError
from megatron_moa.layers.coefficients import Coefficients
from megatron_moa.mixture.config import MixtureConfig
from megatron_moa.research.gates.probe import GateProbe, Site
from megatron_moa.trained.compare_logits import Comparison, compared_tokens, reference_logits
from megatron_moa.trained.from_megatron import PreparedCheckpoint, empty_model, prepare_checkpoint
from megatron_moa.trained.upcycling import args_of_new_run, mixture_flags
from megatron_moa.training.model import model_config_from_args


def collapsed_mixture(mixture: MixtureConfig) -> MixtureConfig:
    """The LA of the same form and dictionary; its coefficients train."""
    return MixtureConfig("la", mixture.form, mixture.activations)


def write_collapsed(
    prepared: PreparedCheckpoint,
    probe: GateProbe,
    means: Mapping[str, Tensor],
    root: Path,
    megatron_flags: Sequence[str] = (),
) -> Comparison:
    """Writes the LA as a checkpoint from which training starts at iteration 0.

    Compares the LA, as it lies on disk, with the MoA whose coefficients are replaced by the same means.

    Args:
        prepared: the MoA's checkpoint.
        probe: its model.
        means: coefficients [n] by the name of the module that owns them (:attr:`Site.names`).
        root: where to write, as ``--save`` names it; not there yet.
        megatron_flags: with which the checkpoint was prepared.

    Raises:
        UserError: a layer whose mean is not known.
    """
    target = collapsed_mixture(prepared.config.mixture)
    args = copy.copy(prepared.args)
    vars(args).update(mixture_flags(target))
    model = empty_model(model_config_from_args(args, dataclasses.replace(target, backend="eager")))
    owners = {name for name, module in model.named_modules() if isinstance(module, Coefficients)}
    if without := sorted(owners - means.keys()):
        raise UserError(f"--write-la: no text passes through {without[0]}, so its mean is not known; it is not written")
    saved = args_of_new_run(prepared.saved, target)
    # As training keeps them: coefficients of a bf16 model are bf16.
    means = {name: mean.to("cpu", saved.params_dtype).float() for name, mean in means.items()}
    tensors = ModelTensors(prepared.checkpoint.path, prepared.build_empty())

    def read(name: str) -> Tensor:
        module, _, _ = name.rpartition(".")
        return means[module] if module in owners else tensors[name]

    def at_mean(site: Site, expert: int, rows: Tensor, _: Tensor) -> Tensor:
        return means[site.names[expert]].to(rows.device).expand_as(rows)

    write_release(model, saved, root, read)
    tokens = compared_tokens(prepared.vocab_size, prepared.args.seq_length)
    with probe.changed(at_mean):
        expected = torch.cat([probe.loaded.logits(row[None]).cpu() for row in tokens])
    found = reference_logits(prepare_checkpoint(str(root), megatron_flags), tokens)
    return Comparison.of(found[..., : expected.shape[-1]], expected)
