"""What the scripts of recipes share: manifests of a small corpus, a run of a recipe, and what it left behind.

Runs lie below `--dir`. What has ended there is only judged again: remove it to train anew.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import common
import corpora
import numpy as np

from millrace.core.ledger import read
from millrace.data.prepare import PrepareConfig, prepare
from millrace.launch.train import pretrain


def parser(description: str | None, name: str) -> argparse.ArgumentParser:
    """Of a script: seeds, folder, and overrides of the recipe."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("overrides", nargs="*", metavar="section.key=value", help="passed on to every run")
    made.add_argument("--seeds", type=int, nargs="+", default=[0])
    made.add_argument("--dir", type=Path, default=common.ROOT / "runs" / name, help="where data and runs are kept")
    return made


def manifests(corpus: str, folder: Path, vocabulary: int = 512, **roles: str) -> dict[str, Any]:
    """Overrides that name the two parts of a corpus; the tokenizer has seen the training part only."""
    paths = corpora.write(corpus, folder / "parquet")
    return prepared(paths, folder, vocabulary, **roles)


def prepared(paths: dict[str, Path], folder: Path, vocabulary: int = 512, **roles: str) -> dict[str, Any]:
    """As `manifests`, of Parquet files that are there; `roles` name their columns."""
    made = {part: folder / f"manifest-{part}" for part in paths}
    given: dict[str, Any] = {"vocab_size": vocabulary, **roles}
    prepare(PrepareConfig(inputs=[str(paths["train"])], out=str(made["train"]), **given))
    tokenizer = made["train"] / "tokenizer"
    if tokenizer.is_dir():
        given = {**roles, "tokenizer": str(tokenizer)}
    prepare(PrepareConfig(inputs=[str(paths["heldout"])], out=str(made["heldout"]), **given))
    return {"data.manifest": made["train"], "data.heldout": made["heldout"]}


def train(recipe: str, run: Path, seed: int, given: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """A run, begun or continued; how it went (see `summary`). One that has ended is not trained again."""
    outcome = run / "outcome.json"
    if outcome.is_file() and json.loads(outcome.read_text())["code"] == 0:
        return summary(run)
    given = {**given, "run.dir": run.parent, "run.name": run.name, "run.seed": seed}
    values = [f"{key}={value}" for key, value in given.items()]
    code = pretrain([str(common.ROOT / "configs" / f"{recipe}.toml"), *values, *overrides])
    if code:
        raise SystemExit(f"{run} ended with exit code {code}")
    return summary(run)


def summary(run: Path) -> dict[str, Any]:
    """Steps, seconds of training, weights, steps that were not taken, and the last held-out figures."""
    records = read(run / "ledger.jsonl")
    steps = [record for record in records if record["event"] == "step"]
    start = next(record for record in records if record["event"] == "start")
    evals = [record for record in records if record["event"] == "eval"]
    figures = ("event", "time", "step", "tokens", "bytes", "seconds", "rank")
    return {
        "steps": len(steps),
        "seconds": sum(step["seconds"] for step in steps),
        "waited": sum(step["data_wait"] for step in steps),
        "params": start["params"],
        "skipped": sum(record["event"] == "skip" for record in records),
        "heldout": {k: v for k, v in evals[-1].items() if k not in figures} if evals else {},
    }


def pictures(path: Path, size: int) -> np.ndarray:
    """The images of a Parquet file, uint8 (N, size, size, 3), as a view without chance shows them."""
    from millrace.data.decoders import image
    from millrace.data.modalities.image import ImageView

    view, random = ImageView(size=size), np.random.default_rng(0)
    return np.stack([view.make(image.decode(raw), raw, random) for raw in _raw(path, "image")])


def sounds(path: Path, rate: int, seconds: float) -> np.ndarray:
    """The sounds of a Parquet file, float32 (N, rate * seconds), as a view without chance gives them."""
    from millrace.data.decoders import audio
    from millrace.data.modalities.audio import AudioView

    view, random = AudioView(rate=rate, seconds=seconds), np.random.default_rng(0)
    return np.stack([view.make(audio.decode(raw), raw, random) for raw in _raw(path, "audio")])


def _raw(path: Path, name: str) -> list[bytes]:
    return [row[name] for row in corpora.read_rows(path)]


def sheet(rows: list[np.ndarray], path: Path, scale: int = 2) -> None:
    """A PNG of pictures uint8 (N, height, width, 3), a row of each array."""
    from PIL import Image

    whole = np.concatenate([np.concatenate(list(np.pad(row, ((0, 0), (1, 1), (1, 1), (0, 0)))), 1) for row in rows])
    made = Image.fromarray(whole)
    made.resize((made.width * scale, made.height * scale), Image.Resampling.NEAREST).save(path)
