"""Lets Muon see the two matrices of a gated feed-forward layer, which Megatron keeps as one."""

from __future__ import annotations

import torch


def separate_gated_halves(models: list[torch.nn.Module]) -> list[torch.nn.Module]:
    """Marks fc1 of gated layers, so that Muon orthogonalises W1 and W2 each by itself.

    The paper's matrices are two. Megatron has fc1 as [2f, h], W1 above W2, and would take that for one matrix. Its Muon
    already splits queries, keys and values by these attributes of a weight (Megatron 0.19.2,
    TensorParallelMuon.orthogonalize); --muon-no-split-qkv turns both off. A post-wrap hook, so it returns the models as
    they came; without effect on other optimizers.
    """
    for model in models:
        for name, weight in model.named_parameters():
            # Grouped experts have weight0, weight1, … of one expert each.
            if ".linear_fc1.weight" in name and weight.dim() == 2:
                weight.is_qkv = True
                weight.qkv_split_shapes = [weight.shape[0] // 2] * 2
    return models
