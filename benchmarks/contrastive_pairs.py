"""Contrastive towers on small pairs: how often a held-out emoji finds its name, or a word its picture and its sound.

    python benchmarks/contrastive_pairs.py [emoji] [mandarin] [--seeds 0 1 2] [section.key=value …]

Recall at k among 100 held-out samples (or all, where there are fewer), both ways, beside the chance of a guess and
nearest neighbours: a held-out picture (or sound) gets the words of the five training pictures (mel bands) nearest to
it, and is compared with names by TF-IDF, of words or of Mandarin characters. A training emoji has two rows, its English
name and its English keywords; held out are names alone. Captions stand behind "emoji: ", as CLIP's behind "a photo of",
so that a word is the same tokens wherever it stands. Mandarin words are held out as words; of several pictures of a
held-out word the first is asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import common
import corpora
import recipe_runs
import torch

from millrace.eval.retrieval import recall, retrieval
from millrace.models.config import MelConfig
from millrace.models.sound import LogMel

_PROMPT = "emoji: "
_KS = (1, 5, 10)
_NEIGHBOURS = 5
_ROLES = {"emoji": {"image": "image", "text": "text"}, "mandarin": {"image": "image", "audio": "audio", "text": "text"}}


def main() -> None:
    parser = recipe_runs.parser(__doc__, "contrastive_pairs")
    options = parser.parse_intermixed_args()
    named = [text for text in options.overrides if text in _ROLES] or list(_ROLES)
    overrides = [text for text in options.overrides if text not in _ROLES]
    result: dict[str, Any] = {"environment": common.environment(), "overrides": overrides, "runs": {}, "neighbours": {}}
    rows = []
    for corpus in named:
        data = _data(corpus, options.dir / corpus)
        for seed in options.seeds:
            run = options.dir / corpus / f"seed-{seed}"
            found = recipe_runs.train(f"contrastive_{corpus}", run, seed, data, overrides)
            found |= retrieval(run, str(data["data.heldout"]), _KS)
            result["runs"][f"{corpus} {seed}"] = found
            rows += [(f"{corpus}, seed {seed}", way, *_shown(shares)) for way, shares in found["recall"].items()]
        result["neighbours"][corpus] = neighbours(options.dir / corpus / "parquet", found["among"])
        ways = result["neighbours"][corpus].items()
        rows += [(f"{corpus}, nearest neighbours", way, *_shown(shares)) for way, shares in ways]
        rows.append((corpus, "chance", *(f"{k / found['among']:.3f}" for k in _KS)))
    path = common.save("contrastive_pairs", result)
    common.report("Recall among held-out samples", ["", "", *(f"at {k}" for k in _KS)], rows, path)


def _shown(shares: dict[str, float]) -> list[str]:
    return [f"{share:.3f}" for share in shares.values()]


def neighbours(folder: Path, among: int) -> dict[str, dict[str, float]]:
    """Recall of the baseline, as `retrieval` gives it."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    paths = {part: folder / f"captioned-{part}.parquet" for part in ("train", "heldout")}
    rows = {part: corpora.read_rows(path) for part, path in paths.items()}
    mandarin = "audio" in rows["train"][0]
    words = TfidfVectorizer(analyzer="char" if mandarin else "word").fit([row["text"] for row in rows["train"]])
    told, names = (
        torch.from_numpy(words.transform([row["text"] for row in rows[p]]).toarray()) for p in ("train", "heldout")
    )
    found = {}
    for medium, look in {"image": _pixels, "audio": _bands}.items():
        if medium not in rows["train"][0]:
            continue
        train, held = (look(paths[part]) for part in ("train", "heldout"))
        nearest = torch.cdist(held, train).topk(_NEIGHBOURS, largest=False).indices
        guessed = told[nearest].mean(1)
        pairs = {f"{medium} to tokens": (guessed, names), f"tokens to {medium}": (names, guessed)}
        found |= {way: {str(k): recall(a, b, k, among) for k in _KS} for way, (a, b) in pairs.items()}
    return found


def _pixels(path: Path) -> torch.Tensor:
    return torch.from_numpy(recipe_runs.pictures(path, 16)).float().flatten(1)


def _bands(path: Path) -> torch.Tensor:
    mel = LogMel(MelConfig(rate=22050, window=512, hop=1764, bands=40))
    return mel(torch.from_numpy(recipe_runs.sounds(path, 22050, 1.28))).flatten(1)


def _data(corpus: str, folder: Path) -> dict[str, Any]:
    paths = corpora.write(corpus, folder / "parquet")
    written = {part: folder / "parquet" / f"captioned-{part}.parquet" for part in paths}
    for part, path in paths.items():
        if not written[part].is_file():
            rows = (_emoji if corpus == "emoji" else _words)(path, held=part == "heldout")
            corpora.write_rows(rows, written[part])
    return recipe_runs.prepared(written, folder, 1024, **_ROLES[corpus])


def _emoji(path: Path, *, held: bool) -> list[dict[str, Any]]:
    names, words = (["text"], []) if held else (["text", "keywords"], [])
    for row in corpora.read_rows(path):
        words += [{"image": row["image"], "text": _PROMPT + row[name].lower()} for name in names]
    return words


def _words(path: Path, *, held: bool) -> list[dict[str, Any]]:
    rows = corpora.read_rows(path)
    kept = {row["text"]: row for row in reversed(rows)}.values() if held else rows
    return [{name: row[name] for name in ("image", "audio", "text")} for row in kept]


if __name__ == "__main__":
    main()
