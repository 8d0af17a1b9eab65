"""Bits per byte of text: what a model needs to store it, so that models of different tokenizers can be compared.

A document is `[BOS] text [EOS]`; every token of it and the EOS is predicted once. B rows, T positions, D hidden,
V vocabulary, N = n + 1 predictions of a document of n tokens.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from millrace.core.errors import UserError
from millrace.core.registry import lookup
from millrace.data import SOURCES
from millrace.data.corpus import Corpus
from millrace.data.inputs import resolve
from millrace.data.manifest import Manifest
from millrace.data.reader import ShardReader
from millrace.data.sources.base import BadSample, Content
from millrace.data.stores.base import open_blob
from millrace.data.tokenizer import Tokenizer
from millrace.eval.subject import Subject
from millrace.models.heads import backbone_and_head, logits_transform

IGNORE = -100
POSITIONS = 2048  # whose logits are held at once
SORTED = 64  # batches whose spans are sorted by length together, so that rows of a batch need little padding


@dataclass(frozen=True)
class BitsPerByte:
    """`nats` is the summed negative log-likelihood; bytes are those of the UTF-8 text, without BOS and EOS."""

    nats: float
    tokens: int
    bytes: int
    documents: int
    seconds: float

    @property
    def nats_per_token(self) -> float:
        """The usual loss."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers."""
        return self.nats / math.log(2) / self.bytes


Document = tuple[str | np.ndarray, int]
"""Text, or token ids without borders, and its size in bytes of UTF-8."""


def bits_per_byte(
    subject: Subject, documents: Iterable[Document], *, batch: int = 8, stride: int | None = None
) -> BitsPerByte:
    """Exact bits per byte of `documents`, streamed.

    Args:
        batch: rows computed at once.
        stride: without it, a document longer than the context is cut into consecutive spans, as in training. With it,
            a window of the whole context moves by `stride` tokens and only the newest are counted, so that every
            token but the first few has at least `context - stride` tokens before it.

    Raises:
        UserError: no documents, or a stride that is not 1 to the context.
    """
    if stride is not None and not 1 <= stride <= subject.context:
        raise UserError(f"a stride of {stride} tokens: give 1 to {subject.context}, the context")
    began = time.perf_counter()
    counts = {"tokens": 0, "bytes": 0, "documents": 0}
    rows = _rows(subject, documents, stride or subject.context, counts)
    score = _scorer(subject)
    nats = 0.0
    while block := list(itertools.islice(rows, SORTED * batch)):
        block.sort(key=lambda row: -len(row[0]))
        for start in range(0, len(block), batch):
            nats += score(block[start : start + batch])
    if not counts["bytes"]:
        raise UserError("there is no text to evaluate: the documents are empty")
    return BitsPerByte(nats, seconds=time.perf_counter() - began, **counts)


Row = tuple[np.ndarray, np.ndarray]
"""(inputs, labels), each of shape (length,); labels are aligned, -100 where another window counts."""


def _rows(subject: Subject, documents: Iterable[Document], stride: int, counts: dict[str, int]) -> Iterator[Row]:
    tokenizer = subject.tokenizer
    for content, size in documents:
        ids = tokenizer.encode([content])[0] if isinstance(content, str) else content
        whole = np.concatenate([[tokenizer.bos_id], ids, [tokenizer.eos_id]]).astype(np.int64)
        counts["tokens"] += len(whole) - 1
        counts["bytes"] += size
        counts["documents"] += 1
        for start, end, first in windows(len(whole) - 1, subject.context, stride):
            labels = whole[start + 1 : end + 1].copy()
            labels[: first - start] = IGNORE
            yield whole[start:end], labels


def windows(positions: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, first counted) of each window over `positions`; together they count every position once."""
    counted = start = 0
    while counted < positions:
        end = min(start + context, positions)
        yield start, end, counted
        counted, start = end, start + stride


def _scorer(subject: Subject) -> Callable[[list[Row]], float]:
    """A function from rows to their summed negative log-likelihood in nats."""
    model, device = subject.model, subject.device
    logits_of = _logits(model)

    @torch.no_grad()
    def score(rows: list[Row]) -> float:
        # Padding on the right: causal models, recurrent ones too, never see it.
        shape = len(rows), max(len(inputs) for inputs, _ in rows)
        ids_BT = np.full(shape, subject.tokenizer.eos_id, np.int64)
        labels_BT = np.full(shape, IGNORE, np.int64)
        for number, (inputs, labels) in enumerate(rows):
            ids_BT[number, : len(inputs)], labels_BT[number, : len(labels)] = inputs, labels
        labels_N = torch.from_numpy(labels_BT).to(device).reshape(-1)
        total = torch.zeros((), dtype=torch.float64, device=device)
        at = 0
        for logits_CV in logits_of(torch.from_numpy(ids_BT).to(device)):
            part = labels_N[at : at + len(logits_CV)]
            at += len(logits_CV)
            nll = torch.nn.functional.cross_entropy(logits_CV.float(), part, ignore_index=IGNORE, reduction="none")
            total += nll.double().sum()
        return float(total)

    return score


def _logits(model: torch.nn.Module) -> Callable[[torch.Tensor], Iterator[torch.Tensor]]:
    """A function from ids (B, T) to logits (some positions, V) in order, never those of the whole batch if it can."""
    try:
        backbone, head = backbone_and_head(model)  # type: ignore[arg-type]
    except UserError:  # something stands around this architecture's head

        def whole(ids_BT: torch.Tensor) -> Iterator[torch.Tensor]:
            yield model(input_ids=ids_BT, use_cache=False).logits.flatten(0, 1)

        return whole
    transform = logits_transform(model.config)  # type: ignore[arg-type]

    def parts(ids_BT: torch.Tensor) -> Iterator[torch.Tensor]:
        hidden_ND = backbone(input_ids=ids_BT, use_cache=False).last_hidden_state.flatten(0, 1)
        for hidden_CD in hidden_ND.split(POSITIONS):
            yield transform(head(hidden_CD).float())

    return parts


def read_documents(path: str | Path, tokenizer: Tokenizer) -> Iterator[Document]:
    """Documents of a text, JSONL or Parquet file ("text" column), of a folder or glob of them, or of a manifest.

    Raises:
        UserError: nothing there, a document that is not UTF-8, or a manifest of another tokenizer.
    """
    folder = Path(path).parent if Path(path).name == "manifest.json" else Path(path)
    if (folder / "manifest.json").is_file():
        yield from _of_manifest(Manifest.load(folder), tokenizer)
        return
    for file in resolve([str(path)], "auto", Path(os.devnull)):
        source = lookup(SOURCES, file.kind, "source")({"text": "text"})
        with open_blob(file.url) as blob:
            for number, sample in enumerate(source.scan(blob)):
                yield _good(sample.content, f"{file.url}, document {number}"), sample.bytes


def _of_manifest(manifest: Manifest, tokenizer: Tokenizer) -> Iterator[Document]:
    if "tokens" in manifest.columns:
        manifest.check_tokenizer(tokenizer.sha256, "of the model")
    reader = ShardReader(Corpus([manifest]))
    for start in range(0, manifest.samples, 256):
        samples = np.arange(start, min(start + 256, manifest.samples))
        contents, sizes = reader.read(samples), manifest.entries(samples).bytes
        for sample, size in zip(samples.tolist(), sizes.tolist(), strict=True):
            yield _good(contents[sample], f"{manifest.folder}, sample {sample}"), int(size)


def _good(content: Content, where: str) -> str | np.ndarray:
    if isinstance(content, BadSample):
        raise UserError(f"{where}: {content.why}; mend or remove it, a figure over the rest would not be comparable")
    return content["tokens"] if "tokens" in content else content["text"]  # type: ignore[return-value]
