"""Text: how well the model predicts it. A line is {"text": "…"}.

Figures are lm-eval's: `bits_per_byte`, `byte_perplexity` and `word_perplexity` of the text after the BOS, the EOS
not being predicted. `millrace eval --text` counts the EOS as well, as the training does.
"""

from __future__ import annotations

from millrace.eval.tasks.base import Kind, text_field

_METRICS = {
    "bits_per_byte": "bits_per_byte",
    "byte_perplexity": "weighted_perplexity",
    "word_perplexity": "weighted_perplexity",
}

TEXT = Kind(
    fits=lambda row: "text" in row,
    document=lambda row: {"text": text_field(row, "text")},
    settings={
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [
            {"metric": name, "aggregation": how, "higher_is_better": False} for name, how in _METRICS.items()
        ],
    },
)
