"""Last word: whether the model's likeliest continuation is the text's last word, as LAMBADA asks.

A line is {"text": "… and the mill grinds grain"}; arXiv:1606.06031, evaluated as in lm-eval's lambada_openai.
"""

from __future__ import annotations

from typing import Any

from millrace.eval.tasks.base import Kind, Row, text_field


def _document(row: Row) -> dict[str, Any]:
    before, space, word = text_field(row, "text").rstrip().rpartition(" ")
    if not space or not before.strip():
        raise ValueError("'text' must be two words or more")
    return {"before": before, "word": " " + word}


LAST_WORD = Kind(
    fits=lambda row: False,  # its lines look like those of "text": it is always named
    document=_document,
    settings={
        "output_type": "loglikelihood",
        "doc_to_text": "before",
        "doc_to_target": "word",
        "target_delimiter": "",
        "metric_list": [
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        ],
    },
)
