"""Images of a manifest with their labels, one after the other: for judging what a model makes of them.

B images of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import numpy as np

from millrace.core.errors import UserError
from millrace.core.registry import lookup
from millrace.data import SOURCES
from millrace.data.corpus import Corpus
from millrace.data.index import Entries
from millrace.data.modalities.base import modality
from millrace.data.modalities.image import ImageView
from millrace.data.reader import ShardReader
from millrace.data.sources.base import BadSample, Content

LABEL = "label"
_WITH_NUMBERS = ("arrow", "parquet")  # formats whose labels may be whole numbers; elsewhere they are text


class LabelledImages:
    """All images of a manifest in its order, as a model sees them in evaluation, each with its label as a text."""

    def __init__(self, manifest: str, label: str, size: int) -> None:
        """`label` is a column (or field, or suffix) of its files, which the manifest need not know; `size` in pixels.

        Raises:
            UserError: no manifest, or one without images.
        """
        self._corpus = Corpus.load(manifest)
        (self._manifest,) = self._corpus.manifests
        if "image" not in self._manifest.columns:
            held = ", ".join(self._manifest.columns)
            raise UserError(f"{manifest} has no images, but {held}; index it with --image COLUMN")
        self._reader, self._label = ShardReader(self._corpus), label
        self._view = ImageView(size=size)
        self.bad: list[str] = []  # why samples were left out so far: they have no image, or no label

    def __len__(self) -> int:
        return self._corpus.samples

    def batches(self, size: int) -> Iterator[tuple[np.ndarray, list[str]]]:
        """(images uint8 (B, side, side, 3), labels), B at most `size`.

        Raises:
            UserError: a shard is missing or is not what was indexed, or has no such column.
        """
        for first in range(0, len(self), size):
            samples = np.arange(first, min(first + size, len(self)))
            pairs = zip(self._reader.read(samples), self._labels(samples), strict=True)
            tried = [self._made(*pair) for pair in pairs]
            made = [one for one in tried if not isinstance(one, str)]
            self.bad += [why for why in tried if isinstance(why, str)]
            if made:
                yield np.stack([image for image, _ in made]), [label for _, label in made]

    def _labels(self, samples: np.ndarray) -> list[Content]:
        entries, found = self._corpus.entries(samples), []
        for number, places in groupby(range(len(samples)), self._corpus.shard_of(samples).tolist().__getitem__):
            found += self._of_shard(number, entries, list(places))
        return found

    def _of_shard(self, number: int, entries: Entries, here: list[int]) -> list[Content]:
        """A source of its own for the label: the checksums of the manifest are of other columns."""
        kind = self._manifest.shards[number].kind
        source = lookup(SOURCES, kind, "source")({LABEL if kind in _WITH_NUMBERS else "text": self._label})
        _, blob = self._reader.opened(number)
        return source.read(blob, list(zip(entries.at[here].tolist(), entries.extent[here].tolist(), strict=True)))

    def _made(self, content: Content, label: Content) -> tuple[np.ndarray, str] | str:
        """Image and label, or why there are none."""
        for part in (content, label):
            if isinstance(part, BadSample):
                return part.why
        assert isinstance(content, dict) and isinstance(label, dict)
        (text,), raw = label.values(), content["image"]
        assert isinstance(raw, bytes)
        try:
            image = self._view.make(modality("image").decode(raw), raw, np.random.default_rng(0))
        except ValueError as error:
            return str(error)
        return image, str(text).strip()
