"""A rank's process ends with its code, after exit handlers, without Python's teardown."""

import subprocess
import sys
import textwrap

import pytest

SCRIPT = """
import atexit, sys
from millrace.core.process import run_process

class Late:
    def __del__(self):
        print("torn down")

def main():
    global late
    late = Late()
    atexit.register(print, "exit handler")
    {body}

run_process(main)
"""


@pytest.mark.parametrize(("body", "code"), [("return 0", 0), ("return 75", 75), ("raise ValueError('told')", 1)])
def test_ends_with_the_code_after_exit_handlers(body, code):
    script = textwrap.dedent(SCRIPT).format(body=body)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code
    assert done.stdout == "exit handler\n"  # and nothing of the teardown
    assert ("ValueError: told" in done.stderr) == (code == 1)
