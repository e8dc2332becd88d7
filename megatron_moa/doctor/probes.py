"""Finds out what the packages here can do, each in a process of its own.

An import may raise, crash or hang.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

from megatron_moa.doctor.finding import Facts
from megatron_moa.doctor.processes import LAUNCHER_VARIABLES, ROOT, run


def probe_torch() -> Facts:
    """Finds torch's version, the GPUs it sees, and why it sees none."""
    import torch

    facts = {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": None,
        "threads": torch.get_num_threads(),
        "devices": [],
        "reason": "",
    }
    if torch.cuda.is_available() or torch.version.cuda:
        with contextlib.suppress(Exception):
            facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    if not torch.cuda.is_available():
        try:
            torch.cuda.init()
        except Exception as error:  # whatever torch says is the finding
            facts["reason"] = " ".join(str(error).split())
        return facts
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        device = {"name": properties.name, "capability": [properties.major, properties.minor], "error": ""}
        try:
            device["free"], device["total"] = torch.cuda.mem_get_info(index)
            product = torch.ones(64, 64, device=f"cuda:{index}") @ torch.ones(64, 64, device=f"cuda:{index}")
            device["error"] = "" if product.sum().item() == 64**3 else "a product of matrices is wrong"
        except Exception as error:
            device["error"] = " ".join(str(error).split())[:200]
        facts["devices"].append(device)
    return facts


def probe_megatron() -> Facts:
    """Finds Megatron's version, and the classes that a run without flags about them would build."""
    facts: Facts = {"version": importlib.metadata.version("megatron-core")}
    if importlib.util.find_spec("megatron.training") is None:
        return {**facts, "error": "it has no megatron.training"}
    import megatron.training.training  # noqa: F401  what the training loop needs
    import torch
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import HAVE_APEX
    from megatron.core.optimizer import HAVE_EMERGING_OPTIMIZERS, Adam
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_moa import startup
    from megatron_moa.layer_specs import HAVE_TE, layer_spec
    from megatron_moa.mixture.functional import resolve_backend

    startup.prepare()  # as every run begins
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()  # the spec depends on the pipeline's stage
    try:
        from megatron.core.datasets import helpers_cpp  # noqa: F401

        facts["helpers"] = ""
    except ImportError as error:
        facts["helpers"] = str(error)

    # What a run without flags about it would build: the classes in the spec.
    def spec(**settings: Any) -> Any:
        config = TransformerConfig(
            num_layers=1,
            hidden_size=64,
            num_attention_heads=4,
            normalization="RMSNorm",
            add_bias_linear=False,
            use_cpu_initialization=True,
            transformer_impl="transformer_engine" if HAVE_TE else "local",
            **settings,
        )
        return layer_spec(config, None)

    def name(module: Any) -> str:
        module = getattr(module, "module", module)
        return getattr(getattr(module, "func", module), "__name__", str(module))

    attention = spec().layer_specs[0].submodules.self_attention.submodules.core_attention
    experts = (
        spec(num_moe_experts=2, moe_grouped_gemm=True).layer_specs[0].submodules.mlp.keywords["submodules"].experts
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    facts["backend"] = resolve_backend("auto", device)
    facts["attention"] = name(attention)
    facts["norm"] = name(spec().layer_norm)
    facts["experts"] = name(experts)
    facts["adam"] = Adam.__module__.split(".")[0]
    facts["muon"] = bool(HAVE_EMERGING_OPTIMIZERS)
    facts["te"], facts["apex"] = bool(HAVE_TE), bool(HAVE_APEX)
    return facts


def probe_transformer_engine() -> Facts:
    """Finds Transformer Engine's version, and whether a layer of it runs."""
    import torch

    if not torch.cuda.is_available():
        return {
            "version": installed_version("transformer-engine"),
            "runs": False,
        }  # megatron_moa.megatron_fixes.te_guard
    import transformer_engine
    import transformer_engine.pytorch

    layer = transformer_engine.pytorch.Linear(16, 16, device="cuda")
    runs = bool(torch.isfinite(layer(torch.ones(16, 16, device="cuda"))).all().item())
    return {"version": str(getattr(transformer_engine, "__version__", "of unknown version")), "runs": runs}


def probe_apex() -> Facts:
    """Finds out whether a package apex is NVIDIA's, and which kernels were compiled with it."""
    import torch

    # NVIDIA's has these; the project of that name on PyPI has not.
    folders = [Path(folder) for folder in importlib.util.find_spec("apex").submodule_search_locations or ()]
    nvidias = all(any((folder / part).is_dir() for folder in folders) for part in ("optimizers", "normalization"))
    if not torch.cuda.is_available():
        return {"nvidia": nvidias, "accumulates": False}  # megatron_moa.megatron_fixes.te_guard
    import apex  # noqa: F401

    if not nvidias:
        return {"nvidia": False, "accumulates": False}
    import amp_C  # noqa: F401  its compiled kernels
    import fused_layer_norm_cuda  # noqa: F401

    try:  # compiled only where it was asked for
        import fused_weight_gradient_mlp_cuda  # noqa: F401
    except ImportError:
        return {"nvidia": True, "accumulates": False}
    return {"nvidia": True, "accumulates": True}


def probe_triton() -> Facts:
    """Finds Triton's version."""
    import triton

    return {"version": triton.__version__}


def probe_emerging_optimizers() -> Facts:
    """Finds the version of emerging-optimizers, whose placeholder has nothing to import."""
    facts = {"version": importlib.metadata.version("emerging-optimizers")}
    if facts["version"].startswith("999"):
        return facts  # the placeholder: nothing to import
    from emerging_optimizers.orthogonalized_optimizers import Muon  # noqa: F401
    from emerging_optimizers.scalar_optimizers import Lion  # noqa: F401

    return facts


PROBES = {
    # the package to be found: what looks at it
    "torch": probe_torch,
    "megatron": probe_megatron,
    "transformer_engine": probe_transformer_engine,
    "apex": probe_apex,
    "triton": probe_triton,
    "emerging_optimizers": probe_emerging_optimizers,
}

_DISTRIBUTIONS = {"megatron": "megatron-core"}  # where the package has another name than what pip installs

_MARK = "probe-result:"  # imports print, too


def run_probe(name: str) -> None:
    """Runs a probe in this process and prints what it found; for :func:`probe` alone."""
    print(_MARK + json.dumps(PROBES[name]()), flush=True)


def probe(name: str, seconds: float) -> Facts:
    """Returns what the probe of that name finds, run in a process of its own.

    If the process failed or took too long, ``error`` says so, and ``version`` is the installed distribution's or empty.
    """
    if importlib.util.find_spec(name) is None:
        return {}
    command = [sys.executable, "-c", f"from megatron_moa.doctor import probes; probes.run_probe({name!r})"]
    environment = {key: value for key, value in os.environ.items() if key not in LAUNCHER_VARIABLES}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    code, output = run(command, seconds, environment)
    for line in output.splitlines():
        if line.startswith(_MARK):
            return json.loads(line[len(_MARK) :])
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    # The line that names the exception; texts of several lines go on after it.
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Exit|Interrupt)\b", line)]
    error = (named or lines or [f"exit code {code}"])[-1][:300]
    if code is None:
        error = f"its import did not end within {seconds:.0f} s"
    elif code < 0:
        error = f"its import was ended by signal {-code} ({signal.Signals(-code).name})"
    return {"error": error, "version": installed_version(_DISTRIBUTIONS.get(name, name))}


def installed_version(distribution: str) -> str:
    """Returns the version of an installed distribution; empty if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""
