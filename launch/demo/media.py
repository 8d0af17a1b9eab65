"""The demo's pictures and sounds as shards, and how well a model makes the one from the other: judged by what knows no
model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from millrace.launch.demo import glyphs, tones

_PICTURES, _SOUNDS = 4000, 4000  # to train on
_SEED, _HELD_OUT_SEED = 0, 1
JUDGED = 48  # of each kind
_GUIDANCE = 1.0


@dataclass(frozen=True)
class Files:
    """Parquet files of pictures and sounds, with the text of each."""

    glyphs: Path
    tones: Path


def write_media(out: Path) -> Files:
    """Write glyphs and dial tones; a part of them is held out later."""
    files = Files(out / "glyphs.parquet", out / "tones.parquet")
    _write(files.glyphs, glyphs.samples(_PICTURES, _SEED))
    _write(files.tones, tones.samples(_SOUNDS, _SEED))
    return files


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=256)


@dataclass(frozen=True)
class Judged:
    """What was made of what, and whether it was right."""

    way: str  # such as "text to image"
    wanted: list[str]
    found: list[str]
    made: list[Any]  # as `AnyToAny.generate` gives them

    @property
    def right(self) -> float:
        """Share of those that are what they should be."""
        return sum(a == b for a, b in zip(self.wanted, self.found, strict=True)) / len(self.wanted)

    @property
    def errors(self) -> float:
        """Edits by which what was found becomes what was wanted, for each character that was wanted."""
        pairs = zip(self.wanted, self.found, strict=True)
        return sum(edits(a, b) for a, b in pairs) / sum(map(len, self.wanted))


def judge(model: Any) -> list[Judged]:
    """All four ways of an `AnyToAny`, on other renderings than the training's, and numbers that it never heard."""
    from millrace.eval.decoding import Sampling

    pictures = list(glyphs.samples(JUDGED, _HELD_OUT_SEED))
    sounds = list(tones.samples(JUDGED, _HELD_OUT_SEED, held_out=True))
    likeliest, guided = Sampling(temperature=0.0), Sampling(guidance=_GUIDANCE, temperature=0.7)
    ways: list[tuple[str, str, list[dict[str, Any]], Callable[[Sequence[Any]], list[str]]]] = [
        ("image", "text", pictures, list),
        ("text", "image", pictures, glyphs.nearest),
        ("audio", "text", sounds, list),
        ("text", "audio", sounds, lambda made: [" ".join(tones.heard(sound)) for sound in made]),
    ]
    found = []
    for given, to, rows, listen in ways:
        made = model.generate([{given: row[given]} for row in rows], to, likeliest if to == "text" else guided)
        found.append(Judged(f"{given} to {to}", [row["text"] for row in rows], listen(made), made))
    return found


def edits(wanted: str, found: str) -> int:
    """Levenshtein's distance: insertions, deletions and replacements of characters."""
    row = list(range(len(found) + 1))
    for number, character in enumerate(wanted, 1):
        before, row[0] = row[0], number
        for place, other in enumerate(found, 1):
            before, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, before + (character != other))
    return row[-1]
