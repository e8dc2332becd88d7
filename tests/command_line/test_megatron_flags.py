"""The tables of Megatron's flags: complete, spelled right, and true about what Megatron reads."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path

import megatron.core
import megatron.training
import pytest
from megatron.core.transformer.transformer_config import MLATransformerConfig
from megatron.training.arguments import add_megatron_arguments

from megatron_moa.command_line import megatron_flags
from megatron_moa.command_line.flags import our_flags
from megatron_moa.errors import UserError
from megatron_moa.training.parser import add_all_arguments, parser_defaults
from tests.support.training import ROOT

CLASSES = ("FUNCTION", "TOKENIZER", "TRAINING", "EXECUTION", "UNREAD")

# Read in ways that no search for their names finds.
READ_BY_PREFIX = ("muon_",)  # megatron.core.optimizer takes the fields of an optimizer's config by prefix
# Only the code that defines the flag, or refuses other programs' settings, has their names.
NAMED_WITHOUT_USE = {"bert_binary_head", "inference_max_requests", "use_legacy_static_engine"}

# Fields of TransformerConfig without a flag of their name, by what they decide.
FUNCTION_FIELDS = tuple(
    """
    softmax_scale gated_linear_unit activation_func num_moe_experts moe_router_topk_limited_devices moe_token_dropping
    heterogeneous_block_specs original_max_position_embeddings beta_fast beta_slow
    """.split()
)
TRAINING_FIELDS = ("init_method", "output_layer_init_method", "embedding_init_method")
EXECUTION_FIELDS = tuple(
    """
    gtp_weight_remat_size virtual_pipeline_model_parallel_size expert_gtp_weight_remat_size params_dtype timers
    finalize_model_grads_func grad_scale_func moe_grad_scale_func mtp_grad_scale_func no_sync_func grad_sync_func
    param_sync_func enable_autocast autocast_dtype num_microbatches_with_partial_activation_checkpoints
    use_te_rng_tracker tp_comm_atomic_ag tp_comm_atomic_rs tp_comm_overlap_disable_qkv tp_comm_overlap_disable_fc1
    pipeline_dtype variable_seq_lengths batch_p2p_comm batch_p2p_sync deallocate_pipeline_outputs cpu_offloading
    _cpu_offloading_context cpu_offloading_activations cpu_offloading_weights cpu_offloading_double_buffering
    num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage activation_func_fp8_input_store
    experimental_attention_variant_loss_scale_func bias_activation_fusion persist_layer_norm
    memory_efficient_layer_norm fused_single_qkv_rope fp8_param fp8_dot_product_attention fp8_multi_head_attention
    tp_only_amax_red use_kitchen fp4_param cuda_graph_use_single_mempool cuda_graph_retain_backward_graph
    cuda_graph_scope disable_parameter_transpose_cache inference_sampling_seed use_inference_optimized_layers
    hetereogenous_dist_checkpoint quant_recipe
    """.split()
)


def megatrons_flags() -> dict[str, set[str]]:
    """The flags of Megatron's parser, by the setting they set."""
    parser = argparse.ArgumentParser(add_help=False)
    add_megatron_arguments(parser)
    flags: dict[str, set[str]] = {}
    for action in parser._actions:
        flags.setdefault(action.dest, set()).update(action.option_strings)
    return flags


def test_tables_are_of_the_installed_version() -> None:
    assert importlib.metadata.version("megatron-core") == megatron_flags.VERSION


def test_every_flag_of_megatrons_is_in_one_table() -> None:
    sorted_in = [name for kind in CLASSES for name in getattr(megatron_flags, kind)]
    assert len(sorted_in) == len(set(sorted_in))
    flags = set(megatrons_flags())
    assert flags - set(sorted_in) == set(), "flags that no table has: say what they decide"
    assert set(sorted_in) - flags == set(), "names that are no flags any more"


def test_every_field_of_the_config_is_in_one_table() -> None:
    fields = {field.name for field in dataclasses.fields(MLATransformerConfig)} - set(megatrons_flags())
    assert sorted(FUNCTION_FIELDS + TRAINING_FIELDS + EXECUTION_FIELDS) == sorted(fields)


def test_flags_are_spelled_as_megatron_does() -> None:
    for name, flags in megatrons_flags().items():
        assert set(megatron_flags.spellings(name)) == flags


def test_flags_that_turn_something_off_are_known() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    add_megatron_arguments(parser)
    switches = [a for a in parser._actions if a.nargs == 0 and isinstance(a.const, bool) and len(a.option_strings) < 3]
    for action in switches:
        if not isinstance(action, argparse.BooleanOptionalAction) and action.dest not in megatron_flags._BOTH:
            assert megatron_flags.is_negative(action.dest) == (action.const is False), action.option_strings


@pytest.mark.parametrize("kind", ["POSITIVE", "NOT_NEGATIVE", "AT_MOST_ONE"])
def test_defaults_pass_the_checks_of_numbers(kind: str) -> None:
    defaults = parser_defaults()
    assert set(getattr(megatron_flags, kind)) <= set(defaults)
    megatron_flags.check_numbers(argparse.Namespace(**defaults))


def names_read(node: ast.AST) -> Iterator[str]:
    """Attributes that code loads, and every text it has, which may name one."""
    for child in ast.walk(node):
        if isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Load):
            yield child.attr
        elif isinstance(child, ast.Constant) and isinstance(child.value, str):
            yield child.value


def test_unread_flags_are_those_that_no_line_reads() -> None:
    folders = [Path(package.__path__[0]) for package in (megatron.core, megatron.training)]
    folders += [ROOT / "megatron_moa"]
    files = [file for folder in folders for file in folder.rglob("*.py") if file.name != "megatron_flags.py"]
    read: set[str] = set()
    for file in [*files, ROOT / "pretrain_gpt_moa.py"]:
        read.update(names_read(ast.parse(file.read_text(encoding="utf-8"))))
    unread = {name for name in megatrons_flags() if name not in read and not name.startswith(READ_BY_PREFIX)}
    assert unread | NAMED_WITHOUT_USE == set(megatron_flags.UNREAD)


@pytest.mark.parametrize("name", megatron_flags.UNREAD)
def test_unread_flags_are_refused(name: str) -> None:
    for flag in megatron_flags.spellings(name):
        for words in ([flag, "1"], [f"{flag}=1"]):
            with pytest.raises(UserError, match=f"^{flag}: has no effect, .*; drop the flag$"):
                megatron_flags.check_words(words, [])


def test_flags_that_do_not_exist_are_refused_with_the_nearest_that_does() -> None:
    megatron_flags.check_words(["--num-layers", "3", "--moa-gate=tanh", "-1", "--help"], our_flags())
    with pytest.raises(UserError, match=r"^--num-layer: neither .*; did you mean --num-layers[?]$"):
        megatron_flags.check_words(["--num-layer", "3"], our_flags())


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ("--num-layers 0", "--num-layers 0: give a number above 0"),
        ("--hidden-size -32", "--hidden-size -32: give a number above 0"),
        ("--lr nan", "--lr nan: not a number"),
        ("--clip-grad inf", "--clip-grad inf: give 0 or more"),
        ("--norm-epsilon 0", "--norm-epsilon 0.0: give a number above 0"),
        ("--rotary-percent 1.5", "--rotary-percent 1.5: give 1 or less"),
        ("--train-iters -5", "--train-iters -5: give a number above 0"),
        ("--log-interval 0", "--log-interval 0: give a number above 0"),
    ],
)
def test_impossible_numbers_are_refused(flags: str, part: str) -> None:
    parser = argparse.ArgumentParser()
    add_megatron_arguments(parser)
    args = add_all_arguments(parser).parse_args(flags.split())
    with pytest.raises(UserError) as error:
        megatron_flags.check_numbers(args)
    assert str(error.value).startswith(part)
