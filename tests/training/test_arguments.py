"""The command line: what flags become, and one line for every mistake."""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from megatron.training.arguments import add_megatron_arguments

import pretrain_gpt_moa
from megatron_moa.command_line.flags import add_flags, check_checkpoint_flags, mixture_from_args
from megatron_moa.errors import UserError
from megatron_moa.mixture import functional
from megatron_moa.mixture.config import DICTIONARIES, MixtureConfig
from megatron_moa.training.arguments import _settle, check_graphs, check_splits, restore_model_flags
from megatron_moa.training.parser import add_all_arguments
from tests.support import launch
from tests.support.training import ROOT, SWIGLU, TINY, Run

SAVE = ["--train-iters", "2", "--save-interval", "2", "--save"]


def parse(*flags: str, swiglu: bool = True, **others: object) -> argparse.Namespace:
    """Megatron's flags and ours, parsed and not validated."""
    parser = argparse.ArgumentParser()
    add_megatron_arguments(parser)
    args = add_all_arguments(parser).parse_args(flags)
    vars(args).update({"swiglu": swiglu, **others})
    return args


@pytest.mark.parametrize(
    ("settings", "form", "reason"),
    [
        ({}, "bi-sided", "a dense model"),
        ({"num_experts": 8}, "one-sided", "routed experts"),
        ({"swiglu": False}, "type1", "no --swiglu"),
        ({"swiglu": False, "num_experts": 8}, "type1", "no --swiglu"),
    ],
)
def test_default_is_the_papers_best_form_and_initial_values(settings: dict, form: str, reason: str) -> None:
    args = parse(**settings)
    expected = MixtureConfig("moa", form, DICTIONARIES[form], gate="sigmoid", gate_init_std=0.02, init_scale="paper")
    assert mixture_from_args(args) == expected
    assert args.moa_form_reason == reason


def test_a_named_form_needs_no_reason() -> None:
    args = parse("--moa-form", "bi-sided", num_experts=8)
    assert mixture_from_args(args).form == "bi-sided"
    assert args.moa_form_reason is None


def test_small_negative_starts_are_numbers() -> None:
    """Python 3.12 takes -1e-05 for a flag; a mixture's own flags have it."""
    mixture = MixtureConfig("la", "one-sided", ("silu",), initial_coefficients=(-1e-5,))
    assert mixture_from_args(parse(*mixture.to_flags())).initial_coefficients == (-1e-5,)


def test_initial_values_are_taken_as_they_are_given() -> None:
    mixture = mixture_from_args(parse("--moa-mixing", "la", "--moa-init", "0"))
    assert (set(mixture.start_values()), mixture.init_scale) == ({0.0}, "paper")
    both = mixture_from_args(parse("--moa-mixing", "la", "--moa-init", "0.1", "--moa-init-scale", "matched"))
    assert (set(both.start_values()), both.init_scale) == ({0.1}, "matched")
    assert mixture_from_args(parse("--moa-gate-init-std", "0.1")).gate_init_std == 0.1


def test_none_is_stock() -> None:
    assert mixture_from_args(parse("--moa-mixing", "none")) is None


def test_resolved_settings_are_written_back_for_the_checkpoint() -> None:
    args = parse()
    mixture_from_args(args)
    assert args.moa_form == "bi-sided"
    assert args.moa_activations == list(DICTIONARIES["bi-sided"])
    assert args.moa_init == [1.0]
    assert (args.moa_gate_init_std, args.moa_init_scale) == (0.02, "paper")


def test_settings_come_back_from_a_checkpoints_args() -> None:
    saved = parse("--moa-form", "quadratic", "--moa-activations", "silu", "tanh", "--moa-gate-bias")
    expected = mixture_from_args(saved)
    args = parse()
    restore_model_flags(args, saved)
    assert mixture_from_args(args) == expected
    args = parse()
    restore_model_flags(args, argparse.Namespace(bias_gelu_fusion=False))  # a checkpoint of stock Megatron
    assert args.moa_mixing == "none"
    assert args.bias_gelu_fusion is False  # the exact GELU
    args, stock = parse(), parse("--moa-mixing", "none")
    assert mixture_from_args(stock) is None
    restore_model_flags(args, stock)
    assert mixture_from_args(args) is None


SHARED = ("--num-experts", "4", "--moe-shared-expert-intermediate-size", "64")
GRAPHS_BESIDE_MIXTURES = [
    (),
    ("--cuda-graph-impl", "local", "--cuda-graph-modules", "attn"),
    ("--cuda-graph-impl", "local", "--cuda-graph-modules", "moe_router"),
    (*SHARED, "--moe-shared-expert-overlap", "--cuda-graph-impl", "local", "--cuda-graph-modules", "moe_router"),
]
GRAPHS_OF_MIXTURES = [
    ("--cuda-graph-impl", "local"),
    ("--cuda-graph-impl", "transformer_engine", "--cuda-graph-modules", "attn", "mlp"),
    ("--cuda-graph-impl", "full_iteration"),
    (*SHARED, "--cuda-graph-impl", "local", "--cuda-graph-modules", "moe_router"),
]


@pytest.mark.parametrize("flags", GRAPHS_OF_MIXTURES, ids=" ".join)
def test_logging_coefficients_inside_a_cuda_graph_is_refused(flags: tuple[str, ...]) -> None:
    check_graphs(parse(*flags, "--moa-log-interval", "0"))
    with pytest.raises(UserError) as refused:
        check_graphs(parse(*flags, "--moa-log-interval", "100"))
    text = str(refused.value)
    assert text.startswith("--moa-log-interval 100: ")
    assert "\n" not in text
    assert flags[flags.index("--cuda-graph-impl") + 1] in text
    assert "take --moa-log-interval 0" in text


@pytest.mark.parametrize("flags", GRAPHS_BESIDE_MIXTURES, ids=" ".join)
def test_coefficients_outside_a_cuda_graph_are_logged(flags: tuple[str, ...]) -> None:
    check_graphs(parse(*flags, "--moa-log-interval", "100"))


EXPERTS = ("--num-experts", "4", "--moa-log-interval", "0", "--cuda-graph-impl", "local")
GROUPED_ON_THE_GPU = ("--moe-grouped-gemm", "--transformer-impl", "local")


@pytest.mark.parametrize(
    "flags", [(), ("--moe-grouped-gemm", "--transformer-impl", "transformer_engine")], ids=" ".join
)
@pytest.mark.parametrize("modules", [(), ("--cuda-graph-modules", "moe")], ids=" ".join)
def test_experts_that_read_numbers_on_the_host_are_in_no_cuda_graph(
    modules: tuple[str, ...], flags: tuple[str, ...]
) -> None:
    with pytest.raises(UserError, match=r"--cuda-graph-impl local: records routed experts.* take .*-modules attn, or"):
        check_graphs(parse(*EXPERTS, *modules, *flags))
    check_graphs(parse(*EXPERTS, "--cuda-graph-modules", "attn", *flags))
    check_graphs(parse(*EXPERTS, *modules, *GROUPED_ON_THE_GPU))


def test_ranks_experts_that_would_be_saved_under_one_name_are_refused() -> None:
    flags = "--num-experts 4 --moe-grouped-gemm --ckpt-format fsdp_dtensor --moa-backend eager".split()
    args = parse(*flags, "--expert-model-parallel-size", "2")
    with pytest.raises(UserError, match=r"--ckpt-format fsdp_dtensor: cannot hold .* on 2 ranks; drop --moe-grouped"):
        _settle(args, mixture_from_args(args))
    args = parse(*flags)
    _settle(args, mixture_from_args(args))


@pytest.mark.parametrize(
    ("shards", "mixed", "message"),
    [
        ({"gtp_weight_remat_size": 2}, True, "--tensor-parallel-num-weight-shards 2: not supported with a mixture"),
        ({"gtp_weight_remat_size": 2}, False, "--tensor-parallel-num-weight-shards 2: needs Transformer Engine 2.19"),
        ({"expert_gtp_weight_remat_size": 2}, True, "--expert-tensor-parallel-num-weight-shards 4: not supported with"),
        ({"use_megatron_fsdp": True}, True, "--use-megatron-fsdp: needs einops; pip install einops, or drop the flag"),
        ({"num_distributed_optimizer_instances": 2}, False, "--num-distributed-optimizer-instances 2: needs einops"),
        ({}, True, None),
    ],
)
def test_splits_that_fail_late_are_refused(
    shards: dict, mixed: bool, message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = parse()
    vars(args).update({"gtp_weight_remat_size": 1, "expert_gtp_weight_remat_size": 1} | shards)
    vars(args).update(tensor_parallel_num_weight_shards=2, expert_tensor_parallel_num_weight_shards=4)
    mixture = mixture_from_args(args) if mixed else None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("megatron.core.tensor_parallel.gtp_api.HAVE_GTP", False)
    if message is None:
        check_splits(args, mixture)
        return
    with pytest.raises(UserError, match=re.escape(message)):
        check_splits(args, mixture)


def test_a_flag_that_contradicts_the_checkpoint_is_refused() -> None:
    saved = parse("--moa-form", "quadratic")
    mixture_from_args(saved)
    restore_model_flags(parse("--moa-form", "quadratic"), saved)
    with pytest.raises(UserError, match="--moa-form one-sided: the checkpoint has --moa-form quadratic; drop the flag"):
        restore_model_flags(parse("--moa-form", "one-sided"), saved)


def test_gates_can_be_frozen_later() -> None:
    saved = parse("--moa-gate", "tanh")
    mixture_from_args(saved)
    args = parse("--moa-freeze-gates")
    restore_model_flags(args, saved)
    assert mixture_from_args(args) == dataclasses.replace(mixture_from_args(saved), freeze=True)
    args = parse()
    restore_model_flags(args, parse("--moa-freeze-gates"))
    assert args.moa_freeze_gates  # without the flag as it was


@pytest.mark.parametrize(
    ("flags", "settings", "parts"),
    [
        (["--moa-mixing", "none", "--moa-gate", "tanh"], {}, ["--moa-gate tanh", "--moa-mixing none"]),
        (["--moa-mixing", "none", "--moa-activations", "silu"], {}, ["--moa-activations silu", "--moa-mixing none"]),
        (["--moa-mixing", "none", "--moa-log-interval", "5"], {}, ["--moa-log-interval 5", "--moa-mixing none"]),
        (["--moa-log-interval", "-1"], {}, ["--moa-log-interval -1", "0 for never"]),
    ],
)
def test_contradictions(flags: list[str], settings: dict, parts: list[str]) -> None:
    with pytest.raises(UserError) as error:
        mixture_from_args(parse(*flags, **settings))
    assert all(part in str(error.value) for part in parts), error.value


@pytest.fixture
def failing_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., str]:
    """Calls the script's main with flags that are wrong; gives the one line it printed to stderr."""

    def run(*flags: str, base: list[str] = TINY) -> str:
        save = tmp_path / "save"
        monkeypatch.setattr(sys, "argv", ["pretrain_gpt_moa.py", *base, *SAVE, str(save), *flags])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            pretrain_gpt_moa.main()
        lines = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2, lines
        assert len(lines) == 1, lines
        assert lines[0].startswith("pretrain_gpt_moa.py: error: "), lines
        assert not save.exists()
        return lines[0]

    return run


def test_saving_needs_an_interval() -> None:
    """Megatron has an assertion without a text for it."""
    parser = add_flags(argparse.ArgumentParser())
    others = dict.fromkeys(("load", "pretrained_checkpoint", "non_persistent_global_ckpt_dir", "save_interval"))
    args = argparse.Namespace(**vars(parser.parse_args([])), **others, save="folder", ckpt_step=None)
    with pytest.raises(UserError, match="--save folder: says where, not when; add --save-interval N"):
        check_checkpoint_flags(args)


def test_gradients_are_saved_to_a_folder_that_has_a_name() -> None:
    """Megatron has an assertion without a text for it, in the iteration that would save them."""
    args = parse("--save-wgrads-interval", "5")
    with pytest.raises(UserError, match="--save-wgrads-interval 5: writes to the folder --save names; add it"):
        check_checkpoint_flags(args)
    saved = ("--save", "folder", "--save-interval", "5")
    check_checkpoint_flags(parse("--save-wgrads-interval", "5", *saved))
    interval = ("--non-persistent-save-interval", "5", *saved)
    with pytest.raises(UserError, match="--non-persistent-save-interval 5: says when, not how; add --non-persistent-c"):
        check_checkpoint_flags(parse(*interval))
    check_checkpoint_flags(parse(*interval, "--non-persistent-ckpt-type", "global"))


def test_help_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt_moa.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        pretrain_gpt_moa.main()
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "--tensor-model-parallel-size" in printed
    assert "--moa-keep-last" in printed


def without_data() -> list[str]:
    """The tiny model's flags without its mock data and tokenizer."""
    text = " ".join(TINY)
    for part in ("--mock-data", "--tokenizer-type NullTokenizer", "--vocab-size 63"):
        text = text.replace(part, "")
    return text.split()


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ([*SWIGLU, "--moa-activations", "silu", "swoosh"], ["--moa-activations swoosh", "choose from", "silu"]),
        (["--moa-log-interval", "5", "--fake-process-group"], ["--moa-log-interval 5", "no ranks to sum over"]),
        ([*SWIGLU, "--moa-activations", "silu", "silu"], ["--moa-activations silu", "twice"]),
        (["--moa-form", "bi-sided"], ["--moa-form bi-sided", "add --swiglu"]),
        ([*SWIGLU, "--moa-form", "type1"], ["--moa-form type1", "drop --swiglu"]),
        ([*SWIGLU, "--moa-gate", "softmax", "--moa-activations", "silu"], ["--moa-gate softmax", "two or more"]),
        ([*SWIGLU, "--moa-backend", "cudnn"], ["--moa-backend cudnn", "choose one of"]),
        ([*SWIGLU, "--moa-mixing", "maybe"], ["--moa-mixing maybe", "la, moa"]),
        ([*SWIGLU, "--moa-init", "half"], ["--moa-init", "half"]),
        ([*SWIGLU, "--moa-la-init", "0.5"], ["--moa-la-init"]),  # its name in version 1
        ([*SWIGLU, "--moa-init-scale", "swiglu"], ["--moa-init-scale swiglu", "paper, matched"]),
        ([*SWIGLU, "--no-such-flag", "3"], ["--no-such-flag"]),
        ([*SWIGLU, "--num-attention-heads", "5"], ["--num-query-groups 2", "--num-attention-heads 5"]),
        ([*SWIGLU, "--kv-channels", "7"], ["--rotary-percent 1.0", "--kv-channels"]),
        ([*SWIGLU, "--global-batch-size", "3"], ["--global-batch-size 3", "--micro-batch-size 2"]),
        ([*SWIGLU, "--num-experts", "4", "--moe-router-topk", "5"], ["--moe-router-topk 5", "--num-experts 4"]),
        ([*SWIGLU, "--num-experts", "4", "--moe-layer-freq", "[1]*5"], ["has 5 layers", "--num-layers is 2"]),
        ([*SWIGLU, "--num-experts", "4", "--moe-layer-freq", "0"], ["--moe-layer-freq 0", "every N-th"]),
        ([*SWIGLU, "--num-experts", "4", "--moe-layer-freq", "([0,1)"], ["--moe-layer-freq", "([0,1)"]),
        ([*SWIGLU, "--lr-warmup-iters", "10"], ["--lr-warmup-iters 10", "--train-iters 2", "give less"]),
        ([*SWIGLU, "--lr-warmup-fraction", "1.0"], ["--lr-warmup-fraction 1.0"]),
        ([*SWIGLU, "--lr-decay-style", "WSD"], ["--lr-decay-style WSD", "--lr-wsd-decay-iters N"]),
        ([*SWIGLU, "--lr-decay-style", "WSD", "--lr-wsd-decay-iters", "9"], ["--lr-wsd-decay-iters 9"]),
        ([*SWIGLU, "--min-lr", "1"], ["--min-lr 1.0", "--lr 0.002"]),
        (
            [
                *SWIGLU,
                *"--weight-decay-incr-style linear --start-weight-decay 0.2 --end-weight-decay 0.1".split(),
            ],
            ["--start-weight-decay 0.2", "--end-weight-decay 0.1"],
        ),
        (
            [*SWIGLU, "--tensorboard-dir", "/proc/nowhere/tb"],
            ["--tensorboard-dir /proc/nowhere/tb", "cannot be written"],
        ),
        ([*SWIGLU, "--seq-length", "64"], ["--seq-length 64", "--max-position-embeddings 32"]),  # Megatron asserts it
        ([*SWIGLU, "--log-interval", "0"], ["--log-interval 0"]),
        ([*SWIGLU, "--optimizer", "adaptive_muon"], ["--optimizer adaptive_muon", "take --optimizer muon"]),
        ([*SWIGLU, "--logits-load-dir", "x"], ["--logits-load-dir", "drop the flag"]),
        ([*SWIGLU, "--tensor-model-parallel-size", "2"], ["world size"]),
        ([*SWIGLU, "--sft"], ["--sft", "drop the flag"]),
        (
            [*SWIGLU, "--num-experts", "2", "--save-tokens-per-expert-interval", "1"],
            ["--save-tokens-per-expert-interval 1: sees the tokens of Transformer Engine's grouped experts alone"],
        ),
        ([*SWIGLU, "--save-dgrads-interval", "1"], ["--save-dgrads-interval 1: needs Transformer Engine; install it"]),
        ([*SWIGLU, "--save-wgrads-interval", "0"], ["--save-wgrads-interval 0: give a number above 0"]),
        ([*SWIGLU, "--hybrid-layer-pattern", "*-*-"], ["--hybrid-layer-pattern *-*-: not supported by"]),
        ([*SWIGLU, "--mtp-hybrid-override-pattern", "*-"], ["--mtp-hybrid-override-pattern *-: not supported by"]),
        ([*SWIGLU, "--heterogeneous-layers-config-path", "x"], ["--heterogeneous-layers-config-path x: not supported"]),
        ([*SWIGLU, "--heterogeneous-layers-config-encoded-json", "{}"], ["--heterogeneous-layers-config-encoded-json"]),
        ([*SWIGLU, "--freeze-all-layers"], ["--freeze-all-layers: not supported by pretrain_gpt_moa.py; drop"]),
        ([*SWIGLU, "--num-experts", "2", "--moe-use-upcycling"], ["--moe-use-upcycling: not supported by"]),
        ([*SWIGLU, "--spec", "megatron_moa.layer_specs", "moa_layer_spec"], ["--spec", "--moa-mixing"]),
        ([*SWIGLU, "--use-checkpoint-args"], ["--use-checkpoint-args", "--load"]),
        ([*SWIGLU, "--use-checkpoint-args", "--load", "/nonexistent"], ["--load /nonexistent"]),
        (
            [*SWIGLU, "--transformer-impl", "transformer_engine"],
            ["--transformer-impl transformer_engine", "local"],
        ),
    ],
    ids=lambda value: " ".join(value[-3:]) if isinstance(value, list) else None,
)
def test_wrong_flags_get_one_line_and_exit_code_2(
    failing_run: Callable[..., str], flags: list[str], parts: list[str]
) -> None:
    line = failing_run(*flags)
    assert all(part in line for part in parts), line


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--tokenizer-type", "NullTokenizer", "--vocab-size", "63"], ["--data-path"]),
        (
            ["--tokenizer-type", "NullTokenizer", "--vocab-size", "63", "--data-path", "/nonexistent/corpus"],
            ["--data-path /nonexistent/corpus"],
        ),
        (
            ["--mock-data", "--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", "/nonexistent/t.model"],
            ["--tokenizer-model /nonexistent/t.model"],
        ),
        (["--mock-data", "--tokenizer-type", "SentencePieceTokenizer"], ["--tokenizer-model"]),
    ],
    ids=["no data", "missing data", "missing tokenizer", "no tokenizer"],
)
def test_missing_data_and_tokenizer(failing_run: Callable[..., str], flags: list[str], parts: list[str]) -> None:
    line = failing_run(*SWIGLU, *flags, base=without_data())
    assert all(part in line for part in parts), line


def test_kernels_without_a_gpu_stop_before_anything_is_built(
    failing_run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    functional.resolve_backend.cache_clear()
    assert "--moa-backend triton: no GPU" in failing_run(*SWIGLU, "--moa-backend", "triton")
    functional.resolve_backend.cache_clear()


def test_what_the_layers_lack_is_refused_before_anything_is_written(
    failing_run: Callable[..., str], tmp_path: Path
) -> None:
    folder = tmp_path / "tensorboard"
    line = failing_run(*SWIGLU, "--activation-func-clamp-value", "2", "--tensorboard-dir", str(folder))
    assert "--activation-func-clamp-value 2.0: acts on the activation step" in line
    assert not folder.exists()


def test_writing_in_place_needs_the_kernels(failing_run: Callable[..., str]) -> None:
    line = failing_run(*SWIGLU, "--moa-backend", "eager", "--moa-overwrite-preactivation")
    assert "--moa-overwrite-preactivation: the eager backend does not write in place" in line


@pytest.mark.parametrize("fuses_accumulation", [True, False], ids=["Apex", "no Apex"])
@pytest.mark.parametrize("has_te", [True, False], ids=["TE", "no TE"])
def test_each_default_that_needs_a_kernel_follows_that_kernel(
    monkeypatch: pytest.MonkeyPatch, has_te: bool, fuses_accumulation: bool
) -> None:
    """Checks each default that needs a kernel, with and without Transformer Engine and Apex's kernel.

    Among the cases are Transformer Engine and no Apex, as pip installs it, and a package apex without this kernel.
    """
    monkeypatch.setattr("megatron.core.extensions.transformer_engine.HAVE_TE", has_te)
    rotary = (lambda *_: None) if has_te else None
    monkeypatch.setattr("megatron.core.models.common.embeddings.rope_utils.fused_apply_rotary_pos_emb", rotary)
    monkeypatch.setattr("megatron.core.tensor_parallel.layers._grad_accum_fusion_available", fuses_accumulation)
    monkeypatch.setattr("megatron.core.fusions.fused_layer_norm.HAVE_PERSIST_LAYER_NORM", fuses_accumulation)
    monkeypatch.setattr("megatron.core.models.gpt.gpt_layer_specs.HAVE_APEX", True)  # a foreign one sets it too
    parser = argparse.ArgumentParser()
    getattr(add_megatron_arguments, "__wrapped__", add_megatron_arguments)(parser)
    parser.set_defaults(transformer_impl="transformer_engine")
    args = add_all_arguments(parser).parse_args([])
    assert args.transformer_impl == ("transformer_engine" if has_te else "local")
    assert args.apply_rope_fusion is has_te
    assert args.gradient_accumulation_fusion is fuses_accumulation
    assert args.no_persist_layer_norm is not fuses_accumulation
    assert args.masked_softmax_fusion is False
    given = parser.parse_args(["--transformer-impl", "inference_optimized"])
    assert given.transformer_impl == "inference_optimized"


@pytest.mark.parametrize(
    ("flags", "validations"),
    [(["--train-iters", "2", "--eval-iters", "0"], 0), (["--train-samples", "8", "--eval-interval", "0"], 2)],
    ids=["no evaluation", "after training alone"],
)
def test_no_interval_of_evaluation_is_never_before_the_end(flags: list[str], validations: int) -> None:
    at = TINY.index("--eval-iters")  # --eval-iters 0 --eval-interval 1000
    base = [*TINY[:at], *TINY[at + 4 :], *SWIGLU, "--eval-iters", "1", "--moa-backend", "eager"]
    run = Run(*launch.launch(launch.script, (str(ROOT / "pretrain_gpt_moa.py"), [*base, *flags]), 1, ROOT))
    assert run.returncode == 0, run.log
    assert sorted(run.losses) == [1, 2]
    assert len(run.validation_losses) == validations  # after training on the validation set, and on the test set
