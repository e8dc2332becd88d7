"""Tests megatron_moa/hf/folder.py: what a Hugging Face folder says is data.

What is damaged or hostile is answered in one line.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from megatron_moa.errors import UserError
from megatron_moa.hf.families import function_settings
from megatron_moa.hf.folder import open_folder
from tests.support.checkpoints import Hostile
from tools import convert_from_hf

SIZES = {"vocab_size": 67, "hidden_size": 24, "intermediate_size": 28, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 3, "num_key_value_heads": 1, "max_position_embeddings": 32}
INDEX, SINGLE, PICKLED = "model.safetensors.index.json", "model.safetensors", "pytorch_model.bin"


def llama(**settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(5)
    return LlamaForCausalLM(LlamaConfig(**SIZES, **settings)).eval()


def saved(folder: Path, shards: bool = True, **settings: Any) -> dict[str, Tensor]:
    """A tiny LLaMA in a folder, in shards with an index or in one file; its weights."""
    model = llama(**settings)
    model.save_pretrained(folder, max_shard_size="12KB" if shards else "1GB")
    assert (folder / (INDEX if shards else SINGLE)).is_file()
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def read_all(folder: Path, allow_pickle: bool = False) -> dict[str, Tensor]:
    opened = open_folder(folder, allow_pickle)
    return {name: opened.read(name) for name in opened.weights}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def rewrite(path: Path, change: Callable[[Any], None]) -> None:
    """Changes a JSON file."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Changes the single file of weights."""
    weights = load_file(folder / SINGLE)
    change(weights)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / SINGLE)


# What is read.


@pytest.mark.parametrize("shards", [False, True])
def test_weights_by_name(shards: bool, tmp_path: Path) -> None:
    weights = saved(tmp_path, shards)
    assert_same(read_all(tmp_path), weights)


@pytest.mark.parametrize("legacy", [False, True])
def test_pickles_if_asked_for(legacy: bool, tmp_path: Path) -> None:
    weights = saved(tmp_path, shards=False)
    (tmp_path / SINGLE).unlink()
    torch.save(weights, tmp_path / PICKLED, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match=r"its weights are pickled \(pytorch_model\.bin\); add --allow-pickle"):
        open_folder(tmp_path)
    assert_same(read_all(tmp_path, allow_pickle=True), weights)
    half = len(weights) // 2
    files = {"pytorch_model-1.bin": list(weights)[:half], "pytorch_model-2.bin": list(weights)[half:]}
    for file, names in files.items():
        torch.save({name: weights[name] for name in names}, tmp_path / file)
    index = {"weight_map": {name: file for file, names in files.items() for name in names}}
    (tmp_path / PICKLED).unlink()
    (tmp_path / f"{PICKLED}.index.json").write_text(json.dumps(index))
    assert_same(read_all(tmp_path, allow_pickle=True), weights)


def test_the_hubs_cache_is_a_folder_too(tmp_path: Path) -> None:
    """Its files are links into the folder blobs."""
    weights = saved(tmp_path / "plain")
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate((tmp_path / "plain").iterdir()):
        shutil.move(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert_same(read_all(snapshot), weights)
    for above in (snapshot.parent.parent, snapshot.parent):
        with pytest.raises(UserError, match=f"{above}: is a part of the hub's cache; .* own folder: {snapshot}$"):
            open_folder(above)


def test_a_download_is_looked_for_where_one_is_left(tmp_path: Path) -> None:
    """The whole tree may be a home folder."""
    weights = saved(tmp_path)
    for place in ("other/deep", ".cache/huggingface/download/a"):
        (tmp_path / place).mkdir(parents=True)
    (tmp_path / "other/deep/x.incomplete").touch()
    assert_same(read_all(tmp_path), weights)
    (tmp_path / ".cache/huggingface/download/a/x.incomplete").touch()
    with pytest.raises(UserError, match=r"its download has not ended \(\.cache/huggingface/download/a/x\.incomplete\)"):
        open_folder(tmp_path)


def test_old_names_of_gpt2(tmp_path: Path) -> None:
    """Without the prefix of the model, with masks that are computed today, and with a tied output layer."""
    torch.manual_seed(5)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=67, n_embd=24, n_layer=2, n_head=3, n_positions=32))
    model.config.architectures = ["GPT2LMHeadModel"]
    model.config.save_pretrained(tmp_path)
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    old = {name.removeprefix("transformer."): tensor.clone() for name, tensor in weights.items()}
    masks = {f"h.{n}.attn.bias": torch.ones(1, 1, 32, 32, dtype=torch.uint8) for n in range(2)}
    save_file({**old, **masks}, tmp_path / SINGLE)
    opened = open_folder(tmp_path)
    opened.check_tied()
    assert_same({name: opened.read(name) for name in opened.weights}, weights)
    save_file({**old, "lm_head.weight": old["wte.weight"] + 1}, tmp_path / SINGLE)
    with pytest.raises(UserError, match=r"lm_head\.weight differs from transformer\.wte\.weight, and config\.json"):
        open_folder(tmp_path).check_tied()


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        (None, [3]),
        ({}, [3]),
        ({"eos_token_id": [5, 2, 4]}, [5, 2, 4]),
        ({"eos_token_id": 7}, [7]),
        ({"eos_token_id": [5, 10**6, -1]}, [5]),  # those that there are
    ],
)
def test_tokens_that_end_a_text(generation: dict[str, Any] | None, expected: list[int], tmp_path: Path) -> None:
    saved(tmp_path)
    rewrite(tmp_path / "config.json", lambda config: config.update(eos_token_id=3))
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert open_folder(tmp_path).end_tokens == expected
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": ["</s>"]}')
    with pytest.raises(UserError, match=r"generation_config\.json, eos_token_id \['</s>'\]: is neither an id"):
        _ = open_folder(tmp_path).end_tokens


def test_how_a_text_is_written(tmp_path: Path) -> None:
    """First token and padding are of either file; ids beyond the vocabulary are left out."""
    saved(tmp_path)
    rewrite(tmp_path / "config.json", lambda config: config.update(bos_token_id=3, pad_token_id=67))
    path = tmp_path / "generation_config.json"
    path.unlink(missing_ok=True)
    assert open_folder(tmp_path).generation == {"bos_token_id": 3}
    settings = {"top_p": 0.9, "bos_token_id": 4, "eos_token_id": [5], "transformers_version": "5.0"}
    path.write_text(json.dumps(settings))
    assert open_folder(tmp_path).generation == {"top_p": 0.9, "bos_token_id": 4}
    path.write_text('{"pad_token_id": "</s>"}')
    with pytest.raises(UserError, match=r"generation_config\.json, pad_token_id '</s>': is no id; correct it"):
        _ = open_folder(tmp_path).generation


# Values that mean nothing.

MODELS = {
    "llama": lambda: llama(),
    "qwen3 moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=20)
    ),
}
FURTHER = ("sliding_window", "use_sliding_window", "layer_types", "rope_scaling", "rope_theta", "torch_dtype")
ROPE = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2}


@pytest.mark.parametrize("value", ["a", 0, -1, None, [], {}, float("inf"), True], ids=repr)
@pytest.mark.parametrize("model", MODELS)
def test_a_key_of_any_value_is_one_line_or_changes_nothing(model: str, value: object, tmp_path: Path) -> None:
    built: PreTrainedModel = MODELS[model]()
    built.save_pretrained(tmp_path)
    plain, path = open_folder(tmp_path), tmp_path / "config.json"
    settings = json.loads(path.read_text())
    cases = [(key, {**settings, key: value}) for key in (*settings, *FURTHER)]
    cases += [(f"rope {key}", {**settings, "rope_parameters": {**ROPE, key: value}}) for key in ROPE]
    for key, changed in cases:
        path.write_text(json.dumps(changed).replace("Infinity", "1e400"))
        try:
            opened = open_folder(tmp_path)
            opened.check_tied()
            message = None
        except UserError as error:
            message = str(error)
        if message is not None:
            assert str(tmp_path) in message, (key, message)
            assert len(message.splitlines()) == 1, (key, message)
            continue
        assert value != float("inf"), key
        if not (value is True and settings.get(key) is False):  # which is no mistake
            assert function_settings(opened.own) == function_settings(plain.own), key
            assert opened.own.max_position_embeddings == 32
            assert opened.own.intermediate_size == 28


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_attention_heads": 0}, r"config\.json, num_attention_heads 0: a whole number of at least 1 is wanted"),
        ({"head_dim": 0}, r"head_dim 0: a whole number of at least 1"),
        ({"max_position_embeddings": -1}, r"max_position_embeddings -1: a whole number of at least 1"),
        ({"sliding_window": "a"}, r"sliding_window a: a whole number or null is wanted"),
        ({"dtype": []}, r"config\.json: is no LlamaConfig"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": True}}, r"rope_theta True: a number above 0"),
    ],
)
def test_the_key_of_a_mistake_is_named(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    saved(tmp_path)
    rewrite(tmp_path / "config.json", lambda config: config.update(settings))
    with pytest.raises(UserError, match=message):
        open_folder(tmp_path)


def test_an_endless_number_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    text = (tmp_path / "config.json").read_text()
    for number in ("1e400", "-Infinity", "NaN"):
        (tmp_path / "config.json").write_text(text.replace('"rms_norm_eps": 1e-06', f'"rms_norm_eps": {number}'))
        with pytest.raises(UserError, match=rf"config\.json: has the number {number}, which is none; correct it"):
            open_folder(tmp_path)


# What is refused.


def _no(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _config(**settings: Any) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder / "config.json", lambda config: config.update(settings))


def _text(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text)


def _index(name: str) -> Callable[[Path], None]:
    """The index says that all weights of its first file are in another one."""

    def change(folder: Path) -> None:
        def move(index: dict[str, Any]) -> None:
            first = min(index["weight_map"].values())
            index["weight_map"] = {
                weight: name.format(folder=folder) if file == first else file
                for weight, file in index["weight_map"].items()
            }

        rewrite(folder / INDEX, move)

    return change


def _outside(folder: Path) -> None:
    shard = min(folder.glob("*.safetensors"))
    shutil.move(shard, folder.parent / "elsewhere.safetensors")
    shard.symlink_to(folder.parent / "elsewhere.safetensors")


def _cut(folder: Path) -> None:
    shard = min(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])


def _shard_lacks(folder: Path) -> None:
    shard = min(folder.glob("*.safetensors"))
    weights = load_file(shard)
    weights.popitem()
    save_file(weights, shard)


def _shard_has_more(folder: Path) -> None:
    shard = min(folder.glob("*.safetensors"))
    save_file({**load_file(shard), "other": torch.ones(1)}, shard)


def _twice(folder: Path) -> None:
    path = folder / INDEX
    entry = '"lm_head.weight": "model-00001-of-00002.safetensors", '
    path.write_text(path.read_text().replace('"weight_map": {', '"weight_map": {' + entry))


def _two_kinds(folder: Path) -> None:
    save_file({"a": torch.ones(1)}, folder / SINGLE)


SHARDED: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (_no("config.json"), r"config\.json is not there"),
    "config is no JSON": (_text("config.json", "{'model_type': 'llama'"), r"config\.json: is not JSON"),
    "config is a list": (_text("config.json", "[1]"), r"config\.json: holds no JSON object"),
    "a key twice": (_text("config.json", '{"vocab_size": 1, "vocab_size": 2}'), r"has 'vocab_size' twice"),
    "endless brackets": (_text("config.json", "[" * 100_000), r"config\.json: is not JSON"),
    "unknown architecture": (_config(architectures=["T5Model"]), r"T5Model: is not supported; supported: Llama"),
    "unknown type": (_config(architectures=None, model_type="t5"), r"model_type t5: is not supported; supported: ll"),
    "another type": (_config(model_type="gpt2"), r"model_type gpt2: a LlamaForCausalLM is of llama"),
    "two architectures": (_config(architectures=["a", "b"]), r"one name is wanted"),
    "a size that is none": (_config(hidden_size="many"), r"config\.json, hidden_size many: a whole number of at l"),
    "an endless size": (_config(num_hidden_layers=10**6), r"promises 1000000 layers and 0 experts, and there are 21 w"),
    "unknown rope": (_config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}), r"yarn: supp"),
    "quantised": (_config(quantization_config={"quant_method": "gptq"}), r"quantised weights are not read"),
    "no weights": (lambda folder: [file.unlink() for file in folder.glob("model*")], r"no weights there; one of"),
    "no shard": (lambda folder: min(folder.glob("*.safetensors")).unlink(), r"index\.json: model-.* is not there"),
    "a shard cut off": (_cut, r"safetensors: damaged or cut off"),
    "a shard lacks a weight": (_shard_lacks, r"safetensors: lacks model\..*; fetch the file and the index"),
    "a shard has more": (_shard_has_more, r"has, beside what the index names, other"),
    "a name in the index twice": (_twice, r"index\.json: has 'lm_head\.weight' twice"),
    "an index without a map": (_text(INDEX, "{}"), r"has no weight_map"),
    "an index of numbers": (_text(INDEX, '{"weight_map": {"a": 1}}'), r"has no weight_map"),
    "two kinds of files": (_two_kinds, r"has model\.safetensors and model\.safetensors\.index\.json; take away"),
    "the folder above": (_index("../elsewhere.safetensors"), r"names the file '\.\./elsewhere\.safetensors', and only"),
    "an absolute path": (_index("{folder}/../elsewhere.safetensors"), r"names the file '/.*', and only files of this"),
    "another system's path": (_index("..\\elsewhere.safetensors"), r"names the file .*, and only files of this"),
    "a drive": (_index("C:elsewhere.safetensors"), r"names the file 'C:elsewhere\.safetensors', and only"),
    "a file of another kind": (_index("config.json"), r"names the file 'config\.json', which is no \.safetensors"),
    "a link that leaves": (_outside, r"is a link that leaves the folder, to .*elsewhere"),
    "git-lfs": (
        _text("model-00001-of-00004.safetensors", "version https://git-lfs.github.com/spec/v1\n"),
        r"git lfs p",
    ),
    "a download": (_text("model.safetensors.incomplete", ""), r"its download has not ended \(model\.safetensors\.inc"),
    "an adapter": (_text("adapter_config.json", "{}"), r"holds an adapter \(adapter_config\.json\); merge it"),
}


@pytest.mark.parametrize("case", SHARDED)
def test_damaged_folders_are_one_line(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, message = SHARDED[case]
    saved(tmp_path / "hf")
    shutil.copyfile(min((tmp_path / "hf").glob("*.safetensors")), tmp_path / "elsewhere.safetensors")
    change(tmp_path / "hf")
    assert_refused(tmp_path / "hf", message, capsys)


def assert_refused(folder: Path, message: str, capsys: pytest.CaptureFixture[str], *flags: str) -> None:
    """The tool says so in one line with exit code 2, and writes nothing."""
    before = sorted(folder.parent.rglob("*"))
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        convert_from_hf.main(["--hf", str(folder), "--out", str(folder.parent / "out"), *flags])
    assert end.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("[transformers]")]
    assert len(lines) == 1, lines
    with pytest.raises(UserError, match=message):
        raise UserError(lines[0])
    assert sorted(folder.parent.rglob("*")) == before


def _half_mixed(weights: dict[str, Tensor]) -> None:
    weights["model.norm.weight"] = weights["model.norm.weight"].bfloat16()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("model.norm.weight"), r"model\.norm\.weight is not among the weights"),
        (lambda weights: weights.update({"odd.bias": torch.ones(2)}), r"LlamaForCausalLM has no place for odd\.bias"),
        (
            lambda weights: weights.update({"model.norm.weight": torch.ones(25)}),
            r"model\.norm\.weight is \[25\], and by config\.json it would be \[24\]",
        ),
        (
            lambda weights: weights.update({"lm_head.weight": weights["lm_head.weight"].to(torch.int8)}),
            r"lm_head\.weight is of I8; float32, bfloat16 and float16 are read, quantised weights are not",
        ),
        (_half_mixed, r"its weights are of bfloat16 and float32; add --dtype"),
    ],
)
def test_weights_that_do_not_fit(
    change: Callable[[dict[str, Tensor]], None],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    saved(tmp_path / "hf", shards=False)
    change_weights(tmp_path / "hf", change)
    assert_refused(tmp_path / "hf", message, capsys)


def test_what_a_killed_conversion_left_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path / "hf.123.unfinished")
    assert_refused(tmp_path / "hf.123.unfinished", r"was left by a conversion that did not end", capsys)
    assert_refused(tmp_path / "nowhere", r"no such folder", capsys)


# Nothing is run.


def test_a_hostile_pickle_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = saved(tmp_path / "hf", shards=False)
    (tmp_path / "hf" / SINGLE).unlink()
    marker = tmp_path / "marker"
    hostile = {**weights, "model.norm.weight": Hostile(marker)}
    for legacy in (False, True):
        torch.save(hostile, tmp_path / "hf" / PICKLED, _use_new_zipfile_serialization=not legacy)
        assert_refused(tmp_path / "hf", r"its weights are pickled", capsys)
        assert_refused(tmp_path / "hf", r"holds more than tensors .*nothing of it was run", capsys, "--allow-pickle")
    (tmp_path / "hf" / PICKLED).write_bytes(pickle.dumps(hostile))
    assert_refused(tmp_path / "hf", PICKLED, capsys, "--allow-pickle")
    for wrong in ([1, 2], {"model": weights}):
        torch.save(wrong, tmp_path / "hf" / PICKLED)
        assert_refused(tmp_path / "hf", r"holds something else than tensors by name", capsys, "--allow-pickle")
    assert not marker.exists()
    pickle.loads(pickle.dumps(hostile))
    assert marker.exists()  # so it would have shown
