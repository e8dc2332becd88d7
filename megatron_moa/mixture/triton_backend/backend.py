"""Gathers the functions of the ``triton`` backend that autograd.py calls."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_moa.mixture.triton_backend import gate, mixture


def _on_device_of_first_argument(function: Callable[..., Any]) -> Callable[..., Any]:
    # Triton launches on the current device, which need not be that of the tensors.
    @functools.wraps(function)
    def launch(first: Tensor, *arguments: Any) -> Any:
        with torch.cuda.device_of(first):
            return function(first, *arguments)

    return launch


mixture_forward = _on_device_of_first_argument(mixture.forward)
mixture_backward = _on_device_of_first_argument(mixture.backward)
gate_forward = _on_device_of_first_argument(gate.forward)
gate_backward = _on_device_of_first_argument(gate.backward)
