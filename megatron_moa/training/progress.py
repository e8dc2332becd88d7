"""Shows how fast a training goes and when it ends: in the log, on a terminal, in TensorBoard and W&B.

docs/watching.md says what each figure is. Megatron 0.19.2 has no callbacks, so two of its functions are wrapped in
place: ``training.training_log``, which all ranks call after each step, and ``training.print_rank_last``, by which it
prints the line of every --log-interval. Times are those of its own timer ``interval-time``, which stands still while
the model is evaluated or saved.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import shutil
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Self, TextIO

import torch

from megatron_moa.megatron_fixes.patching import patch
from megatron_moa.training.exit_codes import report
from megatron_moa.training.gpus import this_gpu

if TYPE_CHECKING:
    from megatron_moa.training.coefficient_monitor import CoefficientMonitor

_RECENT = 50  # intervals that the time left is estimated from
_REDRAW = 0.2  # seconds


@contextmanager
def wandb_errors(args: argparse.Namespace) -> Iterator[None]:
    """Turns what W&B has against a start into one line and exit code 2.

    W&B's error is raised inside, on the last rank alone.
    """
    try:
        yield
    except Exception as error:
        # Only where --wandb-project has it imported.
        wandb = sys.modules.get("wandb")
        if not args.wandb_project or wandb is None or not isinstance(error, wandb.errors.Error):
            raise
        report(
            f"error: --wandb-project {args.wandb_project}: {' '.join(str(error).split())}; mend that, or set "
            "WANDB_MODE=offline"
        )
        raise SystemExit(2) from error


@dataclass(frozen=True)
class Mark:
    """Where a training stood.

    Attributes:
        seconds: of training since this process began to train, evaluations and saves left out.
        clock: seconds, all included.
        tokens: since this process began to train.
        flops: the same, of all ranks.
    """

    seconds: float = 0.0
    clock: float = 0.0
    tokens: int = 0
    flops: float = 0.0

    def speed_since(self, before: Mark) -> tuple[float, float]:
        """Tokens/s and FLOP/s of all ranks in between."""
        seconds = max(self.seconds - before.seconds, 1e-9)
        return (self.tokens - before.tokens) / seconds, (self.flops - before.flops) / seconds


class Meter:
    """Adds up steps, and estimates the time left.

    The estimate is the median time of a token over the last intervals; the first step after a start (compilation,
    first allocations) is in none of them. Evaluations and saves to come are taken to cost the share of the time that
    they have cost since the first step.
    """

    def __init__(self) -> None:
        self.last = Mark()
        self._first: Mark | None = None
        self._tokens = 0
        self._flops = 0.0
        self._seconds_per_token: deque[float] = deque(maxlen=_RECENT)

    def add(self, tokens: int, flops: float) -> None:
        """Counts one step over all ranks."""
        self._tokens += tokens
        self._flops += flops

    def mark(self, seconds: float, clock: float) -> Mark:
        """Reads the clocks (:class:`Mark`) after one or more steps."""
        mark = Mark(seconds, clock, self._tokens, self._flops)
        if self._first is None:
            self._first = mark
        elif mark.tokens > self.last.tokens:
            self._seconds_per_token.append((seconds - self.last.seconds) / (mark.tokens - self.last.tokens))
        self.last = mark
        return mark

    def seconds_left(self, tokens: int) -> float | None:
        """Until so many more tokens are trained on; None before the second interval."""
        if not self._seconds_per_token:
            return None
        training = self.last.seconds - self._first.seconds
        share = (self.last.clock - self._first.clock) / training if training > 0 else 1.0
        return tokens * statistics.median(self._seconds_per_token) * max(share, 1.0)

    def recent_speed(self) -> tuple[float, float] | None:
        """Tokens/s and FLOP/s by the same median; None before the second interval."""
        if not self._seconds_per_token:
            return None
        tokens = 1 / max(statistics.median(self._seconds_per_token), 1e-15)
        return tokens, tokens * self._flops / self._tokens


class Terminal:
    """A stream to a terminal on whose last line something may stand that is rewritten in place."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._shown = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes in the place of the line that is rewritten."""
        self.clear()
        return self._stream.write(text)

    def show(self, line: str) -> None:
        """Rewrites that line, cut to the terminal's width."""
        width = shutil.get_terminal_size().columns - 1
        # The cursor returns to the line's beginning, where other processes' output goes over it.
        self._stream.write(f"\r\x1b[K{line[:width]}\r")
        self._stream.flush()
        self._shown = True

    def clear(self) -> None:
        """Takes that line away."""
        if self._shown:
            self._stream.write("\x1b[K")
            self._shown = False


class Progress:
    """Follows a training: a context manager around it.

    Args:
        args: Megatron's, parsed and validated; its global variables are set.
        monitor: what ``--moa-log-interval`` records, logged after each step.
    """

    def __init__(self, args: argparse.Namespace, monitor: CoefficientMonitor | None = None) -> None:
        self.args = args
        self.monitor = monitor
        self.meter = Meter()
        # The rank whose print_rank_last prints.
        self.logs = args.rank == args.world_size - 1 or args.fake_process_group
        self.mode = args.moa_progress
        if self.mode == "auto":
            self.mode = "line" if sys.stdout.isatty() else "log"
        self.peak_flops, of_what = peak_flops(args)
        if args.rank == 0 and self.mode != "off":
            print(f"> MFU: {of_what}", flush=True)
        self.terminal = Terminal(sys.stdout) if self.mode == "line" and self.logs else None
        self._logged = Mark()
        self._line_due = False
        self._last_sample: int | None = None
        self._end: float | None = None
        self._drawn = 0.0

    def __enter__(self) -> Self:
        """Takes the terminal's last line."""
        if self.terminal is not None:
            sys.stdout = self.terminal
        return self

    def __exit__(self, *exception: object) -> None:
        """Gives the terminal's last line back, and writes out what TensorBoard holds back.

        That is validation and test after training, too.
        """
        from megatron.training import get_tensorboard_writer

        if self.terminal is not None:
            self.terminal.clear()
            sys.stdout = self.terminal._stream
        writer = get_tensorboard_writer()
        if writer is not None:
            writer.flush()

    def install(self) -> None:
        """Lets Megatron's training loop tell this object of every step and every line; before ``pretrain``."""
        _LOG.install(self)
        _PRINT.install(self)

    def followed(self, stock_log: Callable) -> Callable:
        """Wraps Megatron's ``training_log``, which all ranks call after each step."""
        signature = inspect.signature(stock_log)

        @functools.wraps(stock_log)
        def log(*positional: Any, **named: Any) -> Any:
            step = signature.bind(*positional, **named)
            step.apply_defaults()
            self._before_log(**step.arguments)
            result = stock_log(*positional, **named)
            self._after_log(**step.arguments)
            return result

        return log

    def extended(self, stock_print: Callable) -> Callable:
        """Wraps Megatron's ``print_rank_last``, and adds our fields to the line of every --log-interval."""

        @functools.wraps(stock_print)
        def print_rank_last(message: str) -> None:
            if self._line_due:
                self._line_due = False
                message += self._fields()
            stock_print(message)

        return print_rank_last

    def _before_log(
        self,
        iteration: int,
        is_first_iteration: bool,
        seqlen_squared_sum_in_batch: float | None,
        total_real_tokens_in_batch: float | None,
        **_: Any,
    ) -> None:
        from megatron.core.num_microbatches_calculator import get_current_running_global_batch_size
        from megatron.training import training

        self._iteration = iteration
        samples = get_current_running_global_batch_size()
        tokens = total_real_tokens_in_batch
        flops = training.num_floating_point_operations(
            self.args,
            samples,
            seqlen_squared_sum_in_batch=seqlen_squared_sum_in_batch,
            total_real_tokens_in_batch=total_real_tokens_in_batch,
        )
        self.meter.add(samples * self.args.seq_length if tokens is None else tokens, flops)
        self._line_due = iteration % self.args.log_interval == 0 or is_first_iteration

    def _fields(self) -> str:
        """What is added to Megatron's line, which has just read the timer."""
        now = self._read_clocks()
        tokens, flops = now.speed_since(self._logged)
        self._logged = now
        scalars = self._speeds(tokens, flops)
        left = self._seconds_left()
        if left is not None:
            scalars["progress/hours-left"] = left / 3600
        if self.logs and self._iteration % self.args.log_interval == 0:
            write_scalars(scalars, self._iteration)
        if self.mode == "off":
            return ""
        fields = [f"tokens: {self.tokens_so_far}", f"tokens/s: {tokens:.1f}"]
        fields.append(f"tokens/s/GPU: {tokens / self.args.world_size:.1f}")
        if "speed/mfu" in scalars:
            fields.append(f"MFU: {100 * scalars['speed/mfu']:.1f}%")
        if left is not None:
            end = datetime.fromtimestamp(self._end)
            fields += [f"time left: {duration(left)}", f"end: {end:%Y-%m-%d %H:%M}"]
        return "".join(f" {field} |" for field in fields)

    def _after_log(self, loss_dict: dict[str, Any], iteration: int, **_: Any) -> None:
        if self.logs and iteration % self.args.tensorboard_log_interval == 0:
            write_scalars({"progress/tokens": self.tokens_so_far}, iteration)
        if self.monitor is not None:
            self.monitor.end_iteration()
        if self.terminal is None or time.monotonic() - self._drawn < _REDRAW:
            return
        self._drawn = time.monotonic()
        self._read_clocks(waits=True)
        self.terminal.show(self._line(loss_dict.get("lm loss"), iteration))

    def _line(self, loss: Any, iteration: int) -> str:
        parts = [f"step {iteration}/{self.args.train_iters}"]
        if loss is not None:
            parts.append(f"loss {loss.item():.4f}")
        speed = self.meter.recent_speed()
        if speed is not None:
            scalars = self._speeds(*speed)
            parts.append(f"{scalars['speed/tokens-per-second']:,.0f} tokens/s")
            if "speed/mfu" in scalars:
                parts.append(f"MFU {100 * scalars['speed/mfu']:.1f}%")
        left = self._seconds_left()
        if left is not None:
            parts.append(f"{duration(left)} left")
        return " | ".join(parts)

    def _read_clocks(self, waits: bool = False) -> Mark:
        from megatron.training import get_timers

        timer = get_timers()("interval-time")
        if waits:
            timer.elapsed(reset=False)  # reads the clock once the device has caught up
        seconds = timer.active_time()
        if seconds > self.meter.last.seconds:
            self.meter.mark(seconds, time.monotonic())
        return self.meter.last

    def _speeds(self, tokens: float, flops: float) -> dict[str, float]:
        world = self.args.world_size
        scalars = {
            "speed/tokens-per-second": tokens,
            "speed/tokens-per-second-per-gpu": tokens / world,
            "speed/tflops-per-gpu": flops / world / 1e12,
        }
        if self.peak_flops is not None:
            scalars["speed/mfu"] = flops / world / self.peak_flops
        return scalars

    @property
    def tokens_so_far(self) -> int:
        """Trained on since iteration 0, before a checkpoint included."""
        return self.args.consumed_train_samples * self.args.seq_length

    def _seconds_left(self) -> float | None:
        if self._last_sample is None:
            self._last_sample = samples_at_the_end(self.args, self._iteration)
        samples = max(self._last_sample - self.args.consumed_train_samples, 0)
        left = self.meter.seconds_left(samples * self.args.seq_length)
        if left is not None:
            self._end = time.time() + left
        return left


_LOG = patch(
    "megatron.training.training.training_log",
    lambda stock_log, progress: progress.followed(stock_log),
    why="it is the one place that all ranks pass after each step; Megatron has no callbacks",
    version="0.19.2",
    remove_when="pretrain() takes callbacks",
)
_PRINT = patch(
    "megatron.training.training.print_rank_last",
    lambda stock_print, progress: progress.extended(stock_print),
    why="the line of --log-interval has no place for further fields",
    version="0.19.2",
    remove_when="training_log takes further fields",
)


def peak_flops(args: argparse.Namespace) -> tuple[float | None, str]:
    """Returns the FLOP/s of one GPU that MFU is a part of, and in a few words what that is.

    None where they are not known; the words then say why. Training in fp8 is measured by fp8's peak, although attention
    and logits stay in bf16.
    """
    if args.moa_peak_tflops is not None:
        return args.moa_peak_tflops * 1e12, f"of {args.moa_peak_tflops:g} TFLOP/s a GPU (--moa-peak-tflops)"
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    for narrower in ("fp8", "fp4"):
        precision = narrower if getattr(args, narrower, None) else precision
    gpu = this_gpu()
    if gpu is not None and precision in gpu.peak_flops:
        peak = gpu.peak_flops[precision]
        return peak, f"of {peak / 1e12:g} TFLOP/s a GPU ({gpu.name}, {precision}, dense)"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"
    return None, f"left out, no peak is known of {device} in {precision}; give one with --moa-peak-tflops X"


def samples_at_the_end(args: argparse.Namespace, iteration: int) -> int:
    """Samples that ``args.train_iters`` iterations consume, the schedule of batch sizes followed.

    Args:
        iteration: that has been done, with ``args.consumed_train_samples`` in all.
    """
    from megatron.core import num_microbatches_calculator as calculator

    samples, left = args.consumed_train_samples, args.train_iters - iteration
    current = calculator._GLOBAL_NUM_MICROBATCHES_CALCULATOR
    if not isinstance(current, calculator.StepBatchsizeNumMicroBatchesCalculator):
        return samples + left * calculator.get_current_running_global_batch_size()
    for _ in range(left):
        samples += current._get_batch_size_for_samples(samples)
    return samples


def duration(seconds: float) -> str:
    """``1:02:03``, and with days ``3d 04:05:06``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}d {hours:02}:{minutes:02}:{seconds:02}" if days else f"{hours}:{minutes:02}:{seconds:02}"


def write_scalars(scalars: dict[str, float], iteration: int) -> None:
    """To TensorBoard and W&B, where this rank has them: Megatron gives them to the last one."""
    from megatron.training import get_tensorboard_writer, get_wandb_writer

    tensorboard, wandb = get_tensorboard_writer(), get_wandb_writer()
    if tensorboard is not None:
        for name, value in scalars.items():
            tensorboard.add_scalar(name, value, iteration)
    if wandb is not None and scalars:
        wandb.log(scalars, iteration)
