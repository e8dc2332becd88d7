"""Which device is which, figures that hang together, and whether forked trainings can use one."""

from __future__ import annotations

import os

import pytest
import torch

from megatron_moa.training import gpus
from megatron_moa.training.gpus import GPUS, gpu_named, this_gpu
from tests.support import launch


@pytest.mark.parametrize(
    ("device", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA B200", "b200"),
    ],
)
def test_known_devices(device: str, key: str) -> None:
    assert gpu_named(device) is GPUS[key]


@pytest.mark.parametrize(
    "device",
    [
        "NVIDIA H100 PCIe",
        "NVIDIA H100 NVL",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA H200 NVL",
        "NVIDIA GH200 480GB",
        "NVIDIA GB200",
        "NVIDIA A100-SXM4-40GB",
        "NVIDIA A100 80GB PCIe",
        "NVIDIA GeForce RTX 4090",
    ],
)
def test_other_boards_are_not_taken_for_them(device: str) -> None:
    assert gpu_named(device) is None


@pytest.mark.parametrize("key", GPUS)
def test_figures_are_in_one_unit(key: str) -> None:
    gpu = GPUS[key]
    assert gpu.peak_flops["bf16"] == gpu.peak_flops["fp16"]
    assert gpu.peak_flops.get("fp8", 2 * gpu.peak_flops["bf16"]) == pytest.approx(2 * gpu.peak_flops["bf16"], rel=1e-3)
    assert gpu.peak_flops["fp32"] < gpu.peak_flops["bf16"] / 10
    assert gpu.network_bandwidth < gpu.nvlink_bandwidth < gpu.memory_bandwidth
    nominal = float(gpu.name.split()[-2]) * 1e9
    assert nominal < gpu.memory_bytes < 1.1 * nominal


def test_this_gpu_goes_by_the_current_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpus.torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert this_gpu() is GPUS["h200"]
    monkeypatch.setattr(gpus.torch.cuda, "is_available", lambda: False)
    assert this_gpu() is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_memory_is_what_torch_reports() -> None:
    gpu = this_gpu()
    if gpu is None:
        pytest.skip(f"{torch.cuda.get_device_name()} is not among the known GPUs")
    assert torch.cuda.get_device_properties(0).total_memory == pytest.approx(gpu.memory_bytes, rel=0.02)


def test_trainings_of_tests_can_use_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server they are forked from is told to ask for GPUs without starting CUDA."""
    seen: dict[str, str] = {}
    monkeypatch.setattr(launch.forkserver, "ensure_running", lambda: seen.update(os.environ))
    monkeypatch.delenv("PYTORCH_NVML_BASED_CUDA_CHECK", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    launch.start_server()
    assert (seen["PYTORCH_NVML_BASED_CUDA_CHECK"], seen["OMP_NUM_THREADS"]) == ("1", "1")
    assert "PYTORCH_NVML_BASED_CUDA_CHECK" not in os.environ
    assert os.environ["OMP_NUM_THREADS"] == "7"
