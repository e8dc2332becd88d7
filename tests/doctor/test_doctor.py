"""Tests the doctor in surroundings that are really broken, where breaking them is cheap.

What the doctor says of GPUs is tested on facts about them.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from megatron_moa.doctor import examine, judgements, machine, network, probes, processes, smoke, uses, versions
from megatron_moa.doctor.__main__ import main
from megatron_moa.megatron_fixes.single_process import free_port, single_process_environment
from tests.test_setup import packaging_arguments, pins, write_script

__all__ = ["packaging_arguments", "pins"]  # fixtures

ROOT = Path(__file__).resolve().parents[2]

HOPPER = {"name": "NVIDIA H100", "capability": [9, 0], "error": "", "free": 79 * 2**30, "total": 80 * 2**30}
GPU_TORCH = {"version": "2.11.0", "cuda": "13.0", "nccl": "2.28.9", "threads": 8, "devices": [HOPPER], "reason": ""}
DRIVER = {"gpus": 1, "version": "580.1", "cuda": "13.0", "topology": True, "nvlink": "", "error": ""}


def run(*flags: str, python: str = sys.executable, **environment: str) -> subprocess.CompletedProcess[str]:
    """``python -m megatron_moa.doctor`` in the repository, with these variables."""
    inherited = {key: value for key, value in os.environ.items() if key not in processes.LAUNCHER_VARIABLES}
    return subprocess.run(
        [python, "-m", "megatron_moa.doctor", *flags],
        cwd=ROOT,
        env={**inherited, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=250,
    )


def fake_package(folder: Path, name: str, source: str = "", distribution: str = "", version: str = "") -> None:
    """A package with this source, and what pip would have noted of it."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(source)
    if distribution:
        info = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose packages come before all others, here and in processes started from here."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_versions_are_those_of_the_set_up(packaging_arguments: dict, pins: dict[str, str]) -> None:
    assert pins["megatron-core"] == versions.MEGATRON
    assert pins["torch"] == versions.TORCH
    assert pins["triton"] == versions.TRITON
    assert pins["emerging-optimizers"] == versions.EMERGING_OPTIMIZERS
    assert packaging_arguments["python_requires"] == f">={'.'.join(map(str, versions.PYTHON))}"
    ranges = {canonicalize_name(r.name): r.specifier for r in map(Requirement, packaging_arguments["install_requires"])}
    assert str(ranges["torch"]) == f">={'.'.join(map(str, versions.OLDEST_TORCH))}"


@pytest.mark.slow
def test_here_training_can_start() -> None:
    result = run("--json", TRITON_INTERPRET="0")
    report = json.loads(result.stdout)
    assert result.returncode == 0, result.stdout
    assert report["can_start"] is True
    states = {finding["name"]: finding["state"] for finding in report["findings"]}
    assert states["megatron-core"] == states["torch"] == states["dataset helpers"] == "ok"
    if not shutil.which("nvidia-smi"):
        assert states["GPU"] == "falls back"
        assert report["uses"]["communication"] == "gloo"
        assert report["uses"]["attention"] == "torch's scaled_dot_product_attention"
        assert report["uses"]["norms"] == "plain PyTorch's"


@pytest.mark.slow
def test_broken_surroundings_are_findings(broken: Path) -> None:
    """Checks that four broken packages are found in one run, without a GPU.

    They are an old Megatron, a foreign apex, the placeholder of emerging-optimizers, and Transformer Engine.
    """
    fake_package(broken, "apex", "__version__ = '0.9.10dev'")
    fake_package(broken, "emerging_optimizers", "", "emerging-optimizers", "999.9.9")
    fake_package(broken, "transformer_engine", "raise OSError('libcudnn.so.9: cannot open\\nshared object file')")
    fake_package(broken, "nothing", "", "megatron-core", "0.16.0")
    result = run()
    assert result.returncode == 1
    assert "Traceback" not in result.stdout + result.stderr
    lines = {match[2]: match for match in re.finditer(r"  (missing|check|falls back) +(\S.*?)  +(.*)", result.stdout)}
    assert "0.16.0: below 0.17 it ships no megatron.training" in lines["megatron-core"][3]
    assert 'pip install "megatron-core[training]==0.19.2"' in result.stdout
    assert "not NVIDIA's" in lines["Apex"][3]
    assert "pip uninstall apex" in result.stdout
    assert "placeholder" in lines["emerging-optimizers"][3]
    assert "kept out: its modules need CUDA" in lines["Transformer Engine"][3]
    assert lines["Apex"][1] == "check"
    assert all(lines[name][1] == "missing" for name in ("megatron-core", "emerging-optimizers"))
    ending = "Training cannot start: megatron-core, emerging-optimizers."
    assert result.stdout.rstrip().endswith(ending)


@pytest.mark.parametrize(("accumulates", "state"), [(True, "ok"), (False, "falls back")])
def test_apex_without_gradient_accumulation_is_told(accumulates: bool, state: str) -> None:
    finding = judgements.judge_apex({"version": "0.1", "nvidia": True, "accumulates": accumulates}, gpu=True)
    assert finding.state == state
    assert accumulates or "fused_weight_gradient_mlp_cuda" in finding.text


def test_apex_is_not_in_use_without_a_gpu(broken: Path) -> None:
    """What it has is looked up, not imported."""
    fake_package(broken, "apex", "raise OSError('no libcudart.so')")
    for part in ("optimizers", "normalization"):
        (broken / "apex" / part).mkdir()
    facts = probes.probe_apex()
    assert facts["nvidia"] is True
    finding = judgements.judge_apex(facts, gpu=False)
    assert (finding.state, finding.remedy) == ("falls back", "")
    assert "kept out" in finding.text


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize(("name", "state"), [("apex", "ok"), ("emerging_optimizers", "missing")])
def test_a_run_ends_as_the_doctor_says(broken: Path, name: str, state: str) -> None:
    """With the foreign apex it trains, with the placeholder it cannot start."""
    fake_package(broken, name, "", *(("emerging-optimizers", "999.9.9") if name == "emerging_optimizers" else ()))
    finding = smoke.smoke()
    assert finding.state == state, finding
    assert state == "ok" or "scalar_optimizers" in finding.text


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("raise ValueError('no such thing')", "ValueError: no such thing"),
        ("import os; os.abort()", "signal 6 (SIGABRT)"),
        ("import time; time.sleep(60)", "did not end within 2 s"),
        ("raise SystemExit(3)", "exit code 3"),
    ],
)
def test_an_import_that_fails_is_a_finding(broken: Path, source: str, error: str) -> None:
    fake_package(broken, "triton", source)
    facts = probes.probe("triton", seconds=2)
    assert error in facts["error"]
    finding = judgements.judge_triton(facts, gpu=True, interpreted=False)
    assert finding.state == "falls back"
    assert error in finding.text


def test_what_is_not_installed_is_not_a_failed_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(probes.PROBES, "no_such_package", dict)
    assert probes.probe("no_such_package", seconds=2) == {}


def test_old_python_is_named_by_old_python() -> None:
    candidates = [shutil.which(f"python3.{minor}") for minor in (11, 10, 9, 8)]
    candidates += sorted(str(path) for path in (Path.home() / ".pyenv/versions").glob("3.[89].*/bin/python"))
    works = [
        path
        for path in filter(None, candidates)
        if subprocess.run([path, "-c", "import sys; sys.exit(sys.version_info >= (3, 12))"], check=False).returncode
        == 0
    ]
    if not works:
        pytest.skip("no Python from 3.8 to 3.11 here")
    for python in works:
        result = run("--json", python=python)
        assert result.returncode == 1, result.stderr
        (finding,) = json.loads(result.stdout)["findings"]
        assert finding["state"] == "missing"
        assert "needs 3.12 or later" in finding["text"]


def test_what_the_doctor_loads_at_its_start_is_read_by_python_3_8() -> None:
    """Python 3.8 evaluates the annotations of a module without the import from ``__future__``."""
    code = """import sys, megatron_moa.doctor.__main__
for name, module in sys.modules.items():
    if name.startswith("megatron_moa"):
        print(module.__file__)"""
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    files = [Path(file) for file in loaded.stdout.splitlines()]
    assert len(files) > 15, files
    for file in files:
        module = ast.parse(file.read_text(), feature_version=(3, 8))
        imported = {node.module for node in module.body if isinstance(node, ast.ImportFrom)}
        annotated = any(isinstance(node, ast.FunctionDef | ast.AnnAssign) for node in ast.walk(module))
        assert "__future__" in imported or not annotated, file


def test_driver_too_old_for_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU that torch cannot use: training falls back to the CPU, and the line says why."""
    answer = "| NVIDIA-SMI 535.104  Driver Version: 535.104   CUDA Version: 12.2 |"
    body = f'case "$*" in "") echo "{answer}" ;; --query*) echo "NVIDIA H100 80GB HBM3" ;; *) exit 1 ;; esac'
    write_script(tmp_path / "nvidia-smi", body)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    driver = machine.ask_driver()
    assert (driver["gpus"], driver["version"], driver["cuda"]) == (1, "535.104", "12.2")
    without = {**GPU_TORCH, "devices": []}
    (finding,) = judgements.judge_cuda(without, driver, {})
    assert finding.state == "falls back"
    assert "serves CUDA up to 12.2, torch is built for 13.0" in finding.text
    (finding,) = judgements.judge_cuda({**without, "cuda": None}, driver, {})
    assert "built without CUDA" in finding.text
    (finding,) = judgements.judge_cuda({**without, "reason": "no libcuda.so"}, {**driver, "cuda": ""}, {})
    assert (finding.remedy, "newer driver" in finding.text) == ("no libcuda.so", False)
    (finding,) = judgements.judge_cuda({**without, "cuda": "12.6"}, driver, {"CUDA_VISIBLE_DEVICES": ""})
    assert finding.remedy == "unset CUDA_VISIBLE_DEVICES"
    for seen in (driver, {"gpus": 0, "error": "no nvidia-smi"}):
        (finding,) = judgements.judge_cuda(without, seen, {"SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": "0,1"})
        assert (finding.state, "Slurm gave this job 8, so training ends at once" in finding.text) == ("missing", True)
        hidden = {"SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": ""}
        assert judgements.judge_cuda(without, seen, hidden)[0].state == "falls back"


def test_cuda_version_that_nvidia_smi_does_not_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container without libcuda."""
    write_script(tmp_path / "nvidia-smi", 'echo "| Driver Version: 580.1   CUDA Version: N/A |"')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert machine.ask_driver()["cuda"] == ""


def test_a_gpu_that_hangs_leaves_a_report() -> None:
    """Megatron's probe does not touch the GPU, so it may answer where torch's does not."""
    megatron = {"backend": "triton", "te": False, "muon": True}
    assert uses.uses(megatron, {"error": "its import did not end within 120 s"}) == {}


def test_driver_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_script(tmp_path / "nvidia-smi", "exec sleep 60")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert "did not answer" in machine.ask_driver(seconds=1)["error"]


def test_gpus_from_facts() -> None:
    """Judges facts about GPUs, which needs no GPU.

    That the facts are right is for a GPU machine to show.
    """
    findings = {finding.name: finding for finding in judgements.judge_cuda(GPU_TORCH, DRIVER, {})}
    assert [finding.state for finding in findings.values()] == ["ok"] * 3
    assert "79.0 of 80.0 GiB" in findings["GPU 0"].text
    ill = {**HOPPER, "error": "no kernel image is available"}
    full = {**HOPPER, "free": 2**30}
    found = judgements.judge_cuda({**GPU_TORCH, "devices": [full, ill]}, DRIVER, {})
    states = {finding.name: finding.state for finding in found}
    assert states == {"CUDA": "ok", "GPU 0": "check", "GPU 1": "missing", "NVLink": "falls back", "NCCL": "ok"}


def test_variables_of_gpu_machines() -> None:
    def states(environment: dict[str, str], torch: dict = GPU_TORCH) -> dict[str, str]:
        return {
            finding.name: finding.state for finding in judgements.judge_environment(environment, torch, launched=False)
        }

    assert states({})["CUDA_DEVICE_MAX_CONNECTIONS"] == "check"
    assert states({"CUDA_DEVICE_MAX_CONNECTIONS": "1"})["CUDA_DEVICE_MAX_CONNECTIONS"] == "ok"
    blackwell = {**GPU_TORCH, "devices": [{**HOPPER, "capability": [10, 0]}]}
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in states({}, blackwell)
    assert states({"NCCL_IB_DISABLE": "1"})["NCCL_IB_DISABLE"] == "check"
    assert "NCCL_IB_DISABLE" not in states({"NCCL_IB_DISABLE": "0"})
    assert states({"WORLD_SIZE": "8"})["WORLD_SIZE"] == "missing"
    interpreted = judgements.judge_triton({"version": "3.6.0"}, gpu=True, interpreted=True)
    assert (interpreted.state, interpreted.remedy) == ("check", "unset TRITON_INTERPRET")


def test_left_over_world_size_would_stop_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the doctor says of it: the script refuses to start."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="WORLD_SIZE is 8 but RANK is not set"):
        single_process_environment()


def test_compiler_that_does_not_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its being on PATH is all that the mixture's backend asks, so the first step would fail."""
    (finding,) = [f for f in machine.check_compiler(gpu=False) if f.name == "C++ compiler"]
    assert finding.state == ("ok" if shutil.which("g++") or shutil.which("clang++") else "falls back")
    broken = write_script(tmp_path / "g++", 'echo "g++: fatal error: cc1plus: no such file" >&2; exit 1')
    monkeypatch.setenv("CXX", str(broken))
    (finding,) = [f for f in machine.check_compiler(gpu=False) if f.name == "C++ compiler"]
    assert finding.state == "missing"
    assert "cc1plus" in finding.text
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    (finding,) = machine.check_compiler(gpu=False)
    assert finding.state == "falls back"
    assert "apt install g++" in finding.remedy


def test_shared_memory_that_is_read_only() -> None:
    """A container's /dev/shm, remade in a mount namespace of its own."""
    program = (
        "from megatron_moa.doctor import machine; f = machine.check_shared_memory(); print(f.state); print(f.text)"
    )
    mount = f'mount -t tmpfs -o ro none /dev/shm && exec "{sys.executable}" -c "{program}"'
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "true"], check=False).returncode:
        pytest.skip("needs the right to make mount namespaces")
    result = subprocess.run(["unshare", "-m", "sh", "-c", mount], cwd=ROOT, capture_output=True, text=True)
    state, text = result.stdout.splitlines()
    assert state == "missing"
    assert "Read-only file system" in text
    assert machine.check_shared_memory().state in ("ok", "check")


def test_disk_of_save(tmp_path: Path) -> None:
    finding = machine.check_disk("disk", str(tmp_path / "not" / "yet"), needed=True)
    assert "GiB free" in finding.text
    assert not (tmp_path / "not").exists()
    (tmp_path / "file").touch()
    finding = machine.check_disk("disk", str(tmp_path / "file"), needed=True)
    assert finding.state == "missing"
    assert "cannot be written to" in finding.text


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--timeout", "0"), "--timeout 0.0: give a positive number"),
        (("--nccl", "--smoke"), "--nccl: runs on every rank and alone"),
        (("--recipe", "moe2b"), "--recipe moe2b: there is no such recipe; did you mean moe-2b"),
        (("--smok",), "unrecognized arguments: --smok"),
    ],
)
def test_mistakes_are_one_line(flags: tuple[str, ...], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert_mistake(flags, text, capsys)


def assert_mistake(flags: tuple[str, ...], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The doctor says so in one line and leaves with 2."""
    with pytest.raises(SystemExit) as left:
        main(list(flags))
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert text in line


@pytest.mark.parametrize(("name", "value"), [("TP", "0"), ("CP", "two"), ("MICRO_BATCH_SIZE", "x")])
def test_recipes_variables_that_are_no_numbers_are_one_line(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, value)
    assert_mistake(("--recipe", "dense-0.12b"), "--recipe ", capsys)


def test_widths_of_a_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    finding = examine.check_recipe("dense-0.5b")
    assert (finding.state, finding.text) == (
        "check",
        "dense-0.5b: feed-forward width 3413 is odd: slow on tensor cores",
    )
    assert finding.remedy.startswith("FFN_MULTIPLE=128 ")
    monkeypatch.setenv("FFN_MULTIPLE", "128")
    finding = examine.check_recipe("dense-0.5b")
    assert (finding.state, finding.text) == ("ok", "dense-0.5b: feed-forward width 3456")


@pytest.mark.full
@pytest.mark.slow
def test_smoke_trains_here() -> None:
    finding = smoke.smoke()
    assert finding.state == "ok", finding.text
    first, last = map(float, re.findall(r"\d\.\d{4}", finding.text))
    assert last < first


def test_smoke_shows_what_went_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoke, "ROOT", tmp_path)
    assert "pretrain_gpt_moa.py is not at" in smoke.smoke().text
    (tmp_path / "pretrain_gpt_moa.py").write_text("raise RuntimeError('out of luck')")
    finding = smoke.smoke()
    assert finding.state == "missing"
    assert "exit code 1" in finding.text
    assert finding.text.endswith("RuntimeError: out of luck")
    line = " iteration 1/ 5 | elapsed time per iteration (ms): 9.0 | lm loss: 4.1E+00 |"
    (tmp_path / "pretrain_gpt_moa.py").write_text(f"print('{line}')")
    assert "losses 4.1000: not five that go down" in smoke.smoke().text


@pytest.mark.full
@pytest.mark.distributed
@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="two ranks on one GPU are refused")
def test_all_reduce_across_two_ranks() -> None:
    command = [sys.executable, "-m", "megatron_moa.launch", "--nproc-per-node", "2"]
    command += ["--master-port", str(free_port()), "-m", "megatron_moa.doctor", "--nccl", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    results = json.loads(result.stdout)
    assert results["backend"] == "gloo"
    assert results["correct"] is True
    assert [row["bytes"] for row in results["all_reduce"]] == list(network.SIZES["gloo"])
    for row in results["all_reduce"]:
        assert row["algorithm_bandwidth_median"] == pytest.approx(row["bytes"] / row["ms_median"] * 1000)
        assert row["bus_bandwidth_median"] == pytest.approx(row["algorithm_bandwidth_median"])  # 2 (n - 1) / n is 1
        assert 0 < row["algorithm_bandwidth_min"] <= row["algorithm_bandwidth_median"]
    assert [link["ranks"] for link in results["links"]] == [[0, 1]]


@pytest.mark.parametrize(
    ("rank", "text"),
    [
        ("0", "no sign of rank 1, 2 of 3 within 2 s"),
        ("1", "does not answer"),
        ("3", "RANK 3: not below WORLD_SIZE 3"),
    ],
)
def test_ranks_that_do_not_come(rank: str, text: str) -> None:
    world = {"RANK": rank, "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    result = run("--nccl", "--timeout", "2", **world)
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert text in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 but RANK is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "x"}, "MASTER_PORT x: not a number"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "99999"}, "MASTER_PORT 99999: no port"),
        ({"RANK": "0", "WORLD_SIZE": "0", "MASTER_ADDR": "a", "MASTER_PORT": "9"}, "WORLD_SIZE 0: no ranks"),
    ],
)
def test_variables_of_no_launcher_are_one_line(
    variables: dict[str, str], text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in processes.LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert_mistake(("--nccl",), text, capsys)


def test_ranks_that_cannot_work_together() -> None:
    assert network.complaint([{"gpus": 8, "local_rank": 7, "host": "a"}] * 2) is None
    mixed = [{"gpus": 8, "local_rank": 0, "host": "a"}, {"gpus": 0, "local_rank": 0, "host": "b"}]
    assert "rank 1 sees no GPU" in network.complaint(mixed)
    assert "LOCAL_RANK 1, but a has 1 GPUs" in network.complaint([{"gpus": 1, "local_rank": 1, "host": "a"}])


def test_slow_ranks_and_links_are_named() -> None:
    assert network.slow_ranks([1.0, 1.1, 0.9, 1.4], "aabb") == []
    (line,) = network.slow_ranks([1.0, 1.1, 2.0, 0.9], "aabb")
    assert line.startswith("rank 2 on b ")
    # Four hosts of one rank each: between hosts all around; rank 2's links are both slow.
    ring = {(0, 1): 40e9, (1, 2): 10e9, (2, 3): 11e9, (3, 4): 41e9, (4, 0): 39e9}
    (line,) = network.slow_links(ring, "abcde")
    assert line.startswith("rank 2 on c:")
    assert "10 GB/s" in line
    # Within hosts links are fast: those between hosts are no slower than others of their kind.
    nodes = {(0, 1): 400e9, (1, 2): 40e9, (2, 3): 400e9, (3, 0): 41e9}
    assert network.slow_links(nodes, "aabb") == []
    (line,) = network.slow_links({**ring, (2, 3): 40e9}, "abcde")
    assert "ranks 1 on b and 2 on c" in line


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8])
def test_links_measured_at_once_share_no_rank(size: int) -> None:
    pairs = [(rank, (rank + 1) % size) for rank in range(size)][: size if size > 2 else 1]
    for turn in range(3):
        ranks = [rank for pair in pairs if network.turn_of(pair, size) == turn for rank in pair]
        assert len(ranks) == len(set(ranks))
