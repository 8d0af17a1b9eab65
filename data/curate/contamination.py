"""Contamination: 13-grams of words that a document shares with an evaluation set.

As in Brown et al. 2020 (arXiv:2005.14165, appendix C), but a document is removed whole. The code is ours, since
datatrove's indexer needs lighteval, which downloads the tasks, and its filter stops at the first match and holds the
index as a dictionary. Words are lower case without punctuation (`words.evaluation_words`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from millrace.core.errors import UserError
from millrace.data.curate.words import evaluation_words, ngram_hashes
from millrace.data.inputs import InputFile

NGRAM = 13


@dataclass(frozen=True)
class Match:
    """What a document shares with the evaluation files."""

    ngrams: int  # how many of its 13-grams
    first: str  # the first of them
    lines: np.ndarray  # lines of evaluation files that have one, the first one's first


@dataclass(frozen=True)
class Evaluation:
    """The 13-grams of evaluation files. Memory: 16 bytes per 13-gram. Lines are numbered through all files."""

    hashes: np.ndarray  # ascending, uint64
    lines: np.ndarray  # of each hash, its first line
    files: list[dict[str, Any]]  # path, lines, checkable (of 13 words or more), first (number of the first line)

    def match(self, text: str) -> Match | None:
        """What `text` shares with the evaluation files, if anything."""
        words = evaluation_words(text)
        hashes = ngram_hashes(words, NGRAM)
        at = np.searchsorted(self.hashes, hashes)
        at[at == len(self.hashes)] = 0
        places = np.flatnonzero(self.hashes[at] == hashes) if len(self.hashes) else np.zeros(0, np.int64)
        if not len(places):
            return None
        lines = self.lines[at[places]]
        _, first = np.unique(lines, return_index=True)
        return Match(len(places), " ".join(words[places[0] : places[0] + NGRAM]), lines[np.sort(first)])

    def place(self, line: int) -> tuple[str, int]:
        """(path, number of the line from 1)."""
        file = next(file for file in reversed(self.files) if file["first"] <= line)
        return file["path"], line - file["first"] + 1


def read_evaluation(files: Sequence[InputFile]) -> Evaluation:
    """All 13-grams of all text in the files: the strings of a line are taken together, in their order.

    Raises:
        UserError: a file that is not of the format of its name, or without any text.
    """
    hashes, lines, found = [], [], []
    count = 0
    for file in files:
        first, checkable, text = count, 0, False
        for row in _rows(file):
            words = evaluation_words(" ".join(_strings(row)))
            grams = ngram_hashes(words, NGRAM)
            hashes.append(grams)
            lines.append(np.full(len(grams), count, np.int64))
            checkable += len(grams) > 0
            text = text or bool(words)
            count += 1
        if not text:
            raise UserError(f"the evaluation file {file.url} has no text; leave it out, or name the right one")
        found.append({"path": str(file.url), "lines": count - first, "checkable": checkable, "first": first})
    unique, at = np.unique(np.concatenate(hashes), return_index=True)
    return Evaluation(unique, np.concatenate(lines)[at], found)


def _rows(file: InputFile) -> Iterator[Any]:
    try:
        if file.kind == "parquet":
            import pyarrow.parquet as pq

            for batch in pq.ParquetFile(file.url).iter_batches(1024):
                yield from batch.to_pylist()
        elif file.kind == "jsonl":
            with open(file.url, encoding="utf-8") as lines:
                for line in lines:
                    yield json.loads(line) if line.strip() else ""
        elif file.kind == "text":
            yield Path(file.url).read_text(encoding="utf-8")
        else:
            raise UserError(f"the evaluation file {file.url} is {file.kind}; give JSONL, Parquet or text")
    except UserError:
        raise
    except (OSError, ValueError) as error:  # those of json, of UTF-8 and of pyarrow are among them
        raise UserError(f"cannot read the evaluation file {file.url} as {file.kind}: {error}") from None


def _strings(value: Any) -> Iterable[str]:
    """Every text in a row, in lists and objects inside it too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def save(evaluation: Evaluation, folder: Path) -> None:
    """Write the index for the workers, `files.json` last."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "hashes.npy", evaluation.hashes)
    np.save(folder / "lines.npy", evaluation.lines)
    (folder / "files.json").write_text(json.dumps(evaluation.files))


def load(folder: Path) -> Evaluation:
    """Read what `save` wrote; the arrays are mapped, so workers share them."""
    hashes, lines = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("hashes", "lines"))
    return Evaluation(hashes, lines, json.loads((folder / "files.json").read_text()))
