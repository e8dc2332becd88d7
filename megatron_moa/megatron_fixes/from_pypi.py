"""Mends what fails in Megatron from PyPI, without Transformer Engine and Apex; on GPUs and CPUs alike."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from megatron_moa.megatron_fixes.patching import NO_TE, NO_TE_NO_APEX, constant, patch

_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer"
_TORCH_ADAM_LOADS = "the distributed optimizer loads what it has saved with torch's Adam"


def install() -> None:
    """Makes all of this module's changes; again changes nothing."""
    skip_dataset_compile()
    fix_torch_adam_checkpoints()
    fix_recompute_without_te()


_DATASET_COMPILE = patch(
    "megatron.core.datasets.utils.compile_helpers",
    constant(lambda: None),
    why="it runs make at every start and ends the run if that fails; the wheel has the helpers compiled, no Makefile",
    version="0.19.2",
    remove_when="Megatron looks for the compiled helpers before it runs make",
)


def skip_dataset_compile() -> None:
    """Skips building Megatron's data set helpers where they are there already.

    Rank 0 runs ``make`` for them at every start and leaves with exit code 1 if that fails; the wheel on PyPI ships
    them compiled and without a Makefile.
    """
    try:
        import megatron.core.datasets.helpers_cpp  # noqa: F401
    except ImportError:
        return
    _DATASET_COMPILE.install()


def fix_torch_adam_checkpoints() -> None:
    """Lets the distributed optimizer load its checkpoints with torch's Adam.

    As of 0.19.2 it fails there: to load, it asks the fresh optimizer for its state, of which there is none yet.  Past
    that it restarts Adam's step counters at 0, so that the steps after loading come out too large, or, with
    --dist-ckpt-optim-fully-reshardable, looks in vain for the counters among the sharded tensors; and a float32 model
    split over data-parallel ranks fails with "a view of a leaf Variable that requires grad".
    """
    from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE

    if not HAVE_APEX_OR_TE:
        _SET_STATES.install()
        _STATE_DICT.install()
        _LOAD_STATE_DICT.install()


def _state_dict_of_any(state_dict: Callable) -> Callable:
    @functools.wraps(state_dict)
    def call(self: Any) -> dict:
        inner = self.optimizer
        if isinstance(inner, torch.optim.Adam | torch.optim.AdamW) and not inner.state:
            for parameter in (p for group in inner.param_groups for p in group["params"]):
                # What Adam itself starts from.
                inner.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        return state_dict(self)

    return call


def _load_state_dict_with_own_steps(load_state_dict: Callable) -> Callable:
    @functools.wraps(load_state_dict)
    def call(self: Any, loaded: dict) -> None:
        load_state_dict(self, loaded)
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"] = torch.tensor(float(loaded["optimizer"]["param_groups"][0]["step"]))

    return call


def _set_states_but_steps(set_states: Callable) -> Callable:
    @functools.wraps(set_states)
    @torch.no_grad()  # of a float32 model it writes into views of the parameters themselves
    def call(self: Any, model_param: torch.Tensor, tensors: dict) -> None:
        set_states(self, model_param, {**tensors, "step": None})  # it skips what is no tensor

    return call


_SET_STATES = patch(
    f"{_OPTIMIZER}._set_main_param_and_optimizer_states",
    _set_states_but_steps,
    why="it looks for the step counter of torch's Adam among sharded tensors, and writes into leaves with gradients",
    version="0.19.2",
    remove_when=_TORCH_ADAM_LOADS,
    where=NO_TE_NO_APEX,
)
_STATE_DICT = patch(
    f"{_OPTIMIZER}.state_dict",
    _state_dict_of_any,
    why="to load, it asks torch's Adam for a state that a fresh optimizer does not have",
    version="0.19.2",
    remove_when=_TORCH_ADAM_LOADS,
    where=NO_TE_NO_APEX,
)
_LOAD_STATE_DICT = patch(
    f"{_OPTIMIZER}.load_state_dict",
    _load_state_dict_with_own_steps,
    why="it restarts the step counters of torch's Adam at 0",
    version="0.19.2",
    remove_when=_TORCH_ADAM_LOADS,
    where=NO_TE_NO_APEX,
)


def fix_recompute_without_te() -> None:
    """Lets ``--recompute-modules layernorm``, moe_act and mla_up_proj work without Transformer Engine.

    As of 0.19.2 ``CheckpointWithoutOutput(fp8=False)``, the default, takes itself for an fp8 one (its test is ``fp8 is
    not None``) and asks Transformer Engine about it: NameError in the first forward.
    """
    from megatron.core.tensor_parallel.random import HAVE_TE

    if not HAVE_TE:
        _RECOMPUTE.install()


def _without_fp8(start: Callable) -> Callable:
    @functools.wraps(start)
    def call(self: Any, fp8: object = None) -> None:
        start(self, fp8 or None)

    return call


_RECOMPUTE = patch(
    "megatron.core.tensor_parallel.random.CheckpointWithoutOutput.__init__",
    _without_fp8,
    why="it takes fp8=False, its default, for fp8, and asks Transformer Engine about it",
    version="0.19.2",
    remove_when="CheckpointWithoutOutput tests fp8 for truth",
    where=NO_TE,
)
