"""--moa-log-interval: the statistics against the coefficients themselves."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

from megatron_moa.layers.mlp import MixedMLP
from megatron_moa.mixture.config import MixtureConfig
from megatron_moa.training import coefficient_monitor as monitor_module
from megatron_moa.training.coefficient_monitor import CoefficientMonitor
from tests.support.layers import build_model, logits_of, make_config, moe_settings
from tests.support.training import MOE, SWIGLU, Run, record

TWO = MixtureConfig(activations=("silu", "tanh"), backend="eager")


def logged(text: str, label: str) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation by activation from the line of one layer."""
    (line,) = [line for line in text.splitlines() if "coefficients at" in line and f"| {label} |" in line]
    return {name: (float(m), float(s)) for name, m, s in re.findall(r"([\w.]+) (-?[\d.]+) \+- ([\d.]+)", line)}


def gates_of(text: str) -> dict[str, tuple[float, ...]]:
    """Effective rank, its largest value, spread and distance, by layer, of one iteration."""
    pattern = r"gates at iteration \d+ \| ([^|]+) \| effective rank (\S+) of (\d+) \| spread (\S+) \| distance from a"
    rows = re.findall(pattern + r" constant (\S+)", text)
    assert len(rows) == len({label for label, *_ in rows})
    return {label: tuple(map(float, values)) for label, *values in rows}


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> dict[int, dict[str, float]]:
    """What TensorBoard and W&B get, by iteration."""
    scalars: dict[int, dict[str, float]] = {}
    monkeypatch.setattr(
        monitor_module, "write_scalars", lambda values, iteration: scalars.setdefault(iteration, {}).update(values)
    )
    return scalars


def record_once(mixture: MixtureConfig, weight: float | None = None, **settings: object) -> None:
    """One recorded forward pass; ``weight``: what all gates' vectors are made of."""
    model = build_model(make_config(**settings), mixture)
    monitor = CoefficientMonitor(mixture, interval=1)
    monitor.attach([model])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if weight is not None and name.endswith("coefficients.weight"):
                parameter.fill_(weight)
    monitor.begin_microbatch(0)
    logits_of(model)
    monitor.end_iteration()


@pytest.mark.usefixtures("megatron")
class TestStatistics:
    """Of models in this process."""

    def test_they_are_those_of_the_recorded_iteration(
        self, capsys: pytest.CaptureFixture[str], written: dict[int, dict[str, float]]
    ) -> None:
        model = build_model(make_config(), TWO)
        layers = [module for module in model.modules() if isinstance(module, MixedMLP)]
        monitor = CoefficientMonitor(TWO, interval=2)
        monitor.attach([model])
        seen: list[torch.Tensor] = []
        layers[1].coefficients.register_forward_hook(lambda _module, _inputs, output: seen.append(output.detach()))
        for iteration in range(4):
            monitor.begin_microbatch(iteration)
            seen.clear()
            for _ in range(2):  # micro-batches
                monitor.begin_microbatch(iteration)
                logits_of(model)
            recorded = torch.cat(list(seen)).flatten(0, 1).double()  # [tokens, n]
            monitor.end_iteration()
            with torch.no_grad():
                layers[1].coefficients.weight.mul_(1.5)
            logits_of(model)  # validation between iterations is not recorded
        printed = capsys.readouterr().out
        assert {int(i) for i in re.findall(r"at iteration (\d+)", printed)} == {2, 4} == set(written)
        last = printed[printed.index("coefficients at iteration 4") :]
        values = logged(last, "layer 2")
        for index, name in enumerate(TWO.coefficient_names):
            mean, std = recorded[:, index].mean().item(), recorded[:, index].std(correction=0).item()
            assert values[name] == pytest.approx((mean, std), abs=1e-4)
            assert written[4][f"moa/layer_2/{name}/mean"] == pytest.approx(mean)
            assert written[4][f"moa/layer_2/{name}/std"] == pytest.approx(std)
        centred = recorded - recorded.mean(0)
        part = torch.linalg.svdvals(centred)
        part = part / part.sum()
        expected = {
            "effective-rank": math.exp(-(part * part.log()).sum()),
            "spread": centred.square().mean().sqrt().item(),
            "distance": (torch.linalg.norm(centred) / torch.linalg.norm(recorded)).item(),
        }
        assert 1 < expected["effective-rank"] < 4
        for name, value in expected.items():
            assert written[4][f"moa/layer_2/{name}"] == pytest.approx(value)
        assert gates_of(last)["layer 2"] == pytest.approx(
            (expected["effective-rank"], 4, expected["spread"], expected["distance"]), abs=5e-3
        )

    def test_shared_experts_have_lines_of_their_own_and_la_has_no_spread(
        self, capsys: pytest.CaptureFixture[str], written: dict[int, dict[str, float]]
    ) -> None:
        mixture = MixtureConfig(kind="la", activations=("silu", "tanh"), backend="eager")
        record_once(mixture, **moe_settings(moe_shared_expert_intermediate_size=12))
        printed = capsys.readouterr().out
        for label in ("layer 1", "layer 1 shared expert", "layer 2", "layer 2 shared expert"):
            assert logged(printed, label)["linear.tanh"] == (1.0, 0.0)
        assert not gates_of(printed)
        assert all(name.endswith(("/mean", "/std")) for name in written[1])

    @pytest.mark.parametrize(("weight", "rank"), [(0.3, 1.0), (0.0, 0.0)], ids=["all alike", "constant"])
    def test_rank_of_gates_that_move_together_and_of_those_that_do_not_move(
        self, weight: float, rank: float, written: dict[int, dict[str, float]]
    ) -> None:
        record_once(TWO, weight)
        for layer in (1, 2):
            assert written[1][f"moa/layer_{layer}/effective-rank"] == pytest.approx(rank, abs=1e-3)
            for name in ("spread", "distance"):
                assert (written[1][f"moa/layer_{layer}/{name}"] > 1e-3) == (rank > 0)

    def test_coefficients_that_are_not_finite_do_not_stop_the_run(
        self, capsys: pytest.CaptureFixture[str], written: dict[int, dict[str, float]]
    ) -> None:
        """The run says where they come from and ends with its own exit code (megatron_moa.training.nan_guard)."""
        record_once(TWO, math.nan)
        assert all(math.isnan(value) for value in written[1].values())
        assert gates_of(capsys.readouterr().out).keys() == {"layer 1", "layer 2"}

    def test_names_are_in_the_documentation(self, written: dict[int, dict[str, float]]) -> None:
        record_once(MixtureConfig(backend="eager"))
        table = (Path(__file__).resolve().parents[2] / "docs/watching.md").read_text()
        assert not [name for name in written[1] if f"/{name.rsplit('/', 1)[-1]}`" not in table]


@pytest.mark.distributed
def test_splitting_the_model_changes_no_statistic(tmp_path: Path) -> None:
    """Checks that every token counts as often as any other, on whatever ranks.

    Routed and shared experts start from the same weights in every split.
    """
    flags = [*SWIGLU, *MOE, "--moe-shared-expert-intermediate-size", "32", "--micro-batch-size", "1"]
    flags += ["--moa-gate-init-std", "0.3", "--moa-backend", "eager", "--moa-log-interval", "1", "--train-iters", "1"]
    start = tmp_path / "start"
    whole = record(start, *flags)
    splits = {
        "sequence and experts": "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2 "
        "--expert-tensor-parallel-size 1",
        "pipeline": "--pipeline-model-parallel-size 2",
    }
    expected = gates_of(whole.log)
    assert list(expected) == ["layer 1", "layer 1 shared expert", "layer 2", "layer 2 shared expert"]
    assert all(1 < rank < 7 and spread > 0.05 for rank, _, spread, _ in expected.values())
    assert "moa, one-sided, " in whole.log
    assert " (--moa-form auto: routed experts), eager backend" in whole.log
    for name, split in splits.items():
        run: Run = record(tmp_path / name, *flags, *split.split(), processes=2, start_from=start)
        for label, values in expected.items():
            assert gates_of(run.log)[label] == pytest.approx(values, abs=2e-4), name
            assert logged(run.log, label) == {
                gate: pytest.approx(numbers, abs=2e-4) for gate, numbers in logged(whole.log, label).items()
            }, name
