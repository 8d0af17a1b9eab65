"""Small corpora of images and sounds as Parquet, train and held out, for the recipes that are measured on them.

    paths = corpora.write("mnist", folder)      # {"train": train.parquet, "heldout": heldout.parquet}

Columns: `image` (PNG) or `audio` (as it was) or both, `text` (what it is), and `label` (a whole number) where there are
classes. What is held out: of MNIST's t10k the last 1,000; of spoken digits takes 0 to 4, as their authors do; of emoji
and of what has Mandarin names every tenth by a hash; of sounds the last fold; of X-rays what its authors
held out.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common
import numpy as np

from millrace.eval.media import png

SOURCE = common.ROOT.parent / "shared" / "data"
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
Rows = Iterator[tuple[bool, dict[str, Any]]]  # (held out, columns)


def write(name: str, folder: Path, source: Path = SOURCE) -> dict[str, Path]:
    """Write both parts of a corpus, unless they are there.

    Raises:
        SystemExit: the data are not on this machine.
    """
    paths = {part: folder / f"{part}.parquet" for part in ("train", "heldout")}
    if all(path.is_file() for path in paths.values()):
        return paths
    try:
        rows = list(CORPORA[name](source))
    except FileNotFoundError as error:
        raise SystemExit(f"the corpus '{name}' is not on this machine: {error.filename} is missing") from None
    folder.mkdir(parents=True, exist_ok=True)
    for part, path in paths.items():
        write_rows([row for held, row in rows if held == (part == "heldout")], path)
    return paths


def write_rows(rows: list[dict[str, Any]], path: Path) -> None:
    """Write a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=256)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a Parquet file."""
    import pyarrow.parquet as pq

    found: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return found


def on_white(path: Path) -> bytes:
    """A picture with its transparent parts white, encoded."""
    from PIL import Image

    picture = Image.open(path).convert("RGBA")
    ground = Image.new("RGBA", picture.size, "white")
    return png(np.asarray(Image.alpha_composite(ground, picture).convert("RGB")))


def _every(key: str, number: int) -> bool:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % number == 0


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _unzipped(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes())


def _mnist(source: Path) -> Rows:
    folder = source / "image_mnist_t10k"
    images = np.frombuffer(_unzipped(folder / "t10k-images-idx3-ubyte.gz"), np.uint8)[16:].reshape(-1, 28, 28)
    labels = np.frombuffer(_unzipped(folder / "t10k-labels-idx1-ubyte.gz"), np.uint8)[8:].tolist()
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        yield number >= 9000, {"image": png(np.pad(image, 2)), "text": DIGITS[label], "label": label}


def _fsdd(source: Path) -> Rows:
    folder = source / "audio_fsdd"
    for line in _lines(folder / "recordings.jsonl"):
        audio = (folder / line["audio"]).read_bytes()
        yield line["take"] < 5, {"audio": audio, "text": line["text"], "label": line["digit"]}


def _emoji(source: Path) -> Rows:
    """`text` is the English name; `names` holds those of all languages, `keywords` more English words."""
    folder = source / "image_emoji"
    for line in _lines(folder / "captions.jsonl"):
        names = json.dumps(line["names"], ensure_ascii=False)
        image = on_white(folder / line["image"])
        row = {"image": image, "text": line["names"]["en"], "names": names, "keywords": ", ".join(line["keywords_en"])}
        yield _every(line["id"], 10), row


def _mandarin(source: Path) -> Rows:
    """Emoji, their Mandarin word, and the word spoken; held out by word."""
    folder = source / "tri_emoji_mandarin_speech"
    for line in _lines(folder / "triples.jsonl"):
        row = {"image": on_white(folder / line["image"]), "audio": (folder / line["audio"]).read_bytes()}
        yield _every(line["text_zh"], 6), row | {"text": line["text_zh"]}


def _esc10(source: Path) -> Rows:
    folder, lines = source / "audio_esc10", list(_lines(source / "audio_esc10" / "clips.jsonl"))
    names = sorted({line["label"] for line in lines})
    for line in lines:
        audio = (folder / line["audio"]).read_bytes()
        row = {"audio": audio, "text": line["label"], "label": names.index(line["label"])}
        yield line["fold"] == 4, row


def _xrays(source: Path) -> Rows:
    found = np.load(source / "image_medical_pneumonia" / "pneumoniamnist_balanced.npz")
    for part in ("train", "val"):
        images, labels = found[f"{part}_images"], found[f"{part}_labels"].flatten().tolist()
        for image, label in zip(images, labels, strict=True):
            row = {"image": png(np.pad(image, 2, "edge")), "text": ("normal", "pneumonia")[label], "label": label}
            yield part == "val", row


CORPORA: dict[str, Callable[[Path], Rows]] = {
    "emoji": _emoji, "esc10": _esc10, "fsdd": _fsdd, "mandarin": _mandarin, "mnist": _mnist, "xrays": _xrays,
}  # fmt: skip
