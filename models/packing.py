"""Which architectures may see several documents in one row, and what they must be given then."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from millrace.core.errors import UserError
from millrace.core.registry import load
from millrace.models import REGISTRY, attention

# Each has a test that a document's logits in a packed row equal those of the document alone, to 1e-5.
_PROVEN = {kind: load(target) for kind, target in REGISTRY.items()}
PACKABLE = frozenset(kind for kind, found in _PROVEN.items() if found.packable and not found.masked)
PACKABLE_MASKED = frozenset(kind for kind, found in _PROVEN.items() if found.packable and found.masked)


def check_packable(kind: str, proven: Collection[str] = PACKABLE) -> None:
    """Refuse packed rows for an architecture whose documents would see each other.

    Raises:
        UserError: `kind` (a transformers `model_type`) is not in `proven`.
    """
    if kind in proven:
        return
    why = load(REGISTRY[kind]).why_not if kind in REGISTRY else "nobody has proven that its documents stay apart"
    raise UserError(
        f"model.kind = '{kind}' cannot be trained on packed documents: {why}; set data.rows = 'alone', or take one of "
        f"{', '.join(sorted(proven))}"
    )


def document_inputs(position_ids_BT: torch.Tensor, seq_lens: list[list[int]], attention_name: str) -> dict[str, Any]:
    """Keyword arguments of the backbone under which attention never crosses a document border.

    `position_ids_BT` restart at 0 in every document; `seq_lens` are the document lengths of each row, padding
    left out; `attention_name` is `model.config._attn_implementation`. For "documents" a table of starts
    stands in the place of the mask. For the others transformers derives the mask from the positions, which it
    does only without a mask and without a cache (`masking_utils._preprocess_mask_arguments`). Call it outside
    a compiled region.
    """
    inputs: dict[str, Any] = {"position_ids": position_ids_BT, "attention_mask": None, "use_cache": False}
    if attention_name == attention.NAME:
        table = attention.document_starts(seq_lens, position_ids_BT.shape[1])
        inputs["attention_mask"] = table.to(position_ids_BT.device, non_blocking=True)
    return inputs
