"""Builds one rank of a large world without its peers, and counts its messages.

Megatron's --fake-process-group stands in for the peers.

A world can be set up once per process next to nothing else of Megatron's, so tests hand jobs to another process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support import launch

ROOT = Path(__file__).resolve().parents[2]

# What a model's recipe leaves to the rest of a run, as small as can be.
RUN = (
    "--micro-batch-size 1 --train-iters 1 --lr 1e-3 --bf16 --vocab-size 32000 --tokenizer-type NullTokenizer "
    "--mock-data --fake-process-group"
).split()


@dataclasses.dataclass(frozen=True)
class Job:
    """One model in one world.

    Attributes:
        arguments: flags of pretrain_gpt_moa.py.
        world_size: number of ranks there would be.
        ranks: those to be, one after the other.
        messages: whether to run a micro-batch and count messages; else only shapes are found, on no memory at all.
    """

    arguments: tuple[str, ...]
    world_size: int
    ranks: tuple[int, ...]
    messages: bool = False


@dataclasses.dataclass(frozen=True)
class ParameterInfo:
    """Describes one parameter on one rank.

    ``pieces`` is the number of ranks that together hold all of it and, of experts, of its siblings.
    """

    shape: tuple[int, ...]
    pieces: int
    replicas: int


@dataclasses.dataclass(frozen=True)
class Message:
    """Describes collectives of one kind, by phase (forward, backward, finalize), operation and group.

    ``number`` is how many there are, and ``bytes`` is the size of all.

    A collective's bytes are those of its larger side: the input of an all-reduce or reduce-scatter, the output of an
    all-gather.
    """

    phase: str
    operation: str
    group: str
    number: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class RankReport:
    """What one job found on one rank; parameters by name, layers numbered over the whole model from 0."""

    rank: int
    padded_vocab_size: int
    parameters: dict[str, ParameterInfo]
    messages: list[Message]


def visit(jobs: list[Job], results: Path) -> list[list[RankReport]]:
    """Runs the jobs in one other process; reports by job, then by rank."""
    code, log = launch.launch(write_reports, (jobs, results), 0, ROOT)
    assert code == 0, log[-4000:]
    return [[_report(saved) for saved in ranks] for ranks in json.loads(results.read_text())]


def _report(saved: dict[str, Any]) -> RankReport:
    parameters = {
        name: ParameterInfo(tuple(info["shape"]), info["pieces"], info["replicas"])
        for name, info in saved["parameters"].items()
    }
    messages = [Message(**message) for message in saved["messages"]]
    return RankReport(saved["rank"], saved["padded_vocab_size"], parameters, messages)


# What follows runs in the other process.


@contextlib.contextmanager
def world(arguments: list[str], rank: int, world_size: int) -> Iterator[tuple[Any, Any]]:
    """As one rank: Megatron initialised on its real path; gives the parsed args and the model's config."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
    from megatron.core.rerun_state_machine import destroy_rerun_state_machine
    from megatron.training.global_vars import destroy_global_vars
    from megatron.training.initialize import initialize_megatron

    from megatron_moa.training.arguments import parse_arguments
    from megatron_moa.training.model import model_config_from_args

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0", MASTER_ADDR="none", MASTER_PORT="1")
    sys.argv = ["pretrain_gpt_moa.py", *arguments]
    args, mixture = parse_arguments()
    excepthook = sys.excepthook  # torch.distributed puts the rank before each line, and another with each world
    initialize_megatron()
    try:
        yield args, model_config_from_args(args, mixture)
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
        destroy_global_vars()
        destroy_num_microbatches_calculator()
        destroy_rerun_state_machine()
        sys.excepthook = excepthook


def build(model_config: Any, args: Any) -> list[Any]:
    """This rank's stages, by the builder that training uses, gradient buffers and all."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    groups = ProcessGroupCollection.use_mpu_process_groups()
    ddp_config = pretrain_cfg_container_from_args(args, model_config).ddp
    return model_config.get_builder_cls()(model_config).build_distributed_models(groups, ddp_config=ddp_config)


@contextlib.contextmanager
def no_memory() -> Iterator[None]:
    """Inside, whatever is made has a shape and no storage."""
    import torch

    current_device = torch.cuda.current_device
    torch.cuda.current_device = lambda: torch.device("meta")
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.cuda.current_device = current_device


def find_parameters(models: list[Any]) -> dict[str, ParameterInfo]:
    """All parameters of this rank's stages."""
    import re

    from megatron.core import parallel_state
    from megatron.core.utils import unwrap_model

    from megatron_moa.training.model import _replicas

    found = {}
    for model in unwrap_model(models):
        for name, parameter in model.named_parameters():
            if match := re.match(r"decoder\.layers\.(\d+)\.", name):
                layer = model.decoder.layers[int(match[1])].layer_number - 1
                name = f"decoder.layers.{layer}.{name[match.end() :]}"
            assert name not in found
            routed = ".local_experts." in name
            pieces = parallel_state.get_expert_model_parallel_world_size() if routed else 1
            if getattr(parameter, "tensor_model_parallel", False):
                tensor_parallel = (
                    parallel_state.get_expert_tensor_parallel_world_size()
                    if routed
                    else parallel_state.get_tensor_model_parallel_world_size()
                )
                pieces *= tensor_parallel
            found[name] = ParameterInfo(tuple(parameter.shape), pieces, _replicas(parameter))
    return found


def count_messages(args: Any, models: list[Any]) -> list[Message]:
    """Forward and backward of one micro-batch, and Megatron's last sums of gradients."""
    from collections import Counter

    import torch
    from megatron.core.distributed import finalize_model_grads
    from torch.distributed.distributed_c10d import ProcessGroup
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.phase = "forward"
            self.number: Counter[tuple[str, str, str]] = Counter()
            self.bytes: Counter[tuple[str, str, str]] = Counter()

        def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
            if func.namespace == "c10d":
                groups = [a for a in args if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type())]
                group = ProcessGroup.unbox(groups[0])
                key = (self.phase, func._schema.name.removeprefix("c10d::").strip("_"), _name_of(group))
                tensors = [a for a in args if isinstance(a, torch.Tensor)]
                tensors += [t for a in args if isinstance(a, list) for t in a if isinstance(t, torch.Tensor)]
                self.number[key] += 1
                if (
                    "alltoall" not in key[1]
                ):  # routed tokens: their number hangs on values, which no message brings here
                    self.bytes[key] += max(t.numel() * t.element_size() for t in tensors)
            return func(*args, **(kwargs or {}))

    length = args.seq_length
    tokens = torch.arange(length).unsqueeze(0) % 100  # [b, s]
    counting = Counting()
    (model,) = models
    with counting:
        loss = model(tokens, torch.arange(length).unsqueeze(0), None, labels=tokens).sum()
        counting.phase = "backward"
        loss.backward()
        counting.phase = "finalize"
        finalize_model_grads(models)
    return [Message(*key, number, counting.bytes[key]) for key, number in counting.number.items()]


def _name_of(group: Any) -> str:
    from megatron.core import parallel_state

    known = {
        "tp": parallel_state.get_tensor_model_parallel_group(),
        "etp": parallel_state.get_expert_tensor_parallel_group(),
        "ep": parallel_state.get_expert_model_parallel_group(),
        "dp": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "edp": parallel_state.get_expert_data_parallel_group(),
        "etp-ep": parallel_state.get_expert_tensor_and_model_parallel_group(),
    }
    names = [name for name, other in known.items() if other.group_name == group.group_name]
    return names[0] if names else f"{group.size()} ranks"


def do(job: Job) -> list[RankReport]:
    """One job, rank after rank."""
    reports = []
    for rank in job.ranks:
        with world([*RUN, *job.arguments], rank, job.world_size) as (args, model_config):
            with contextlib.nullcontext() if job.messages else no_memory():
                models = build(model_config, args)
            messages = count_messages(args, models) if job.messages else []
            reports.append(RankReport(rank, args.padded_vocab_size, find_parameters(models), messages))
    return reports


def write_reports(jobs: list[Job], results: Path) -> None:
    """A target of :func:`launch.launch`: JSON, a list with one entry per job, in it one per rank."""
    from megatron_moa import startup

    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="none", MASTER_PORT="1")
    startup.prepare()
    results.write_text(json.dumps([[dataclasses.asdict(report) for report in do(job)] for job in jobs]))
