"""Books cut into chapter-sized blocks, every twentieth held out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from millrace.core.errors import UserError

BLOCK_BYTES = 20_000
HELD_OUT_EVERY = 20
_CHAPTER, _PARAGRAPH = "\n\n\n", "\n\n"


def split(text: str, size: int = BLOCK_BYTES) -> list[str]:
    """Blocks of about `size` bytes whose concatenation is `text`: short chapters are joined, long ones cut.

    Borders are ends of chapters (two empty lines) where there are enough of them, ends of paragraphs otherwise; only a
    paragraph that is longer than `size` makes a block longer than 1.5 times `size`.
    """
    blocks: list[str] = [""]
    for chapter in _pieces(text, _CHAPTER):
        short = _size(chapter) <= 1.5 * size
        for part in [chapter] if short else _pieces(chapter, _PARAGRAPH):
            if blocks[-1] and _size(blocks[-1]) + _size(part) / 2 > size:
                blocks.append("")
            blocks[-1] += part
    return [block for block in blocks if block]


def _pieces(text: str, border: str) -> list[str]:
    """`text` cut after every `border`."""
    parts = text.split(border)
    return [part + border for part in parts[:-1]] + [parts[-1]]


def _size(text: str) -> int:
    return len(text.encode())


def write_corpus(books: Path, out: Path) -> dict[str, Path]:
    """Write train.jsonl and heldout.jsonl below `out` from the .txt files in `books`; returns their paths by part.

    Raises:
        UserError: `books` holds no text.
    """
    files = sorted(books.glob("*.txt")) if books.is_dir() else []
    if not files:
        raise UserError(
            f"{books} holds no .txt files. Give a folder of plain-text books (UTF-8), one file each: "
            "https://standardebooks.org and https://www.gutenberg.org have thousands in the public domain"
        )
    out.mkdir(parents=True, exist_ok=True)
    paths = {part: out / f"{part}.jsonl" for part in ("train", "heldout")}
    with open(paths["train"], "w") as train, open(paths["heldout"], "w") as heldout:
        for number, block in enumerate(_blocks(files)):
            held = number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
            (heldout if held else train).write(json.dumps({"text": block}) + "\n")
    return paths


def _blocks(files: list[Path]) -> Iterator[str]:
    for file in files:
        yield from split(file.read_text(encoding="utf-8"))


def read_texts(path: Path) -> bytes:
    """All documents of a JSONL file, one after the other, as bytes."""
    with open(path, encoding="utf-8") as lines:
        return "".join(json.loads(line)["text"] for line in lines).encode()
