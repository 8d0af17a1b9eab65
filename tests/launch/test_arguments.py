"""Mistakes in options: one line, with what was probably meant."""

from __future__ import annotations

import pytest

from millrace.launch.cli import main

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("data peek --stepp 3", "error: unknown option --stepp; did you mean '--step'?; see millrace data peek --help"),
        ("data stat --token 3", "error: unknown option --token; did you mean '--tokens'?; see"),
        ("data stat --tokens many", "error: argument --tokens: cannot read 'many' as a quantity; write it like"),
        ("prepare x --out y --vocab-sise 3", "error: unknown option --vocab-sise; did you mean '--vocab-size'?; see"),
        ("export", "error: the following arguments are required: source, out; see millrace export --help"),
        ("data verify", "error: the following arguments are required: folder; see millrace data verify --help"),
    ],
)
def test_a_mistake_is_one_line(command: str, message: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as ended:
        main(command.split())
    said = capsys.readouterr().err
    assert ended.value.code == 2 and message in said and said.count("\n") == 1


def test_help_is_whole(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["data", "peek", "--help"])
    assert ended.value.code == 0 and "example: millrace data peek" in capsys.readouterr().out
