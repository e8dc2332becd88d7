"""Gathers the functions of the ``triton`` backend that autograd.py calls."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from megatron_moa.mixture.autograd import GateInputs, MixtureInputs
from megatron_moa.mixture.triton_backend import gate, mixture


def _on_device_of_inputs(function: Callable[..., Any]) -> Callable[..., Any]:
    # Triton launches on the current device, which need not be that of the tensors.
    @functools.wraps(function)
    def launch(inputs: MixtureInputs | GateInputs, *arguments: Any) -> Any:
        tensor = inputs[0]
        if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
            return function(inputs, *arguments)
        with torch.cuda.device_of(tensor):
            return function(inputs, *arguments)

    return launch


mixture_forward = _on_device_of_inputs(mixture.forward)
mixture_backward = _on_device_of_inputs(mixture.backward)
gate_forward = _on_device_of_inputs(gate.forward)
gate_backward = _on_device_of_inputs(gate.backward)
