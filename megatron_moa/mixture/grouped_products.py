"""Multiplies tokens sorted by expert with each expert's own matrix.

The product is torch's grouped product, made safe.

``group_ends`` [groups] int32 is the number of tokens up to and with each group: group g has the rows from
``group_ends[g - 1]`` to ``group_ends[g]`` (torch.nn.functional.grouped_mm calls it ``offs``). A group may be empty.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

_ALIGNMENT = 16  # bytes; torch's product refuses rows that do not start at multiples of it


def ends_of_groups(sizes: Tensor | Sequence[int], device: torch.device) -> Tensor:
    """``group_ends`` of groups of these sizes, on the device; sizes that are there already stay there."""
    sizes = torch.as_tensor(sizes).to(device, non_blocking=True)
    return sizes.cumsum(0, dtype=torch.int32)


def group_sizes(group_ends: Tensor) -> list[int]:
    """Rows of each group; waits for the device."""
    return torch.diff(group_ends, prepend=group_ends.new_zeros(1)).tolist()


def group_of_rows(group_ends: Tensor, rows: int) -> Tensor:
    """[rows] int64, the group that each row belongs to; without waiting for the device."""
    return torch.searchsorted(group_ends, torch.arange(rows, device=group_ends.device, dtype=torch.int32), right=True)


def grouped_linear(x: Tensor, weight: Tensor, group_ends: Tensor) -> Tensor:
    """x[rows of g] @ weight[g].T for every group g.

    Args:
        x: [t, h]
        weight: [groups, f, h], x's dtype; each group's matrix contiguous, at any equal distance from the next.

    Returns:
        [t, f]
    """
    if x.dtype == torch.float64:
        return _product_float64(x, weight.transpose(1, 2), group_ends)
    return F.grouped_mm(_aligned(_dense(x)), _aligned(weight).transpose(1, 2), offs=group_ends)


def grouped_linear_input_gradient(grad: Tensor, weight: Tensor, group_ends: Tensor) -> Tensor:
    """grad[rows of g] @ weight[g] for every group: [t, f] and [groups, f, h] -> [t, h]."""
    if grad.dtype == torch.float64:
        return _product_float64(grad, weight, group_ends)
    grad, columns = _aligned(_dense(grad)), weight.shape[2]
    if grad.shape[1] != weight.shape[1]:
        weight = F.pad(weight, (0, 0, 0, grad.shape[1] - weight.shape[1]))
    return F.grouped_mm(grad, _aligned(weight), offs=group_ends)[:, :columns]


def grouped_linear_weight_gradient(grad: Tensor, x: Tensor, group_ends: Tensor) -> Tensor:
    """Returns grad[rows of g].T @ x[rows of g] for every group g.

    [t, f] and [t, h] give [groups, f, h], with 0 for an empty group.
    """
    if x.dtype == torch.float64:
        sizes = group_sizes(group_ends)
        return torch.stack([g.t() @ rows for g, rows in zip(grad.split(sizes), x.split(sizes), strict=True)])
    product = F.grouped_mm(_aligned(_dense(grad)).t(), _aligned(_dense(x)), offs=group_ends)
    return product[:, : grad.shape[1], : x.shape[1]]


def grouped_sum(rows: Tensor, group_ends: Tensor) -> Tensor:
    """The sum of each group's rows: [t, n] -> [groups, n]; in the same order at every call (no atomics)."""
    member = group_of_rows(group_ends, len(rows)) == torch.arange(len(group_ends), device=rows.device)[:, None]
    return member.to(rows.dtype) @ rows


def _product_float64(rows: Tensor, matrices: Tensor, group_ends: Tensor) -> Tensor:
    """rows [t, k], matrices [groups, k, m] -> [t, m], in the dtype that torch's product does not have."""
    parts = rows.split(group_sizes(group_ends))
    return torch.cat([part @ matrix for part, matrix in zip(parts, matrices, strict=True)])


def _dense(rows: Tensor) -> Tensor:
    """Returns the same rows, one after the other in memory.

    The gradient of a sum is one number with strides of 0, also without rows.
    """
    return rows.contiguous() if rows.numel() else rows.new_empty(rows.shape)


def _aligned(tensor: Tensor) -> Tensor:
    """Returns the same rows, with zeros behind each where torch's product needs them.

    A gate's n is seldom a multiple of what the product asks for.
    """
    multiple = _ALIGNMENT // tensor.element_size()
    missing = -tensor.shape[-1] % multiple
    return F.pad(tensor, (0, missing)) if missing else tensor
