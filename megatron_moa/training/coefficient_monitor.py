"""Logs what the coefficients do over tokens, per layer and activation (``--moa-log-interval``).

Of each coefficient mean and standard deviation; of a layer's gates together effective rank, spread and distance from a
constant (docs/watching.md). All follow from one small matrix a layer, the sum over tokens of the products of
coefficients, which ranks add up.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.nn import functional as F

from megatron_moa.layers.coefficients import Coefficients
from megatron_moa.layers.experts import MixedSharedExpertMLP
from megatron_moa.mixture.config import MixtureConfig
from megatron_moa.training.gate_statistics import GateStatistics
from megatron_moa.training.progress import write_scalars


class CoefficientMonitor:
    """Records coefficients during every ``interval``-th iteration, and logs their statistics.

    Statistics are over all ranks. Coefficients are summed and logged at the iteration's end (progress.py), where all
    ranks meet; the last rank, which has TensorBoard and W&B, logs.
    """

    def __init__(self, mixture: MixtureConfig, interval: int) -> None:
        self.mixture = mixture
        self.interval = interval
        self._recorded: int | None = None  # the iteration that is being recorded

    def attach(self, models: list[MegatronModule]) -> list[MegatronModule]:
        """Finds the coefficients' modules; a post-wrap hook, so it returns the models as they came."""
        self._decoder_layers = models[0].config.num_layers
        mtp_layers = models[0].config.mtp_num_layers or 0
        # Row: decoder layer, then MTP layer; column: dense or routed, and shared; then see _accumulate.
        size = 1 + self.mixture.num_coefficients
        shape = (self._decoder_layers + mtp_layers, 2, size, size)
        self._sums = torch.zeros(shape, dtype=torch.float64, device=torch.cuda.current_device())
        self._observed: list[tuple[Coefficients, Callable[[Tensor], None]]] = []
        for model in models:
            for name, layer in model.named_modules():
                if isinstance(layer, TransformerLayer):
                    in_mtp = ".mtp." in f".{name}."
                    self._find(layer, row=layer.layer_number - 1 + in_mtp * self._decoder_layers)
        return models

    def _find(self, layer: TransformerLayer, row: int) -> None:
        shared = {id(m.coefficients) for m in layer.modules() if isinstance(m, MixedSharedExpertMLP)}
        for module in layer.modules():
            if isinstance(module, Coefficients):
                target = self._sums[row, int(id(module) in shared)]
                self._observed.append((module, lambda coefficients, target=target: _accumulate(target, coefficients)))

    def begin_microbatch(self, iteration: int) -> None:
        """Called before each training forward; ``iteration`` counts from 0, as in ``args.curr_iteration``."""
        if self._recorded is not None or (iteration + 1) % self.interval:
            return
        self._recorded = iteration + 1
        self._sums.zero_()
        for module, observer in self._observed:
            module.observer = observer

    def end_iteration(self) -> None:
        """Logs what was recorded, if this iteration was; all ranks call it, before anything else runs forward."""
        if self._recorded is None:
            return
        for module, _ in self._observed:
            module.observer = None
        torch.distributed.all_reduce(self._sums)
        if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            self._log(self._recorded, self._sums.cpu())
        self._recorded = None

    def _log(self, iteration: int, sums: Tensor) -> None:
        scalars: dict[str, float] = {}
        for row, column in sums[..., 0, 0].nonzero().tolist():
            mtp = row >= self._decoder_layers
            label = f"mtp layer {row - self._decoder_layers + 1}" if mtp else f"layer {row + 1}"
            label += " shared expert" if column else ""
            tag = f"moa/{label.replace(' ', '_')}"
            statistics = _statistics_of(sums[row, column])
            means = statistics.mean
            stds = torch.where(means.isfinite(), statistics.variance.sqrt(), math.nan)
            cells = []
            for name, mean, std in zip(self.mixture.coefficient_names, means.tolist(), stds.tolist(), strict=True):
                cells.append(f"{name} {mean:.4f} +- {std:.4f}")
                scalars |= {f"{tag}/{name}/mean": mean, f"{tag}/{name}/std": std}
            print(f" coefficients at iteration {iteration} | {label} | {' | '.join(cells)}", flush=True)
            if self.mixture.kind == "moa":
                rank, spread, distance = _of_all_gates(statistics)
                scalars |= {f"{tag}/effective-rank": rank, f"{tag}/spread": spread, f"{tag}/distance": distance}
                print(
                    f" gates at iteration {iteration} | {label} | effective rank {rank:.2f} of {len(cells)} | "
                    f"spread {spread:.4f} | distance from a constant {distance:.4f}",
                    flush=True,
                )
        write_scalars(scalars, iteration)


def _accumulate(target: Tensor, coefficients: Tensor) -> None:
    """Adds the sum over tokens of the products of (1, c_1 ... c_n) to the target.

    The target is [1 + n, 1 + n], with the number of tokens in the corner and the sums beside that.

    Args:
        target: float64.
        coefficients: [..., n]
    """
    rows = F.pad(coefficients.reshape(-1, coefficients.shape[-1]).double(), (1, 0), value=1.0)
    target.addmm_(rows.T, rows)


def _statistics_of(sums: Tensor) -> GateStatistics:
    """Of what :func:`_accumulate` has added up, without groups of tokens."""
    statistics = GateStatistics(len(sums) - 1, types=1, positions=1)
    statistics.products += sums[1:, 1:]
    statistics.by_expert.sums += sums[0, 1:]
    statistics.by_expert.counts += sums[0, 0]
    return statistics


def _of_all_gates(statistics: GateStatistics) -> tuple[float, float, float]:
    """Returns the effective rank, spread and distance from a constant of all gates together.

    The effective rank is that of the tokens-by-coefficients matrix C, centred; the spread is the root mean square of
    the gates' standard deviations; the distance is relative, |C - 1 m| / |C| with m the mean over tokens and Frobenius'
    norm. NaN where coefficients are not finite: nan_guard.py decides whether to stop.
    """
    if not statistics.products.isfinite().all():
        return math.nan, math.nan, math.nan
    spread = statistics.variance.mean().sqrt().item()
    size = (statistics.products.diagonal().mean() / statistics.count).sqrt().item()
    return statistics.effective_rank(), spread, spread / size if size > 0 else 0.0
