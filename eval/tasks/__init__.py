"""Evaluation tasks on local files, computed by lm-eval. A kind of task is one file and one line in `REGISTRY`.

A task file is JSON lines. Its kind is written before it (`last_word=lambada.jsonl`) or, for the first two kinds,
seen from its fields (`arc.jsonl`).
"""

if __name__ != "millrace.eval.tasks":
    raise ImportError(
        f"import millrace.eval.tasks, not {__name__}: a bare import would load a second copy with a second registry"
    )

# kind -> a `Kind`; see `millrace.eval.tasks.base`. Kinds are tried in this order on a file without one.
REGISTRY = {
    "multiple_choice": "millrace.eval.tasks.multiple_choice:MULTIPLE_CHOICE",
    "text": "millrace.eval.tasks.text:TEXT",
    "last_word": "millrace.eval.tasks.last_word:LAST_WORD",
}
