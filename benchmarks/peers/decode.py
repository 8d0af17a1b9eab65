"""The same work in every arm: payload bytes become arrays, and arrays a batch of tensors."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

ROW = 1024  # tokens in a row of a text batch


class Collate:
    """(id, label, payload) of each sample → {"ids": int64 (B,), "labels": int64 (B,), "data": tensor}.

    data: images uint8 (B, 256, 256, 3); audio float32 (B, 64000); text and tokens int64 (3, rows, 1024), the documents
    of the batch end to end, the last row filled up: tokens, the token that follows each (-100 at the end of a document
    and in what is filled up), and positions in their documents. It is what a step on packed rows takes.
    """

    def __init__(self, modality: str, tokenizer: str) -> None:
        self._decode = {"text": self._text, "tokens": _tokens, "images": _images, "audio": _audio}[modality]
        self._tokenizer = tokenizer
        self._backend: Any = None

    def __call__(self, samples: Sequence[tuple[int, int, Any]]) -> dict[str, Any]:
        import torch

        ids, labels, payloads = zip(*samples, strict=True)
        return {
            "ids": torch.tensor(ids, dtype=torch.int64),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "data": torch.from_numpy(self._decode(payloads)),
        }

    def _text(self, payloads: Sequence[str | bytes]) -> np.ndarray:
        if self._backend is None:  # after the fork, in each process of its own
            from tokenizers import Tokenizer

            self._backend = Tokenizer.from_file(self._tokenizer)
        texts = [p if isinstance(p, str) else str(p, "utf-8") for p in payloads]
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return _rows([np.array(encoding.ids, np.int32) for encoding in encodings])


def _tokens(payloads: Sequence[bytes | np.ndarray]) -> np.ndarray:
    return _rows([p if isinstance(p, np.ndarray) else np.frombuffer(p, np.uint16) for p in payloads])


def _rows(documents: Sequence[np.ndarray]) -> np.ndarray:
    lengths = [len(document) for document in documents]
    ends = np.cumsum(lengths)
    rows = np.zeros((3, max(1, -(-int(ends[-1]) // ROW)), ROW), np.int64)
    rows[1] = -100
    tokens, following, positions = rows.reshape(3, -1)[:, : ends[-1]]
    np.concatenate(documents, out=tokens, casting="unsafe")
    following[:-1] = tokens[1:]
    following[ends - 1] = -100
    np.subtract(np.arange(ends[-1]), (ends - lengths).repeat(lengths), out=positions)
    return rows


def _images(payloads: Sequence[bytes]) -> np.ndarray:
    from PIL import Image

    return np.stack([np.asarray(Image.open(io.BytesIO(payload)).convert("RGB")) for payload in payloads])


def _audio(payloads: Sequence[bytes]) -> np.ndarray:
    import soundfile

    return np.stack([soundfile.read(io.BytesIO(payload), dtype="float32")[0] for payload in payloads])
