"""Says what a run here will use, part by part."""

from __future__ import annotations

from megatron_moa.doctor.finding import Facts

_CLASSES = {
    "TEDotProductAttention": "Transformer Engine's (flash, fused or unfused)",
    "TorchAttention": "torch's scaled_dot_product_attention",
    "TENorm": "Transformer Engine's",
    "FusedLayerNorm": "Apex's fused kernel",
    "TorchNorm": "plain PyTorch's",
    "TEGroupedMLP": "Transformer Engine's grouped linears",
    "TorchGroupedMLP": "torch's grouped_mm",
    "triton": "Triton kernels",
    "compile": "torch.compile",
    "eager": "eager PyTorch (the reference)",
    "transformer_engine": "Transformer Engine's FusedAdam",
    "apex": "Apex's FusedAdam",
    "torch": "torch's AdamW",
}


def uses(megatron: Facts, torch: Facts) -> dict[str, str]:
    """What a run without flags about it uses, part by part; empty if none can start."""
    if "backend" not in megatron or "devices" not in torch:
        return {}
    devices = torch["devices"]
    oldest = min((device["capability"] for device in devices), default=[0, 0])
    precision = "fp32, --bf16"
    if devices:
        half = "--bf16" if oldest >= [8, 0] else "--fp16 (bf16 needs compute capability 8.0)"
        eight = ", --fp8-format hybrid" if megatron["te"] and oldest >= [8, 9] else ", no fp8"
        if eight == ", no fp8":
            eight += " (it needs Transformer Engine and compute capability 8.9)"
        precision = f"{half}, fp32{eight}"
    return {
        "device": f"{len(devices)} GPUs" if devices else "CPU",
        "mixture": f"{_CLASSES[megatron['backend']]} (--moa-backend)",
        "attention": _CLASSES.get(megatron["attention"], megatron["attention"]),
        "norms": _CLASSES.get(megatron["norm"], megatron["norm"]),
        "grouped experts": _CLASSES.get(megatron["experts"], megatron["experts"]) + " (--moe-grouped-gemm)",
        "AdamW": _CLASSES.get(megatron["adam"], megatron["adam"]),
        "Muon": "emerging-optimizers (--optimizer muon)" if megatron["muon"] else "not there",
        "communication": "NCCL" if devices else "gloo",
        "precision": precision,
    }
