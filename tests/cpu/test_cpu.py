"""Tests Megatron on CPU over gloo: its own training loop in processes of its own, and the parts alone."""

import os
import runpy
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from megatron_moa.cpu.switch import enable, is_enabled
from megatron_moa.errors import UserError
from megatron_moa.megatron_fixes.single_process import single_process_environment, slurm_gpus
from megatron_moa.planning import inputs
from megatron_moa.runs import tiny_model
from tests.support import launch
from tests.support.training import ROOT, Run

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="only for machines without a GPU")

# A GPT of Megatron's own modules; every rank writes its final parameters.
SCRIPT = """
from functools import partial

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.utils import get_batch_on_this_tp_rank
from megatron.training import get_args, get_tokenizer
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.training import pretrain

from megatron_moa.layers.norm_and_attention import TorchAttention, TorchNorm

MODEL = []


def add_arguments(parser):
    parser.add_argument("--write-parameters")
    parser.add_argument("--stock-modules", action="store_true")
    return parser


def layer_spec(config, vp_stage=None):
    block = get_gpt_decoder_block_spec(config.transformer, False, config.transformer.normalization, vp_stage=vp_stage)
    for layer in block.layer_specs:
        layer.submodules.input_layernorm = TorchNorm
        layer.submodules.pre_mlp_layernorm = TorchNorm
        layer.submodules.self_attention.submodules.core_attention = TorchAttention
    block.layer_norm = TorchNorm
    return block


def datasets(num_samples):
    args = get_args()
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        split="90,5,5",
        tokenizer=get_tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    first = lambda: mpu.get_tensor_model_parallel_rank() == 0
    return BlendedMegatronDatasetBuilder(MockGPTDataset, num_samples, first, config).build()


datasets.is_distributed = True


def loss_func(mask, output):
    losses, mask = output.view(-1).float(), mask.view(-1)
    total, count = (losses * mask).sum(), mask.sum().int()
    return total, count, {"lm loss": torch.stack([total.detach(), count.float()])}


def forward_step(data_iterator, model):
    args = get_args()
    MODEL[:] = [model]
    batch = None
    if mpu.get_tensor_model_parallel_rank() == 0:
        batch = {name: tensor.cuda() for name, tensor in next(data_iterator).items()} | {"attention_mask": None}
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=False,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=1,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=False,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return output, partial(loss_func, batch["loss_mask"])


args = parse_and_validate_args(extra_args_provider=add_arguments)
config = gpt_config_from_args(args)
if not args.stock_modules:
    config.transformer_layer_spec = layer_spec
pretrain(pretrain_cfg_container_from_args(args, config), datasets, ModelType.encoder_or_decoder, forward_step)
if args.write_parameters:
    parameters = {name: p.detach().clone() for name, p in MODEL[0].named_parameters()}
    torch.save(parameters, f"{args.write_parameters}/{torch.distributed.get_rank()}.pt")
"""

# Dropout stays at Megatron's 0.1: it shows whether every rank draws from the stream it should.
TINY = shlex.split(
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --max-position-embeddings 16 "
    "--micro-batch-size 2 --global-batch-size 4 --train-iters 4 --lr 1e-2 --lr-decay-style constant "
    "--mock-data --tokenizer-type NullTokenizer --vocab-size 63 --make-vocab-size-divisible-by 16 "
    "--log-interval 1 --eval-iters 0 --eval-interval 1000 --num-workers 0"
)
LLAMA = shlex.split("--normalization RMSNorm --swiglu --disable-bias-linear --position-embedding-type rope")


def run(command: list[str], cwd: Path = ROOT, **variables: str) -> Run:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "CUDA_DEVICE_MAX_CONNECTIONS"):
        environment.pop(name, None)
    result = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=150,
        check=False,
    )
    return Run(result.returncode, result.stdout)


def on_cpu(arguments: list[str]) -> None:
    """A target of launch: ``python -m megatron_moa.cpu ARGUMENTS``."""
    sys.argv = ["megatron_moa.cpu", *arguments]
    runpy.run_module("megatron_moa.cpu", run_name="__main__", alter_sys=True)


def train(folder: Path, *flags: str, processes: int = 1) -> tuple[Run, list[dict]]:
    """Trains, and returns the log and the parameters of every rank.

    A single process is a fresh one; several are forked.
    """
    script = folder / "train_gpt.py"
    script.write_text(SCRIPT)
    arguments = [str(script), *TINY, *flags, "--write-parameters", str(folder)]
    if processes == 1:
        result = run(["-m", "megatron_moa.cpu", *arguments], folder)
    else:
        result = Run(*launch.launch(on_cpu, (arguments,), processes, folder))
    assert result.returncode == 0, result.log[-6000:]
    return result, [torch.load(folder / f"{rank}.pt") for rank in range(processes)]


def assert_copies_equal(ranks: list[dict], sharded: tuple[str, ...]) -> None:
    """The parameters two ranks hold copies of are bit-equal, those they hold parts of are not."""
    first, second = ranks
    assert first.keys() == second.keys()
    assert any(any(part in name for part in sharded) for name in first)
    for name in first:
        assert torch.equal(first[name], second[name]) != any(part in name for part in sharded), name


COLUMNS_AND_ROWS = ("word_embeddings", "output_layer", "linear_qkv.weight", "linear_proj.weight", "linear_fc")


def test_one_process_trains_with_the_stock_modules_and_no_cpu_flags(tmp_path):
    result, _ = train(tmp_path, "--stock-modules", "--bf16", "--async-save", "--save", "ckpt", "--save-interval", "4")
    assert result.losses[4] < result.losses[1] - 0.2
    assert result.log.count("No CUDA device found: Megatron runs on CPU over gloo.") == 1
    assert result.log.count("CPU defaults: transformer_impl=local attention_backend=unfused") == 1
    assert "not installed" not in result.log
    assert (tmp_path / "ckpt" / "iter_0000004" / ".metadata").exists()


@pytest.mark.full
@pytest.mark.distributed
def test_tensor_parallel_copies_stay_equal_under_dropout(tmp_path):
    # Without sequence parallelism both ranks must draw the same hidden dropout, though only one has a data loader.
    result, ranks = train(tmp_path, *LLAMA, "--tensor-model-parallel-size", "2", processes=2)
    assert result.losses[4] < result.losses[1] - 0.2
    assert_copies_equal(ranks, COLUMNS_AND_ROWS)


@pytest.mark.full
@pytest.mark.distributed
def test_sequence_and_expert_parallel(tmp_path):
    flags = "--tensor-model-parallel-size 2 --sequence-parallel --bf16 --num-experts 4 --expert-model-parallel-size 2"
    flags += " --expert-tensor-parallel-size 1 --moe-token-dispatcher-type alltoall --moe-router-topk 2"
    flags += " --moe-aux-loss-coeff 1e-2 --moe-router-load-balancing-type aux_loss"
    result, ranks = train(tmp_path, *LLAMA, *flags.split(), processes=2)
    assert result.losses[4] < result.losses[1] - 0.2
    # Unequal experts at the end mean that each rank drew its own at the start.
    assert_copies_equal(ranks, (*COLUMNS_AND_ROWS, "experts"))


@pytest.mark.full
@pytest.mark.distributed
def test_pipeline_parallel(tmp_path):
    flags = "--pipeline-model-parallel-size 2 --untie-embeddings-and-output-weights --use-cpu-initialization"
    result, ranks = train(tmp_path, *LLAMA, *flags.split(), processes=2)
    assert result.losses[4] < result.losses[1] - 0.2
    assert not any("output_layer" in name for name in ranks[0])
    assert not any("word_embeddings" in name for name in ranks[1])


@pytest.mark.full
@pytest.mark.distributed
def test_distributed_optimizer_continues_from_a_checkpoint_as_if_never_stopped(tmp_path):
    flags = [*LLAMA, "--bf16", "--use-distributed-optimizer"]
    whole, ends = train(tmp_path, *flags, "--save", "ckpt", "--save-interval", "2", processes=2)
    continued, ends_again = train(tmp_path, *flags, "--load", "ckpt", "--ckpt-step", "2", processes=2)
    # Every bit: weights, Adam's moments and step, and the random numbers of dropout.
    assert continued.losses[3] == whole.losses[3]
    for before, after in zip(ends, ends_again, strict=True):
        for name in before:
            assert torch.equal(before[name], after[name]), name


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--transformer-impl transformer_engine", "--transformer-impl transformer_engine cannot work without a GPU"),
        ("--distributed-backend nccl", "say gloo"),
        ("--attention-backend flash", "say unfused"),
        ("--tp-comm-overlap", "--tp-comm-overlap cannot work without a GPU: leave it out"),
    ],
)
def test_flags_that_need_a_gpu_are_refused(monkeypatch, flags, message):
    enable()
    from megatron.training.arguments import parse_args

    monkeypatch.setattr(sys, "argv", ["script.py", *flags.split()])
    with pytest.raises(UserError, match=message):
        parse_args()


def test_explicit_flags_stay(monkeypatch):
    enable()
    from megatron.training.arguments import parse_args

    monkeypatch.setattr(sys, "argv", ["script.py", "--attention-backend", "local"])
    args = parse_args()
    assert args.attention_backend.name == "local"
    assert args.transformer_impl == "local"
    assert not args.use_cpu_initialization


@pytest.mark.parametrize(
    ("flags", "fused"),
    [
        ([], True),
        (["--no-bias-gelu-fusion"], False),
        (["--disable-bias-linear"], False),
        # What Megatron cannot fuse with a bias, and raises for.
        (["--squared-relu"], False),
        (tiny_model.MOE, False),
    ],
)
def test_gelu_is_fused_with_its_bias_as_on_gpus(flags, fused):
    enable()
    common = [flag for flag in tiny_model.TINY if flag != "--disable-bias-linear"]
    args, _ = inputs.parse([*common, "--moa-mixing", "none", *flags], 1)
    assert inputs.validated(args).bias_gelu_fusion is fused


def test_command_line_without_a_script():
    missing = run(["-m", "megatron_moa.cpu", "no/such.py"])
    assert missing.returncode == 2
    assert missing.log.strip() == "python -m megatron_moa.cpu: error: there is no script no/such.py"
    nothing = run(["-m", "megatron_moa.cpu"])
    assert nothing.returncode == 2
    assert nothing.log.startswith("usage: ")


def test_gpus_of_slurm_that_cannot_be_used_end_a_run():
    """The whole allocation once computed on the CPU, after one line."""
    script = ["-c", "from megatron_moa import startup; startup.prepare(); startup.check_given_gpus()"]
    without = {"SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": "0,1"}
    ended = run(script, **without)
    assert ended.returncode == 1, ended.log
    assert "SLURM_GPUS_ON_NODE is 8, but torch finds no CUDA device on " in ended.log
    assert slurm_gpus(without) == 8
    for hidden in ("", "-1", "NoDevFiles"):
        assert slurm_gpus({**without, "CUDA_VISIBLE_DEVICES": hidden}) == 0


def test_enable_again_changes_nothing():
    assert enable()
    before = torch.zeros, torch.Tensor.to, torch.cuda.current_device
    assert enable()
    assert is_enabled()
    assert (torch.zeros, torch.Tensor.to, torch.cuda.current_device) == before


def test_cuda_devices_become_the_cpu():
    enable()
    x = torch.zeros(2, device="cuda")
    assert x.device.type == "cpu"
    assert torch.full((2,), 1.0, device=torch.device("cuda", 1)).device.type == "cpu"
    assert torch.empty_like(x, device="cuda").device.type == "cpu"
    assert torch.arange(3, device=torch.cuda.current_device()).device.type == "cpu"
    assert x.cuda() is x
    assert x.to("cuda", torch.bfloat16).dtype == torch.bfloat16
    assert x.new_zeros(3, device="cuda").device.type == "cpu"
    assert torch.nn.Linear(2, 2, device="cuda").to("cuda").weight.device.type == "cpu"
    assert not torch.empty(2, pin_memory=True).is_pinned()
    assert torch.cuda.FloatTensor([1.5]).tolist() == [1.5]
    assert isinstance(x, torch.cuda.FloatTensor)
    assert x.type() == "torch.FloatTensor"  # the name with cuda in it is for Megatron only
    with torch.device("meta"):
        assert torch.zeros(2).is_meta
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(torch.cuda.Stream()):
        start.record()
        end.record()
    assert start.elapsed_time(end) >= 0


def test_cuda_devices_become_the_cpu_in_other_threads():
    enable()
    devices = []
    thread = threading.Thread(target=lambda: devices.append(torch.ones(2, device="cuda").device.type))
    thread.start()
    thread.join()
    assert devices == ["cpu"]


def test_torch_compile_still_compiles_whole_functions():
    enable()
    counter = CompileCounter()

    @torch.compile(backend=counter, fullgraph=True)
    def mixture(x):
        return x.sigmoid() * x + torch.zeros(4, device="cuda") + torch.ones_like(x).to("cuda")

    x = torch.randn(4, requires_grad=True)
    torch.testing.assert_close(mixture(x), x.sigmoid() * x + 1)
    mixture(x).sum().backward()
    assert counter.frame_count == 1


def test_no_function_of_megatron_is_compiled():
    enable()
    import megatron.core.fusions.fused_bias_swiglu as fused
    from megatron.core.jit import jit_fuser

    assert not hasattr(fused.swiglu, "_torchdynamo_orig_callable")
    assert jit_fuser(len) is len


def test_streams_of_random_numbers():
    enable()
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    torch.manual_seed(1)
    tracker.add("a", 10)
    tracker.add("b", 11)
    outer = torch.get_rng_state()
    with tracker.fork("a"):
        a = torch.rand(4)
        with tracker.fork("b"):
            b = torch.rand(4)
        a_after = torch.rand(4)
    assert torch.equal(torch.get_rng_state(), outer)
    torch.manual_seed(10)
    assert torch.equal(torch.rand(8), torch.cat([a, a_after]))
    assert not torch.equal(a, b)

    states = tracker.get_states()
    with tracker.fork("a"):
        first = torch.rand(4)
    tracker.set_states(states)
    with tracker.fork("a"):
        assert torch.equal(torch.rand(4), first)


def test_states_written_on_a_gpu_are_refused():
    enable()
    with pytest.raises(UserError, match="--no-load-rng"):
        torch.cuda.set_rng_state(torch.zeros(16, dtype=torch.uint8))


def test_data_loaders_leave_the_models_random_numbers_alone():
    enable()
    state = torch.get_rng_state()
    seen = [list(torch.utils.data.DataLoader(range(20), shuffle=True)) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert seen[0] != seen[1]


def gather_and_scatter() -> None:
    """Both collectives with one row more on each rank, waited for as Megatron does."""
    enable()
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    gathered = [torch.zeros(rows) for rows in (1, 2)]
    torch.distributed.all_gather(gathered, torch.full((rank + 1,), rank + 1.0), async_op=True).wait()
    assert [tensor.tolist() for tensor in gathered] == [[1], [2, 2]]
    scattered = torch.zeros(rank + 1)
    parts = [torch.ones(1), torch.ones(2)]
    torch.distributed.reduce_scatter(scattered, parts, async_op=True).wait()
    assert scattered.tolist() == [2] * (rank + 1)


@pytest.mark.distributed
def test_collectives_of_unequal_sizes_in_the_background():
    returncode, log = launch.launch(gather_and_scatter, (), 2, ROOT)
    assert returncode == 0, log


def test_single_process_environment(monkeypatch):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in names:
        monkeypatch.setenv(name, "x")  # so that monkeypatch removes afterwards what is set here
        monkeypatch.delenv(name)
    single_process_environment()
    assert [os.environ[name] for name in names[:4]] == ["0", "0", "1", "127.0.0.1"]
    assert int(os.environ["MASTER_PORT"]) > 0
    monkeypatch.setenv("MASTER_PORT", "5")
    single_process_environment()
    assert os.environ["MASTER_PORT"] == "5"
    monkeypatch.delenv("RANK")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="WORLD_SIZE is 2 but RANK is not set"):
        single_process_environment()


@pytest.mark.parametrize("spec", ["moa_layer_spec", pytest.param("la_layer_spec", marks=pytest.mark.full)])
def test_megatrons_own_script_trains_the_mixture_through_spec(tmp_path, spec, monkeypatch):
    """What Megatron's script does with --spec, with nothing of ours but the callable it names.

    Under tensor and sequence parallelism with dropout: copies of the coefficients drift apart if a sum is missing.
    """
    for name, value in launch.without_compiler({}).items():
        monkeypatch.setenv(name, value)
    flags = ["--spec", "megatron_moa.layer_specs", spec, "--stock-modules", *LLAMA, "--train-iters", "6"]
    split = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
    _, ranks = train(tmp_path, *flags, *split, processes=2)
    coefficients = [name for name in ranks[0] if ".coefficients." in name]
    assert len(coefficients) == 2
    expected = {(14, 32)} if spec == "moa_layer_spec" else {(14,)}
    assert {tuple(ranks[0][name].shape) for name in coefficients} == expected
    assert_copies_equal(ranks, COLUMNS_AND_ROWS)
