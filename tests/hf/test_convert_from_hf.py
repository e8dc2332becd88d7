"""Tests tools/convert_from_hf.py: a folder's model is the same function in Megatron, and trains on.

If the model came from Megatron, it is the same to the last bit.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch.nn import functional as F
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from megatron_moa.checkpoints.tensors import CheckpointTensors
from megatron_moa.hf.configuration_gpt_moa import GPTMoAConfig
from megatron_moa.hf.families import LLAMA3_ROPE
from megatron_moa.hf.tokenizer import SAMPLE
from tests.hf import test_families
from tests.support import launch
from tests.support.tokenizers import train_sentencepiece
from tests.support.training import MOE, ROOT, SWIGLU, TINY
from tools import convert_from_hf, convert_to_hf


def run(target: Any, *arguments: Any, code: int = 0, processes: int = 1, folder: Path = ROOT) -> str:
    """What it printed, in a process of its own that has Megatron imported."""
    returncode, log = launch.launch(target, arguments, processes, folder)
    assert returncode == code, log[-3000:]
    return log


def convert(*runs: list[str]) -> None:
    """A target of :func:`run`: the tool, so many times in one process."""
    for flags in runs:
        convert_from_hf.main(list(map(str, flags)))


def verified(log: str) -> list[float]:
    """The differences that were printed."""
    return [float(number) for number in re.findall(r"verified +largest difference of logits (\S+) of", log)]


# Settings.

PLAIN = {"vocab_size": 67, "hidden_size": 24, "intermediate_size": 28, "num_hidden_layers": 3, "norm_eps": 1.1e-3}
PLAIN |= {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10, "max_position_embeddings": 37}
PLAIN |= {"initializer_range": 0.0123}
GPT2 = {"normalization": "LayerNorm", "position_embedding_type": "learned_absolute", "gated": False}
BIASES = {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}
PARTIAL = {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.4}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 4.5, **LLAMA3_ROPE}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 20}
SHARED = {"shared_expert_intermediate_size": 12, "shared_expert_gate": True}
SIGMOID = {"router_score": "sigmoid", "router_bias": True, "router_scaling_factor": 2.5, "router_float32": True}


def mixing(kind: str, form: str, *activations: str, **gate: Any) -> dict[str, Any]:
    gates = {"gate": "sigmoid", "gate_bias": False, "amplitude": "fixed", **gate} if kind == "moa" else {}
    return {"mixing": kind, "form": form, "activations": list(activations or ("silu", "relu2")), **gates}


SETTINGS: list[dict[str, Any]] = [
    {},
    {"tie_word_embeddings": True, "num_key_value_heads": 6, "head_dim": 4},
    BIASES,
    {"attention_bias": True},
    {"qk_norm": True, "rope_parameters": LINEAR},
    {"rope_parameters": PARTIAL},
    {"rope_parameters": LLAMA3},
    {"position_embedding_type": "none"},
    {**GPT2, "hidden_act": "gelu"},
    {**GPT2, **BIASES, "hidden_act": "gelu"},
    {**GPT2, **BIASES, "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True},
    EXPERTS,
    {**EXPERTS, **SHARED, "moe_layers": [True, False, True], "router_pre_softmax": True},
    {**EXPERTS, **SIGMOID, "shared_expert_intermediate_size": 12},
    {"mixing": mixing("la", "one-sided")},
    {"mixing": mixing("la", "bi-sided", "tanh", "identity", "gelu")},
    {"mixing": mixing("la", "quadratic"), **BIASES},
    {"mixing": mixing("la", "type1"), **GPT2, "hidden_act": "gelu"},
    {"mixing": mixing("moa", "one-sided", gate="softmax", gate_bias=True)},
    {"mixing": mixing("moa", "bi-sided", amplitude="learned", gate="tanh")},
    {"mixing": mixing("moa", "quadratic")},
    {"mixing": mixing("moa", "type1"), **GPT2, **BIASES, "hidden_act": "gelu"},
    {"mixing": mixing("moa", "bi-sided"), "mixing_scale": True, **EXPERTS, **SHARED},
]


def settings_there_and_back(settings: list[dict[str, Any]]) -> None:
    """Writes configurations as flags, parses these as training does, and reads them back from the args.

    This is a target of :func:`run`.
    """
    from megatron_moa.hf.importing import flags_from_config, parse
    from megatron_moa.hf.settings import config_from_args

    sizes = ["--micro-batch-size", "1", "--seq-length", "16", "--tokenizer-type", "NullTokenizer", "--vocab-size", "67"]
    for number, some in enumerate(settings):
        own = GPTMoAConfig(**{**PLAIN, **some})
        args, found = parse([*flags_from_config(own), *sizes])
        back = config_from_args(args, found, 67).to_dict()
        different = {name: (value, back[name]) for name, value in own.to_dict().items() if back[name] != value}
        assert not different, (number, different)
        assert args.world_size == 1


def test_settings_become_flags_and_come_back() -> None:
    run(settings_there_and_back, SETTINGS)


def test_a_split_is_of_widths_that_layers_have() -> None:
    from megatron_moa.errors import UserError
    from megatron_moa.hf.importing import TakenSplit

    experts = {**PLAIN, **EXPERTS, "intermediate_size": 27}  # a width of dense layers
    TakenSplit(tensor=2, expert=5).check(GPTMoAConfig(**experts))
    for settings, message in (
        (
            {"moe_layers": [True, False, True]},
            r"--tp 2: does not divide the model's 27 columns of a feed-forward layer",
        ),
        ({"moe_intermediate_size": 21}, r"--tp 2: does not divide the model's 21 columns of an expert"),
    ):
        with pytest.raises(UserError, match=message):
            TakenSplit(tensor=2).check(GPTMoAConfig(**{**experts, **settings}))


# Models of transformers' own.

OFTEN = ("llama, all biases, tied, llama3 rope", "gpt2", "qwen2 moe")


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(OFTEN, id="some"),
        pytest.param([case for case in test_families.CASES if case not in OFTEN], id="all"),
    ],
)
def test_families_compute_the_same(cases: list[str], tmp_path: Path) -> None:
    runs = []
    for number, case in enumerate(cases):
        _, model = test_families.build(case)
        folder = tmp_path / f"hf{number}"
        model.save_pretrained(folder, max_shard_size="20KB")
        assert (folder / "model.safetensors.index.json").is_file()
        # Split as far as this model can be.
        split = ["--pp", "3", "--ep", "5" if "moe" in case or case == "mixtral" else "1"]
        target = ["--mixing", "moa"] if case == OFTEN[0] else []  # it starts as the same function
        runs.append(["--hf", str(folder), "--out", str(tmp_path / f"out{number}"), *split, *target])
    log = run(convert, *runs)
    differences = verified(log)
    assert len(differences) == len(cases)
    assert max(differences) < 1e-5
    assert "same likeliest token at 100.00%" in log
    for number in range(len(cases)):
        args = CheckpointTensors(tmp_path / f"out{number}" / "release").args
        assert args.pipeline_model_parallel_size == 3
        assert args.vocab_size == 101
        assert args.moa_mixing == ("moa" if cases[number] == OFTEN[0] else "none")
    assert not list(tmp_path.glob("*.unfinished"))


EVIL = """
import pathlib
pathlib.Path({marker!r}).write_text("it was run")
class Model: pass
class Config: pass
"""
CODE = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.Model", None]}


@pytest.mark.full
@pytest.mark.slow
def test_training_goes_on_and_nothing_of_the_folder_is_run(tmp_path: Path) -> None:
    """Checks that the loss of the first step, with TP 2, is the one that transformers computes.

    Code in the folder stays unread.
    """
    torch.manual_seed(3)
    sizes = {"vocab_size": 101, "hidden_size": 40, "intermediate_size": 52, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    model = LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.3, rope_parameters={"rope_theta": 5e3})).eval()
    folder, out, marker = tmp_path / "hf", tmp_path / "out", tmp_path / "marker"
    model.save_pretrained(folder)
    for name in ("config.json", "tokenizer_config.json"):
        path = folder / name
        settings = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**settings, "auto_map": CODE}))
    for name in ("evil.py", "modeling_llama.py", "tokenization_llama.py", "__init__.py"):
        (folder / name).write_text(EVIL.format(marker=str(marker)))
    log = run(changed, ["--hf", folder, "--out", out], code=1)
    assert "allows less; nothing was written" in log
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    log = run(convert, ["--hf", folder, "--out", out, "--tp", "2", "--seq-length", "32"])
    assert "> comparing the checkpoint's logits with those of transformers' model" in log
    assert verified(log)[0] < 1e-5
    assert not marker.exists()

    pattern = torch.randint(100, (32,), generator=torch.Generator().manual_seed(1))
    run(write_data, pattern.tolist(), str(tmp_path / "data"))
    log = run(
        launch.script,
        str(ROOT / "pretrain_gpt_moa.py"),
        [
            *("--pretrained-checkpoint", str(out), "--use-checkpoint-args", "--use-mp-args-from-checkpoint-args"),
            *("--data-path", str(tmp_path / "data"), "--split", "100,0,0", "--num-workers", "0", "--log-interval", "1"),
            *"--micro-batch-size 1 --global-batch-size 2 --train-iters 3 --lr 1e-3".split(),
            *(
                "--eval-iters",
                "0",
                "--eval-interval",
                "9",
                "--load",  # where a run started again goes on from: not there yet
                str(tmp_path / "run"),
                "--save",
                str(tmp_path / "run"),
                "--save-interval",
                "3",
                "--moa-mixing",
                "none",
            ),
        ],
        processes=2,
    )
    losses = [float(loss) for loss in re.findall(r"lm loss: ([0-9.E+-]+)", log)]
    with torch.no_grad():
        logits = model(pattern[None]).logits[0]
    padded = torch.cat((logits, logits[:, -1:]), dim=1)  # 101 tokens do not halve; Megatron's loss counts what pads
    assert losses[0] == pytest.approx(F.cross_entropy(padded, pattern.roll(-1)).item(), rel=1e-5)
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    assert CheckpointTensors(tmp_path / "run" / "iter_0000003").args.tensor_model_parallel_size == 2


def changed(flags: list[Any]) -> None:
    """A target of :func:`run`: the tool, with one number of one layer changed on the way."""
    from megatron_moa.hf.folder import HuggingFaceFolder

    read = HuggingFaceFolder.read

    def wrong(self: HuggingFaceFolder, name: str) -> torch.Tensor:
        tensor = read(self, name)
        if name == "model.layers.1.mlp.down_proj.weight":
            tensor[0, 0] += 0.1
        return tensor

    HuggingFaceFolder.read = wrong
    convert(flags)


def write_data(pattern: list[int], prefix: str) -> None:
    """Writes a dataset whose every sample is this pattern, wherever the sample starts in the stream.

    This is a target of :func:`run`.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder, get_bin_path, get_idx_path

    builder = IndexedDatasetBuilder(get_bin_path(prefix))
    builder.add_document(torch.tensor(pattern * 50 + pattern[:1]), [50 * len(pattern) + 1])
    builder.finalize(get_idx_path(prefix))


# The paper's one-sided and quadratic forms.


def forms_there_and_back(folder: Path) -> None:
    """A target of :func:`run`: LA and MoA, dense and with experts, become checkpoints and exports again."""
    import megatron_moa
    from megatron_moa.hf.modeling_gpt_moa import GPTMoAForCausalLM

    tokens = torch.randint(67, (1, 37), generator=torch.Generator().manual_seed(3))
    for number, (kind, form, experts) in enumerate(
        itertools.product(("la", "moa"), ("one-sided", "quadratic"), ({}, {**EXPERTS, **SHARED}))
    ):
        torch.manual_seed(number)
        settings = {**mixing(kind, form, "gelu", "silu", "relu2", "identity"), "gate_init_std": 0.5}
        if kind == "la":
            del settings["gate_init_std"]
        ends, found_ends = ([5, 3, 66], (5, 3, 66)) if experts else (7, (7,)) if kind == "la" else (None, ())
        own = GPTMoAConfig(**{**PLAIN, "initializer_range": 0.3, "mixing": settings, "eos_token_id": ends, **experts})
        own.mixing_backend = "eager"
        model = GPTMoAForCausalLM(own).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("coefficients.value"):
                    parameter.normal_()  # they start at 1, all alike
            logits = model(tokens).logits[0]
        source, checkpoint, back = (str(folder / f"{name}{number}") for name in ("hf", "out", "back"))
        model.save_pretrained(source)
        with pytest.raises(SystemExit) as refused:  # what is written, --dtype alone says
            convert_from_hf.main(["--hf", source, "--out", checkpoint, "--no-verify", "--bf16"])
        assert (refused.value.code, Path(checkpoint).exists()) == (2, False)
        convert_from_hf.main(["--hf", source, "--out", checkpoint, "--no-verify"])
        found = megatron_moa.from_checkpoint(checkpoint, ["--moa-backend", "eager"])
        assert (found.mixture.kind, found.mixture.form) == (kind, form)
        assert found.ends == found_ends
        likeliest = logits[-2].argmax().item()
        (ended,) = dataclasses.replace(found, saved_ends=[66, likeliest]).generate([tokens[0, :-1].tolist()], 3)
        assert (ended.tokens, ended.ended) == ([], "document")
        assert logits.std() > 0.5
        difference = (found.logits(tokens[0]) - logits).abs().max()
        assert difference < 1e-5 * logits.abs().max(), (kind, form, experts, difference)
        convert_to_hf.main(["--load", checkpoint, "--out", back, "--no-verify"])
        expected, again = (load_file(Path(path) / "model.safetensors") for path in (source, back))
        assert again.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(again[name], tensor), (kind, form, name)
        function = ("mixing", "form", "activations", "gate")
        config, generation = (
            json.loads((Path(back) / f"{name}.json").read_text()) for name in ("config", "generation_config")
        )
        assert config.get("eos_token_id") == generation.get("eos_token_id") == ends
        assert [config["mixing"].get(name) for name in function] == [settings.get(name) for name in function]


@pytest.mark.slow
def test_one_sided_and_quadratic_come_back_to_the_last_bit(tmp_path: Path) -> None:
    run(forms_there_and_back, tmp_path)


# What a folder says of writing text, of its training and of its tokenizer.

GENERATION = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "bos_token_id": 1, "pad_token_id": 3}


def save_a_chat_model(folder: Path) -> None:
    """Experts in one layer of two, several end tokens, and a tokenizer of bytes with a chat template."""
    torch.manual_seed(2)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(("<unk>", "<s>", "</s>", "<pad>", "<|end|>", *letters))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    around = {"single": "<s> $A", "pair": "<s> $A $B", "special_tokens": [("<s>", 1)]}
    tokenizer.post_processor = processors.TemplateProcessing(**around)
    saved = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    saved.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    sizes = {name: value for name, value in PLAIN.items() if name not in ("norm_eps", "initializer_range")}
    sizes |= {"vocab_size": 264, "num_hidden_layers": 4, "decoder_sparse_step": 2, "norm_topk_prob": True}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**sizes, **EXPERTS}, router_aux_loss_coef=0.02))
    model.generation_config = GenerationConfig(**GENERATION, eos_token_id=[2, 4])
    model.save_pretrained(folder)
    saved.save_pretrained(folder)


def chat_model_there_and_back(folder: Path) -> None:
    """A target of :func:`run`: with and without tokenizer, as a mixture, and of an older checkpoint."""
    from megatron_moa.hf import importing
    from tools import convert_mixing

    def back(checkpoint: Path) -> Path:
        out = checkpoint.with_suffix(".exported")
        convert_to_hf.main(["--load", str(checkpoint), "--out", str(out), "--no-verify"])
        return out

    def imported(name: str, *flags: str) -> Path:
        convert_from_hf.main(["--hf", str(folder / "chat"), "--out", str(folder / name), "--no-verify", *flags])
        return folder / name

    whole = imported("whole")
    exports = [back(whole), back(imported("numbers", "--no-tokenizer"))]
    convert_mixing.main(["--load", str(whole), "--out", str(folder / "mixed"), "--mixing", "la"])
    exports.append(back(folder / "mixed"))
    for out in exports:
        config, generation = (
            json.loads((out / f"{name}.json").read_text()) for name in ("config", "generation_config")
        )
        assert generation.items() >= {**GENERATION, "eos_token_id": [2, 4]}.items(), out
        assert [config[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [1, [2, 4], 3], out
        assert config["router_aux_loss_coef"] == 0.02, out
        card = (out / "README.md").read_text()
        assert "imported from chat (Qwen3MoeForCausalLM): see there for its licence" in card
        assert "| tokens trained on since the last conversion | 0 |" in card
        assert not [word for word in ("pretrained with", "--optimizer", "--lr") if word in card]
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (exports[0] / name).read_text() == (folder / "chat" / name).read_text(), name

    write = importing.write_release

    def older(model: Any, args: Any, *others: Any) -> Path:
        del args.moa_generation, args.moa_source
        return write(model, args, *others)

    importing.write_release = older
    generation = json.loads((back(imported("older")) / "generation_config.json").read_text())
    assert (generation["eos_token_id"], "do_sample" in generation) == ([2, 4], False)


@pytest.mark.slow
def test_a_chat_model_comes_back_as_it_was(tmp_path: Path) -> None:
    save_a_chat_model(tmp_path / "chat")
    log = run(chat_model_there_and_back, tmp_path)
    # 2 layers of experts, 3 experts a token.
    assert "balance     router_aux_loss_coef is --moe-aux-loss-coeff 0.03: add it to the training" in log


def test_a_loss_of_balance_is_the_same_number() -> None:
    """Where the layers' shares are the same, Megatron's loss is transformers'."""
    from megatron.core.transformer.moe.moe_utils import switch_load_balancing_loss_func

    from megatron_moa.hf.settings import moe_aux_loss_coeff, router_aux_loss_coef

    own = GPTMoAConfig(**{**PLAIN, **EXPERTS, "moe_layers": [True, False, True], "router_aux_loss_coef": 0.07})
    experts, chosen, factor = own.num_experts, own.num_experts_per_tok, moe_aux_loss_coeff(own)
    logits = torch.randn(50, experts, generator=torch.Generator().manual_seed(1))
    theirs = own.router_aux_loss_coef * load_balancing_loss_func((logits, logits), experts, chosen)
    tokens = logits.topk(chosen).indices.flatten().bincount(minlength=experts)
    ours = 2 * switch_load_balancing_loss_func(logits.softmax(-1), tokens, 50, chosen, experts, factor)
    torch.testing.assert_close(ours, theirs)
    for kind, factors, expected in (
        ("seq_aux_loss", factor, 0.07),
        (["aux_loss", "global_aux_loss"], [factor, factor], 0.14),
        ("none", factor, 0.0),
    ):
        args = argparse.Namespace(moe_router_load_balancing_type=kind, moe_aux_loss_coeff=factors)
        assert router_aux_loss_coef(args, own) == expected


# There and back.

WITH_BIASES, TIED = "--disable-bias-linear", "--untie-embeddings-and-output-weights"
EAGER, STOCK = ["--moa-backend", "eager"], ["--moa-mixing", "none"]
LA, MOA = ["--moa-mixing", "la", *EAGER], ["--moa-mixing", "moa", *EAGER, "--moa-gate-init-std", "0.3"]
ONE_SIDED, QUADRATIC = ["--moa-form", "one-sided"], ["--moa-form", "quadratic"]
LIKE_GPT2 = "--position-embedding-type learned_absolute --normalization LayerNorm --ffn-hidden-size 48".split()
ROUTER = "--moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-router-dtype fp32".split()
SHARED_EXPERT = "--moe-shared-expert-intermediate-size 32 --moe-shared-expert-gate".split()

TRIPS: dict[str, tuple[list[str], dict[str, int]]] = {
    "moa quadratic, TP 2": ([*SWIGLU, *MOA, *QUADRATIC, "--moa-gate-bias"], {"tp": 2}),
    "MoE, la one-sided, shared expert, PP 2, EP 2": (
        [*SWIGLU, *MOE, *SHARED_EXPERT, *LA, *ONE_SIDED],
        {"pp": 2, "ep": 2},
    ),
    "moa bi-sided, TP 2": ([*SWIGLU, *MOA, "--moa-form", "bi-sided"], {"tp": 2}),
    "stock GPT-2, biases, tied": ([*LIKE_GPT2, *STOCK], {}),
    "stock SwiGLU, biases of q, k, v, TP 2": ([*SWIGLU, *STOCK, "--add-qkv-bias"], {"tp": 2}),
    "la type1, biases, tied, PP 2": ([*LIKE_GPT2, *LA], {"pp": 2}),
    "la one-sided": ([*SWIGLU, *LA, *ONE_SIDED], {}),
    "la quadratic, q/k norm": ([*SWIGLU, *LA, *QUADRATIC, "--qk-layernorm"], {}),
    "moa one-sided, softmax": ([*SWIGLU, *MOA, *ONE_SIDED, "--moa-gate", "softmax"], {}),
    "moa quadratic, learned amplitude": (
        [*SWIGLU, *MOA, *QUADRATIC, *"--moa-gate tanh --moa-amplitude learned --moa-gate-bias".split()],
        {"tp": 2},
    ),
    "MoE, moa one-sided with a scale, router bias, every second layer": (
        [*SWIGLU, *MOE, *ROUTER, *MOA, *ONE_SIDED, *"--moa-init-scale matched --moe-layer-freq 2".split()],
        {"ep": 2},
    ),
    "MoE, stock, TP 2": ([*SWIGLU, *MOE, *STOCK], {"tp": 2}),
    "moa type1, bf16, TP 2, PP 2": ([*LIKE_GPT2, *MOA, "--bf16"], {"tp": 2, "pp": 2}),
}
TRIPS_QUICK = list(TRIPS)[1]
LONG = {
    "tp": "--tensor-model-parallel-size",
    "pp": "--pipeline-model-parallel-size",
    "ep": "--expert-model-parallel-size",
}


def there_and_back(checkpoint: str, exported: str, back: str, *flags: str) -> None:
    """A target of :func:`run`: both tools."""
    convert_to_hf.main(["--load", checkpoint, "--out", exported, "--no-verify"])
    convert_from_hf.main(["--hf", exported, "--out", back, *flags])


def tensors(folder: Path, rows: int) -> dict[str, torch.Tensor]:
    """Those of a checkpoint's model; embedding and output layer without padding."""
    stored = CheckpointTensors(folder)
    left_out = re.compile(r"optimizer\.|chained_|rng_state|.*_extra_state")
    read = {key: stored.read(key) for key in stored.tensors if not left_out.match(key)}
    return {
        key: tensor[:rows] if "word_emb" in key or "output_layer" in key else tensor for key, tensor in read.items()
    }


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.full][case == TRIPS_QUICK :]) for case in TRIPS]
)
def test_every_parameter_comes_back_to_the_last_bit(case: str, tmp_path: Path) -> None:
    model_flags, split = TRIPS[case]
    checkpoint, back = tmp_path / "checkpoint", tmp_path / "back"
    flags = [flag for flag in TINY if not ("biases, tied" in case and flag in (WITH_BIASES, TIED))]
    flags += [*model_flags, *"--init-method-std 0.3 --train-iters 2 --save-interval 2 --save".split(), str(checkpoint)]
    for name, size in split.items():
        flags += [LONG[name], str(size)]
    flags += ["--sequence-parallel"] if "tp" in split else []
    vocabulary = 59
    if case == TRIPS_QUICK:  # with a tokenizer, that goes there and back, too
        vocabulary = 1200
        train_sentencepiece(tmp_path / "tok.model")
        flags += ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(tmp_path / "tok.model")]
    else:
        flags += ["--vocab-size", str(vocabulary)]
    processes = split.get("tp", 1) * split.get("pp", 1) * split.get("ep", 1)
    run(launch.script, str(ROOT / "pretrain_gpt_moa.py"), flags, processes=processes)
    ours = [flag for name, size in split.items() for flag in (f"--{name}", str(size))]
    if case != TRIPS_QUICK:
        ours.append("--no-verify")
    log = run(there_and_back, str(checkpoint), str(tmp_path / "exported"), str(back), *ours)

    source, result = CheckpointTensors(checkpoint / "iter_0000002"), CheckpointTensors(back / "release")
    before, after = tensors(source.folder, vocabulary), tensors(result.folder, vocabulary)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype, key
        assert torch.equal(tensor, after[key]), key
    embedding = result.read("embedding.word_embeddings.weight")
    assert embedding.shape[0] == vocabulary + vocabulary % split.get("tp", 1)
    assert torch.equal(embedding[-1], embedding[vocabulary - 1])  # what pads repeats the last row
    for name, size in split.items():
        assert getattr(result.args, LONG[name][2:].replace("-", "_")) == size

    if case == TRIPS_QUICK:
        assert verified(log)[0] < 1e-5
        tokenizer = back / "tokenizer"
        assert result.args.tokenizer_type == "HuggingFaceTokenizer"
        assert result.args.tokenizer_model == str(tokenizer)
        trained = AutoTokenizer.from_pretrained(tmp_path / "exported").encode(SAMPLE)
        assert AutoTokenizer.from_pretrained(tokenizer).encode(SAMPLE) == trained
