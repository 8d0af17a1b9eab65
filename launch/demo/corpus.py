"""The demo's text: Python's own standard library, as modules, docstrings and small instruction examples."""

from __future__ import annotations

import ast
import hashlib
import json
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from millrace.core.errors import UserError

HELD_OUT_SHARE = 0.05  # of the modules
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_DOCSTRING_BYTES = 400  # shorter ones are no documents of their own
_FUNCTION_CHARACTERS = 700  # longest function of an instruction example


@dataclass(frozen=True)
class Module:
    """One source file; `name` is dotted, such as `email.message`."""

    name: str
    text: str

    @property
    def held_out(self) -> bool:
        """Whether it is kept from training: decided by its name alone, so the same on every machine."""
        return int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:8], "big") < HELD_OUT_SHARE * 2**64


def standard_library() -> Path:
    """Where Python keeps its library's sources."""
    return Path(sysconfig.get_path("stdlib"))


def read_modules(folder: Path) -> Iterator[Module]:
    """Every module below `folder` in order of its path; tests, installed packages and empty files are left out.

    Files that are not UTF-8 are read with replacement characters; a file that cannot be read is passed over.
    """
    for path in sorted(folder.rglob("*.py")):
        inside = path.relative_to(folder)
        if _SKIPPED & set(inside.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        if text.strip():
            yield Module(".".join(inside.with_suffix("").parts), text)


def documents(module: Module) -> list[str]:
    """The module, and its sizeable docstrings as plain text."""
    return [module.text, *(text for text in _docstrings(module) if len(text.encode()) >= _DOCSTRING_BYTES)]


def _docstrings(module: Module) -> Iterator[str]:
    for node in ast.walk(_parse(module)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield text + "\n"


def _parse(module: Module) -> ast.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old modules
            return ast.parse(module.text)
    except (SyntaxError, ValueError):  # templates and files for other versions of Python
        return ast.Module(body=[], type_ignores=[])


def examples(module: Module) -> Iterator[dict[str, str]]:
    """{"prompt", "response"}: a short function without its docstring, and the docstring's first sentence."""
    for node in ast.walk(_parse(module)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or len(node.body) < 2:
            continue
        doc = ast.get_docstring(node)
        first = " ".join(doc.split("\n\n")[0].split()) if doc else ""
        if not 15 <= len(first) <= 120:
            continue
        code = ast.unparse(ast.FunctionDef(**{**vars(node), "body": node.body[1:], "decorator_list": []}))
        if len(code) <= _FUNCTION_CHARACTERS:
            yield {"prompt": f"What does this function do?\n\n{code}", "response": first}


@dataclass(frozen=True)
class Corpus:
    """Files that `write_corpus` wrote, and what is in them."""

    train: Path
    heldout: Path
    tuning: Path
    tuning_heldout: Path
    modules: int
    modules_held_out: int
    bytes: int


def write_corpus(folder: Path, out: Path) -> Corpus:
    """Write train, heldout, tuning and tuning_heldout .jsonl below `out` from the modules in `folder`.

    A module and all that is made of it are on one side of the split. The same text is written once.

    Raises:
        UserError: there are no sources (some distributions ship compiled files only).
    """
    modules = list(read_modules(folder))
    held = [module for module in modules if module.held_out]
    kept = [module for module in modules if not module.held_out]
    if not held or not kept:
        raise UserError(
            f"{folder} holds {len(modules)} Python modules, too few to train on; run the demo with a Python that ships "
            "the sources of its standard library"
        )
    out.mkdir(parents=True, exist_ok=True)
    names = ("train", "heldout", "tuning", "tuning_heldout")
    paths = {name: out / f"{name}.jsonl" for name in names}
    seen: set[str] = set()
    size = 0
    for name, part in (("train", kept), ("heldout", held)):
        texts = [text for module in part for text in documents(module)]
        size += _write(paths[name], ({"text": t} for t in texts if _is_new(t, seen)))
    for name, part in (("tuning", kept), ("tuning_heldout", held)):
        made = [example for module in part for example in examples(module)]
        _write(paths[name], (e for e in made if _is_new(e["prompt"], seen)))
    return Corpus(**paths, modules=len(modules), modules_held_out=len(held), bytes=size)


def _is_new(text: str, seen: set[str]) -> bool:
    digest = hashlib.sha256(text.encode(errors="replace")).hexdigest()
    if digest in seen:
        return False
    seen.add(digest)
    return True


def _write(path: Path, records: Iterable[dict[str, str]]) -> int:
    """Write JSON lines; returns the bytes of text in them."""
    size = 0
    with open(path, "w", encoding="utf-8") as file:
        for record in records:
            clean = {key: value.encode("utf-8", "replace").decode() for key, value in record.items()}
            size += sum(len(value.encode()) for value in clean.values())
            file.write(json.dumps(clean) + "\n")
    return size
