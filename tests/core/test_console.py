"""What people see goes to stderr; what programs read goes to stdout."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
from millrace.core.console import error, say, show_table, warn
say("plain [bold]text[/bold] " + "x" * 200)
warn("careful [red]")
error("broken [/]")
show_table("Title", ["name", "count"], [("a [b]", 1), ("long", 23456)])
print("result")
"""


def test_messages_go_to_stderr_and_markup_is_left_alone() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert done.stdout == "result\n"
    lines = done.stderr.splitlines()
    assert lines[0] == "plain [bold]text[/bold] " + "x" * 200
    assert lines[1:3] == ["warning: careful [red]", "error: broken [/]"]
    assert "Title" in lines[3]
    assert any("a [b]" in line and line.rstrip(" │").endswith("1") for line in lines)


def test_rich_is_imported_on_first_use() -> None:
    check = "import sys, millrace.core.console; assert 'rich' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)
