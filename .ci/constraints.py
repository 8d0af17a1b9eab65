"""Print the versions that this environment has of everything that millrace (with its dev extras) depends on.

`make constraints` writes them to constraints.txt. A local version suffix (torch's "+cpu") is left out, so that the same
pin is right for the wheel of any index, and what belongs to one platform only (CUDA's packages) is not pinned.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HEADER = "# Versions that the tests ran with; written by `make constraints`. Use: pip install -c constraints.txt …"
PLATFORM = ("nvidia-", "cuda-", "triton")


def closure(name: str, extras: frozenset[str]) -> dict[str, str]:
    """{canonical name: version} of the installed dependencies of `name[extras]`, itself left out."""
    found: dict[str, str] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    queue = [(canonicalize_name(name), extras)]
    while queue:
        item = queue.pop()
        if item in seen:
            continue
        seen.add(item)
        try:
            installed = distribution(item[0])
        except PackageNotFoundError:
            continue  # of another platform
        found[item[0]] = installed.version.partition("+")[0]
        for text in installed.requires or []:
            needed = Requirement(text)
            if _applies(needed, item[1]):
                queue.append((canonicalize_name(needed.name), frozenset(needed.extras)))
    found.pop(canonicalize_name(name), None)
    return found


def _applies(needed: Requirement, extras: frozenset[str]) -> bool:
    return needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras | {""})


def lines() -> Iterator[str]:
    """The lines of constraints.txt."""
    yield HEADER
    for name, version in sorted(closure("millrace", frozenset({"dev"})).items()):
        if not name.startswith(PLATFORM):
            yield f"{name}=={version}"


if __name__ == "__main__":
    print("\n".join(lines()))
