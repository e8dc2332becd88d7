"""What is here, what a training will use of it, and what to do where something is missing.

    python -m megatron_moa.doctor                     what is here; exit code 0 if training can start, else 1
    python -m megatron_moa.doctor --smoke             and trains a tiny mixture for five steps
    python -m megatron_moa.doctor --recipe moe-2b     and whether GPUs take the widths of that recipe well
    python -m megatron_moa.launch --nproc-per-node 8 -m megatron_moa.doctor --nccl     an all-reduce across these ranks

Each line has a state:

    ok          there, and used
    falls back  not there, or not usable: a run takes what the line says instead
    check       there, but runs may fail or crawl with it
    missing     training cannot start without it: exit code 1

It must itself run where much is broken: whatever imports something big happens in a process of its own, which may
crash or hang, and this file needs nothing but the standard library (of Python 3.7 and later, to be able to say that
3.12 is needed).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PROGRAM = "doctor"
ROOT = Path(__file__).resolve().parents[1]  # the repository, or site-packages: pretrain_gpt_moa.py is there in both

# As setup.py and constraints.txt have them.
PYTHON = (3, 12)
MEGATRON = "0.19.2"
TORCH = "2.11.0"
OLDEST_TORCH = (2, 6)
TRITON = "3.6.0"
EMERGING_OPTIMIZERS = "0.3.0"

OK, FALLS_BACK, CHECK, MISSING = "ok", "falls back", "check", "missing"

_GIB = 2**30
_SMOKE_SECONDS = 600
_LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

Facts = dict  # what a probe found: JSON; {"error": text} if it failed, {} where the package is not installed


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: what was looked at.
        state: :data:`OK`, :data:`FALLS_BACK`, :data:`CHECK` or :data:`MISSING`.
        text: what is there, and what a run does with it.
        remedy: what to do, a command where there is one; empty for nothing.
    """

    name: str
    state: str
    text: str
    remedy: str = ""


# Probes: each runs in a process of its own, since an import may raise, crash or hang.


def _probe_torch() -> Facts:
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


def _probe_megatron() -> Facts:
    facts: Facts = {"version": importlib.metadata.version("megatron-core")}
    if importlib.util.find_spec("megatron.training") is None:
        return {**facts, "error": "it has no megatron.training"}
    import megatron.training.training  # noqa: F401  what the training loop needs
    import torch
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import HAVE_APEX
    from megatron.core.optimizer import HAVE_EMERGING_OPTIMIZERS, Adam
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_moa import cpu
    from megatron_moa.layer_specs import HAVE_TE, layer_spec
    from megatron_moa.mixture.functional import resolve_backend

    cpu.prepare()  # as every run begins
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


def _probe_transformer_engine() -> Facts:
    import torch

    if not torch.cuda.is_available():
        return {
            "version": _installed_version("transformer-engine"),
            "runs": False,
        }  # megatron_moa.megatron_fixes.te_guard
    import transformer_engine
    import transformer_engine.pytorch

    layer = transformer_engine.pytorch.Linear(16, 16, device="cuda")
    runs = bool(torch.isfinite(layer(torch.ones(16, 16, device="cuda"))).all().item())
    return {"version": str(getattr(transformer_engine, "__version__", "of unknown version")), "runs": runs}


def _probe_apex() -> Facts:
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


def _probe_triton() -> Facts:
    import triton

    return {"version": triton.__version__}


def _probe_emerging_optimizers() -> Facts:
    facts = {"version": importlib.metadata.version("emerging-optimizers")}
    if facts["version"].startswith("999"):
        return facts  # the placeholder: nothing to import
    from emerging_optimizers.orthogonalized_optimizers import Muon  # noqa: F401
    from emerging_optimizers.scalar_optimizers import Lion  # noqa: F401

    return facts


PROBES = {
    # the package to be found: what looks at it
    "torch": _probe_torch,
    "megatron": _probe_megatron,
    "transformer_engine": _probe_transformer_engine,
    "apex": _probe_apex,
    "triton": _probe_triton,
    "emerging_optimizers": _probe_emerging_optimizers,
}

_DISTRIBUTIONS = {"megatron": "megatron-core"}  # where the package has another name than what pip installs

_MARK = "probe-result:"  # imports print, too


def run_probe(name: str) -> None:
    """Runs a probe in this process and prints what it found; for :func:`probe` alone."""
    print(_MARK + json.dumps(PROBES[name]()), flush=True)


def probe(name: str, seconds: float) -> Facts:
    """What the probe of that name finds, in a process of its own; if that failed or took too long ``error`` says so,
    and ``version`` is the installed distribution's, or empty.
    """
    if importlib.util.find_spec(name) is None:
        return {}
    command = [sys.executable, "-c", f"from megatron_moa import doctor; doctor.run_probe({name!r})"]
    environment = {key: value for key, value in os.environ.items() if key not in _LAUNCHER_VARIABLES}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    code, output = _run(command, seconds, environment)
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
    return {"error": error, "version": _installed_version(_DISTRIBUTIONS.get(name, name))}


def _installed_version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _run(
    command: list[str], seconds: float, environment: dict[str, str] | None = None, folder: str | None = None
) -> tuple[int | None, str]:
    """Exit code (None: it took too long, or could not be started) and everything printed; leaves no process behind."""
    with tempfile.TemporaryFile() as output:
        try:
            process = subprocess.Popen(
                command,
                env=environment,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return None, str(error)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        return code, output.read().decode(errors="replace")


# Judgements: facts -> findings. They touch nothing, so that GPUs can be judged where there is none.


def judge_python(version: tuple, executable: str) -> Finding:
    """Python itself: ``version`` as ``sys.version_info``."""
    text = f"{'.'.join(map(str, version[:3]))} ({executable})"
    if tuple(version[:2]) >= PYTHON:
        return Finding("Python", OK, text)
    wanted = ".".join(map(str, PYTHON))
    return Finding(
        "Python",
        MISSING,
        f"{text}: megatron-core {MEGATRON} needs {wanted} or later",
        f"make venv finds one, or: uv venv --python {wanted} .venv, and use .venv/bin/python",
    )


def judge_torch(facts: Facts) -> Finding:
    """torch: there, importable, new enough."""
    install = f"pip install torch=={TORCH}"
    if not facts:
        return Finding("torch", MISSING, "not installed", install)
    if "error" in facts:
        return Finding("torch", MISSING, f"cannot be imported: {facts['error']}", f"{install} --force-reinstall")
    built = f"built for CUDA {facts['cuda']}" if facts["cuda"] else "a build without CUDA"
    text = f"{facts['version']}, {built}"
    if _numbers(facts["version"])[:2] < OLDEST_TORCH:
        return Finding("torch", MISSING, f"{text}: older than 2.6, which Megatron needs", install)
    if facts["version"].split("+")[0] != TORCH:
        text += f" (tested with {TORCH})"
    return Finding("torch", OK, text)


def judge_cuda(torch: Facts, driver: Facts, environment: dict) -> list[Finding]:
    """Driver, GPUs, NVLink, NCCL.

    Args:
        torch: from :func:`_probe_torch`.
        driver: from :func:`ask_driver`.
        environment: of the process.
    """
    if not torch or "error" in torch:
        return []
    if not torch["devices"]:
        return [_no_gpu(torch, driver, environment)]
    found = []
    # nvidia-smi may be absent from a container whose GPUs work.
    version = f"{driver['version']} (up to CUDA {driver['cuda']}), " if driver.get("version") else ""
    found.append(Finding("CUDA", OK, f"driver {version}torch's runtime {torch['cuda']}"))
    for index, device in enumerate(torch["devices"]):
        capability = ".".join(map(str, device["capability"]))
        text = f"{device['name']}, compute capability {capability}"
        name = f"GPU {index}"
        if device["error"]:
            remedy = f"leave it out with CUDA_VISIBLE_DEVICES, or take a torch built for {capability}"
            found.append(Finding(name, MISSING, f"{text}: does not compute: {device['error']}", remedy))
            continue
        text += f", {device['free'] / _GIB:.1f} of {device['total'] / _GIB:.1f} GiB free"
        if device["free"] < 0.9 * device["total"]:
            remedy = "nvidia-smi shows the processes on it"
            found.append(Finding(name, CHECK, f"{text}: something else is on it", remedy))
        else:
            found.append(Finding(name, OK, text))
    if len(torch["devices"]) > 1 and driver.get("topology"):
        if driver["nvlink"]:
            found.append(Finding("NVLink", OK, f"between GPUs of this node ({driver['nvlink']})"))
        else:
            text = "not between GPUs of this node: tensor parallelism goes over PCIe and is slow"
            found.append(
                Finding("NVLink", FALLS_BACK, text, "keep --tensor-model-parallel-size 1 where the model fits")
            )
    nccl = torch["nccl"]
    if nccl:
        found.append(Finding("NCCL", OK, f"{nccl}; --nccl under megatron_moa.launch tests it across ranks"))
    else:
        found.append(Finding("NCCL", MISSING, "this torch has none", f"pip install torch=={TORCH} --force-reinstall"))
    return found


def _no_gpu(torch: Facts, driver: Facts, environment: dict) -> Finding:
    consequence = "training runs on CPU over gloo"
    if not driver.get("gpus"):
        return Finding("GPU", FALLS_BACK, f"none seen ({driver['error']}): {consequence}")
    seen = f"nvidia-smi lists {driver['gpus']}"
    remedy = torch["reason"] or "python -c 'import torch; torch.cuda.init()' says why"
    if not torch["cuda"]:
        why, remedy = "this torch is built without CUDA", f"pip install torch=={TORCH} (PyPI's has CUDA)"
    elif environment.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        why, remedy = "CUDA_VISIBLE_DEVICES hides all", "unset CUDA_VISIBLE_DEVICES"
    elif _numbers(driver["cuda"])[:1] < _numbers(torch["cuda"])[:1]:
        why = f"driver {driver['version']} serves CUDA up to {driver['cuda']}, torch is built for {torch['cuda']}"
        major = _numbers(driver["cuda"])[0]
        remedy = (
            f"install a newer driver, or a torch for CUDA {major} (pip install torch=={TORCH} "
            f"--index-url https://download.pytorch.org/whl/cuNNN; pytorch.org lists the NNN)"
        )
    else:
        why = "torch cannot use them"
    return Finding("GPU", FALLS_BACK, f"{seen}, but {why}: {consequence}", remedy)


def judge_megatron(facts: Facts) -> list[Finding]:
    """megatron-core and its data set helpers."""
    install = f'pip install "megatron-core[training]=={MEGATRON}"'
    if not facts:
        return [Finding("megatron-core", MISSING, "not installed", install)]
    version = facts.get("version")
    if version and version != MEGATRON:
        why = f"{version}: what is wrapped and extended here is {MEGATRON}'s"
        if _numbers(version) < (0, 17):
            why = f"{version}: below 0.17 it ships no megatron.training, so there is no training loop"
        return [Finding("megatron-core", MISSING, why, install)]
    if "error" in facts:
        # The package is there; what it imports may be what is broken, and has a line of its own then.
        text = f"{version or 'installed'}, but cannot be used: {facts['error']}"
        return [Finding("megatron-core", MISSING, text, f"repair what the error names, or {install} --force-reinstall")]
    found = [Finding("megatron-core", OK, f"{version}, with its training loop")]
    if facts["helpers"]:
        text = f"not compiled ({facts['helpers']}): Megatron tries make at start, and needs g++ and pybind11 for it"
        found.append(Finding("dataset helpers", CHECK, text, f"{install} --force-reinstall brings them compiled"))
    else:
        found.append(Finding("dataset helpers", OK, "compiled (helpers_cpp)"))
    return found


def judge_transformer_engine(facts: Facts, gpu: bool) -> Finding:
    """Transformer Engine: imported, and usable."""
    name = "Transformer Engine"
    if not facts:
        text = "not installed: layers, norms and attention are Megatron's local ones and plain PyTorch's"
        remedy = (
            "optional, on GPUs: pip install --no-build-isolation 'transformer-engine[pytorch]' (compiles for minutes)"
        )
        return Finding(name, FALLS_BACK, text, remedy if gpu else "")
    remove = "pip uninstall transformer-engine transformer-engine-torch"
    if "error" in facts:
        # Megatron goes on without it where its import raises ImportError, and only there.
        spared = re.match(r"(ImportError|ModuleNotFoundError)\b", facts["error"]) is not None
        text = (
            f"its import fails ({facts['error']}): {'a run goes on without it' if spared else 'Megatron fails with it'}"
        )
        return Finding(name, FALLS_BACK if spared else MISSING, text, f"install it anew, or {remove}")
    if not gpu:
        version = facts["version"] or "of unknown version"
        text = f"{version}, kept out: its modules need CUDA, and a run here is --transformer-impl local"
        return Finding(name, FALLS_BACK, text)
    if not facts["runs"]:
        return Finding(
            name, CHECK, f"{facts['version']} gives values that are not finite", f"install it anew, or {remove}"
        )
    return Finding(name, OK, f"{facts['version']}, a layer of it ran")


def judge_apex(facts: Facts, gpu: bool) -> Finding:
    """NVIDIA's Apex, or what goes by its name."""
    if not facts:
        text = "not installed: norms and Adam are Transformer Engine's or PyTorch's"
        remedy = "optional: from source, https://github.com/NVIDIA/apex (PyPI's apex is another project)"
        return Finding("Apex", FALLS_BACK, text, remedy if gpu else "")
    if "error" in facts:
        text = f"cannot be used: {facts['error']}"
        return Finding("Apex", CHECK, text, "compile it anew against this torch, or pip uninstall apex")
    if not facts["nvidia"]:
        # `import apex` is all that Megatron itself asks before it builds Apex's norm.
        text = (
            "a package apex that is not NVIDIA's; nothing of it is used here, but Megatron's own script fails with it"
        )
        return Finding("Apex", CHECK, text, "pip uninstall apex")
    if not gpu:
        return Finding("Apex", FALLS_BACK, "NVIDIA's, kept out: its kernels need CUDA, and a run here takes PyTorch's")
    if not facts["accumulates"]:
        text = "NVIDIA's, without fused_weight_gradient_mlp_cuda: gradient accumulation is not fused"
        return Finding("Apex", FALLS_BACK, text, "optional: compile Apex with APEX_CPP_EXT=1 APEX_CUDA_EXT=1")
    return Finding("Apex", OK, "NVIDIA's, with its kernels")


def judge_triton(facts: Facts, gpu: bool, interpreted: bool) -> Finding:
    """Triton: kernels on GPUs, its interpreter for tests."""
    if not facts or "error" in facts:
        why = f"cannot be imported: {facts['error']}" if facts else "not installed"
        text = f"{why}: the mixture runs {'in eager PyTorch' if gpu else 'by torch.compile'}"
        return Finding("Triton", FALLS_BACK, text, f"pip install triton=={TRITON}" if gpu else "")
    if interpreted and gpu:
        text = f"{facts['version']}, but TRITON_INTERPRET=1 runs kernels in the interpreter, far slower"
        return Finding("Triton", CHECK, text, "unset TRITON_INTERPRET")
    if interpreted:
        return Finding("Triton", OK, f"{facts['version']}, in its interpreter (TRITON_INTERPRET=1): for tests")
    if gpu:
        return Finding("Triton", OK, f"{facts['version']}: the mixture's kernels")
    return Finding("Triton", FALLS_BACK, f"{facts['version']}, unused without a GPU: the mixture runs by torch.compile")


def judge_emerging_optimizers(facts: Facts) -> Finding:
    """What --optimizer muon needs."""
    name, install = "emerging-optimizers", f"pip install emerging-optimizers=={EMERGING_OPTIMIZERS}"
    if not facts:
        text = "not installed: --optimizer muon, which MoE recipes train with, soap and lion end a run; AdamW is there"
        return Finding(name, CHECK, text, f"{install}, or OPTIMIZER=adamw")
    if "error" in facts:
        return Finding(name, MISSING, f"cannot be imported, and Megatron imports it: {facts['error']}", install)
    if facts["version"].startswith("999"):
        text = f"{facts['version']} is a placeholder without code, and Megatron imports it"
        return Finding(name, MISSING, text, install)
    if facts["version"] != EMERGING_OPTIMIZERS:
        return Finding(name, CHECK, f"{facts['version']}, tested is {EMERGING_OPTIMIZERS}", install)
    return Finding(name, OK, f"{facts['version']}: --optimizer muon")


def judge_environment(environment: dict, torch: Facts, launched: bool) -> list[Finding]:
    """Variables that change runs without a word.

    Args:
        launched: whether a launcher has started this process, whose RANK and so on are then right.
    """
    found = []
    devices = torch.get("devices") or []
    connections = environment.get("CUDA_DEVICE_MAX_CONNECTIONS")
    # Blackwell no longer needs it; Megatron 0.19.2 asks for it below compute capability 10.
    if devices and min(device["capability"][0] for device in devices) < 10:
        name = "CUDA_DEVICE_MAX_CONNECTIONS"
        if connections == "1":
            found.append(Finding(name, OK, "1"))
        else:
            text = f"{connections or 'not set'}: tensor and context parallelism need 1, before the processes start"
            found.append(Finding(name, CHECK, text, "export CUDA_DEVICE_MAX_CONNECTIONS=1 (not with FSDP)"))
    threads = environment.get("OMP_NUM_THREADS")
    text = threads or "not set"
    if "threads" in torch:
        text += f"; torch takes {torch['threads']} threads"
    if threads is None:
        text += ", under a launcher with several processes 1 each"
    found.append(Finding("OMP_NUM_THREADS", OK, text))
    slow = {
        "NCCL_P2P_DISABLE": "GPUs of a node no longer talk directly",
        "NCCL_IB_DISABLE": "between nodes NCCL takes TCP in place of InfiniBand",
        "NCCL_SHM_DISABLE": "GPUs of a node talk through the network",
        "CUDA_LAUNCH_BLOCKING": "every kernel is waited for",
        "TORCH_COMPILE_DISABLE": "the compile backend runs uncompiled",
        "TORCHDYNAMO_DISABLE": "the compile backend runs uncompiled",
    }
    for name, effect in slow.items():
        if environment.get(name, "0") not in ("", "0"):
            found.append(Finding(name, CHECK, f"{environment[name]}: {effect}, which is slow", f"unset {name}"))
    others = sorted(name for name in environment if name.startswith("NCCL_") and name not in slow)
    if others:
        found.append(Finding("NCCL variables", OK, " ".join(f"{name}={environment[name]}" for name in others)))
    if environment.get("WORLD_SIZE", "1") != "1" and not launched:
        text = f"WORLD_SIZE={environment['WORLD_SIZE']} without RANK, left over: a run would wait for others"
        found.append(Finding("WORLD_SIZE", MISSING, text, f"unset {' '.join(_LAUNCHER_VARIABLES)}"))
    return found


def _numbers(version: str) -> tuple:
    """A version's leading numbers, to be compared."""
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


# The machine, looked at from here.


def ask_driver(seconds: float = 30) -> Facts:
    """What nvidia-smi says: version, CUDA version served, number of GPUs, NVLink; ``error`` says why it cannot."""
    if shutil.which("nvidia-smi") is None:
        return {"gpus": 0, "error": "no nvidia-smi: no NVIDIA driver"}
    code, text = _run(["nvidia-smi"], seconds)
    if code != 0:
        why = "it did not answer" if code is None else (text.strip().splitlines() or [f"exit code {code}"])[-1]
        return {"gpus": 0, "error": f"nvidia-smi: {why}"}
    _, names = _run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], seconds)
    code, topology = _run(["nvidia-smi", "topo", "-m"], seconds)
    links = sorted(set(re.findall(r"\bNV\d+\b", topology.split("Legend")[0])))
    version, cuda = (re.search(rf"{name}: *([\d.]+)", text) for name in ("Driver Version", "CUDA Version"))
    return {
        "gpus": len(names.split("\n")) - 1,
        "error": "it lists no GPU",
        "version": version.group(1) if version else "",
        "cuda": cuda.group(1) if cuda else "0",
        "topology": code == 0,
        "nvlink": " ".join(links),
    }


def check_compiler(gpu: bool) -> list[Finding]:
    """A C++ compiler and Python's headers, by compiling what torch.compile would: an extension of one line."""
    use = "Triton's launchers need a C compiler" if gpu else "torch.compile needs a C++ compiler"
    fallback = (
        "kernels fail at the first step" if gpu else "the mixture runs in eager PyTorch, slower and with more memory"
    )
    kind = "C" if gpu else "C++"
    variable, names = ("CC", ("gcc", "clang", "cc")) if gpu else ("CXX", ("g++", "clang++"))
    candidates = [os.environ.get(variable), *names]
    compiler = next((path for path in map(shutil.which, filter(None, candidates)) if path), None)
    install = "apt install g++ python3-dev (or your system's packages of that kind), or set " + variable
    name = f"{kind} compiler"
    if compiler is None:
        return [Finding(name, MISSING if gpu else FALLS_BACK, f"none on PATH: {use}; {fallback}", install)]
    include = sysconfig.get_paths()["include"]
    headers = os.path.exists(os.path.join(include, "Python.h"))
    found = []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / ("probe.c" if gpu else "probe.cpp")
        source.write_text(("#include <Python.h>\n" if headers else "") + "int main(void) { return 0; }\n")
        code, output = _run([compiler, f"-I{include}", str(source), "-c", "-o", str(source) + ".o"], 60)
    if code == 0:
        found.append(Finding(name, OK, f"{compiler} compiles"))
    else:
        why = ([line for line in output.splitlines() if "error" in line] or ["it did not end"])[0]
        found.append(Finding(name, MISSING, f"{compiler} does not compile: {why}; {use}", install))
    if headers:
        found.append(Finding("Python headers", OK, include))
    else:
        state = MISSING if gpu else FALLS_BACK
        found.append(Finding("Python headers", state, f"no Python.h in {include}: {fallback}", install))
    return found


def check_shared_memory() -> Finding:
    """/dev/shm: locks between processes, data loaders' workers and NCCL within a node are there."""
    import multiprocessing

    name, folder = "shared memory", "/dev/shm"
    remedy = "containers: docker run --ipc=host or --shm-size=16g; else mount -o remount,rw,size=16g /dev/shm"
    try:
        multiprocessing.Semaphore()  # saving a checkpoint needs some
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(bytes(2**20))
            file.flush()
        size = shutil.disk_usage(folder)
    except (OSError, ImportError) as error:
        return Finding(name, MISSING, f"{folder} cannot be used ({error}): saving, data workers and NCCL fail", remedy)
    text = f"{folder}, {size.free / _GIB:.1f} of {size.total / _GIB:.1f} GiB free"
    if size.free < _GIB:
        return Finding(name, CHECK, f"{text}: data workers and NCCL may fail with a bus error", remedy)
    return Finding(name, OK, text)


def check_disk(label: str, folder: str, needed: bool) -> Finding:
    """Free space, and whether it can be written to.

    Args:
        folder: need not exist; the nearest folder above it that does is looked at.
        needed: whether a run must write there.
    """
    path = os.path.abspath(folder)
    while not os.path.exists(path):
        path = os.path.dirname(path)
    try:
        free = shutil.disk_usage(path).free
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        text = f"{folder}: cannot be written to ({error.strerror or error})"
        return Finding(label, MISSING if needed else CHECK, text, "name a folder on a disk that can be written to")
    text = f"{free / _GIB:.1f} GiB free at {folder}"
    if free < 2 * _GIB:
        return Finding(
            label, CHECK, f"{text}: little; a save that does not fit ends the run", "free some, or name another disk"
        )
    return Finding(label, OK, text)


def check_limits() -> list[Finding]:
    """Open files, cores, memory, as the kernel and the container limit them."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"{soft} (hard limit {hard})"
    files = Finding("open files", OK, text)
    if 0 <= soft < 4096:
        files = Finding(
            "open files", CHECK, f"{text}: runs with many data workers or shards may fail", "ulimit -n 65536"
        )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0
    text = f"{cores} of {os.cpu_count()} for this process"
    quota = _read("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0] != "max":
        text += f", {int(quota[0]) / int(quota[1]):.1f} by the container's quota"
    found = [files, Finding("CPU cores", OK, text)]
    kilobytes = dict(re.findall(r"^(\w+): +(\d+) kB", _read("/proc/meminfo"), flags=re.MULTILINE))
    if "MemAvailable" in kilobytes:
        free, total = (int(kilobytes[key]) * 1024 for key in ("MemAvailable", "MemTotal"))
        text = f"{free / _GIB:.1f} of {total / _GIB:.1f} GiB available"
        limits = (_read("/sys/fs/cgroup/memory.max"), _read("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
        limit = min((int(value) for value in limits if value.strip().isdigit()), default=total)
        if limit < total:
            text += f", the container's limit is {limit / _GIB:.1f}"
        remedy = "torch and Megatron alone take 0.7 GiB a process; the model comes on top"
        little = min(free, limit) < 4 * _GIB
        found.append(Finding("memory", CHECK, text, remedy) if little else Finding("memory", OK, text))
    return found


def _read(path: str) -> str:
    """The text of a file of the kernel's; empty where there is none."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""


# What a run will use.

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
    if "backend" not in megatron:
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


@dataclass(frozen=True)
class Report:
    """Everything that was found.

    Attributes:
        findings: in the order of the report.
        uses: as :func:`uses` gives it.
        smoke: the finding of ``--smoke``, where it was asked for.
    """

    findings: list[Finding]
    uses: dict[str, str]
    smoke: Finding | None = None

    @property
    def can_start(self) -> bool:
        """Whether training can start: nothing is missing, and the smoke test did not fail."""
        return all(finding.state != MISSING for finding in [*self.findings, *filter(None, [self.smoke])])


def examine(seconds: float, save: str | None = None, recipe: str | None = None) -> Report:
    """Looks at everything.

    Args:
        seconds: how long each import may take.
        save: the folder that --save will name.
        recipe: one of examples/models that will be trained.
    """
    python = judge_python(sys.version_info, sys.executable)
    if python.state == MISSING:
        return Report([python], {})
    recipe_findings = [check_recipe(recipe)] if recipe else []
    with ThreadPoolExecutor(max_workers=max(2, (os.cpu_count() or 2) // 2)) as pool:
        found = dict(zip(PROBES, pool.map(lambda name: probe(name, seconds), PROBES), strict=True))
    environment = dict(os.environ)
    torch = found["torch"]
    gpu = bool(torch.get("devices"))
    findings = [
        python,
        judge_torch(torch),
        *judge_cuda(torch, ask_driver(), environment),
        *judge_megatron(found["megatron"]),
        judge_transformer_engine(found["transformer_engine"], gpu),
        judge_apex(found["apex"], gpu),
        judge_triton(found["triton"], gpu, environment.get("TRITON_INTERPRET") == "1"),
        judge_emerging_optimizers(found["emerging_optimizers"]),
        *check_compiler(gpu),
        check_shared_memory(),
        check_disk("disk, here", os.getcwd(), needed=False),
        check_disk("disk, TMPDIR", os.environ.get("TMPDIR") or tempfile.gettempdir(), needed=True),
        *([check_disk("disk, --save", save, needed=True)] if save else []),
        *check_limits(),
        *judge_environment(environment, torch, "RANK" in environment),
        *recipe_findings,
    ]
    return Report(findings, uses(found["megatron"], torch))


def check_recipe(model: str) -> Finding:
    """Looks at a recipe's feed-forward widths, with FFN, FFN_MULTIPLE and TP as they are set."""
    from megatron_moa.errors import UserError
    from megatron_moa.runs.recipes import awkward_widths, feed_forward_widths, recipe_flags

    try:
        widths = feed_forward_widths(recipe_flags(model, "none", ["--mock-data"]))
    except UserError as error:
        _fail(f"--recipe {error}")
    text = ", ".join(f"{name} {width}" for name, (width, _) in widths.items())
    if awkward := awkward_widths(widths):
        found, _, remedy = awkward.partition("; ")
        return Finding("recipe", CHECK, f"{model}: {found}", remedy)
    return Finding("recipe", OK, f"{model}: {text}")


def smoke() -> Finding:
    """Trains a tiny mixture for five steps, as a user would, on one GPU or the CPU."""
    from megatron_moa.runs.tiny_model import SWIGLU, TINY
    from megatron_moa.runs.training_log import parse_iteration

    script = ROOT / "pretrain_gpt_moa.py"
    name = "five steps"
    if not script.is_file():
        text = f"pretrain_gpt_moa.py is not at {ROOT}"
        return Finding(name, MISSING, text, "install the whole package: pip install -c constraints.txt .")
    environment = {key: value for key, value in os.environ.items() if key not in _LAUNCHER_VARIABLES}
    environment.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        flags = [*TINY, *SWIGLU, "--moa-mixing", "moa", "--train-iters", "5"]
        code, log = _run([sys.executable, str(script), *flags], _SMOKE_SECONDS, environment, folder)
    seconds = time.monotonic() - start
    steps = [step for step in map(parse_iteration, log.splitlines()) if step is not None]
    losses = [step.loss for step in steps if step.loss is not None]
    if code == 0 and len(losses) == 5 and losses[-1] < losses[0]:
        return Finding(name, OK, f"loss {losses[0]:.4f} -> {losses[-1]:.4f}, {seconds:.0f} s with the start")
    why = f"no end within {_SMOKE_SECONDS} s" if code is None else f"exit code {code}"
    if code == 0:
        why = f"losses {' '.join(f'{loss:.4f}' for loss in losses) or 'none'}: not five that go down"
    last = "\n".join(log.strip().splitlines()[-12:])
    return Finding(name, MISSING, f"failed: {why}; the log's last lines:\n{last}")


def show(report: Report) -> None:
    """Prints the report for people."""
    print(f"megatron_moa on {platform.node()}, {platform.system()} {platform.machine()}")
    for finding in [*report.findings, *filter(None, [report.smoke])]:
        print(f"  {finding.state:10}  {finding.name:20}  {finding.text}")
        if finding.remedy:
            print(f"  {'':10}  {'':20}  -> {finding.remedy}")
    if report.uses:
        print("A run here uses")
        for part, what in report.uses.items():
            print(f"  {part:15}  {what}")
    missing = [
        finding.name for finding in [*report.findings, *filter(None, [report.smoke])] if finding.state == MISSING
    ]
    if missing:
        print(f"Training cannot start: {', '.join(missing)}.")
    else:
        print(f"Training can start, on {report.uses['device']}.")


def main(argv: list[str] | None = None) -> int:
    """Looks, prints, and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.error = lambda message: _fail(f"{message}; see {PROGRAM} --help")
    parser.add_argument(
        "--smoke", action="store_true", help="also train a tiny mixture for five steps; minutes at most"
    )
    parser.add_argument(
        "--nccl",
        action="store_true",
        help="only test all-reduces across the ranks this is launched on, and print bandwidths (gloo without GPUs)",
    )
    parser.add_argument("--recipe", metavar="MODEL", help="also look at the widths of a recipe of examples/models")
    parser.add_argument("--save", metavar="FOLDER", help="also look at the disk that training's --save will name")
    parser.add_argument(
        "--timeout", type=float, default=120, metavar="S", help="seconds an import may take, or with --nccl a rank"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    if not 0 < options.timeout < 86400:
        _fail(f"--timeout {options.timeout}: give a positive number of seconds, below a day")
    if options.nccl:
        if options.smoke or options.save or options.recipe:
            _fail("--nccl: runs on every rank and alone; drop --smoke, --save and --recipe")
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # else a time-out is a page of C++ frames
        try:
            from megatron_moa import network
        except ImportError as error:
            _fail(f"--nccl: torch cannot be imported ({error}); run it without --nccl, which says what is missing")
        from megatron_moa.errors import one_line_errors

        with one_line_errors(PROGRAM):
            return network.main(options.timeout, options.json)
    report = examine(options.timeout, options.save, options.recipe)
    if options.smoke and report.can_start:
        report = Report(report.findings, report.uses, smoke())
    if options.json:
        print(json.dumps({"can_start": report.can_start, **asdict(report)}, indent=2))
    else:
        show(report)
    return 0 if report.can_start else 1


def _fail(message: str) -> None:
    print(f"{PROGRAM}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    raise SystemExit(main())
