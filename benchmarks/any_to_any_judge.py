"""Judges of any_to_any.py: classifiers of real pictures and sounds, and what they say of what a decoder made.

B rows, H and W sizes, M mel bands.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from any_to_any import ROLES
from corpora import DIGITS
from torch import Tensor, nn
from torch.nn import functional as F

from millrace.eval.any_to_any import AnyToAny
from millrace.eval.decoding import Sampling

EACH = 20  # samples that are made of each word
_BATCH = 128


def judged(folder: Path, run: Path, guidances: Sequence[float]) -> dict[str, float]:
    """Shares that are right, by what was asked; of guided answers those of the first guidance count."""
    subject = AnyToAny.open(run)
    found: dict[str, float] = {}
    judges, heldout = {}, {}
    for name, role in ROLES.items():
        real, labels = signals(subject, role, folder / f"{name}.parquet")
        heldout[role] = pq.read_table(folder / ("mnist" if role == "image" else "fsdd") / "heldout.parquet").to_pylist()
        seen, truth = _of(subject, role, heldout[role])
        judge = judges[role] = train(real, labels)
        found[f"judge of {role}, real"] = right(judge, seen, truth)
        codes = [subject.media[role].encode(row[role]).tolist() for row in heldout[role]]
        restored = torch.stack([shown(role, subject.media[role].restore(each)) for each in codes])
        found[f"judge of {role}, restored"] = right(judge, restored, truth)
        found[f"{role}, distance of restored"] = (restored - seen).abs().mean().item()
    likeliest = Sampling(temperature=0.0)
    words = {role: _words(subject, role, heldout[role], likeliest) for role in ROLES.values()}
    for role, rows in heldout.items():
        hits = [word == row["text"] for word, row in zip(words[role], rows, strict=True)]
        found[f"{role} > text"] = sum(hits) / len(hits)
    asked = [digit for digit in DIGITS for _ in range(EACH)]
    for role in ROLES.values():
        for guidance in guidances:
            share = _made(subject, judges[role], role, asked, guidance)
            found.setdefault(f"text > {role}", share)
            found[f"text > {role}, guidance {guidance:g}"] = share
    heard = [word if word in DIGITS else "" for word in words["audio"]]
    truth = [row["text"] for row in heldout["audio"]]
    found["audio > text > image"] = _made(subject, judges["image"], "image", heard, guidances[0], truth)
    return found


def _words(subject: AnyToAny, role: str, rows: Sequence[dict[str, Any]], how: Sampling) -> list[str]:
    prompts = [{role: row[role]} for row in rows]
    return [
        str(word).strip()
        for first in range(0, len(prompts), _BATCH)
        for word in subject.generate(prompts[first : first + _BATCH], "text", how)
    ]


def _made(
    subject: AnyToAny, judge: nn.Module, role: str, words: Sequence[str], guidance: float, truth: Sequence[str] = ()
) -> float:
    """Share of what is made of words that the judge takes for the truth, which is the words unless it is given."""
    codes: list[list[int]] = []
    for first in range(0, len(words), _BATCH):
        prompts = [{"text": word} for word in words[first : first + _BATCH]]
        codes += subject.write(prompts, role, Sampling(guidance=guidance, seed=first))
    made = torch.stack([shown(role, subject.media[role].restore(each)) for each in codes])
    return right(judge, made, torch.tensor([DIGITS.index(word) for word in truth or words]))


def signals(subject: AnyToAny, role: str, path: Path) -> tuple[Tensor, Tensor]:
    """What judges see of real samples (B, 1, H, W), and the digits (B,)."""
    return _of(subject, role, pq.read_table(path).to_pylist())


def _of(subject: AnyToAny, role: str, rows: Sequence[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    medium = subject.media[role]
    given = torch.stack([medium.given(row[role]) for row in rows])
    if role == "audio":
        given = torch.cat([medium.codec.mel(part) for part in given.split(500)])
    return torch.stack([shown(role, each) for each in given]), torch.tensor([DIGITS.index(row["text"]) for row in rows])


def shown(role: str, signal: Tensor) -> Tensor:
    """A picture uint8 (H, W, 3) or bands (M, H) as one channel (1, H, W) of about -1 to 1."""
    return (signal.float().mean(-1) / 127.5 - 1)[None] if role == "image" else (signal / 2 + 1)[None]


def train(x: Tensor, labels: Tensor, steps: int = 400) -> nn.Module:
    """A classifier of 32 x 32 places, as in the probe of this design."""
    torch.manual_seed(0)
    judge = nn.Sequential(
        nn.Conv2d(1, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32),
        nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.LazyLinear(128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip
    judge(x[:2])
    optimiser = torch.optim.AdamW(judge.parameters(), 2e-3)
    for _ in range(steps):
        chosen = torch.randint(0, len(x), (128,))
        F.cross_entropy(judge(x[chosen]), labels[chosen]).backward()
        optimiser.step()
        optimiser.zero_grad()
    return judge.eval()


@torch.no_grad()
def right(judge: nn.Module, x: Tensor, labels: Tensor) -> float:
    """Share of the samples whose digit the judge finds."""
    return float((judge(x).argmax(1) == labels).float().mean())
