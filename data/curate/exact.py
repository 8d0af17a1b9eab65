"""Exact duplicates: documents whose text is equal up to case, white space and Unicode composition.

Ours, since datatrove's (`ExactDedupSignature` …) hashes to 64 bits, opens all its files at once and does not say of
which document a removed one is the duplicate.
"""

from __future__ import annotations

import unicodedata

import numpy as np
import xxhash


def normalise(text: str) -> str:
    """NFC, lower case, every run of white space one space, none at the ends. Punctuation and digits count."""
    return " ".join(unicodedata.normalize("NFC", text).lower().split())


def content_hash(text: str) -> tuple[int, int]:
    """XXH3's 128 bits of the normalised text, as two numbers of 64 bits."""
    value = xxhash.xxh3_128_intdigest(normalise(text).encode())
    return value >> 64, value & (2**64 - 1)


def find_duplicates(high: np.ndarray, low: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(positions of the duplicates, ascending; positions of the first document with the same hash).

    `high` and `low` are the hashes of all documents in input order, uint64 of shape (documents,). Memory: about 100
    bytes a document.
    """
    if not len(high):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    order = np.lexsort((low, high))  # stable: equal hashes stay in input order
    new = np.ones(len(order), bool)
    new[1:] = (high[order][1:] != high[order][:-1]) | (low[order][1:] != low[order][:-1])
    first = order[np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))]
    duplicates, kept = order[~new], first[~new]
    ascending = np.argsort(duplicates)
    return duplicates[ascending], kept[ascending]
