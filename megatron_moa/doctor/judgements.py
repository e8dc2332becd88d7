"""Judges facts about packages, and words what the doctor says of each.

The functions touch nothing, so that facts about GPUs can be judged on a machine without any.
"""

from __future__ import annotations

import re

from megatron_moa.doctor.finding import CHECK, FALLS_BACK, GIB, MISSING, OK, Facts, Finding
from megatron_moa.doctor.processes import LAUNCHER_VARIABLES
from megatron_moa.doctor.versions import EMERGING_OPTIMIZERS, MEGATRON, OLDEST_TORCH, PYTHON, TORCH, TRITON, numbers
from megatron_moa.megatron_fixes.single_process import slurm_gpus


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
    if numbers(facts["version"])[:2] < OLDEST_TORCH:
        return Finding("torch", MISSING, f"{text}: older than 2.6, which Megatron needs", install)
    if facts["version"].split("+")[0] != TORCH:
        text += f" (tested with {TORCH})"
    return Finding("torch", OK, text)


def judge_cuda(torch: Facts, driver: Facts, environment: dict) -> list[Finding]:
    """Driver, GPUs, NVLink, NCCL.

    Args:
        torch: from :func:`megatron_moa.doctor.probes.probe_torch`.
        driver: from :func:`megatron_moa.doctor.machine.ask_driver`.
        environment: of the process.
    """
    if not torch or "error" in torch:
        return []
    if not torch["devices"]:
        return [_no_gpu(torch, driver, environment)]
    found = []
    # nvidia-smi may be absent from a container whose GPUs work.
    served = f" (up to CUDA {driver['cuda']})" if driver.get("cuda") else ""
    version = f"{driver['version']}{served}, " if driver.get("version") else ""
    found.append(Finding("CUDA", OK, f"driver {version}torch's runtime {torch['cuda']}"))
    for index, device in enumerate(torch["devices"]):
        capability = ".".join(map(str, device["capability"]))
        text = f"{device['name']}, compute capability {capability}"
        name = f"GPU {index}"
        if device["error"]:
            remedy = f"leave it out with CUDA_VISIBLE_DEVICES, or take a torch built for {capability}"
            found.append(Finding(name, MISSING, f"{text}: does not compute: {device['error']}", remedy))
            continue
        text += f", {device['free'] / GIB:.1f} of {device['total'] / GIB:.1f} GiB free"
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
    state, consequence = FALLS_BACK, "training runs on CPU over gloo"
    if given := slurm_gpus(environment):
        state = MISSING
        consequence = f"Slurm gave this job {given}, so training ends at once unless CUDA_VISIBLE_DEVICES is set empty"
    if not driver.get("gpus"):
        return Finding("GPU", state, f"none seen ({driver['error']}): {consequence}")
    seen = f"nvidia-smi lists {driver['gpus']}"
    remedy = torch["reason"] or "python -c 'import torch; torch.cuda.init()' says why"
    if not torch["cuda"]:
        why, remedy = "this torch is built without CUDA", f"pip install torch=={TORCH} (PyPI's has CUDA)"
    elif environment.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        why, remedy = "CUDA_VISIBLE_DEVICES hides all", "unset CUDA_VISIBLE_DEVICES"
    elif driver["cuda"] and numbers(driver["cuda"])[:1] < numbers(torch["cuda"])[:1]:
        why = f"driver {driver['version']} serves CUDA up to {driver['cuda']}, torch is built for {torch['cuda']}"
        major = numbers(driver["cuda"])[0]
        remedy = (
            f"install a newer driver, or a torch for CUDA {major} (pip install torch=={TORCH} "
            f"--index-url https://download.pytorch.org/whl/cuNNN; pytorch.org lists the NNN)"
        )
    else:
        why = "torch cannot use them"
    return Finding("GPU", state, f"{seen}, but {why}: {consequence}", remedy)


def judge_megatron(facts: Facts) -> list[Finding]:
    """megatron-core and its data set helpers."""
    install = f'pip install "megatron-core[training]=={MEGATRON}"'
    if not facts:
        return [Finding("megatron-core", MISSING, "not installed", install)]
    version = facts.get("version")
    if version and version != MEGATRON:
        why = f"{version}: what is wrapped and extended here is {MEGATRON}'s"
        if numbers(version) < (0, 17):
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
        found.append(Finding("WORLD_SIZE", MISSING, text, f"unset {' '.join(LAUNCHER_VARIABLES)}"))
    return found
