"""A disk that forgets: what a power cut may leave of files that a block of code writes below a folder.

The block runs for real; every write, fsync, rename and removal below the folder is also noted in a model of the disk:
data reaches it by fsync of the file, names by fsync of their folder. At any moment `states` gives what may be found
after a crash there:

    killed    a process was killed: everything issued is there
    strict    a power cut: what was not synced is lost, names too
    loose     a power cut after the file system wrote its journal: all names are there, data that was not synced is not
"""

from __future__ import annotations

import builtins
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

KINDS = ("killed", "strict", "loose")


@dataclass
class File:
    """A file's bytes as written, and as they are on the disk."""

    data: bytes = b""
    durable: bytes = b""


@dataclass
class Folder:
    """Names in a folder as they are, and as they are on the disk."""

    names: dict[str, File | Folder] = field(default_factory=dict)
    durable: dict[str, File | Folder] = field(default_factory=dict)


class Disk:
    """The model of what lies below `root`; `moments` counts what happened."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.top = self._take_in(root)
        self.moments = 0

    def _take_in(self, path: Path) -> Folder:
        """What was there before is on the disk."""
        found: dict[str, File | Folder] = {
            child.name: self._take_in(child) if child.is_dir() else File(child.read_bytes(), child.read_bytes())
            for child in path.iterdir()
        }
        return Folder(dict(found), dict(found))

    def _mine(self, path: Any) -> bool:
        return isinstance(path, str | os.PathLike) and Path(os.path.abspath(path)).is_relative_to(self.root)

    def _parts(self, path: Any) -> tuple[str, ...]:
        return Path(os.path.abspath(path)).relative_to(self.root).parts

    def _find(self, parts: tuple[str, ...]) -> Any:
        found: Any = self.top
        for part in parts:
            found = found.names[part]
        return found

    def tree(self, kind: str) -> dict[str, bytes | None]:
        """Relative path → content (None: a folder) after a crash now."""
        found: dict[str, bytes | None] = {}

        def walk(folder: Folder, prefix: str) -> None:
            for name, node in (folder.durable if kind == "strict" else folder.names).items():
                if isinstance(node, Folder):
                    found[prefix + name] = None
                    walk(node, f"{prefix}{name}/")
                else:
                    found[prefix + name] = node.data if kind == "killed" else node.durable

        walk(self.top, "")
        return found

    # What the code under test does, by the functions that it calls.

    def opened(self, real: Any, file: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
        handle = real(file, mode, *rest, **options)
        if self._mine(file) and "w" in mode:
            *above, name = self._parts(file)
            folder = self._find(tuple(above))
            if not isinstance(folder.names.get(name), File):
                folder.names[name] = File()
            folder.names[name].data = b""
            self.moment()
        return handle

    def synced(self, real: Any, descriptor: int) -> None:
        real(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if not self._mine(path):
            return
        node = self._find(self._parts(path))
        if isinstance(node, Folder):
            node.durable = dict(node.names)
        else:
            whole = path.read_bytes()
            for node.data in (whole[: len(whole) // 2], whole):
                self.moment()  # so much is written, and nothing synced
            node.durable = whole
        self.moment()

    def renamed(self, real: Any, old: Any, new: Any) -> None:
        real(old, new)
        if self._mine(old):
            *above, name = self._parts(old)
            node = self._find(tuple(above)).names.pop(name)
            *above, name = self._parts(new)
            self._find(tuple(above)).names[name] = node
            self.moment()

    def made(self, real: Any, path: Any, *rest: Any, **options: Any) -> None:
        real(path, *rest, **options)
        if self._mine(path):
            *above, name = self._parts(path)
            self._find(tuple(above)).names[name] = Folder()
            self.moment()

    def removed(self, real: Any, path: Any, *rest: Any, **options: Any) -> None:
        """A tree, file by file."""
        if self._mine(path) and Path(path).is_dir():
            *above, name = self._parts(path)
            self._empty(self._find((*above, name)))
            del self._find(tuple(above)).names[name]
            self.moment()
        real(path, *rest, **options)

    def _empty(self, folder: Folder) -> None:
        for name, node in list(folder.names.items()):
            if isinstance(node, Folder):
                self._empty(node)
            del folder.names[name]
            self.moment()

    def moment(self) -> None:
        """Something happened; `watched` looks at what a crash would leave."""
        self.moments += 1


@contextmanager
def watched(root: Path, look: Any) -> Iterator[Disk]:
    """Run the block, calling `look(disk)` after each thing that happens below `root`."""
    disk = Disk(root)
    real = {name: getattr(os, name) for name in ("fsync", "rename", "replace", "mkdir")}
    real_open, real_rmtree, looking = builtins.open, shutil.rmtree, []

    def moment() -> None:
        disk.moments += 1
        if not looking:  # what `look` itself writes is not of the block
            looking.append(True)
            look(disk)
            looking.clear()

    def routed(method: Any, function: Any) -> Any:
        return lambda *args, **options: function(*args, **options) if looking else method(function, *args, **options)

    disk.moment = moment  # type: ignore[method-assign]
    with (
        mock.patch.object(builtins, "open", routed(disk.opened, real_open)),
        mock.patch.object(os, "fsync", routed(disk.synced, real["fsync"])),
        mock.patch.object(os, "rename", routed(disk.renamed, real["rename"])),
        mock.patch.object(os, "replace", routed(disk.renamed, real["replace"])),
        mock.patch.object(os, "mkdir", routed(disk.made, real["mkdir"])),
        mock.patch.object(shutil, "rmtree", routed(disk.removed, real_rmtree)),
    ):
        yield disk


def restore(tree: dict[str, bytes | None], folder: Path) -> None:
    """Write what a crash left into an empty folder."""
    for name, content in tree.items():
        path = folder / name
        if content is None:
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.write_bytes(content)
