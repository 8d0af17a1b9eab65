"""One evaluation of one model: bits per byte of texts, tasks, and a result that says what it was computed from."""

from __future__ import annotations

import itertools
import json
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from millrace.core.console import show_table
from millrace.core.errors import UserError
from millrace.core.rundir import write_atomic
from millrace.eval.bits_per_byte import bits_per_byte, read_documents
from millrace.eval.encoder import open_encoder
from millrace.eval.probe import probe
from millrace.eval.retrieval import retrieval
from millrace.eval.subject import Subject, open_subject
from millrace.eval.tasks.harness import find_tasks, run_tasks

FORMAT = "millrace-eval"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to evaluate: `source` as for `open_subject`, `text` as for `read_documents`, `tasks` as for `run_tasks`.

    Or, of an encoder of images, `probe` and `label` as for `millrace.eval.probe`.
    With `retrieval`, a manifest, `source` is a contrastive run.
    """

    source: str
    text: Sequence[str] = ()
    tasks: Sequence[str] = ()
    probe: Sequence[str] = ()
    label: str = "label"
    untrained: bool = False
    retrieval: str | None = None
    limit: int | None = None  # documents of each text and task
    batch: int = 8
    context: int | None = None
    stride: int | None = None
    dtype: str = "auto"


def evaluate(request: Request) -> dict[str, Any]:
    """The result, JSON-able: {"format", "source", "text": {path: …}, "tasks": {name: …}, "request", "versions", …}.

    Raises:
        UserError: nothing was asked for, or something of it cannot be read; tasks are looked at before the model is
            loaded.
    """
    asked = [name for name in ("text", "tasks", "probe", "retrieval") if getattr(request, name)]
    if not asked:
        raise UserError("nothing to evaluate; give --text or --tasks PATH, --probe or --retrieval MANIFEST")
    if set(asked) > {"probe"} or set(asked) > {"retrieval"}:
        raise UserError(f"--{' and --'.join(asked)} are for different models: ask for them one at a time")
    if len(request.probe) > 2:
        raise UserError(f"--probe takes one or two manifests, not {len(request.probe)}")
    if request.batch < 1 or (request.limit is not None and request.limit < 1):
        raise UserError(f"--batch {request.batch} and --limit {request.limit} must be at least 1")
    find_tasks(request.tasks)
    for path in request.text:
        if not Path(path).exists() and not any(c in path for c in "*?["):
            raise UserError(f"no text {path}: no file or folder of that name")
    began = time.time()
    found = _measure(request)
    return {
        "format": FORMAT,
        "version": 1,
        **found,
        "request": asdict(request),
        "time": began,
        "seconds": time.time() - began,
        "versions": _versions(),
    }


def _measure(request: Request) -> dict[str, Any]:
    """What was asked for, and of what."""
    if request.retrieval:
        return retrieval(request.source, request.retrieval)
    if request.probe:
        encoder = open_encoder(request.source, untrained=request.untrained)
        found = probe(encoder, request.probe, request.label, request.batch)
        return {"source": encoder.description, "text": {}, "tasks": {}, "probe": found}
    return _of_language(request)


def _of_language(request: Request) -> dict[str, Any]:
    subject = open_subject(request.source, dtype=request.dtype, context=request.context)
    text = {path: _text(subject, path, request) for path in request.text}
    tasks = {}
    if request.tasks:
        tasks = run_tasks(subject, request.tasks, batch=request.batch, limit=request.limit)
    return {"source": subject.description, "text": text, "tasks": tasks}


def _text(subject: Subject, path: str, request: Request) -> dict[str, Any]:
    documents: Iterator[Any] = itertools.islice(read_documents(path, subject.tokenizer), request.limit)
    found = bits_per_byte(subject, documents, batch=request.batch, stride=request.stride)
    return {"bits_per_byte": found.bits_per_byte, "nats_per_token": found.nats_per_token, **asdict(found)}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("millrace", "torch", "transformers", "tokenizers", "datasets", "lm-eval"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write_result(result: dict[str, Any], out: Path) -> None:
    """Write it as JSON, over an earlier result only.

    Raises:
        UserError: `out` is something else.
    """
    if out.exists():
        try:
            earlier = json.loads(out.read_text(encoding="utf-8"))
        except (ValueError, OSError):
            earlier = None
        if not isinstance(earlier, dict) or earlier.get("format") != FORMAT:
            raise UserError(f"{out} exists and is no earlier result; give another --out. Nothing was overwritten")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def show_result(result: dict[str, Any]) -> None:
    """Tables on the terminal (stderr)."""
    source = result["source"]
    step = f", step {source['step']:,}" if source["step"] is not None else ""
    title = f"{source['path']}{step}, {source['parameters']:,} parameters, {source['dtype']} on {source['device']}"
    if "recall" in result:
        ks, among = list(next(iter(result["recall"].values()))), result["among"]
        ways = [(way, *(f"{share:.3f}" for share in shares.values())) for way, shares in result["recall"].items()]
        chance = ("chance", *(f"{min(1.0, int(k) / among):.3f}" for k in ks))
        show_table(title, (f"among {among}", *(f"recall at {k}" for k in ks)), [*ways, chance])
        return
    if result["text"]:
        rows = [
            (path, f"{r['bits_per_byte']:.4f}", f"{r['nats_per_token']:.4f}", f"{r['tokens']:,}", f"{r['bytes']:,}")
            for path, r in result["text"].items()
        ]
        show_table(title, ("text", "bits per byte", "nats per token", "tokens", "bytes"), rows)
    if judged := result.get("probe"):
        head = ("nearest neighbours", "linear probe", "images", "held out", "classes", "width")
        sizes = (f"{judged['train']:,}", f"{judged['heldout']:,}", len(judged["classes"]), judged["width"])
        show_table(title, head, [(f"{judged['knn']:.4f}", f"{judged['linear']:.4f}", *sizes)])
    rows = []
    for name, task in result["tasks"].items():
        for metric, found in task["metrics"].items():
            error = "" if found["stderr"] is None else f"±{found['stderr']:.4f}"
            rows.append((name, metric, f"{found['value']:.4f}", error, task["samples"] or ""))
    if rows:
        show_table(title, ("task", "metric", "value", "standard error", "samples"), rows)
