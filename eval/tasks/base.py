"""What a kind of task is, and how a task file is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from millrace.core.errors import UserError
from millrace.core.registry import lookup
from millrace.eval.tasks import REGISTRY

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Kind:
    """One kind of task.

    `document` turns a line of the file into lm-eval's document, a flat dictionary with the same fields for every line;
    it raises ValueError with what is wrong about the line. `settings` are lm-eval's task configuration
    (https://github.com/EleutherAI/lm-evaluation-harness/blob/main/docs/task_guide.md) over those fields. `fits` tells
    from a file's first line whether it is of this kind.
    """

    fits: Callable[[Row], bool]
    document: Callable[[Row], dict[str, Any]]
    settings: dict[str, Any]


@dataclass(frozen=True)
class TaskFile:
    """A task file whose kind is known; `name` appears in the results."""

    name: str
    kind: str
    path: Path

    @classmethod
    def parse(cls, argument: str) -> TaskFile:
        """From `PATH` or `KIND=PATH`.

        Raises:
            UserError: unknown kind, no such file, or a file of no kind.
        """
        kind, equals, rest = argument.partition("=")
        named = bool(equals) and "/" not in kind
        path = Path(rest if named else argument)
        if named:
            lookup(REGISTRY, kind, "kind of task")
        if not path.is_file():
            raise UserError(f"no task file {path}; give a JSON lines file, a folder of them or lm-eval's YAML files")
        return cls(path.stem, kind if named else _seen(path), path)

    def documents(self) -> list[dict[str, Any]]:
        """The file as lm-eval's documents.

        Raises:
            UserError: a line that is not of the kind, or no lines.
        """
        kind: Kind = lookup(REGISTRY, self.kind, "kind of task")
        found = []
        for number, row in _rows(self.path):
            try:
                found.append(kind.document(row))
            except ValueError as error:
                raise UserError(f"{self.path}:{number} is no line of kind '{self.kind}': {error}") from None
        if not found:
            raise UserError(f"the task file {self.path} is empty")
        return found


def _rows(path: Path) -> Iterator[tuple[int, Row]]:
    """(line number, object) of every line that is not blank."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:  # UnicodeDecodeError is one
                raise UserError(f"{path}:{number} is not JSON in UTF-8: {error}") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number} is {type(row).__name__}, not an object with fields")
            yield number, row


def _seen(path: Path) -> str:
    first = next(_rows(path), None)
    if first is None:
        raise UserError(f"the task file {path} is empty")
    for name in REGISTRY:
        kind: Kind = lookup(REGISTRY, name, "kind of task")
        if kind.fits(first[1]):
            return name
    raise UserError(
        f"{path} has the fields {', '.join(first[1])}, which are those of no kind of task; multiple_choice has "
        "question (or context), choices and answer; text has text. Or name the kind: KIND=FILE"
    )


def text_field(row: Row, *names: str) -> str:
    """The string in the first of `names` that the line has.

    Raises:
        ValueError: none of them is there, or it is not text.
    """
    for name in names:
        if name in row:
            if not isinstance(row[name], str) or not row[name].strip():
                raise ValueError(f"'{name}' must be text, not {row[name]!r}")
            return row[name]
    raise ValueError(f"it has no field '{names[0]}' (it has: {', '.join(row)})")
