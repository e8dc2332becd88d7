"""What the package reads of examples/: names, flags, and one line for what is not there."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from megatron_moa.errors import UserError
from megatron_moa.runs import recipes


def values(flags: list[str], flag: str) -> list[str]:
    """All values of a flag, in order: the last one holds."""
    return [value for name, value in itertools.pairwise(flags) if name == flag]


def test_names_are_the_files() -> None:
    found = recipes.model_files()
    assert {"dense-0.12b", "gpt2-124m", "moe-2b"} < found.keys()
    assert all(path.is_file() and path.stem == name for name, path in found.items())


def test_a_recipes_flags_are_the_scripts() -> None:
    flags = recipes.recipe_flags("moe-0.5b", "none", ["--mock-data", "--seed", "7"], {"TP": "2", "EP": "4"})
    assert "--dry-run" not in flags
    assert "pretrain_gpt_moa.py" not in " ".join(flags)
    assert values(flags, "--moa-mixing") == ["none"]
    assert values(flags, "--tensor-model-parallel-size") == ["2"]
    assert values(flags, "--expert-model-parallel-size") == ["4"]
    assert values(flags, "--seed")[-1] == "7"
    assert values(flags, "--vocab-size") == ["50257"]


@pytest.mark.parametrize(("mixing", "kind"), [("one-sided", "moa"), ("la-one-sided", "la")])
def test_a_form_is_a_mixing(mixing: str, kind: str) -> None:
    flags = recipes.recipe_flags("dense-0.12b", mixing, ["--mock-data"])
    assert (values(flags, "--moa-mixing"), values(flags, "--moa-form")) == ([kind], ["one-sided"])


def test_every_mixing_is_the_scripts() -> None:
    for mixing in recipes.RECIPE_MIXINGS:
        assert "--moa-mixing" in recipes.recipe_flags("dense-0.12b", mixing, ["--mock-data"])


@pytest.mark.parametrize(
    ("model", "variables", "text"),
    [
        ("dense-0.12b", {"TP": "4"}, ""),
        ("dense-2b", {"TP": "8"}, ""),
        ("dense-0.5b", {}, "feed-forward width 3413 is odd: slow on tensor cores; FFN_MULTIPLE=128 rounds"),
        ("dense-0.5b", {"TP": "2"}, "feed-forward width 3413 is not divisible by TP 2: "),
        ("dense-0.5b", {"FFN_MULTIPLE": "128", "TP": "2"}, ""),
        ("dense-0.25b", {"TP": "2"}, "feed-forward width 1365 on each of 2 ranks is odd: "),
        ("dense-0.25b", {}, "feed-forward width 2730 is no multiple of 8: "),
        ("moe-2b", {}, "shared expert's width 3413 is odd, routed experts' width 853 is odd: "),
        ("moe-2b", {"FFN": "type1", "TP": "4"}, ""),
    ],
)
def test_widths_that_gpus_do_not_take_well(model: str, variables: dict[str, str], text: str) -> None:
    widths = recipes.feed_forward_widths(recipes.recipe_flags(model, "none", ["--mock-data"], variables))
    said = recipes.awkward_widths(widths)
    assert said.startswith(text) if text else said == ""


def test_this_machines_launch_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = recipes.recipe_flags("dense-0.12b", "moa", ["--mock-data"])
    monkeypatch.setenv("NNODES", "4")  # without MASTER_ADDR the script itself asks for it
    assert recipes.recipe_flags("dense-0.12b", "moa", ["--mock-data"]) == alone


def test_words_come_back_as_they_went(tmp_path: Path) -> None:
    path = tmp_path / "two words.sh"
    path.write_text(f"source '{recipes.model_files()['dense-0.12b']}'\n")
    flags = recipes.recipe_flags(str(path), "moa", ["--mock-data", "--wandb-exp-name", "it's a\\name $HOME"])
    assert values(flags, "--wandb-exp-name") == ["it's a\\name $HOME"]
    assert values(flags, "--num-layers") == ["6"]


def test_an_array_is_read_as_bash_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "recipe.sh"
    path.write_text("SIZE=${SIZE:-32}\nMODEL_ARGS=(\n    --hidden-size $SIZE  # comment\n    --name 'two words'\n)\n")
    assert recipes.read_recipe(path) == ["--hidden-size", "32", "--name", "two words"]


@pytest.mark.parametrize(
    ("model", "mixing", "flags", "text"),
    [
        ("moe2b", "moa", [], "moe2b: there is no such recipe; did you mean moe-2b"),
        ("zzz", "moa", [], "zzz: there is no such recipe; there are dense-0.12b, "),
        ("nowhere.sh", "moa", [], "nowhere.sh: there is no such recipe"),
        ("dense-0.12b", "mao", [], "mao: there is no such mixing; take one of none, la, moa"),
    ],
)
def test_mistakes(model: str, mixing: str, flags: list[str], text: str) -> None:
    with pytest.raises(UserError) as error:
        recipes.recipe_flags(model, mixing, flags)
    assert text in str(error.value)
    assert "\n" not in str(error.value)


def test_what_the_script_refuses_is_said() -> None:
    with pytest.raises(UserError, match="EP 2"):
        recipes.recipe_flags("dense-0.12b", "moa", ["--mock-data"], {"EP": "2"})


def test_no_array(tmp_path: Path) -> None:
    path = tmp_path / "recipe.sh"
    path.write_text("OTHER=(1)\n")
    with pytest.raises(UserError, match="no array MODEL_ARGS"):
        recipes.read_recipe(path)


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"exit 0", b"echo '\"'; exit 0", b'"', b"MODEL_ARGS=()", b"\x7fELF\0\0\xff" * 99]
)
def test_a_file_that_is_no_recipe_is_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "recipe.sh"
    path.write_bytes(content)
    with pytest.raises(UserError):
        recipes.recipe_flags(str(path), "none", ["--mock-data"])


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        ("--ffn-hidden-size 24", {"feed-forward width": (24, 1)}),
        ("--num-experts 4 --moe-ffn-hidden-size 8", {"routed experts' width": (8, 1)}),
        ("--ffn-hidden-size x", "invalid int value: 'x'; mend MODEL_ARGS"),
        ("--ffn-hidden-size -8", "feed-forward width is -8; give --ffn-hidden-size"),
        ("--num-experts", "expected one argument; mend MODEL_ARGS"),
        ("--num-experts 4", "routed experts' width is None; give --ffn-hidden-size or --moe-ffn-hidden-size"),
        ("", "feed-forward width is None; give --ffn-hidden-size"),
    ],
)
def test_widths_are_numbers(flags: str, found: dict[str, tuple[int, int]] | str) -> None:
    if isinstance(found, str):
        with pytest.raises(UserError, match=re.escape(found)):
            recipes.feed_forward_widths(flags.split())
    else:
        assert recipes.feed_forward_widths(flags.split()) == found
