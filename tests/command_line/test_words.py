"""Words of a command line, split into flags and values."""

from __future__ import annotations

from megatron_moa.command_line.words import flag_groups, flag_values


def test_flags_have_the_words_that_follow_them() -> None:
    words = "first --bf16 --lr -1e-3 --moa-activations silu gelu --lr 2".split()
    assert flag_groups(words) == [
        ["first"],
        ["--bf16"],
        ["--lr", "-1e-3"],
        ["--moa-activations", "silu", "gelu"],
        ["--lr", "2"],
    ]
    assert flag_values(words[1:]) == {"--bf16": "", "--lr": "2", "--moa-activations": "silu gelu"}
    assert flag_groups([]) == []
