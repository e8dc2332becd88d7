"""``--moa-log-interval``: mean and standard deviation over tokens of the coefficients, per layer and activation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_moa.coefficients import Coefficients
from megatron_moa.config import MixingConfig
from megatron_moa.experts import MixedSharedExpertMLP
from megatron_moa.progress import write_scalars


class CoefficientMonitor:
    """Records coefficients during every ``interval``-th iteration and logs their statistics over all ranks.

    They are summed and logged at the iteration's end (megatron_moa.progress), where all ranks meet; the last rank,
    which has TensorBoard and W&B, logs.
    """

    def __init__(self, mixing: MixingConfig, interval: int) -> None:
        self.mixing = mixing
        self.interval = interval
        self._recorded: int | None = None  # the iteration that is being recorded

    def attach(self, models: list[MegatronModule]) -> list[MegatronModule]:
        """Finds the coefficients' modules; a post-wrap hook, so it returns the models as they came."""
        self._decoder_layers = models[0].config.num_layers
        mtp_layers = models[0].config.mtp_num_layers or 0
        # Sum, sum of squares and count; row: decoder layer, then MTP layer; column: dense or routed, and shared.
        shape = (self._decoder_layers + mtp_layers, 2, self.mixing.num_coefficients, 3)
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
                target = self._sums[row, int(id(module) in shared)]  # [n, 3]
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
        total, squares, count = sums.unbind(-1)  # [rows, 2, n] each
        mean = total / count
        std = (squares / count - mean.square()).clamp_min(0).sqrt()
        scalars = {}
        for row, column in count[..., 0].nonzero().tolist():
            mtp = row >= self._decoder_layers
            label = f"mtp layer {row - self._decoder_layers + 1}" if mtp else f"layer {row + 1}"
            label += " shared expert" if column else ""
            cells = []
            for index, name in enumerate(self.mixing.coefficient_names):
                m, s = mean[row, column, index].item(), std[row, column, index].item()
                cells.append(f"{name} {m:.4f} +- {s:.4f}")
                tag = f"moa/{label.replace(' ', '_')}/{name}"
                scalars |= {f"{tag}/mean": m, f"{tag}/std": s}
            print(f" coefficients at iteration {iteration} | {label} | {' | '.join(cells)}", flush=True)
        write_scalars(scalars, iteration)


def _accumulate(target: Tensor, coefficients: Tensor) -> None:
    """Adds sum, sum of squares and count of coefficients [..., n] to target [n, 3]."""
    rows = coefficients.reshape(-1, coefficients.shape[-1]).double()
    target[:, 0] += rows.sum(0)
    target[:, 1] += rows.square().sum(0)
    target[:, 2] += rows.shape[0]
