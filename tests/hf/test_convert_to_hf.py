"""Tests tools/convert_to_hf.py: its folder stands alone and computes what the checkpoint does.

The folder tokenizes as training did.
"""

from __future__ import annotations

import ast
import json
import os
import random
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from megatron.core.tokenizers import MegatronTokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_moa.errors import UserError
from megatron_moa.hf import export, families
from megatron_moa.hf.configuration_gpt_moa import GPTMoAConfig
from megatron_moa.hf.export import ShardWriter
from megatron_moa.hf.exported_code import code_files
from megatron_moa.hf.modeling_gpt_moa import GPTMoAForCausalLM
from megatron_moa.hf.tokenizer import SAMPLE, _from_sentencepiece, export_tokenizer
from tests.support import launch, stranger, tiny_hf
from tests.support.tokenizers import train_sentencepiece
from tests.support.training import MOE, ROOT, SWIGLU, TINY
from tools.convert_to_hf import PROGRAM, parse_flags, size

EAGER = ["--moa-backend", "eager"]
SPLIT = "--tensor-model-parallel-size 2 --sequence-parallel".split()
STAGES = "--pipeline-model-parallel-size 2".split()
EXPERTS = [*MOE, *"--expert-model-parallel-size 2 --expert-tensor-parallel-size 1".split()]
SIGMOID = "--moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-router-dtype fp32".split()
SHARED = "--moe-shared-expert-intermediate-size 32".split()
GATED = [*SHARED, "--moe-shared-expert-gate"]
GPT2 = "--position-embedding-type learned_absolute --normalization LayerNorm --ffn-hidden-size 48".split()
UNGROUPED = "--num-query-groups 4".split()
LA, STOCK = ["--moa-mixing", "la", *EAGER], ["--moa-mixing", "none"]
MOA = ["--moa-mixing", "moa", *EAGER, "--moa-gate-init-std", "0.3"]

# Flags, processes, and the class of the export.
CASES: dict[str, tuple[list[str], int, str]] = {
    "moa bi-sided": ([*SWIGLU, *MOA], 1, "GPTMoAForCausalLM"),
    "MoE, la one-sided, TP 2, PP 2, EP 2": ([*SWIGLU, *EXPERTS, *SPLIT, *STAGES, *LA], 4, "GPTMoAForCausalLM"),
    "moa type1, GPT-2-like, biases, tied, PP 2": ([*GPT2, *STAGES, *MOA], 2, "GPTMoAForCausalLM"),
    "la quadratic, TP 2": ([*SWIGLU, *SPLIT, *LA, "--moa-form", "quadratic"], 2, "GPTMoAForCausalLM"),
    "moa one-sided": ([*SWIGLU, *MOA, "--moa-form", "one-sided"], 1, "GPTMoAForCausalLM"),
    "MoE, moa quadratic, shared expert": (
        [*SWIGLU, *MOE, *SHARED, *MOA, "--moa-form", "quadratic"],
        1,
        "GPTMoAForCausalLM",
    ),
    "MoE, moa one-sided, grouped experts, bf16": (
        [*SWIGLU, *MOE, *SIGMOID, *"--moe-grouped-gemm --bf16".split(), *MOA],
        1,
        "GPTMoAForCausalLM",
    ),
    "stock, biases, tied, TP 2": ([*SWIGLU, *SPLIT, *STOCK], 2, "LlamaForCausalLM"),
    "stock, biases of q, k, v, no tokenizer": ([*SWIGLU, *STOCK, "--add-qkv-bias"], 1, "Qwen2ForCausalLM"),
    "stock, own class asked for": ([*SWIGLU, *STOCK], 1, "GPTMoAForCausalLM"),
    "stock, q/k norm": ([*SWIGLU, *STOCK, "--qk-layernorm"], 1, "Qwen3ForCausalLM"),
    "stock, GPT-2-like, biases, tied": ([*GPT2, *UNGROUPED, *STOCK], 1, "GPT2LMHeadModel"),
    "stock, GPT-2-like, exact GELU, biases, tied, TP 2": (
        [*GPT2, *UNGROUPED, *SPLIT, *STOCK, "--no-bias-gelu-fusion"],
        2,
        "GPT2LMHeadModel",
    ),
    "stock, GPT-2-like with groups, biases, tied": ([*GPT2, *STOCK], 1, "GPTMoAForCausalLM"),
    "MoE, stock, EP 2": ([*SWIGLU, *EXPERTS, *SPLIT, *STOCK], 2, "MixtralForCausalLM"),
    "MoE, stock, shared expert with gate, dense layers": (
        [
            *SWIGLU,
            *MOE,
            *SHARED,
            *STOCK,
            *"--moe-shared-expert-gate --moe-router-pre-softmax --moe-layer-freq 2".split(),
        ],
        1,
        "Qwen2MoeForCausalLM",
    ),
    "MoE, stock, q/k norm, fp32 router": (
        [*SWIGLU, *MOE, *STOCK, *"--qk-layernorm --moe-router-dtype fp32".split()],
        1,
        "Qwen3MoeForCausalLM",
    ),
    "MoE, stock, sigmoid router": ([*SWIGLU, *MOE, *SIGMOID, *STOCK], 1, "GPTMoAForCausalLM"),
}
SELECTION = ("moa bi-sided", "MoE, la one-sided, TP 2, PP 2, EP 2")
# What a card says of the mixture, by form.
EQUATIONS = {
    "type1": "`sum_k c_k s_k(y)`",
    "one-sided": "`silu(y) * sum_k c_k s_k(z)`",
    "bi-sided": "`(sum_k c_k s_k(y)) * (sum_k c_{K+k} s_k(z))`",
    "quadratic": "`sum_{k <= l} c_kl s_k(y) s_l(z)`",
}
WITH_BIASES, TIED = "--disable-bias-linear", "--untie-embeddings-and-output-weights"


def convert(folder: Path, *flags: str | Path) -> tuple[int, str]:
    """Exit code and output of the tool."""
    return launch.launch(launch.script, (str(ROOT / "tools" / PROGRAM), list(map(str, flags))), 1, folder)


def as_a_stranger(folder: Path, scratch: Path) -> dict:
    """What a process sees in which neither megatron_moa nor Megatron can be imported."""
    result = scratch / "seen.json"
    code, log = launch.launch(stranger.use, (str(folder), str(scratch / "modules"), str(result)), 0, scratch)
    assert code == 0, log[-3000:]
    return json.loads(result.read_text())


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.full][case in SELECTION :]) for case in CASES])
def test_export_stands_alone_and_computes_the_same(case: str, tmp_path: Path) -> None:
    flags, processes, architecture = CASES[case]
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "out"
    train_sentencepiece(tmp_path / "tok.model")
    flags = [
        *(flag for flag in TINY if not ("biases, tied" in case and flag in (WITH_BIASES, TIED))),
        *flags,
        *("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(tmp_path / "tok.model")),
        # Large initial weights, so that a wrong factor or order shows in the logits.
        *"--init-method-std 0.3 --train-iters 2 --save-interval 2 --save".split(),
        str(checkpoint),
    ]
    code, log = launch.launch(launch.script, (str(ROOT / "pretrain_gpt_moa.py"), flags), processes, tmp_path)
    assert code == 0, log[-3000:]
    asked = ["--architecture", architecture] if "asked for" in case else []
    asked += ["--no-tokenizer"] if "no tokenizer" in case else []
    code, log = convert(tmp_path, "--load", checkpoint, "--out", out, "--max-shard-size", "100KB", *asked)
    assert code == 0, log[-3000:]
    assert "> comparing the export's logits with the checkpoint's" in log
    assert "verified    largest difference" in log
    assert not list(tmp_path.glob("out.*"))

    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == [architecture]
    assert config["vocab_size"] == 1200  # 1216 with padding
    if architecture == "GPT2LMHeadModel":
        assert config["activation_function"] == ("gelu" if "exact" in case else "gelu_new")
    assert config["dtype"] == ("bfloat16" if "bf16" in case else "float32")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    weights = {}
    for file in sorted(set(index["weight_map"].values())):
        shard = load_file(out / file)
        assert sum(tensor.nbytes for tensor in shard.values()) <= 100_000 or len(shard) == 1
        weights |= shard
    assert weights.keys() == index["weight_map"].keys()
    assert ("lm_head.weight" in weights) == ("tied" not in case)
    table = "transformer.wte.weight" if architecture.startswith("GPT2") else "model.embed_tokens.weight"
    assert weights[table].shape[0] == 1200

    seen = as_a_stranger(out, tmp_path)
    assert seen["class"] == architecture
    assert seen["hidden"] == [2, 6, 32]
    model = GPTMoAForCausalLM if architecture.startswith("GPTMoA") else AutoModelForCausalLM
    ours = model.from_pretrained(out, dtype=torch.float32).eval()
    tokens = torch.arange(12).view(2, 6)
    with torch.no_grad():
        logits = ours(tokens).logits
        generated = ours.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=5, do_sample=False)
    assert logits.std() > 0.5
    torch.testing.assert_close(torch.tensor(seen["logits"]), logits, atol=1e-4, rtol=1e-4)
    assert seen["generated"] == generated.tolist()
    assert ours.generation_config.eos_token_id == 2

    card = (out / "README.md").read_text()
    for text in ("| iteration | 2 |", "| tokens trained on | 256 |", "| --seq-length | 32 |", "same likeliest token"):
        assert text in card
    assert ("trust_remote_code" in card) == architecture.startswith("GPTMoA")
    assert "Tried with transformers 5.12 to 5.24." in card
    assert ('padding_side="left"' in card) == (out / "tokenizer.json").is_file()
    if "mixing_format_version" in config:
        assert config["mixing_format_version"] == 2
    form = (config.get("mixing") or {}).get("form")
    assert form is None or form in case
    for name, text in EQUATIONS.items():
        assert (f"| {name} |" in card) == (text in card) == (name == form)

    if case == "moa bi-sided":  # the same checkpoint, further
        check_mistakes(checkpoint, out, tmp_path)


def check_mistakes(checkpoint: Path, out: Path, folder: Path) -> None:
    """Checks that each mistake is answered in one line, and that nothing is written.

    The mistakes are a wrong result, an iteration and a file that are not there, and a hostile file.
    """
    new = folder / "new"
    code, log = launch.launch(export_wrongly, (["--load", str(checkpoint), "--out", str(new)],), 1, folder)
    assert code == 1, log[-3000:]
    assert "largest difference" in log
    assert "is allowed; nothing was written" in log
    code, log = convert(folder, "--load", checkpoint, "--out", new, "--iteration", "7")
    assert code == 2
    assert "--iteration 7: is not in" in log
    code, log = convert(folder, "--load", checkpoint, "--out", out)
    assert code == 2
    assert "is a folder that is not empty" in log
    metadata = checkpoint / "iter_0000002" / ".metadata"
    metadata.write_bytes(b"cposix\nsystem\n(S'touch hostile'\ntR.")
    code, log = convert(folder, "--load", checkpoint, "--out", new)
    assert code == 2
    assert "posix.system" in log
    assert not (folder / "hostile").exists()
    assert not list(folder.glob("new*"))


def export_wrongly(flags: list[str]) -> None:
    """Runs in a process of its own: the tool, with one number of one layer changed on the way."""
    from tools import convert_to_hf

    converted = export._converted

    def changed(tensors, dtype):
        for name, tensor in converted(tensors, dtype):
            if name == "model.layers.1.mlp.down_proj.weight":
                tensor[0, 0] += 0.1
            yield name, tensor

    export._converted = changed
    convert_to_hf.main(flags)


@pytest.mark.slow
def test_imports_of_megatron_warn_of_nothing(tmp_path: Path) -> None:
    """In a process of its own: the others have imported Megatron already."""
    command = [sys.executable, ROOT / "tools" / PROGRAM, "--load", tmp_path / "absent", "--out", tmp_path / "out"]
    ended = subprocess.run(
        command, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, cwd=ROOT, capture_output=True, text=True
    )
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"{PROGRAM}: error: --load {tmp_path / 'absent'}: ")


# The pieces.


@pytest.mark.parametrize("settings", [{}, {"user_defined_symbols": ["<|x|>", "foo bar"]}, {"add_dummy_prefix": True}])
def test_tokenizer_gives_the_same_ids(settings: dict, tmp_path: Path) -> None:
    trained = train_sentencepiece(tmp_path / "tok.model", **settings)
    _from_sentencepiece(tmp_path / "tok.model", 128).save_pretrained(tmp_path / "out")
    exported = AutoTokenizer.from_pretrained(tmp_path / "out")
    source = (ROOT / "megatron_moa/data/corpus.py").read_text()
    draw = random.Random(1)
    texts = [SAMPLE, source, "<s>a</s> <pad><unk><0x41>", "", " ", "foo bar<|x|>", "a" * 50 + " " * 50]
    texts += [source[start : start + draw.randrange(200)] for start in draw.sample(range(len(source)), 200)]
    texts += ["".join(draw.choices("aab  =-_.\n\te<s>/1é日🙂▁", k=draw.randrange(60))) for _ in range(300)]
    for text in texts:
        ids = trained.encode(text)
        assert exported.encode(text, add_special_tokens=False) == ids, repr(text)
        assert exported.encode(text) == ids  # nothing is put around it
        assert exported.decode(ids) == trained.decode(ids), repr(text)
    assert (exported.bos_token_id, exported.eos_token_id, exported.pad_token_id) == (1, 2, 3)
    assert exported.encode("a</s>", split_special_tokens=False)[-1] == 2
    assert len(exported) == trained.get_piece_size()


def test_tokenizers_of_all_kinds(tmp_path: Path) -> None:
    """Exported, or refused by name; an exported one can be trained with and is exported as the same again."""

    def exported(kind: str, path: Path | None, library: str, out: Path, **settings: object) -> bool:
        args = Namespace(tokenizer_type=kind, tokenizer_model=path and str(path), seq_length=64)
        tokenizer = MegatronTokenizer.from_pretrained(args.tokenizer_model, {"library": library}, **settings)
        return export_tokenizer(tokenizer, args, out, GPTMoAConfig())

    trained, one, two = tmp_path / "tok.model", tmp_path / "one", tmp_path / "two"
    train_sentencepiece(trained)
    assert exported("SentencePieceTokenizer", trained, "sentencepiece", one)
    assert exported("HuggingFaceTokenizer", one, "huggingface", two, include_special_tokens=True)
    assert AutoTokenizer.from_pretrained(two).encode(SAMPLE) == AutoTokenizer.from_pretrained(one).encode(SAMPLE)
    assert not exported("NullTokenizer", None, "null-text", tmp_path / "three", vocab_size=50)
    # Of words, which transformers has not.
    train_sentencepiece(tmp_path / "words.model", "word", byte_fallback=False, hard_vocab_limit=False)
    with pytest.raises(UserError, match=r"words\.model: neither BPE nor unigram; add --no-tokenizer"):
        exported("SentencePieceTokenizer", tmp_path / "words.model", "sentencepiece", tmp_path / "four")
    # The file was replaced by another tokenizer's.
    tokenizer = MegatronTokenizer.from_pretrained(str(trained), {"library": "sentencepiece"})
    train_sentencepiece(trained, normalization_rule_name="nfkc", remove_extra_whitespaces=True)
    args = Namespace(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(trained), seq_length=64)
    with pytest.raises(UserError, match=r"tok\.model: exported it would give other ids than in training, from token"):
        export_tokenizer(tokenizer, args, tmp_path / "five", GPTMoAConfig())


def test_a_tokenizer_beside_config_json_is_trainings_or_refused(tmp_path: Path) -> None:
    """Beside some models transformers loads a class of tokenizer that the tokenizer's files do not name."""
    trained, saved = tmp_path / "tok.model", tmp_path / "saved"
    train_sentencepiece(trained)
    _from_sentencepiece(trained, 64).save_pretrained(saved)
    for path, kind, library, settings in (
        (trained, "SentencePieceTokenizer", "sentencepiece", {}),
        (saved, "HuggingFaceTokenizer", "huggingface", {"include_special_tokens": True}),
    ):
        tokenizer = MegatronTokenizer.from_pretrained(str(path), {"library": library}, **settings)
        args = Namespace(tokenizer_type=kind, tokenizer_model=str(path), seq_length=64)
        for family in (*families.FAMILIES, families.OWN):
            out, config = tmp_path / f"{library}-{family.architecture}", family.from_own(GPTMoAConfig())
            out.mkdir()
            if family is families.QWEN2:
                with pytest.raises(UserError, match=r"type qwen2; add --architecture GPTMoAForCausalLM, or --no-tok"):
                    export_tokenizer(tokenizer, args, out, config)
                continue
            export_tokenizer(tokenizer, args, out, config)
            config.save_pretrained(out)
            exported = AutoTokenizer.from_pretrained(out)
            assert exported.encode(SAMPLE) == tokenizer.tokenize(SAMPLE), out.name
            assert exported.decode(exported.encode(SAMPLE)) == SAMPLE.replace("\u2581", " "), out.name


def test_card_knows_the_last_validation_loss(tmp_path: Path) -> None:
    log = "  seq_length ...................................... 32\n"
    for n in range(1, 41):
        log += (
            f" [2026-11-24 10:00:{n:02d}.000000] iteration {n:8d}/      40 | consumed samples: {4 * n:12d} | elapsed "
        )
        log += f"time per iteration (ms): 10.0 | global batch size: 4 | lm loss: {3 - n / 100:.6E} | \n"
        if n % 10 == 0:
            log += f" validation loss at iteration {n} on validation set | lm loss value: {3 + n / 100:.6E} | \n"
    (tmp_path / "train.log").write_text(log)
    saved = Namespace(seq_length=32, consumed_train_samples=4 * 25)
    assert export.validation_loss(saved, tmp_path / "checkpoints") == pytest.approx(3.2)  # of iteration 20
    assert export.validation_loss(saved, tmp_path) == pytest.approx(3.2)
    assert export.validation_loss(saved, tmp_path / "a" / "checkpoints") is None
    saved.consumed_train_samples = 4 * 5
    assert export.validation_loss(saved, tmp_path) is None


def test_code_needs_no_megatron_moa() -> None:
    files = code_files()
    assert {"modeling_gpt_moa.py", "configuration_gpt_moa.py", "reference.py", "config.py"} <= set(files)
    for name, text in files.items():
        tree = ast.parse(text)
        tried = {id(node) for block in ast.walk(tree) if isinstance(block, ast.Try) for node in ast.walk(block)}
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or id(node) in tried:
                continue
            assert node.level or not node.module.startswith("megatron"), f"{name}: {node.module}"
            assert not node.level or f"{node.module}.py" in files, f"{name}: {node.module}"


@pytest.mark.distributed
def test_what_this_package_saves_stands_alone(tmp_path: Path) -> None:
    """So does what a stranger saves of it, who has the class of the folder's code."""
    model = tiny_hf.build("moa")
    model.save_pretrained(tmp_path / "ours")
    logits = model(torch.arange(12).view(2, 6)).logits
    for name in ("ours", "saved"):
        seen = as_a_stranger(tmp_path / name, tmp_path)
        torch.testing.assert_close(torch.tensor(seen["logits"]), logits, **tiny_hf.EQUAL)


def test_shards_are_bounded_and_hold_everything(tmp_path: Path) -> None:
    tensors = {f"t{n}": torch.full((n + 1, 10), float(n)) for n in range(6)}  # 40 to 240 bytes
    writer = ShardWriter(tmp_path, 200)
    writer.write(iter(tensors.items()), len(tensors))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-{n + 1:05d}-of-{writer.shards:05d}.safetensors" for n in range(writer.shards)]
    shards = {file: load_file(tmp_path / file) for file in files}
    assert [sorted(shard) for shard in shards.values()] == [["t0", "t1"], ["t2"], ["t3"], ["t4"], ["t5"]]
    for name, tensor in tensors.items():
        assert torch.equal(shards[index["weight_map"][name]][name], tensor)
    assert index["metadata"]["total_size"] == writer.bytes == sum(tensor.nbytes for tensor in tensors.values())


def test_a_class_can_be_asked_for() -> None:
    own = GPTMoAConfig(hidden_size=32, num_attention_heads=4)
    assert export._family(own, None) == (families.LLAMA, None)
    assert export._family(own, "GPTMoAForCausalLM") == (families.OWN, "--architecture GPTMoAForCausalLM")
    assert export._family(own, "MistralForCausalLM") == (families.MISTRAL, None)
    with pytest.raises(UserError, match=r"^--architecture Qwen3ForCausalLM: this model is none: qk_norm is False"):
        export._family(own, "Qwen3ForCausalLM")
    with pytest.raises(UserError, match=r"^--architecture T5: is not supported; supported: LlamaForCausalLM, "):
        export._family(own, "T5")


def test_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert [size(text) for text in ("5GB", "1.5 mb", "300", "7KB")] == [5 * 10**9, 1_500_000, 300, 7000]
    assert size("9" * 400) == 1 << 62
    for wrong in (["--max-shard-size", "big"], ["--iteration", "0"], ["--dtype", "int8"]):
        with pytest.raises(SystemExit) as caught:
            parse_flags(["--load", "a", "--out", "b", *wrong])
        assert caught.value.code == 2
        assert wrong[1] in capsys.readouterr().err
