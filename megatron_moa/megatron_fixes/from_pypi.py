"""Mends what fails in Megatron from PyPI, without Transformer Engine and Apex; on GPUs and CPUs alike."""

import functools

import torch


def install() -> None:
    """Makes all of this module's changes; again changes nothing."""
    skip_dataset_compile()
    fix_torch_adam_checkpoints()
    fix_recompute_without_te()


def skip_dataset_compile() -> None:
    """Skips building Megatron's data set helpers where they are there already.

    Rank 0 runs ``make`` for them at every start and leaves with exit code 1 if that fails; the wheel on PyPI ships
    them compiled and without a Makefile.
    """
    import megatron.core.datasets.utils

    try:
        import megatron.core.datasets.helpers_cpp
    except ImportError:
        return
    megatron.core.datasets.utils.compile_helpers = lambda: None


def fix_torch_adam_checkpoints() -> None:
    """Lets the distributed optimizer load its checkpoints with torch's Adam.

    As of 0.19.2 it fails there: to load, it asks the fresh optimizer for its state, of which there is none yet.  Past
    that it restarts Adam's step counters at 0, so that the steps after loading come out too large, or, with
    --dist-ckpt-optim-fully-reshardable, looks in vain for the counters among the sharded tensors; and a float32 model
    split over data-parallel ranks fails with "a view of a leaf Variable that requires grad".
    """
    from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE, DistributedOptimizer

    if HAVE_APEX_OR_TE or hasattr(DistributedOptimizer.state_dict, "__wrapped__"):
        return
    state_dict, load_state_dict = DistributedOptimizer.state_dict, DistributedOptimizer.load_state_dict
    set_states = DistributedOptimizer._set_main_param_and_optimizer_states

    @functools.wraps(state_dict)
    def state_dict_of_any(self: DistributedOptimizer) -> dict:
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

    @functools.wraps(load_state_dict)
    def load_state_dict_with_own_steps(self: DistributedOptimizer, loaded: dict) -> None:
        load_state_dict(self, loaded)
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"] = torch.tensor(float(loaded["optimizer"]["param_groups"][0]["step"]))

    @functools.wraps(set_states)
    @torch.no_grad()  # of a float32 model it writes into views of the parameters themselves
    def set_states_but_steps(self: DistributedOptimizer, model_param: torch.Tensor, tensors: dict) -> None:
        set_states(self, model_param, {**tensors, "step": None})  # it skips what is no tensor

    DistributedOptimizer._set_main_param_and_optimizer_states = set_states_but_steps
    DistributedOptimizer.state_dict = state_dict_of_any
    DistributedOptimizer.load_state_dict = load_state_dict_with_own_steps


def fix_recompute_without_te() -> None:
    """Lets ``--recompute-modules layernorm``, moe_act and mla_up_proj work without Transformer Engine.

    As of 0.19.2 ``CheckpointWithoutOutput(fp8=False)``, the default, takes itself for an fp8 one (its test is ``fp8 is
    not None``) and asks Transformer Engine about it: NameError in the first forward.
    """
    from megatron.core.tensor_parallel.random import HAVE_TE, CheckpointWithoutOutput

    start = CheckpointWithoutOutput.__init__
    if HAVE_TE or hasattr(start, "__wrapped__"):
        return

    @functools.wraps(start)
    def start_without_fp8(self: CheckpointWithoutOutput, fp8: object = None) -> None:
        start(self, fp8 or None)

    CheckpointWithoutOutput.__init__ = start_without_fp8
