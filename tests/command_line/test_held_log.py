"""megatron_moa/command_line/held_log.py: what of Megatron's log is shown."""

import pytest

from megatron_moa.command_line.held_log import held_log
from megatron_moa.errors import UserError


@held_log(KeyError)
def fail(error: Exception) -> None:
    print("> log")
    raise error


def test_the_log_is_shown_after_an_unexpected_failure_alone(capsys: pytest.CaptureFixture[str]) -> None:
    for error, shown in (
        (UserError("x"), ""),
        (KeyError("x"), ""),
        (ValueError("x"), "> log\n"),
        (SystemExit("x"), "> log\n"),
    ):
        with pytest.raises(type(error)):
            fail(error)
        assert capsys.readouterr() == ("", shown)
    with held_log():
        print("> log\nWARNING: --load x: fp8 scales are dropped")
    assert capsys.readouterr() == ("", "WARNING: --load x: fp8 scales are dropped\n")
