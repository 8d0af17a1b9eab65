"""Digits made from words by a generator against an adversary, judged by a classifier of real digits.

    python benchmarks/gan_digits.py [--seeds 0] [section.key=value …]

The last 1,000 training digits and 1,000 that are made from their words are judged against the 1,000 that are held out:
how many are of the class of their word, the least and most common class, and Fréchet's distance in the features of the
classifier (judges.py), which has seen the other 8,000 only. Writes a sheet of pictures, a row for each word, and one of
real digits at the top.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import common
import corpora
import judges
import numpy as np
import recipe_runs
import torch

from millrace.data.tokenizer import load_tokenizer
from millrace.engine.trained import Trained
from millrace.models.conditioning import seen_tokens

_SIZE, _COUNT, _SHOWN = 32, 1000, 24
_EPOCHS = 4


def main() -> None:
    options = recipe_runs.parser(__doc__, "gan_digits").parse_intermixed_args()
    result: dict[str, Any] = {"environment": common.environment(), "overrides": options.overrides}
    data = recipe_runs.manifests("mnist", options.dir, image="image", text="text")
    real = {part: _real(options.dir / "parquet" / f"{part}.parquet") for part in ("train", "heldout")}
    judge = judges.kept(options.dir / "judge.pt", *(part[:-_COUNT] for part in real["train"]), _EPOCHS)
    held = judges.by_batches(judge.pooled, real["heldout"][0])
    other, aims = (part[-_COUNT:] for part in real["train"])
    found = {"real": _judged(judge, held, other, aims)}
    found["noise"] = _judged(judge, held, torch.rand_like(other) * 2 - 1, aims)
    shown = [_pixels(real["heldout"][0][:_SHOWN])]
    for seed in options.seeds:
        run = options.dir / f"seed-{seed}"
        done = recipe_runs.train("gan_mnist", run, seed, data, options.overrides)
        made = make(run, aims)
        row = done | _judged(judge, held, made, aims)
        row["times real"] = row["frechet"] / found["real"]["frechet"]
        found[f"seed {seed}"] = row
        shown += [_pixels(made[aims == digit][:_SHOWN]) for digit in range(10)] if seed == options.seeds[0] else []
    recipe_runs.sheet(shown, options.dir / "sheet.png")
    path = common.save("gan_digits", result | {"arms": found})
    titles = ("accuracy", "least", "most", "frechet", "times real", "seconds")
    rows = [(name, *(f"{row[t]:.4g}" if t in row else "" for t in titles)) for name, row in found.items()]
    common.report("1,000 digits, judged", ["", *titles], rows, path)


def _real(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.tensor([row["label"] for row in corpora.read_rows(path)])
    images = torch.from_numpy(recipe_runs.pictures(path, _SIZE))
    return images.movedim(-1, 1).float() / 127.5 - 1, labels


@torch.inference_mode()
def make(run: Path, aims_N: torch.Tensor) -> torch.Tensor:
    """Pictures float32 (N, 3, size, size) of the words of digits."""
    trained = Trained.open(run)
    model: Any = trained.load()
    tokenizer = load_tokenizer(trained.checkpoint.path / "tokenizer")
    words = [torch.from_numpy(ids).long() for ids in tokenizer.encode(corpora.DIGITS)]
    tokens_BT = torch.nn.utils.rnn.pad_sequence([words[digit] for digit in aims_N.tolist()], batch_first=True)
    lengths_B = torch.tensor([len(words[digit]) for digit in aims_N.tolist()])
    noise_BN = torch.randn(len(aims_N), model.config.noise, generator=torch.Generator().manual_seed(0))
    return judges.by_batches(model, noise_BN, tokens_BT, seen_tokens(tokens_BT, lengths_B))


def _judged(judge: judges.Judge, held_ND: torch.Tensor, made: torch.Tensor, aims: torch.Tensor) -> dict[str, float]:
    """Rounded to whole pixel values before, as real ones are."""
    made = ((made.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
    taken = judges.by_batches(judge, made).argmax(1)
    counts = torch.bincount(taken, minlength=10).tolist()
    return {
        "accuracy": judges.accuracy(judge, made, aims),
        "least": min(counts),
        "most": max(counts),
        "frechet": judges.frechet(held_ND, judges.by_batches(judge.pooled, made)),
    }


def _pixels(made: torch.Tensor) -> np.ndarray:
    return ((made.clamp(-1, 1) + 1) * 127.5).round().byte().movedim(1, -1).numpy()


if __name__ == "__main__":
    main()
