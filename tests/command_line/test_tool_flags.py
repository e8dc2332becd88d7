"""megatron_moa/command_line/tool_flags.py: flags that several tools have."""

from __future__ import annotations

import pytest

from megatron_moa.command_line.tool_flags import add_target_flags, target_settings
from megatron_moa.errors import OneLineParser, UserError


def _parser(required: bool) -> OneLineParser:
    parser = OneLineParser("tool.py")
    add_target_flags(parser, required)
    return parser


def test_settings_of_flags() -> None:
    words = "--mixing moa --form quadratic --activations silu tanh --gate-bias".split()
    flags = _parser(required=True).parse_args(words)
    assert target_settings(flags) == {
        "mixing": "moa",
        "form": "quadratic",
        "activations": ["silu", "tanh"],
        "gate": None,
        "gate_bias": True,
    }
    assert target_settings(_parser(required=False).parse_args([])) is None


@pytest.mark.parametrize("flag", ["--form quadratic", "--activations silu tanh", "--gate softmax", "--gate-bias"])
def test_flags_that_need_a_mixing(flag: str) -> None:
    flags = _parser(required=False).parse_args(flag.split())
    with pytest.raises(UserError, match=rf"^{flag}: has no effect without --mixing la or moa$"):
        target_settings(flags)


def test_a_mixing_that_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        _parser(required=True).parse_args([])
    assert end.value.code == 2
    assert "--mixing" in capsys.readouterr().err
