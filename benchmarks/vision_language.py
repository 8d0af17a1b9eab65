"""A small model that says what emoji are called: how often the right name of a held-out picture is the likeliest of 50.

    python benchmarks/vision_language.py [--seeds 0] [section.key=value …]

Each seed trains configs/vision_language.toml on pictures with words, and beside it the same decoder on the words alone.
A training emoji has 8 pictures of several sizes (crops, mirrored, altered), one half with its name, the other with its
keywords. Held-out emoji are shown as they are, and asked for by name among 49 other held-out names. A name is judged by
its likelihood after the picture, and by how much likelier it is than after the other pictures. The chance of a guess is
0.02. About 8 minutes a seed on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import common
import corpora
import numpy as np

from millrace.core.console import say
from millrace.core.ledger import read
from millrace.data.prepare import PrepareConfig, prepare
from millrace.eval.media import png
from millrace.launch.train import pretrain

_PATCH, _COPIES, _AMONG, _SIZES = 18, 8, 50, (48, 60, 72)
_PROMPT = "emoji:"  # so that a word is the same tokens wherever it stands
_TEXT_ALONE = ["objective.kind=causal_lm", "train.duration=30 s", "eval.every=10 s"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="passed on to the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--dir", type=Path, default=common.ROOT / "runs" / "vision_language", help="of data and runs")
    options = parser.parse_intermixed_args()
    common.warn_if_busy()
    result: dict[str, Any] = {"environment": common.environment(), "overrides": options.overrides, "seeds": {}}
    seeing, words = (_data(options.dir, pictures=pictures) for pictures in (True, False))
    rows = []
    for seed in options.seeds:
        runs = [
            _train(options.dir / f"{name}-{seed}", seed, data, [*kind, *options.overrides])
            for name, data, kind in (("seeing", seeing, []), ("words", words, _TEXT_ALONE))
        ]
        found = judge(*(options.dir / f"{name}-{seed}" for name in ("seeing", "words")), options.dir, seed)
        result["seeds"][seed] = {"seeing": runs[0], "words": runs[1], **found}
        rows += [(f"seed {seed}", what, f"{share:.3f}") for what, share in found["right"].items()]
    rows.append(("", "chance", f"{1 / _AMONG:.3f}"))
    common.report(
        f"Right name among {_AMONG}", ["", "judged by", "share"], rows, common.save("vision_language", result)
    )


def _data(folder: Path, *, pictures: bool) -> dict[str, Any]:
    """Overrides that name manifests of pictures with words, or of the words alone; one tokenizer for both."""
    parts = {}
    for part, path in corpora.write("emoji", folder / "parquet").items():
        written = folder / "parquet" / f"told-{part}.parquet"
        if not written.is_file():
            say(f"writing {written} …")
            _write(path, written, copies=_COPIES if part == "train" else 0)
        name = f"{'manifest' if pictures else 'words'}-{part}"
        given: dict[str, Any] = {"text": "text", "inputs": [str(written)], "out": str(folder / name)}
        given |= {"image": "image", "costs": {"image": {"patch": _PATCH}}} if pictures else {}
        tokenizer = folder / "manifest-train" / "tokenizer"
        given |= {"vocab_size": 1024} if name == "manifest-train" else {"tokenizer": str(tokenizer)}
        prepare(PrepareConfig(**given))
        parts[part] = folder / name
    return {"data.manifest": parts["train"], "data.heldout": parts["heldout"]}


def _write(source: Path, out: Path, copies: int) -> None:
    """Rows of a picture and words: as they are with the name, or so many of each emoji, altered."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from millrace.data.decoders import image
    from millrace.data.modalities.image import ImageView

    random, made = np.random.default_rng(0), []
    keywords = _keywords()
    for row in pq.read_table(source).to_pylist():
        if not copies:
            made.append({"image": row["image"], "text": f"{_PROMPT} {row['text']}"})
        for copy in range(copies):
            view = ImageView(size=int(random.choice(_SIZES)), scale=[0.6, 1.0], flip=True, shift=0.1, strength=0.4)
            pixels = view.make(image.decode(row["image"]), row["image"], random)
            words = row["text"]
            if copy % 2:
                words = ", ".join(random.permutation(keywords[row["text"]])[:4].tolist()) or words
            narrow = int(random.choice([0, 0, 6, 12]))  # some are higher than they are wide
            made.append({"image": png(pixels[:, narrow:]), "text": f"{_PROMPT} {words}"})
    order = random.permutation(len(made))
    pq.write_table(pa.Table.from_pylist([made[number] for number in order]), out, row_group_size=256)


def _keywords() -> dict[str, list[str]]:
    with (corpora.SOURCE / "image_emoji" / "captions.jsonl").open(encoding="utf-8") as lines:
        return {line["names"]["en"]: line["keywords_en"] for line in map(json.loads, lines)}


def _train(run: Path, seed: int, data: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """A run from the start, and how it went."""
    shutil.rmtree(run, ignore_errors=True)
    given = {**data, "run.dir": run.parent, "run.name": run.name, "run.seed": seed}
    recipe = str(common.ROOT / "configs" / "vision_language.toml")
    if code := pretrain([recipe, *(f"{key}={value}" for key, value in given.items()), *overrides]):
        raise SystemExit(f"{run} ended with exit code {code}")
    records = read(run / "ledger.jsonl")
    steps = [record for record in records if record["event"] == "step"]
    start = next(record for record in records if record["event"] == "start")
    evals = [{"step": r["step"], "bits_per_byte": r["bpb"]} for r in records if r["event"] == "eval"]
    seconds = sum(step["seconds"] for step in steps)
    waited = sum(step["data_wait"] for step in steps)
    return {"params": start["params"], "steps": len(steps), "seconds": seconds, "waited": waited, "evals": evals}


def judge(seeing: Path, words: Path, folder: Path, seed: int) -> dict[str, Any]:
    """Shares of held-out pictures whose name is the likeliest of its 50, and what the model says of a few."""
    import pyarrow.parquet as pq

    from millrace.data.decoders import image
    from millrace.eval.subject import open_subject
    from millrace.eval.vision_language import describe, text_nll

    rows = pq.read_table(folder / "parquet" / "told-heldout.parquet").to_pylist()
    pictures, names = [image.decode(row["image"]) for row in rows], [row["text"] for row in rows]
    subject, blind = open_subject(seeing), open_subject(words)
    say(f"judging {len(rows)} held-out pictures …")
    nll = np.array([text_nll(subject.model, subject.tokenizer, picture, names) for picture in pictures])
    told = describe(subject, pictures[:12], [_PROMPT] * 12, tokens=12, temperature=0)
    prior = np.array(text_nll(blind.model, blind.tokenizer, None, names))
    # Of a name: the mean probability after all held-out pictures, which is its share without a picture.
    usual = -np.logaddexp.reduce(-nll, axis=0)
    scores = {"likelihood": nll, "what the picture adds": nll - usual, "words alone": np.tile(prior, (len(rows), 1))}
    bits = {"seeing": float(nll.diagonal().mean()), "words": float(prior.mean())}
    right = {name: right_of(score, seed) for name, score in scores.items()}
    return {"right": right, "nats_of_a_name": bits, "pictures": len(rows), "said": dict(zip(names, told, strict=False))}


def right_of(nll: np.ndarray, seed: int) -> float:
    """Of a matrix (pictures, names), the own name on the diagonal: the share of rows where it is the least of 50."""
    random, right = np.random.default_rng(seed), 0.0
    for number, row in enumerate(nll):
        others = random.permutation(np.delete(np.arange(len(row)), number))[: _AMONG - 1]
        right += bool((row[number] < row[others]).all())
    return right / len(nll)


if __name__ == "__main__":
    main()
