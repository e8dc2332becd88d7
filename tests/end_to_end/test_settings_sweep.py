"""Checks that every setting which decides the function comes back with --use-checkpoint-args.

Each such setting is exported or refused.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_moa.command_line.megatron_flags import FUNCTION
from tests.support.training import TINY
from tests.sweep_settings import NOT_TRIED, TRIED, Row, flags_of, try_setting

ALWAYS = ("mup_output_mult",)  # which no export has


def test_every_setting_is_tried_or_has_a_reason() -> None:
    assert set(TRIED) | set(NOT_TRIED) == set(FUNCTION)
    assert set(TRIED) & set(NOT_TRIED) == set()
    assert all(NOT_TRIED.values())


def test_flags_are_added_and_taken_away() -> None:
    flags = flags_of("--swiglu -num-query-groups -disable-bias-linear")
    assert set(TINY) - set(flags) == {"--num-query-groups", "--disable-bias-linear"}
    assert flags[-1] == "--swiglu"


def test_another_loss_and_an_unverified_export_are_wrong() -> None:
    right = Row("rotary_base", "3.8E+00", "3.8E+00", "same logits")
    assert not right.is_wrong
    assert Row("rotary_base", "3.8E+00", "3.9E+00", "same logits").is_wrong
    assert Row("rotary_base", "3.8E+00", "3.8E+00", "exit code 1: KeyError").is_wrong
    assert Row("rotary_base", "exit code 1: KeyError").is_wrong
    assert Row("rotary_base", "refused: --rotary-base 50: …").is_wrong
    assert not Row("window_size", "refused: --window-size (4, 0): …").is_wrong


@pytest.mark.distributed
@pytest.mark.parametrize(
    "name", [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.full) for name in TRIED]
)
def test_a_setting_comes_back(name: str, tmp_path: Path) -> None:
    row = try_setting(name, tmp_path)
    assert not row.is_wrong, row
    if name in ALWAYS:
        assert row.loaded
        assert row.export.startswith("refused: --use-mup: ")
