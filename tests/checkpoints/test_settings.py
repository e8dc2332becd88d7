"""A checkpoint of other settings is one clear error before anything is built, and never half loaded."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from megatron.core.tokenizers.text.libraries.null_tokenizer import NullTokenizer

from megatron_moa.checkpoints.files import Checkpoint, write_tracker
from megatron_moa.checkpoints.settings import (
    FORMAT_VERSION,
    changed_data,
    changed_tokens,
    check_saved_settings,
    check_vocabulary,
    upgrade_saved_settings,
    vocabulary_digest,
)
from megatron_moa.command_line.megatron_flags import as_typed
from megatron_moa.errors import UserError
from megatron_moa.layers import coefficients
from megatron_moa.training import arguments
from megatron_moa.training.parser import parser_defaults
from tests.support import launch
from tests.support.checkpoints import write_checkpoint
from tests.support.training import ROOT, SWIGLU, TINY, Run, run_script, train

CHECKPOINT = Checkpoint("--load", Path("somewhere"), 40)
FUSED = {"moa_mixing": "none", "swiglu": False, "add_bias_linear": True, "bias_gelu_fusion": True}
EXACT = {**FUSED, "bias_gelu_fusion": False}
SETTINGS = {
    **parser_defaults(),
    "moa_mixing": "moa",
    "moa_form": "bi-sided",
    "moa_activations": ["silu", "relu2"],
    "moa_gate": "sigmoid",
    "moa_gate_bias": False,
    "moa_amplitude": "fixed",
    "moa_init": [1.0],
    "moa_gate_init_std": 0.02,
    "moa_init_scale": "paper",
    "moa_freeze_gates": False,
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "group_query_attention": True,
    "num_query_groups": 2,
    "kv_channels": 8,
    "multi_latent_attention": False,
    "q_lora_rank": None,
    "kv_lora_rank": 32,
    "qk_head_dim": 128,
    "qk_pos_emb_head_dim": 64,
    "v_head_dim": 128,
    "swiglu": True,
    "squared_relu": False,
    "quick_geglu": False,
    "normalization": "RMSNorm",
    "layernorm_zero_centered_gamma": False,
    "position_embedding_type": "rope",
    "max_position_embeddings": 64,
    "add_bias_linear": False,
    "bias_gelu_fusion": True,
    "add_qkv_bias": False,
    "qk_layernorm": False,
    "untie_embeddings_and_output_weights": True,
    "num_experts": None,
    "moe_ffn_hidden_size": None,
    "moe_layer_freq": 1,
    "moe_router_topk": 2,
    "moe_shared_expert_intermediate_size": None,
    "mtp_num_layers": None,
    "use_checkpoint_args": False,
}


def namespace(**changes: Any) -> argparse.Namespace:
    return argparse.Namespace(**{**SETTINGS, **changes})


@pytest.mark.parametrize(
    ("run", "saved", "given", "there"),
    [
        ({"moa_mixing": "la"}, {}, "--moa-mixing la", "--moa-mixing moa"),
        ({"moa_form": "quadratic"}, {}, "--moa-form quadratic", "--moa-form bi-sided"),
        ({"moa_activations": ["silu", "tanh"]}, {}, "--moa-activations silu tanh", "--moa-activations silu relu2"),
        ({"moa_activations": ["relu2", "silu"]}, {}, "--moa-activations relu2 silu", "--moa-activations silu relu2"),
        ({"moa_gate": "tanh"}, {}, "--moa-gate tanh", "--moa-gate sigmoid"),
        ({"moa_gate_bias": True}, {}, "--moa-gate-bias", "no --moa-gate-bias"),
        ({"moa_amplitude": "learned"}, {}, "--moa-amplitude learned", "--moa-amplitude fixed"),
        ({"moa_init_scale": "matched"}, {}, "--moa-init-scale matched", "--moa-init-scale paper"),
        ({"num_layers": 3}, {}, "--num-layers 3", "--num-layers 2"),
        ({"hidden_size": 64}, {}, "--hidden-size 64", "--hidden-size 32"),
        ({"ffn_hidden_size": 64}, {}, "--ffn-hidden-size 64", "--ffn-hidden-size 48"),
        ({"num_attention_heads": 8}, {}, "--num-attention-heads 8", "--num-attention-heads 4"),
        ({"num_query_groups": 4}, {}, "--num-query-groups 4", "--num-query-groups 2"),
        ({"add_bias_linear": True}, {}, "no --disable-bias-linear", "--disable-bias-linear"),
        ({"num_experts": 4}, {}, "--num-experts 4", "no --num-experts"),
        ({"rotary_base": 500}, {}, "--rotary-base 500", "--rotary-base 10000"),
        ({}, {"qk_l2_norm": True}, "no --qk-l2-norm", "--qk-l2-norm"),
        ({"use_mup": True}, {}, "--use-mup", "no --use-mup"),
        ({"layernorm_epsilon": 1e-6}, {}, "--norm-epsilon 1e-06", "--norm-epsilon 1e-05"),
        (
            {"num_experts": 4, "moe_router_load_balancing_type": "sinkhorn"},
            {"num_experts": 4},
            "--moe-router-load-balancing-type sinkhorn",
            "--moe-router-load-balancing-type aux_loss",
        ),
        ({"num_experts": 4}, {"num_experts": 8}, "--num-experts 4", "--num-experts 8"),
        (
            {"position_embedding_type": "learned_absolute"},
            {"position_embedding_type": "learned_absolute", "max_position_embeddings": 32},
            "--max-position-embeddings 64",
            "--max-position-embeddings 32",
        ),
        ({"moa_mixing": "none"}, {}, "--moa-mixing none", "--moa-mixing moa"),
        ({"moa_mixing": "none", "swiglu": False}, {"moa_mixing": "none"}, "no --swiglu", "--swiglu"),
        (FUSED, EXACT, "no --no-bias-gelu-fusion", "--no-bias-gelu-fusion"),  # two functions, both called GELU
        (EXACT, FUSED, "--no-bias-gelu-fusion", "no --no-bias-gelu-fusion"),
    ],
)
def test_each_setting_is_compared(run: dict[str, Any], saved: dict[str, Any], given: str, there: str) -> None:
    with pytest.raises(UserError) as error:
        check_saved_settings(namespace(**run), namespace(**saved), CHECKPOINT)
    text = str(error.value)
    where = "(--load somewhere: iteration 40); "
    if given.startswith("no "):
        assert text.startswith(f"this run lacks {there}, which the checkpoint was trained with {where}")
    elif there.startswith("no "):
        assert text == f"{given}: the checkpoint was trained without it {where}drop the flag"
    else:
        assert text.startswith(f"{given}: the checkpoint was trained with {there} {where}")
        assert text.endswith("add --use-checkpoint-args")


@pytest.mark.parametrize(
    ("run", "saved"),
    [
        ({}, {}),
        ({"moa_init": [0.1], "moa_gate_init_std": 0.2, "moa_freeze_gates": True}, {}),  # the start; what is trained
        ({"moa_amplitude": "learned", "moa_init_scale": "matched"}, {"moa_amplitude": "learned"}),  # in the amplitudes
        ({"moa_mixing": "la", "moa_init_scale": "matched"}, {"moa_mixing": "la"}),  # in the coefficients
        ({"max_position_embeddings": 128, "v_head_dim": 64}, {}),  # of no effect with these settings
        ({"mtp_num_layers": 0}, {"mtp_num_layers": None}),
        ({"num_experts": 4, "moe_router_load_balancing_type": "none"}, {"num_experts": 4}),  # of training alone
        ({**FUSED, "swiglu": True}, {**EXACT, "swiglu": True}),  # no GELU there
        ({**FUSED, "moa_mixing": "la"}, {**EXACT, "moa_mixing": "la"}),
    ],
)
def test_what_decides_no_parameter_may_differ(run: dict[str, Any], saved: dict[str, Any]) -> None:
    check_saved_settings(namespace(**run), namespace(**saved), CHECKPOINT)


@pytest.mark.parametrize(("swiglu", "name"), [(True, "SwiGLU"), (False, "GELU")])
def test_a_stock_checkpoint_must_be_converted(swiglu: bool, name: str) -> None:
    saved = namespace(swiglu=swiglu)
    for setting in [key for key in SETTINGS if key.startswith("moa_")]:
        delattr(saved, setting)
    with pytest.raises(UserError, match=f"has stock {name} layers.*convert it.*docs/upcycling.md"):
        check_saved_settings(namespace(swiglu=swiglu), saved, CHECKPOINT)


def test_the_remedy_is_not_a_flag_that_is_there_already() -> None:
    with pytest.raises(UserError, match=r"drop the flag$"):
        check_saved_settings(namespace(use_checkpoint_args=True, num_layers=3), namespace(), CHECKPOINT)


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 0, "2"])
def test_an_unknown_format_version_is_refused(version: object) -> None:
    with pytest.raises(UserError, match=f"format version {version}.* up to {FORMAT_VERSION}"):
        upgrade_saved_settings(namespace(moa_format_version=version), CHECKPOINT)


def test_settings_of_this_version_stay_as_they_are() -> None:
    saved = namespace(moa_format_version=FORMAT_VERSION, moa_form="quadratic")
    upgrade_saved_settings(saved, CHECKPOINT)
    assert saved == namespace(moa_format_version=FORMAT_VERSION, moa_form="quadratic")


def version_1(**changes: Any) -> argparse.Namespace:
    """Settings as version 1 named them."""
    saved = namespace(moa_init_scale="mixture", moa_la_init=[0.5], init_method_std=0.1)
    del saved.moa_init, saved.moa_gate_init_std
    vars(saved).update(changes)
    return saved


@pytest.mark.parametrize(
    ("saved", "init", "gate_init_std", "init_scale"),
    [
        ({}, [1.0], 0.1, "paper"),  # gates of fixed amplitude never started from moa_la_init, but like fc1
        ({"moa_format_version": 1}, [1.0], 0.1, "paper"),
        ({"moa_init_scale": "swiglu"}, [1.0], 0.1, "matched"),
        ({"moa_amplitude": "learned"}, [0.5], 0.1, "paper"),
        ({"moa_mixing": "la"}, [0.5], 0.02, "paper"),
        ({"moa_mixing": "la", "moa_la_init": [0.25] * 4, "moa_form": "type1"}, [0.25] * 4, 0.02, "paper"),
    ],
)
def test_version_1s_names_are_understood(
    saved: dict[str, Any], init: list[float], gate_init_std: float, init_scale: str
) -> None:
    args = version_1(**saved)
    upgrade_saved_settings(args, CHECKPOINT)
    assert (args.moa_init, args.moa_gate_init_std, args.moa_init_scale) == (init, gate_init_std, init_scale)
    assert not hasattr(args, "moa_la_init")
    assert args.moa_activations == ["silu", "relu2"]


@pytest.mark.parametrize(
    ("form", "change"), [("one-sided", "SiLU now stays on W1's and W2's is mixed"), ("quadratic", "those of k <= l")]
)
@pytest.mark.parametrize("mixing", ["la", "moa"])
def test_version_1s_changed_forms_are_refused(mixing: str, form: str, change: str) -> None:
    with pytest.raises(UserError) as error:
        upgrade_saved_settings(version_1(moa_mixing=mixing, moa_form=form), CHECKPOINT)
    text = str(error.value)
    assert text.startswith(f"--load somewhere: iteration 40: its {form} form is of format version 1, ")
    assert change in text
    assert "\n" not in text


def test_version_1s_stock_models_are_the_same_whatever_form_they_name() -> None:
    upgrade_saved_settings(version_1(moa_mixing="none", moa_form="one-sided"), CHECKPOINT)


@pytest.mark.parametrize(
    ("padded", "tensor_parallel", "vocabulary", "fits"),
    [(64, 1, 64, True), (64, 2, 50, True), (64, 1, 40, False), (64, 2, 65, False), (96, 1, 64, False)],
)
def test_the_vocabulary_is_compared(padded: int, tensor_parallel: int, vocabulary: int, fits: bool) -> None:
    saved = argparse.Namespace(
        padded_vocab_size=padded, make_vocab_size_divisible_by=16, tensor_model_parallel_size=tensor_parallel
    )
    run = argparse.Namespace(padded_vocab_size=-(-vocabulary // 40) * 40)  # padded otherwise, as another split does
    if fits:
        check_vocabulary(run, saved, vocabulary, CHECKPOINT)
    else:
        with pytest.raises(UserError, match=f"{padded} tokens.*tokenizer has {vocabulary}"):
            check_vocabulary(run, saved, vocabulary, CHECKPOINT)


@pytest.mark.parametrize("tokens", [64, 40])
def test_a_larger_vocabulary_is_refused_where_the_padded_one_is_the_checkpoints(tokens: int) -> None:
    saved = argparse.Namespace(padded_vocab_size=64, make_vocab_size_divisible_by=16, tensor_model_parallel_size=1)
    run = argparse.Namespace(padded_vocab_size=64)  # by --use-checkpoint-args
    check_vocabulary(run, saved, tokens, CHECKPOINT)
    with pytest.raises(UserError, match=r"64 tokens.*tokenizer has 65"):
        check_vocabulary(run, saved, 65, CHECKPOINT)


def test_other_tokens_are_refused_and_told_where_a_run_finetunes() -> None:
    tokens = [dict(enumerate(pieces)) for pieces in (["a", "b"], ["a", "c"], ["b", "a"], ["a", "b", "c"])]
    digests = [vocabulary_digest(argparse.Namespace(inv_vocab=each)) for each in tokens]
    assert len(set(digests)) == len(tokens)
    assert vocabulary_digest(NullTokenizer(8)) is None
    saved = argparse.Namespace(moa_vocabulary=digests[0], tokenizer_model="tok")
    run = argparse.Namespace(tokenizer_model="other", finetune=False)
    for same in (digests[0], None):
        assert not list(changed_tokens(argparse.Namespace(**vars(run), moa_vocabulary=same), saved, CHECKPOINT))
    run.moa_vocabulary = digests[1]
    with pytest.raises(UserError, match=r"--tokenizer-model other: has other tokens .*, tok .*; give that one"):
        list(changed_tokens(run, saved, CHECKPOINT))
    run.finetune = True
    (line,) = changed_tokens(run, saved, CHECKPOINT)
    assert "other tokens" in line
    assert not list(changed_tokens(run, argparse.Namespace(), CHECKPOINT))  # saved by an older version


def test_another_seed_is_told_as_other_data() -> None:
    run = namespace(seed=2, finetune=False, skip_train=False)
    (line,) = changed_data(run, namespace(seed=1), CHECKPOINT)
    assert line.startswith("--seed 2: the checkpoint was trained with --seed 1 (--load somewhere: iteration 40); ")


@pytest.fixture
def take(tmp_path: Path) -> Callable[..., argparse.Namespace]:
    """Returns a run's settings beside those of a checkpoint that --use-checkpoint-args takes."""
    there = namespace(attention_dropout=0.3, hidden_dropout=0.3, spec=["megatron_moa.layer_specs", "moa_layer_spec"])
    vars(there).update(moa_format_version=FORMAT_VERSION, num_layers=2, tensor_model_parallel_size=2)

    def call(saved: Mapping[str, object] = MappingProxyType({}), **typed: object) -> argparse.Namespace:
        settings, root = {**vars(there), **saved}, tmp_path / f"{len(list(tmp_path.iterdir()))}"
        write_checkpoint(root / "iter_0000007", {}, settings)
        write_tracker(root, 7)
        args = argparse.Namespace(**{**parser_defaults(), **typed, "load": str(root), "use_checkpoint_args": True})
        arguments._take_saved_settings(args, Checkpoint("--load", root, 7), argparse.Namespace(**settings))
        return args

    return call


def test_what_is_typed_wins_where_it_is_not_of_the_function(take: Callable[..., argparse.Namespace]) -> None:
    """Megatron takes all of these from the checkpoint, whatever the command line says."""
    typed = {"hidden_dropout": 0.0, "apply_query_key_layer_scaling": True, "moe_single_grouped_weight": True}
    args = take(**typed)
    assert {name: getattr(args, name) for name in typed} == typed
    assert args.attention_dropout == 0.3  # was not given
    assert args.num_layers == 2
    assert args.spec is None


@pytest.mark.parametrize("words", [["--hidden-dropout", "0.1"], ["--hidden-dropout=0.1"]])
def test_what_is_typed_wins_where_it_is_the_default(
    words: list[str], take: Callable[..., argparse.Namespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt_moa.py", *words])
    args = take()
    assert (args.hidden_dropout, args.attention_dropout) == (0.1, 0.3)


@pytest.mark.parametrize("words", [["--moa-gate", "sigmoid"], ["--rotary-base", "10000"]], ids=str)
def test_a_typed_default_contradicts_as_any_other_value(
    words: list[str], take: Callable[..., argparse.Namespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint of tanh gates is not loaded as it is for who typed ``--moa-gate sigmoid``, the default."""
    others = {"moa_mixing": "moa", "moa_gate": "tanh", "rotary_base": 500000}
    assert take(saved=others).rotary_base == 500000
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt_moa.py", *words])
    typed = " ".join(words).replace("=", " ")
    with pytest.raises(UserError, match=f"^{typed}: the checkpoint has .*; drop the flag$"):
        take(saved=others)
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt_moa.py", "--moa-gate-lr-scale", "1"])
    assert take(saved={**others, "moa_gate_lr_scale": 4.0}).moa_gate_lr_scale == 1.0


def test_a_split_is_the_checkpoints_where_that_is_asked_for(take: Callable[..., argparse.Namespace]) -> None:
    assert take(tensor_model_parallel_size=4).tensor_model_parallel_size == 4
    asked = take(tensor_model_parallel_size=4, use_mp_args_from_checkpoint_args=True)
    assert asked.tensor_model_parallel_size == 2


def test_settings_are_shown_as_typed() -> None:
    assert as_typed("moa_activations", ["silu", "tanh"]) == "--moa-activations silu tanh"
    assert [as_typed("add_bias_linear", value) for value in (True, False)] == [
        "no --disable-bias-linear",
        "--disable-bias-linear",
    ]


# Whole runs.

MIXTURE = "--moa-gate softmax --moa-gate-bias --moa-activations silu relu2 --moa-backend eager".split()
MIXTURE += ["--moa-init-scale", "matched"]  # so that a constant scale lies beside the gates
FLAGS = [*SWIGLU, "--train-iters", "2", "--save-interval", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trains and saves checkpoints of a mixture and of stock SwiGLU, and forges others.

    The settings of a forgery say what its tensors do not.
    """
    folder = tmp_path_factory.mktemp("checkpoints")
    train(*FLAGS, *MIXTURE, "--save", folder / "moa")
    train(*FLAGS, "--moa-mixing", "none", "--save", folder / "stock")
    forge("without_gates", *FLAGS, *MIXTURE, "--no-save-optim", "--save", folder / "without")
    forge("without_gates", *FLAGS, *MIXTURE, "--no-save-optim", "--save", folder / "legacy", "--ckpt-format", "torch")
    forge("of_the_next_version", *FLAGS, *MIXTURE, "--save", folder / "next")
    return folder


def forge(name: str, *flags: str | Path, processes: int = 1, check: bool = True) -> Run:
    """A training with something of ours replaced: what runs in each process is ``forged``."""
    target = (name, [*TINY, *map(str, flags)])
    run = Run(*launch.launch(forged, target, processes, ROOT))
    assert not check or run.returncode == 0, run.log[-4000:]
    return run


def forged(name: str, flags: list[str]) -> None:
    if name == "without_gates":
        coefficients.Coefficients.sharded_state_dict = lambda self, *args, **kwargs: {}
        coefficients.Coefficients._save_to_state_dict = lambda self, *args: None
    if name == "of_the_next_version":
        arguments.FORMAT_VERSION += 1
    launch.script(str(ROOT / "pretrain_gpt_moa.py"), flags)


def refusal(run: Run) -> str:
    """The one line of a run that refused its checkpoint before it built anything."""
    assert run.returncode == 2, run.log[-4000:]
    (line,) = [line for line in run.log.splitlines() if line.startswith("pretrain_gpt_moa.py: error: ")]
    assert "Traceback" not in run.log
    assert "> mixture of activations" not in run.log
    assert "parameters on (tensor, pipeline)" not in run.log
    return line.removeprefix("pretrain_gpt_moa.py: error: ")


OTHER_ORDER = [{"silu": "relu2", "relu2": "silu"}.get(flag, flag) for flag in MIXTURE]


@pytest.mark.parametrize("how", ["--load", "--finetune", "--pretrained-checkpoint", "--ckpt-step"])
def test_another_order_of_the_dictionary_is_refused(folder: Path, tmp_path: Path, how: str) -> None:
    source = ["--load", folder / "moa"]
    source += {"--finetune": ["--finetune"], "--ckpt-step": ["--ckpt-step", "2"]}.get(how, [])
    if how == "--pretrained-checkpoint":
        source = ["--load", tmp_path / "new", "--pretrained-checkpoint", folder / "moa"]
    run = train(*FLAGS, *OTHER_ORDER, *source, "--save", tmp_path / "new", check=False)
    assert refusal(run).startswith(
        "--moa-activations relu2 silu: the checkpoint was trained with --moa-activations silu relu2"
    )
    assert not (tmp_path / "new").exists()
    assert "> initializing torch distributed" not in run.log


@pytest.mark.distributed
def test_all_ranks_leave_together(folder: Path) -> None:
    run = train(*FLAGS, *OTHER_ORDER, "--load", folder / "moa", processes=2, check=False)
    assert "--moa-activations relu2 silu" in refusal(run)


def test_a_stock_checkpoint_into_a_mixture_and_back(folder: Path) -> None:
    run = train(*FLAGS, *MIXTURE, "--load", folder / "stock", check=False)
    assert re.search(r"iteration 2: has stock SwiGLU layers.*--moa-mixing moa.*convert it", refusal(run))
    run = train(*FLAGS, "--moa-mixing", "none", "--load", folder / "moa", check=False)
    assert refusal(run).startswith("--moa-mixing none: the checkpoint was trained with --moa-mixing moa")


def test_what_was_given_beside_the_checkpoints_settings_is_refused(folder: Path) -> None:
    flags = ["--use-checkpoint-args", "--load", folder / "moa"]
    assert "--moa-gate tanh" in refusal(train(*FLAGS, *flags, "--moa-gate", "tanh", check=False))
    assert refusal(train(*FLAGS, *flags, "--num-layers", "3", check=False)).endswith("drop the flag")


def test_the_checkpoints_settings_are_taken(folder: Path, tmp_path: Path) -> None:
    more = ["--train-iters", "3", "--override-opt-param-scheduler", "--moa-backend", "eager", "--use-checkpoint-args"]
    run = train(*FLAGS, *more, "--load", tmp_path, "--pretrained-checkpoint", folder / "moa")
    assert "moa, bi-sided, silu+relu2, softmax gates with bias" in run.log
    assert sorted(run.losses) == [1, 2, 3]  # --pretrained-checkpoint starts anew with the weights


def test_another_tokenizer_is_refused(folder: Path) -> None:
    run = train(*FLAGS, *MIXTURE, "--load", folder / "moa", "--vocab-size", "127", check=False)
    assert re.search(r"embedding of 64 tokens.*tokenizer has 127", refusal(run))


def test_a_newer_format_is_refused(folder: Path) -> None:
    run = train(*FLAGS, *MIXTURE, "--load", folder / "next", check=False)
    assert f"format version {FORMAT_VERSION + 1}" in refusal(run)


@pytest.mark.parametrize("strictness", ["assume_ok_unexpected", pytest.param("ignore_all", marks=pytest.mark.full)])
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=[pytest.mark.distributed, pytest.mark.full])])
def test_missing_and_surplus_tensors_are_refused(folder: Path, strictness: str, processes: int) -> None:
    flags = [*FLAGS, *MIXTURE, "--dist-ckpt-strictness", strictness, "--train-iters", "3", "--no-load-optim"]
    run = train(*flags, "--load", folder / "without", processes=processes, check=False)
    assert run.returncode == 2, run.log[-3000:]
    assert "the checkpoint lacks 3 tensors (decoder.layers.mlp.coefficients.bias, " in run.log
    run = forge("without_gates", *flags, "--load", folder / "moa", processes=processes, check=False)
    assert run.returncode == 2, run.log[-3000:]
    assert "the checkpoint has 3 tensors (decoder.layers.mlp.coefficients.bias, " in run.log
    assert 3 not in run.losses


def test_megatrons_partial_load_is_refused(folder: Path) -> None:
    flags = [*FLAGS, *MIXTURE, "--ckpt-format", "torch", "--train-iters", "3", "--no-load-optim"]
    run = train(*flags, "--load", folder / "legacy", check=False)
    assert run.returncode == 2, run.log[-3000:]
    assert "lacks decoder.layers.0.mlp.coefficients.weight" in run.log


def test_generate_refuses_them_too(folder: Path) -> None:
    run = run_script("tools/generate.py", ["--load", folder / "next", "--num-tokens", "1"], check=False)
    assert run.returncode == 2
    assert f"generate.py: error: --load {folder / 'next'}: iteration 2: was saved in format version" in run.log
