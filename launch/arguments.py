"""Options of the commands: a mistake is one line, with what was probably meant."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from millrace.core.console import error
from millrace.core.errors import UserError, did_you_mean
from millrace.core.registry import load

T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """`argparse`, without abbreviations: an option that is added later must not change what a script means."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Say it in one line; the exit code is 2."""
        name, _, given = message.partition(": ")
        if name == "unrecognized arguments":
            word = given.split()[0]
            message = f"unknown option {word}{did_you_mean(word, self._option_string_actions)}"
        error(f"{message.rstrip('.')}; see {self.prog} --help")
        sys.exit(2)


def quantity(parse: Callable[[str], T]) -> Callable[[str], T]:
    """`parse` as the type of an option, with its own message."""

    def checked(text: str) -> T:
        try:
            return parse(text)
        except UserError as problem:
            raise argparse.ArgumentTypeError(str(problem)) from None

    return checked


def run_subcommand(group: str, subcommands: Mapping[str, tuple[str, str, str]], argv: Sequence[str]) -> int:
    """`millrace GROUP NAME …`; `subcommands` has by name what each does, an example, and `module:function` in `launch`.

    Raises:
        UserError: there is no such sub-command.
    """
    if not argv or argv[0] in ("-h", "--help", "help"):
        usage = f"millrace {group} SUBCOMMAND"
        print(f"usage: {usage} [arguments]     ({usage} --help for each)\n")
        for name, (what, example, _) in subcommands.items():
            print(f"  {name:<9} {what}\n            example: {example}")
        return 0
    name, *rest = argv
    if name not in subcommands:
        raise UserError(f"unknown sub-command '{group} {name}'{did_you_mean(name, subcommands) or '; see --help'}")
    return int(load(f"millrace.launch.{subcommands[name][2]}")(rest))
