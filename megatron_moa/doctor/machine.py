"""Looks at the machine itself: driver, compiler, shared memory, disks and limits."""

from __future__ import annotations

import os
import re
import shutil
import sysconfig
import tempfile
from pathlib import Path

from megatron_moa.doctor.finding import CHECK, FALLS_BACK, GIB, MISSING, OK, Facts, Finding
from megatron_moa.doctor.processes import run


def ask_driver(seconds: float = 30) -> Facts:
    """Returns what nvidia-smi says: version, CUDA version served, number of GPUs, NVLink.

    ``error`` says why it lists no GPU. The CUDA version is empty where it says none, as in a container without libcuda.
    """
    if shutil.which("nvidia-smi") is None:
        return {"gpus": 0, "error": "no nvidia-smi: no NVIDIA driver"}
    code, text = run(["nvidia-smi"], seconds)
    if code != 0:
        why = "it did not answer" if code is None else (text.strip().splitlines() or [f"exit code {code}"])[-1]
        return {"gpus": 0, "error": f"nvidia-smi: {why}"}
    _, names = run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], seconds)
    code, topology = run(["nvidia-smi", "topo", "-m"], seconds)
    links = sorted(set(re.findall(r"\bNV\d+\b", topology.split("Legend")[0])))
    version, cuda = (re.search(rf"{name}: *([\d.]+)", text) for name in ("Driver Version", "CUDA Version"))
    return {
        "gpus": len(names.split("\n")) - 1,
        "error": "it lists no GPU",
        "version": version.group(1) if version else "",
        "cuda": cuda.group(1) if cuda else "",
        "topology": code == 0,
        "nvlink": " ".join(links),
    }


def check_compiler(gpu: bool) -> list[Finding]:
    """Checks for a compiler (of C with a GPU, else of C++) and for Python's headers.

    It compiles what Triton or torch.compile would: an extension of one line.
    """
    use = "Triton's launchers need a C compiler" if gpu else "torch.compile needs a C++ compiler"
    fallback = (
        "kernels fail at the first step" if gpu else "the mixture runs in eager PyTorch, slower and with more memory"
    )
    kind = "C" if gpu else "C++"
    variable = "CC" if gpu else "CXX"
    # Triton looks for several; torch.compile for one.
    candidates = [os.environ.get("CC"), "gcc", "clang", "cc"] if gpu else [os.environ.get("CXX", "g++")]
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
        code, output = run([compiler, f"-I{include}", str(source), "-c", "-o", str(source) + ".o"], 60)
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
    text = f"{folder}, {size.free / GIB:.1f} of {size.total / GIB:.1f} GiB free"
    if size.free < GIB:
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
    text = f"{free / GIB:.1f} GiB free at {folder}"
    if free < 2 * GIB:
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
        text = f"{free / GIB:.1f} of {total / GIB:.1f} GiB available"
        limits = (_read("/sys/fs/cgroup/memory.max"), _read("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
        limit = min((int(value) for value in limits if value.strip().isdigit()), default=total)
        if limit < total:
            text += f", the container's limit is {limit / GIB:.1f}"
        remedy = "torch and Megatron alone take 0.7 GiB a process; the model comes on top"
        little = min(free, limit) < 4 * GIB
        found.append(Finding("memory", CHECK, text, remedy) if little else Finding("memory", OK, text))
    return found


def _read(path: str) -> str:
    """The text of a file of the kernel's; empty where there is none."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""
