"""Multiple choice: the likeliest continuation is the model's answer.

A line is {"question": "What grinds?", "choices": ["The mill", "The river"], "answer": 0}. `answer` is the number of
the right choice from 0, or its letter from "A". With "question" the prompt is `Question: …` and `Answer:` on a line of
its own; with "context" instead, the choices continue that text as it is. Names that others use are understood too:
query, endings, gold, label.

`acc` takes the largest log-likelihood, `acc_norm` the largest per character of the choice, as lm-eval defines them.
"""

from __future__ import annotations

from typing import Any

from millrace.eval.tasks.base import Kind, Row, text_field


def _fits(row: Row) -> bool:
    return "choices" in row or "endings" in row


def _document(row: Row) -> dict[str, Any]:
    choices = row.get("choices", row.get("endings"))
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise ValueError(f"'choices' must be two or more texts, not {choices!r}")
    return {"prompt": _prompt(row), "choices": choices, "answer": _answer(row, len(choices))}


def _prompt(row: Row) -> str:
    if "context" in row:
        return text_field(row, "context").rstrip()
    question = text_field(row, "question", "query").strip()
    lead = "" if question.startswith("Question:") or "\nQuestion:" in question else "Question: "
    return f"{lead}{question}\nAnswer:"


def _answer(row: Row, count: int) -> int:
    name = next((n for n in ("answer", "gold", "label") if n in row), "answer")
    given = row.get(name)
    number = ord(given) - ord("A") if isinstance(given, str) and len(given) == 1 and given.isupper() else given
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < count:
        raise ValueError(f"'{name}' must be a number from 0 to {count - 1} or a letter, not {given!r}")
    return number


def _metric(name: str) -> dict[str, Any]:
    return {"metric": name, "aggregation": "mean", "higher_is_better": True}


MULTIPLE_CHOICE = Kind(
    fits=_fits,
    document=_document,
    settings={
        "output_type": "multiple_choice",
        "doc_to_text": "prompt",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": " ",
        "metric_list": [_metric("acc"), _metric("acc_norm")],
    },
)
