"""Architectures of language models of one size, for one time, on books: held-out bits per byte, or tokens guessed.

    python benchmarks/language_models.py [BOOKS] [--arms gpt2 mamba2 …] [--seconds 150] [--seeds 0]

BOOKS is a folder of .txt files (see text_books.py). Every arm has about 3 million parameters and trains by its own
objective for `--seconds` of training, one arm after another, in fp32, with the recipe of configs/text_books.toml, not
compiled (LSTMs do not compile whole). A run that is finished below `--dir` is not run again, so arms may be run one at
a time. What a masked model and T5 predict is not the whole text: their figures stand beside nobody's. About 3 minutes
for an arm and seed on 2 cores.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from pathlib import Path
from typing import Any

import books_corpus
import common

from millrace.core.ledger import read
from millrace.data.prepare import PrepareConfig, prepare
from millrace.launch.train import pretrain

VOCABULARY = 2048
ARMS: dict[str, list[str]] = {
    "qwen3": [
        "model.kind=qwen3", "model.config={hidden_size=192, intermediate_size=512, num_hidden_layers=6, "
        "num_attention_heads=3, num_key_value_heads=3, head_dim=64, tie_word_embeddings=true}",
    ],
    "gpt2": [
        "model.kind=gpt2",
        "model.config={n_embd=192, n_layer=6, n_head=3, n_inner=768, tie_word_embeddings=true}",
    ],
    "recurrent_gemma": [
        "model.kind=recurrent_gemma", "model.config={hidden_size=192, intermediate_size=1024, num_hidden_layers=6, "
        "num_attention_heads=3, num_key_value_heads=3, lru_width=192, attention_window_size=256}",
    ],
    "mamba2": [
        "model.kind=mamba2", "model.config={hidden_size=192, num_hidden_layers=10, num_heads=12, head_dim=32, "
        "state_size=64, n_groups=1, chunk_size=64, tie_word_embeddings=true}",
    ],
    "lstm": ["model.kind=lstm", "model.config={hidden_size=384, num_hidden_layers=2, tie_word_embeddings=true}"],
    "bert": [
        "objective.kind=masked_lm", "model.kind=bert", "model.config={hidden_size=192, intermediate_size=768, "
        "num_hidden_layers=6, num_attention_heads=3}",
    ],
    "t5": [
        "objective.kind=span_corruption", "data.rows=alone", "model.kind=t5", "model.config={d_model=192, d_ff=640, "
        "d_kv=64, num_heads=3, num_layers=3}",
    ],
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("books", nargs="?", type=Path, default=common.ROOT.parent / "shared" / "data" / "text_books_en")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seconds", type=int, default=150, help="of training, for each")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--dir", type=Path, default=common.ROOT / "runs" / "language_models", help="where runs are kept"
    )
    options = parser.parse_args()
    common.warn_if_busy()
    environment = common.environment()
    data = _prepare(options)
    runs: dict[str, list[dict[str, Any]]] = {
        arm: [_train(arm, seed, data, options) for seed in options.seeds] for arm in options.arms
    }
    _report(runs, {"environment": environment, "arms": {arm: ARMS[arm] for arm in runs}, "seconds": options.seconds})


def _prepare(options: argparse.Namespace) -> dict[str, Any]:
    """Overrides that name the two manifests; the tokenizer has seen the training text only."""
    paths = books_corpus.write_corpus(options.books, options.dir / "text")
    train, heldout = (options.dir / part for part in ("train", "heldout"))
    if not heldout.exists():
        prepare(PrepareConfig(inputs=[str(paths["train"])], out=str(train), vocab_size=VOCABULARY, tokenize=True))
        bpe = str(train / "tokenizer")
        prepare(PrepareConfig(inputs=[str(paths["heldout"])], out=str(heldout), tokenizer=bpe, tokenize=True))
    return {"data.manifest": train, "data.heldout": heldout}


def _train(arm: str, seed: int, data: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """A run from the start, unless it is there and finished; its figures at the end."""
    folder = options.dir / f"{arm}-{seed}-{options.seconds}"
    if not (folder / "outcome.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        given = {
            **data, "run.dir": folder.parent, "run.name": folder.name, "run.seed": seed, "engine.precision": "fp32",
            "engine.compile": "false", "train.duration": f"{options.seconds} s", "eval.every": "1 h", "eval.rows": 400,
            "checkpoint.every": "1 h",
        }  # fmt: skip
        recipe = str(common.ROOT / "configs" / "text_books.toml")
        code = pretrain([recipe, *ARMS[arm], *(f"{key}={value}" for key, value in given.items())])
        if code:
            raise SystemExit(f"{arm}, seed {seed}, ended with exit code {code}; see {folder}")
    records = read(folder / "ledger.jsonl")
    start, last = (next(r for r in reversed(records) if r["event"] == event) for event in ("start", "eval"))
    steps = [r for r in records if r["event"] == "step"]
    seconds = sum(r["seconds"] for r in steps)
    return {
        "params": start["params"], "steps": len(steps), "targets": steps[-1]["tokens_total"], "seconds": seconds,
        "heldout": {key: last[key] for key in ("loss", "bpb", "accuracy") if key in last},
        "heldout_targets": last["tokens"],
    }  # fmt: skip


def _report(runs: dict[str, list[dict[str, Any]]], result: dict[str, Any]) -> None:
    rows = []
    for arm, found in runs.items():
        figures = {k: [r["heldout"][k] for r in found] for k in found[0]["heldout"]}
        rows.append(
            (
                arm,
                f"{found[0]['params'] / 1e6:.2f}M",
                f"{statistics.mean(r['targets'] / r['seconds'] for r in found):,.0f}",
                *(" ".join(f"{v:.3f}" for v in figures.get(key, [])) for key in ("bpb", "accuracy", "loss")),
            )
        )
    path = common.save("language_models", result | {"runs": runs})
    columns = ["architecture", "parameters", "targets/s", "bits per byte", "guessed right", "nats a target"]
    common.report(f"Held out, after {result['seconds']} s of training", columns, rows, path)


if __name__ == "__main__":
    main()
