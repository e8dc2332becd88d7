"""Lists what GPUs can do on paper: the figures behind MFU and the plans of trainings.

Peaks and bandwidths are those of NVIDIA's data sheets for the SXM (HGX) boards, dense: the sheets' figures "with
sparsity" are twice as high. No kernel reaches them. Memory is the total capacity that torch
names in its messages; it varies by some hundred MiB with driver and settings.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

GIBIBYTE = 2**30


@dataclass(frozen=True)
class Gpu:
    """One GPU in a node of eight.

    Attributes:
        name: for people.
        memory_bytes: the device's total.
        peak_flops: dense FLOP/s by format: of tensor cores ``bf16``, ``fp16`` and, where they have it, ``fp8``; of the
            others ``fp32`` (torch does not use TF32 unless asked to).
        memory_bandwidth: bytes/s of its memory.
        nvlink_bandwidth: bytes/s to the GPUs of its node, one direction.
        network_bandwidth: bytes/s to other nodes, one direction: one port a GPU, 400 Gb/s (A100: 200), as in the usual
            nodes of eight. Clusters differ: an assumption.
        dollars_per_hour: a round price of renting it in 2026, for orders of magnitude: an assumption, too.
    """

    name: str
    memory_bytes: int
    peak_flops: dict[str, float]
    memory_bandwidth: float
    nvlink_bandwidth: float
    network_bandwidth: float
    dollars_per_hour: float


_HOPPER_PEAKS = {"bf16": 989.4e12, "fp16": 989.4e12, "fp8": 1978.9e12, "fp32": 66.9e12}

GPUS = {
    "h100": Gpu(
        name="H100 SXM 80 GB",
        memory_bytes=int(79.1 * GIBIBYTE),
        peak_flops=_HOPPER_PEAKS,
        memory_bandwidth=3.35e12,
        nvlink_bandwidth=450e9,
        network_bandwidth=50e9,
        dollars_per_hour=2.50,
    ),
    "h200": Gpu(
        name="H200 SXM 141 GB",
        memory_bytes=int(139.8 * GIBIBYTE),
        peak_flops=_HOPPER_PEAKS,
        memory_bandwidth=4.8e12,
        nvlink_bandwidth=450e9,
        network_bandwidth=50e9,
        dollars_per_hour=3.50,
    ),
    "a100-80": Gpu(
        name="A100 SXM 80 GB",
        memory_bytes=int(79.2 * GIBIBYTE),
        peak_flops={"bf16": 312e12, "fp16": 312e12, "fp32": 19.5e12},
        memory_bandwidth=2.039e12,
        nvlink_bandwidth=300e9,
        network_bandwidth=25e9,
        dollars_per_hour=1.50,
    ),
    "b200": Gpu(
        name="B200 SXM 180 GB",
        memory_bytes=int(178.3 * GIBIBYTE),
        peak_flops={"bf16": 2250e12, "fp16": 2250e12, "fp8": 4500e12, "fp32": 75e12},
        memory_bandwidth=7.7e12,
        nvlink_bandwidth=900e9,
        network_bandwidth=50e9,
        dollars_per_hour=5.00,
    ),
}

# In the names that CUDA gives devices. Boards of lower clocks, parts of a GPU and Grace's superchips are others.
_DEVICE_NAMES = {
    "h100": r"\bH100\b.*\bHBM3\b",
    "h200": r"\bH200\b",
    "a100-80": r"\bA100-SXM4-80GB\b",
    "b200": r"\bB200\b",
}
_OTHER_BOARDS = r"PCIe|NVL|MIG"


def this_gpu() -> Gpu | None:
    """The current CUDA device; None without one, and for one that :data:`GPUS` does not have."""
    if not torch.cuda.is_available():
        return None
    return gpu_named(torch.cuda.get_device_name())


def gpu_named(device_name: str) -> Gpu | None:
    """Returns the GPU that CUDA calls so (``NVIDIA H100 80GB HBM3``).

    None for one that :data:`GPUS` does not have.
    """
    if re.search(_OTHER_BOARDS, device_name):
        return None
    for key, pattern in _DEVICE_NAMES.items():
        if re.search(pattern, device_name):
            return GPUS[key]
    return None
