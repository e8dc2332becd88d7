"""``--moa-log-interval``: mean and standard deviation over tokens of the coefficients, per layer and activation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.training import get_tensorboard_writer
from torch import Tensor

from megatron_moa.coefficients import Coefficients
from megatron_moa.config import MixingConfig
from megatron_moa.experts import MixedSharedExpertMLP


@dataclass
class _Pending:
    iteration: int
    sums: Tensor  # [rows, 2, n, 3] on the CPU, being reduced
    work: torch.distributed.Work


class CoefficientMonitor:
    """Records coefficients during every ``interval``-th iteration and logs their statistics over all ranks.

    The reduction is asynchronous, over a gloo group of its own: on pipeline stages the same iteration begins at
    different times, so a blocking one at its beginning would wait for ranks that wait for this one. What is recorded
    in an iteration is therefore logged when the next iteration has begun, by the last rank (which has TensorBoard).
    """

    def __init__(self, mixing: MixingConfig, interval: int) -> None:
        self.mixing = mixing
        self.interval = interval
        self._iteration = -1
        self._recording = False
        self._pending: list[_Pending] = []

    def attach(self, models: list[MegatronModule]) -> list[MegatronModule]:
        """Finds the coefficients' modules; a post-wrap hook, so it returns the models as they came."""
        self._group = torch.distributed.new_group(backend="gloo")
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
        if iteration == self._iteration:
            return
        self._log_pending()
        self._stop_recording()
        self._iteration = iteration
        if (iteration + 1) % self.interval == 0:
            self._recording = True
            self._sums.zero_()
            for module, observer in self._observed:
                module.observer = observer

    def pause(self) -> None:
        """Called before each forward that is not training: validation tokens are not recorded."""
        for module, _ in self._observed:
            module.observer = None

    def close(self) -> None:
        """Logs what the last iteration recorded; all ranks call it, after training."""
        if torch.distributed.is_initialized():
            self._log_pending()
            self._stop_recording()
            self._log_pending()

    def _stop_recording(self) -> None:
        if not self._recording:
            return
        self._recording = False
        self.pause()
        sums = self._sums.cpu()
        work = torch.distributed.all_reduce(sums, group=self._group, async_op=True)
        self._pending.append(_Pending(self._iteration + 1, sums, work))

    def _log_pending(self) -> None:
        for pending in self._pending:
            pending.work.wait()
            if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
                self._log(pending.iteration, pending.sums)
        self._pending.clear()

    def _log(self, iteration: int, sums: Tensor) -> None:
        writer = get_tensorboard_writer()
        total, squares, count = sums.unbind(-1)  # [rows, 2, n] each
        mean = total / count
        std = (squares / count - mean.square()).clamp_min(0).sqrt()
        for row, column in count[..., 0].nonzero().tolist():
            mtp = row >= self._decoder_layers
            label = f"mtp layer {row - self._decoder_layers + 1}" if mtp else f"layer {row + 1}"
            label += " shared expert" if column else ""
            cells = []
            for index, name in enumerate(self.mixing.coefficient_names):
                m, s = mean[row, column, index].item(), std[row, column, index].item()
                cells.append(f"{name} {m:.4f} +- {s:.4f}")
                if writer is not None:
                    tag = f"moa/{label.replace(' ', '_')}/{name}"
                    writer.add_scalar(f"{tag}/mean", m, iteration)
                    writer.add_scalar(f"{tag}/std", s, iteration)
            print(f" coefficients at iteration {iteration} | {label} | {' | '.join(cells)}", flush=True)


def _accumulate(target: Tensor, coefficients: Tensor) -> None:
    """Adds sum, sum of squares and count of coefficients [..., n] to target [n, 3]."""
    rows = coefficients.reshape(-1, coefficients.shape[-1]).double()
    target[:, 0] += rows.sum(0)
    target[:, 1] += rows.square().sum(0)
    target[:, 2] += rows.shape[0]
