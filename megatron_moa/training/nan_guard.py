"""Stops a run at a NaN or Inf in loss or gradient, and names the layer.

The run stops before the optimizer or a save.

Megatron 0.19.2 looks at the local loss and at the norm of every gradient bucket (--check-for-nan-in-loss-and-grad, its
default), and computes a step anew that has a NaN in them.  If it comes again, Megatron saves a checkpoint, NaN and all,
and asks to be started elsewhere; it leaves out the first step after each start; and it names rank and iteration alone.
:class:`StopOnNonFinite` watches the second computation with hooks, says where the first value went wrong, and lets all
ranks leave together with exit_codes.py's ``EXIT_NOT_FINITE`` instead.  A step that is finite costs nothing more than
before.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.rerun_state_machine import RerunMode, RerunState, RerunStateMachine, get_rerun_state_machine
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import unwrap_model
from megatron.training import get_args
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from megatron_moa.megatron_fixes.patching import constant, patch
from megatron_moa.training.exit_codes import EXIT_NOT_FINITE, report


@dataclass(frozen=True)
class NotFinite:
    """What one rank found.

    Attributes:
        order: sorts the findings of all ranks: the least is nearest to the cause.
        text: what is not finite, and where.
    """

    order: tuple[int, ...]
    text: str


# The first number of an order: a parameter is a cause, an output may have come from another rank of the layer, and
# gradients come after both; what nothing is found for, last.
_PARAMETER, _OUTPUT, _GRADIENT, _LAST = range(4)


class StopOnNonFinite(RerunStateMachine):
    """Megatron's state machine of reruns; what it would save and restart for is a reason to stop here.

    Arguments are those of Megatron's; :meth:`watch` gives it the model.
    """

    def __init__(self, *settings: Any, **options: Any) -> None:
        super().__init__(*settings, **options)
        self._chunks: list[tuple[int, MegatronModule]] = []
        self._stages: dict[int, int] = {}
        self._first_seen: str | None = None
        self._seen_again = False
        self._rejections = 0
        self._finding: NotFinite | None = None
        self._hooks: list[RemovableHandle] = []
        self._reran = False

    def watch(self, models: list[MegatronModule]) -> None:
        """Takes the model whose values it is to look at.

        Args:
            models: the model chunks on this rank, wrapped.
        """
        self._chunks = [(stage, unwrap_model(model)) for stage, model in _by_stage(models)]
        for stage, model in _by_stage(models):
            for group in (*getattr(model, "bucket_groups", ()), *getattr(model, "expert_parallel_bucket_groups", ())):
                self._stages[id(group)] = stage

    def should_run_forward_backward(self, data_iterator: Any) -> bool:
        """As Megatron's; a step that is computed anew is watched by hooks."""
        # Megatron skips the first step after a start: it could not save yet. Nothing is saved here.
        self.first_iteration_complete = True
        if self.state is RerunState.NOT_RUNNING_YET:
            self._first_seen = self._finding = None
            self._reran = self._seen_again = False
        run = super().should_run_forward_backward(data_iterator)
        if run and self.state is RerunState.RERUNNING_IN_PLACE and self.mode is RerunMode.VALIDATE_RESULTS:
            self._reran = True  # on all ranks alike
            self._watch_forward()
        elif self._hooks:
            for hook in self._hooks:
                hook.remove()
            self._hooks.clear()
        return run

    def validate_result(
        self, result: Any, rejection_func: Callable[[Any], bool], message: str, *rest: Any, **options: Any
    ) -> None:
        """Validates a result as Megatron does; without reruns a rejected value stops this rank.

        There are no reruns in evaluation, and with --rerun-mode disabled.

        Raises:
            SystemExit: for such a value.
        """
        fatal = options.get("fatal", rest[2] if len(rest) > 2 else True)
        if not fatal:
            super().validate_result(result, rejection_func, message, *rest, **options)
            return

        def rejected(value: Any) -> bool:
            is_rejected = bool(rejection_func(value))
            if is_rejected:
                self._rejections += 1
                self._first_seen = self._first_seen or message
            return is_rejected

        if self._reran:  # Megatron only compares it with the first result now
            self._seen_again |= rejected(result)
        elif self.mode is RerunMode.DISABLED:
            if rejected(result):
                where = self._bad_parameter() or message
                report(f"{where}, at iteration {_iteration()}: {_CONSEQUENCE}")
                raise SystemExit(EXIT_NOT_FINITE)
            return
        super().validate_result(result, rejected, message, *rest, **options)

    def should_checkpoint_and_exit(self) -> tuple[bool, bool, int]:
        """Whether to save (never), to leave, and the exit code: the same on all ranks."""
        if not self._reran:
            return super().should_checkpoint_and_exit()
        if self._finding is None and self._first_seen is not None:
            again = "" if self._seen_again else f", but not when computed again on {os.uname().nodename}: suspect it"
            self._finding = NotFinite((_LAST,), f"{self._first_seen}{again}")
        findings: list[NotFinite | None] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(findings, self._finding)
        first = min((finding for finding in findings if finding is not None), key=lambda f: f.order, default=None)
        if first is None:  # the rerun was for something that is not fatal
            return super().should_checkpoint_and_exit()
        if first == self._finding and findings.index(first) == torch.distributed.get_rank():
            report(f"{first.text}, at iteration {_iteration()}: {_CONSEQUENCE}")
        return False, True, EXIT_NOT_FINITE

    def refuse_to_save(self) -> None:
        """Lets all ranks leave if a parameter of any is not finite.

        The last checkpoint is better than the next. An update can overflow although its gradient was finite.

        Raises:
            SystemExit: on every rank.
        """
        found = self._bad_parameter()
        anywhere = torch.tensor([found is not None], dtype=torch.int32, device=torch.cuda.current_device())
        torch.distributed.all_reduce(anywhere, op=torch.distributed.ReduceOp.MAX)
        if found is not None:
            report(f"{found}, when iteration {_iteration()} was to be saved: {_CONSEQUENCE_OF_UPDATE}")
        if anywhere.item():
            raise SystemExit(EXIT_NOT_FINITE)

    def _bad_parameter(self) -> str | None:
        for _, chunk in self._chunks:
            for name, parameter in chunk.named_parameters():
                if not _is_finite(parameter):
                    return f"parameter {global_name(chunk, name)} is not finite"
        return None

    def _found(self, order: tuple[int, ...], text: str) -> None:
        if self._finding is None or order < self._finding.order:
            self._finding = NotFinite(order, text)

    def _watch_forward(self) -> None:
        self._calls = 0
        for stage, chunk in self._chunks:
            for name, module in chunk.named_modules():
                watch = functools.partial(self._look_at_output, stage, chunk, name)
                self._hooks.append(module.register_forward_hook(watch))

    def _look_at_output(
        self, stage: int, chunk: MegatronModule, name: str, module: torch.nn.Module, inputs: Any, output: Any
    ) -> None:
        # Modules end in the order of their computation, inner ones first: the first one seen is the cause's, and the
        # rank that sees it after the fewest calls.
        self._calls += 1
        if self._finding is not None and self._finding.order < (_OUTPUT, stage + 1):
            return
        if all(map(_is_finite, _tensors(output))):
            return
        for parameter_name, parameter in module.named_parameters():
            if not _is_finite(parameter):
                whole = global_name(chunk, f"{name}.{parameter_name}".lstrip("."))
                self._found((_PARAMETER, stage, self._calls), f"parameter {whole} is not finite")
                return
        where = global_name(chunk, name) or "the model"
        self._found((_OUTPUT, stage, self._calls), f"the output of {where} is not finite")

    def check_gradients(self, check: Callable[..., None], group: Any, *checks: Any, **options: Any) -> None:
        """Looks at a group of buckets by Megatron's ``check``, and names the parameter if it finds anything.

        It is the one place where a rank's own gradients are complete and not yet mixed with those of others.
        """
        before = self._rejections
        check(group, *checks, **options)
        if self._rejections == before or id(group) not in self._stages:
            return
        stage = self._stages[id(group)]
        chunk = dict(self._chunks)[stage]
        in_group = {id(parameter) for bucket in group.buckets for parameter in bucket.params_list}
        own = {name: p.main_grad for name, p in chunk.named_parameters() if id(p) in in_group}
        bad = [name for name, grad in own.items() if not _is_finite(grad)]
        if not bad:  # each number is finite, the sum of their squares is not
            largest = max(own, key=lambda name: own[name].abs().max().item())
            self._found((_GRADIENT, -stage), f"the gradient of {global_name(chunk, largest)} overflows in its norm")
            return
        others = f" (and of {len(bad) - 1} more parameters)" if len(bad) > 1 else ""
        # Backward comes from the other end: the last one has the first.
        self._found((_GRADIENT, -stage), f"the gradient of {global_name(chunk, bad[-1])} is not finite{others}")


_CONSEQUENCE = f"nothing was updated or saved with it; exit code {EXIT_NOT_FINITE}"
_CONSEQUENCE_OF_UPDATE = f"an update made it so, and it is not saved; exit code {EXIT_NOT_FINITE}"


def install() -> None:
    """Makes :class:`StopOnNonFinite` Megatron's state machine, which looks before every save, too.

    To be called before ``pretrain``. The machine needs the model, too: :func:`watch`.
    """
    for change in (_MACHINE, _CHECK, _SAVE):
        change.install()


def watch(models: list[MegatronModule]) -> list[MegatronModule]:
    """Gives the state machine the model; a post-wrap hook, so it returns the models as they came."""
    _machine().watch(models)
    return models


def _machine() -> StopOnNonFinite:
    machine = get_rerun_state_machine()
    assert isinstance(machine, StopOnNonFinite), "Megatron made its state machine before install()"
    return machine


def _watched(check: Callable) -> Callable:
    @functools.wraps(check)
    def call(group: Any, *checks: Any, **options: Any) -> None:
        _machine().check_gradients(check, group, *checks, **options)

    return call


def _if_finite(save: Callable) -> Callable:
    @functools.wraps(save)
    def call(*arguments: Any, **options: Any) -> Any:
        _machine().refuse_to_save()
        return save(*arguments, **options)

    return call


_MACHINE = patch(
    "megatron.core.rerun_state_machine.RerunStateMachine",
    constant(StopOnNonFinite),
    why="it saves a checkpoint with NaN in it and asks to be started elsewhere, and names no layer",
    version="0.19.2",
    remove_when="Megatron stops without saving, and names the layer",
)
_CHECK = patch(
    "megatron.core.distributed.param_and_grad_buffer._ParamAndGradBucketGroup.check_grads",
    _watched,
    why="it names a bucket, not the parameter whose gradient is not finite",
    version="0.19.2",
    remove_when="Megatron names the parameter",
)
_SAVE = patch(
    "megatron.training.training.save_checkpoint",
    _if_finite,
    why="it saves parameters that are not finite: an update can overflow although its gradient was finite",
    version="0.19.2",
    remove_when="Megatron looks at the parameters before it saves them",
)


def global_name(model: torch.nn.Module, name: str) -> str:
    """Returns a module's or parameter's name in the whole model.

    The indices of layer and expert in it are those in the whole model, counted from 0.

    Args:
        model: the model chunk on this rank, whose own indices ``name`` has.
    """
    local = name.split(".")
    parts = list(local)
    for index, part in enumerate(local):
        grouped = re.fullmatch(r"(weight|bias)(\d+)", part)  # linear_fc1.weight3: an expert's, of all in one layer
        if grouped:
            owner = model.get_submodule(".".join(local[: index - 1]))
            if isinstance(owner, TEGroupedMLP):
                parts[index] = f"{grouped[1]}{int(grouped[2]) + owner.ep_group.rank() * owner.num_local_experts}"
        if not part.isdecimal():
            continue
        indexed = model.get_submodule(".".join(local[: index + 1]))
        owner = model.get_submodule(".".join(local[: index - 1]))
        if isinstance(indexed, TransformerLayer) and "mtp" not in local:
            parts[index] = str(indexed.layer_number - 1)
        elif isinstance(owner, SequentialMLP):
            parts[index] = str(int(part) + owner.ep_group.rank() * owner.num_local_experts)
    return ".".join(parts)


def _iteration() -> int:
    """Returns the current iteration as the log counts.

    The state machine's own count is one ahead: ``train`` sets it to the first iteration, and the machine then adds one.
    """
    return get_args().curr_iteration + 1


def _by_stage(models: list[MegatronModule]) -> Iterator[tuple[int, MegatronModule]]:
    """Returns the model chunks on this rank with their place in the order of the pipeline.

    Virtual stages are included.
    """
    size = parallel_state.get_pipeline_model_parallel_world_size()
    rank = parallel_state.get_pipeline_model_parallel_rank()
    return ((chunk * size + rank, model) for chunk, model in enumerate(models))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)


def _is_finite(tensor: Tensor) -> bool:
    # 8-bit formats are left out: not all know NaN or Inf, and what they were made from is looked at.
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        return True
    return bool(torch.isfinite(tensor.detach()).all())
