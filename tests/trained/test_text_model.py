"""A model in use: from a checkpoint and from its export, by Python and by tools; both say the same."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
import torch
from megatron.core.tokenizers import MegatronTokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from megatron_moa.data.corpus import read_documents
from megatron_moa.errors import UserError
from megatron_moa.hf.configuration_gpt_moa import GPTMoAConfig
from megatron_moa.hf.loading import FolderModel, load_folder
from megatron_moa.hf.modeling_gpt_moa import GPTMoAForCausalLM
from megatron_moa.hf.tokenizer import export_tokenizer
from megatron_moa.load import load
from megatron_moa.trained.from_megatron import LoadedModel
from megatron_moa.trained.text_model import TextLoss
from tests.hf.test_convert_to_hf import EAGER, SPLIT, convert
from tests.support import inference_runs, launch
from tests.support.checkpoints import Hostile
from tests.support.tokenizers import train_sentencepiece
from tests.support.training import MOE, ROOT, SWIGLU, TINY

KINDS = {
    "dense": ([*SPLIT, *"--moa-mixing moa --moa-gate-init-std 0.3".split()], 2),
    "moe": ([*MOE, "--moa-mixing", "la", "--bf16"], 1),  # whose weights checkpoint and export have in bfloat16
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``dense`` and ``moe``, trained for 20 steps, and their exports ``dense-hf`` and ``moe-hf``."""
    folder = tmp_path_factory.mktemp("inference")
    train_sentencepiece(folder / "tok.model")
    for kind, (flags, processes) in KINDS.items():
        flags = [
            *(*TINY, *SWIGLU, *flags, *EAGER),
            *("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(folder / "tok.model")),
            *"--init-method-std 0.3 --train-iters 20 --log-interval 20 --save-interval 20 --save".split(),
            str(folder / kind),
        ]
        code, log = launch.launch(launch.script, (str(ROOT / "pretrain_gpt_moa.py"), flags), processes, folder)
        assert code == 0, log[-3000:]
        code, log = convert(folder, "--load", folder / kind, "--out", folder / f"{kind}-hf", "--no-verify")
        assert code == 0, log[-3000:]
    return folder


@pytest.fixture(scope="module")
def used(folder: Path) -> dict[str, Any]:
    """The report of tests.support.inference_runs on all four folders, loaded in one process."""
    folders = [str(folder / name) for name in ("dense", "moe", "dense-hf", "moe-hf")]
    code, log = launch.launch(inference_runs.use, (folders, str(folder / "report.json")), 0, folder)  # as in a notebook
    assert code == 0, log[-3000:]
    report = json.loads((folder / "report.json").read_text())
    return {Path(name).name: value for name, value in report.items()}


def tool(name: str, folder: Path, *flags: str | Path) -> tuple[int, str]:
    """Exit code and output of a tool."""
    return launch.launch(launch.script, (str(ROOT / "tools" / name), list(map(str, flags))), 1, folder)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_and_export_write_the_same_tokens(used: dict[str, Any], kind: str) -> None:
    checkpoint, export = used[kind], used[f"{kind}-hf"]
    assert checkpoint["greedy"] == export["greedy"]
    assert checkpoint["sampled"] == export["sampled"]
    assert checkpoint["sampled"] != checkpoint["greedy"]
    assert checkpoint["ended"] == export["ended"]
    # What else is in the batch, and so how a prompt is padded, changes nothing.
    assert checkpoint["greedy"] == checkpoint["alone"]
    assert export["greedy"] == export["alone"]
    assert checkpoint["full"] == export["full"] == ["context"]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_and_export_have_equal_logits_and_losses(used: dict[str, Any], kind: str) -> None:
    checkpoint, export = used[kind], used[f"{kind}-hf"]
    torch.testing.assert_close(torch.tensor(checkpoint["logits"]), torch.tensor(export["logits"]), rtol=1e-5, atol=1e-5)
    assert checkpoint["batch"] == export["batch"] == [2, 3, checkpoint["vocabulary"]]
    assert checkpoint["losses"] == pytest.approx(export["losses"], rel=1e-5)
    assert len(set(checkpoint["losses"])) == 3
    assert checkpoint["mixing"] == export["mixing"]


@pytest.mark.slow
@pytest.mark.distributed
def test_loading_leaves_nothing_behind(used: dict[str, Any]) -> None:
    assert used["printed"] == ""
    assert used["argv"] == ["notebook", "--not-megatrons", "1"]
    assert used["environment"] is True


@pytest.mark.slow
@pytest.mark.distributed
def test_loss_of_a_text_is_that_of_each_token_behind_its_window(used: dict[str, Any], folder: Path) -> None:
    model = load_folder(folder / "dense-hf").model
    tokens, window = used["dense-hf"]["tokens"], 32
    stepwise = sum(_loss(model, tokens[max(0, i - window) : i], tokens[i : i + 1]) for i in range(1, len(tokens)))
    apart = sum(
        _loss(model, [*tokens[max(0, last - window) : done + 1], *tokens[done + 1 : last]], tokens[done + 1 : last + 1])
        for done in range(0, len(tokens) - 1, window)
        for last in [min(done + window, len(tokens) - 1)]
    )
    assert used["dense-hf"]["losses"][0] == pytest.approx(stepwise, rel=1e-5)
    assert used["dense-hf"]["losses"][2] == pytest.approx(apart, rel=1e-5)


@torch.no_grad()
def _loss(model: torch.nn.Module, given: list[int], predicted: list[int]) -> float:
    """Nats of the last tokens, one position behind what is given."""
    log_probabilities = model(torch.tensor([given])).logits[0].double().log_softmax(-1)
    return -sum(log_probabilities[i - len(predicted), token].item() for i, token in enumerate(predicted))


def test_bits_and_perplexity_of_bytes() -> None:
    loss = TextLoss(3.0, 2, 5) + TextLoss(1.0, 3, 3)
    assert (loss.loss_per_token, loss.tokens, loss.bytes) == (4.0 / 5, 5, 8)
    assert loss.bits_per_byte == pytest.approx(0.5 / math.log(2))
    assert loss.byte_perplexity == pytest.approx(math.exp(0.5))


@pytest.mark.slow
@pytest.mark.distributed
def test_generate_prints_json_of_prompts_in_a_file(folder: Path, used: dict[str, Any]) -> None:
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in inference_runs.PROMPTS))
    flags = ["--temperature", "0", "--num-tokens", inference_runs.NEW, "--json", "--prompts-file", "prompts.jsonl"]
    code, log = tool("generate.py", folder, "--load", folder / "moe-hf", *flags)
    assert code == 0, log
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    assert [line["prompt"] for line in lines] == inference_runs.PROMPTS
    assert [line["tokens"] for line in lines] == used["moe"]["greedy"]


@pytest.mark.slow
@pytest.mark.distributed
def test_evaluate_text_adds_up_documents(folder: Path, used: dict[str, Any]) -> None:
    (folder / "one.txt").write_text(inference_runs.TEXT)
    (folder / "two.jsonl").write_text(json.dumps({"text": inference_runs.TEXT}) + "\n\n")
    code, log = tool("evaluate_text.py", folder, "--load", folder / "dense", "--text", "one.txt", "two.jsonl")
    assert code == 0, log
    result = json.loads(log.splitlines()[-1])
    tokens, size = len(used["dense"]["tokens"]) - 1, len(inference_runs.TEXT.encode())
    assert (result["documents"], result["tokens"], result["bytes"]) == (2, 2 * tokens, 2 * size)
    assert (result["window"], result["stride"], result["dtype"]) == (32, 16, "float32")
    assert result["bits_per_byte"] == pytest.approx(used["dense-hf"]["losses"][1] / size / math.log(2), rel=1e-5)
    assert result["loss_per_token"] == pytest.approx(used["dense-hf"]["losses"][1] / tokens, rel=1e-5)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_tokenizer_that_is_not_the_checkpoints_is_refused(folder: Path, tmp_path: Path) -> None:
    sizes = {"other": 1200, "smaller": 1000, "larger": 1400}  # the model's padded vocabulary has 1280
    for name, size in sizes.items():
        train_sentencepiece(tmp_path / name, kind="unigram" if name == "other" else "bpe", vocab_size=size)
    checkpoint = shutil.copytree(folder / "dense", tmp_path / "dense")
    for name, message in {
        "absent": "absent: no such file; check the path",
        "dense": "dense: not a file; ",
        "dense/latest_checkpointed_iteration.txt": "txt: not a sentencepiece model; ",
        "other": "other: has other tokens than the tokenizer that the checkpoint was trained with, ",
        "smaller": "smaller: has other tokens than ",
        "larger": "the tokenizer has 1400; give the tokenizer it was trained with",
    }.items():
        code, log = tool(
            "generate.py", folder, *("--load", checkpoint, "--prompt", "a", "--tokenizer-model", tmp_path / name)
        )
        assert code == 2, log
        assert message in log.splitlines()[-1]
    shutil.move(folder / "tok.model", tmp_path / "tok.model")
    try:
        code, log = tool("generate.py", folder, "--load", checkpoint, "--prompt", "a")
        assert code == 2, log
        assert log.splitlines()[-1].endswith("it is the checkpoint's: if it has moved, add --tokenizer-model")
        flags = ("--prompt", "a", "--num-tokens", "1", "--tokenizer-model", tmp_path / "tok.model")
        code, log = tool("generate.py", folder, "--load", checkpoint, *flags)
        assert code == 0, log
    finally:
        shutil.move(tmp_path / "tok.model", folder / "tok.model")


def test_the_package_itself_imports_no_torch() -> None:
    program = "import sys, megatron_moa; assert 'torch' not in sys.modules; print(megatron_moa.__version__)"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


# Folders, small and with random weights; without a tokenizer.


def write_model(folder: Path, **settings: Any) -> Path:
    """A GPTMoAForCausalLM with a context of 16 tokens, which ends no document."""
    torch.manual_seed(1)
    sizes = {"vocab_size": 31, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    config = GPTMoAConfig(**sizes, num_attention_heads=2, max_position_embeddings=16, **settings)
    GPTMoAForCausalLM(config).save_pretrained(folder)
    return folder


def rewrite(path: Path, **changes: Any) -> None:
    """Changes keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_tokens_do_without_a_tokenizer(tmp_path: Path) -> None:
    model = load_folder(write_model(tmp_path / "model"))
    assert model.logits([1, 2, 3]).shape == (3, 31)
    short, long = model.generate([[1], [1, 2, 3, 4]], 5)
    assert (short.prompt, short.text, len(short.tokens)) == (None, None, 5)
    tokens = [1, 2, 3, 4]
    for _ in long.tokens:
        tokens.append(model.logits(tokens)[-1].argmax().item())
    assert long.tokens == tokens[4:]
    with pytest.raises(UserError, match="has no tokenizer"):
        model.generate("text")


def test_models_of_numbers_and_tokenizers_without_an_end() -> None:
    tokenizer = MegatronTokenizer.from_pretrained(metadata_path={"library": "null-text"}, vocab_size=8)
    numbers = SimpleNamespace(tokenizer=tokenizer, args=SimpleNamespace(tokenizer_type="NullTokenizer", load="runs/a"))
    assert LoadedModel.encode(numbers, "1 2 3") == [1, 2, 3]
    with pytest.raises(UserError, match=r"^--load runs/a: was trained on numbers.*write tokens as 1 2 3, or add --tok"):
        LoadedModel.encode(numbers, "some text")
    for end, expected in ((0, 0), (7, 7), (-1, None), (None, None)):
        assert LoadedModel.end.fget(SimpleNamespace(tokenizer=SimpleNamespace(eod=end))) == expected


@pytest.mark.slow
@pytest.mark.distributed
def test_the_type_that_an_export_has_is_said_by_dtype_alone(folder: Path, tmp_path: Path) -> None:
    code, log = convert(tmp_path, "--load", folder / "dense", "--out", tmp_path / "out", "--bf16")
    assert code == 2, log[-3000:]
    assert "convert_to_hf.py: error: --bf16, --fp16: models are compared in float32; drop it, and say --dtype" in log
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("prompt", [[], list(range(1, 17))])
def test_prompts_that_do_not_fit_are_named(tmp_path: Path, prompt: list[int]) -> None:
    model = load_folder(write_model(tmp_path / "model"))
    with pytest.raises(UserError, match=r"prompt 2 (has no tokens|.* 17 tokens, the model's context 16)"):
        model.generate([[1], prompt])


@pytest.mark.parametrize(
    "sizes", [{"window": 17}, {"window": 0}, {"stride": 17}, {"stride": 0}, {"window": 4, "stride": 5}]
)
def test_windows_beyond_the_context_are_refused(tmp_path: Path, sizes: dict[str, int]) -> None:
    model = load_folder(write_model(tmp_path / "model"))
    name = list(sizes)[-1]
    with pytest.raises(UserError, match=f"--{name} {sizes[name]}: out of range"):
        model.text_loss("text", **sizes)


@pytest.mark.parametrize("token", [31, -1])
def test_tokens_that_the_vocabulary_lacks_are_named(tmp_path: Path, token: int) -> None:
    model = load_folder(write_model(tmp_path / "model"))
    with pytest.raises(UserError, match=f"prompt 2 has a token {token}; the model's are 0 to 30"):
        model.generate([[1], [2, token]], 2)
    with pytest.raises(UserError, match=f"the text has a token {token}; "):
        model.logits([[1, 2], [token, 3]])


def test_weights_of_any_precision_are_computed_in_float32(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model")
    weights = load_file(path / "model.safetensors")
    half = {name: weight.bfloat16() for name, weight in weights.items()}
    save_file(half, path / "model.safetensors", {"format": "pt"})
    rewrite(path / "config.json", dtype="bfloat16")
    model = load(path)
    assert model.dtype == model.model.lm_head.weight.dtype == torch.float32
    assert torch.equal(model.model.lm_head.weight, half["lm_head.weight"].float())
    assert load(path, ["--bf16"]).dtype == torch.bfloat16


def test_an_empty_list_of_end_tokens_is_none(tmp_path: Path) -> None:
    model = load_folder(write_model(tmp_path / "model"))
    model.config.eos_token_id = []
    assert (model.end, model.generate([[1]], 2)[0].ended) == (None, "length")


def test_a_document_ends_where_the_model_ends_it(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model")
    model = load_folder(path)
    (free,) = model.generate([[1]], 8)
    rewrite(path / "config.json", eos_token_id=free.tokens[3])
    rewrite(path / "generation_config.json", eos_token_id=free.tokens[3])
    (ended,) = load_folder(path).generate([[1]], 8)
    first = free.tokens.index(free.tokens[3])
    assert (ended.tokens, ended.ended) == (free.tokens[:first], "document")


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_any_of_several_end_tokens_ends_a_text(file: str, tmp_path: Path) -> None:
    path = write_model(tmp_path / "model")
    (free,) = load_folder(path).generate([[1]], 8)
    unused = next(token for token in range(31) if token not in free.tokens)
    if file == "config.json":
        (path / "generation_config.json").unlink()
    rewrite(path / file, eos_token_id=[unused, free.tokens[3]])
    model = load_folder(path)
    assert model.ends == (unused, free.tokens[3])
    (ended,) = model.generate([[1]], 8)
    assert (ended.tokens, ended.ended) == (free.tokens[: free.tokens.index(free.tokens[3])], "document")


def test_a_folders_penalties_change_nothing(tmp_path: Path) -> None:
    """Instruction models have them in generation_config.json: the tokens are those that the logits choose.

    The model itself keeps them, for who saves it.
    """
    path = write_model(tmp_path / "model")
    (free,) = load_folder(path).generate([[1]], 8)
    rewrite(path / "generation_config.json", repetition_penalty=5.0, no_repeat_ngram_size=1, min_new_tokens=3)
    model = load_folder(path)
    assert model.generate([[1]], 8) == [free]
    assert model.model.generation_config.repetition_penalty == 5.0


@pytest.mark.parametrize("trained_with", [True, False])
@pytest.mark.parametrize("template", ["$A", "<s> $A", "<s> $A </s>", "</s> $A"])
def test_what_a_tokenizer_puts_before_a_text_is_there_in_checkpoint_and_export(
    template: str, trained_with: bool, tmp_path: Path
) -> None:
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = [("<s>", 1), ("</s>", 2)]
    words.post_processor = tokenizers.processors.TemplateProcessing(single=template, special_tokens=special)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(tmp_path / "trained")
    args = Namespace(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tmp_path / "trained"), seq_length=16)
    trained = MegatronTokenizer.from_pretrained(
        args.tokenizer_model, {"library": "huggingface"}, include_special_tokens=trained_with
    )
    assert export_tokenizer(trained, args, tmp_path / "exported", GPTMoAConfig())
    exported = AutoTokenizer.from_pretrained(tmp_path / "exported")
    document = trained.tokenize("a b")
    assert exported.encode("a b") == document
    before = [vocabulary[name] for name in template.split("$A")[0].split()] if trained_with else []
    checkpoint = LoadedModel(None, Namespace(), None, trained, 5, 1)
    export = FolderModel(Namespace(config=Namespace(eos_token_id=2)), exported, None)
    for model in (checkpoint, export):
        assert model.encode("a b") == [3, 4]
        assert model.start("a b") == [*before, 3, 4] == document[: len(before) + 2]
        assert model.start("") == (before or [2])
        assert model.first == (before or [2])[-1]


def test_code_in_a_folder_is_not_run(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model")
    marker = tmp_path / "it ran"
    (path / "modeling_gpt_moa.py").write_text(f"open({str(marker)!r}, 'w')\n")
    (path / "configuration_gpt_moa.py").write_text(f"open({str(marker)!r}, 'w')\n")
    auto = {"AutoConfig": "configuration_gpt_moa.GPTMoAConfig"}
    auto |= {"AutoModelForCausalLM": "modeling_gpt_moa.GPTMoAForCausalLM"}
    rewrite(path / "config.json", auto_map=auto)
    assert type(load_folder(path).model) is GPTMoAForCausalLM
    rewrite(path / "config.json", model_type="strange")
    with pytest.raises(UserError, match=r"model_type strange: .* not run"):
        load_folder(path)
    assert not marker.exists()


def test_pickles_and_paths_that_lead_elsewhere_are_not_read(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model")
    weights = path / "model.safetensors"
    weights.rename(tmp_path / "outside.safetensors")
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": "../outside.safetensors"}}))
    with pytest.raises(UserError, match=r"\.\./outside\.safetensors"):
        load_folder(path)
    index.unlink()
    torch.save({"lm_head.weight": Hostile(tmp_path / "it ran")}, path / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_folder(path)
    assert not (tmp_path / "it ran").exists()


def test_weights_that_do_not_fit_the_settings_are_named(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model")
    rewrite(path / "config.json", mlp_bias=True)
    with pytest.raises(UserError, match=r"missing: model\.layers\.0\.mlp\.down_proj\.bias"):
        load_folder(path)
    (path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: is not JSON"):
        load_folder(path)


def test_weights_that_are_no_numbers_are_told(tmp_path: Path) -> None:
    model = load_folder(write_model(tmp_path / "model"))
    model.model.lm_head.weight.data[3, 2] = torch.nan
    for temperature in (0.0, 1.0):
        with pytest.raises(UserError, match="logits are NaN or infinite"):
            model.generate([[1, 2]], num_tokens=2, temperature=temperature)


def test_stock_models_are_transformers_own(tmp_path: Path) -> None:
    sizes = {"vocab_size": 31, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=16, eos_token_id=[0, 5])
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    model = load_folder(tmp_path / "llama")
    assert type(model.model) is LlamaForCausalLM
    assert (model.mixture, model.end, model.ends, model.context) == (None, 0, (0, 5), 16)


def test_files_without_text_are_named(tmp_path: Path) -> None:
    for name, content, part in (
        ("empty.txt", b"", "is empty"),
        ("latin.txt", "é".encode("latin-1"), "is not UTF-8 (byte 0)"),
        ("bad.jsonl", b'{"content": "x"}\n', '{"text": "…"}'),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name) as caught:
            read_documents(tmp_path / name)
        assert part in str(caught.value)
    with pytest.raises(UserError, match="absent"):
        read_documents(tmp_path / "absent.txt")


def test_the_space_behind_a_prompt_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenizers such as Llama's leave out the space of the first token that they decode."""
    words = [f"w{number}" for number in range(31)]
    monkeypatch.setattr(FolderModel, "has_tokenizer", True)
    monkeypatch.setattr(FolderModel, "encode", lambda _, text: [words.index(word) for word in text.split()])
    monkeypatch.setattr(FolderModel, "decode", lambda _, tokens: " ".join(words[token] for token in tokens))
    (found,) = load_folder(write_model(tmp_path / "model")).generate("w1 w2", 2)
    assert found.prompt + found.text == " ".join(["w1", "w2", *(words[token] for token in found.tokens)])
