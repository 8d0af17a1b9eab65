"""Codecs of spoken digits and of everyday sounds, beside the mean spectrogram.

    python benchmarks/codec_sounds.py [fsdd] [esc10] [--seeds 0] [section.key=value …]

Of held-out sounds: the mean absolute error of log10 energies in mel bands, beside that of the training part's mean
spectrogram (of each band at each time, and of each band over all times; the better counts). Of spoken digits also how
many a classifier of real training spectrograms (judges.py) recognises, before and after. Waveforms are judged by the
same bands, and written as WAV files, originals beside restored.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import common
import corpora
import judges
import recipe_runs
import torch

from millrace.engine.trained import Trained
from millrace.models.config import MelConfig
from millrace.models.sound import LogMel

_SECONDS = {"fsdd": 0.64, "esc10": 5.0}
_RATES = {"fsdd": 8000, "esc10": 16000}
_BANDS = {
    "fsdd": MelConfig(rate=8000, window=256, hop=80, bands=40),
    "esc10": MelConfig(rate=16000, window=512, hop=160, bands=64),
}
_EPOCHS = 150


def main() -> None:
    options = recipe_runs.parser(__doc__, "codec_sounds").parse_intermixed_args()
    named = [text for text in options.overrides if text in _RATES] or list(_RATES)
    overrides = [text for text in options.overrides if text not in _RATES]
    result: dict[str, Any] = {"environment": common.environment(), "overrides": overrides, "arms": {}}
    for corpus in named:
        result["arms"] |= _measure(corpus, options, overrides)
    path = common.save("codec_sounds", result)
    titles = ("error", "share", "accuracy", "kept", "live", "bits_per_second", "seconds")
    rows = [(name, *(f"{row[t]:.4g}" if t in row else "" for t in titles)) for name, row in result["arms"].items()]
    common.report("Held-out sounds, bands restored", ["", *titles], rows, path)


def _measure(corpus: str, options: Any, overrides: list[str]) -> dict[str, dict[str, Any]]:
    folder = options.dir / corpus
    data = recipe_runs.manifests(corpus, folder, audio="audio", text="text")
    given = {part: _sounds(folder / "parquet" / f"{part}.parquet", corpus) for part in ("train", "heldout")}
    bands = {part: LogMel(_BANDS[corpus])(sounds) for part, (sounds, _) in given.items()}
    real, labels = bands["heldout"], given["heldout"][1]
    means = [bands["train"].mean(0, keepdim=True), bands["train"].mean((0, 2), keepdim=True)]
    mean = min(float((real - each).abs().mean()) for each in means)
    found: dict[str, dict[str, Any]] = {f"{corpus}, mean spectrogram": {"error": mean, "share": 1.0}}
    judge = None
    if corpus == "fsdd":
        judge = judges.kept(folder / "judge.pt", _picture(bands["train"]), given["train"][1], _EPOCHS)
        found[f"{corpus}, originals"] = {"error": 0.0, "accuracy": judges.accuracy(judge, _picture(real), labels)}
    for seed in options.seeds:
        run = folder / f"seed-{seed}"
        done = recipe_runs.train(f"codec_{corpus}", run, seed, data, overrides)
        made, codes = _restored(run, given["heldout"][0], corpus)
        error = float((made - real).abs().mean())
        row = done | codes | {"error": error, "share": error / mean}
        if judge is not None:
            row["accuracy"] = judges.accuracy(judge, _picture(made), labels)
            row["kept"] = row["accuracy"] / found[f"{corpus}, originals"]["accuracy"]
        found[f"{corpus}, seed {seed}"] = row
    return found


def _sounds(path: Path, corpus: str) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.tensor([row["label"] for row in corpora.read_rows(path)])
    return torch.from_numpy(recipe_runs.sounds(path, _RATES[corpus], _SECONDS[corpus])), labels


def _picture(bands_BMH: torch.Tensor) -> torch.Tensor:
    return bands_BMH[:, None] / 2 + 1


@torch.inference_mode()
def _restored(run: Path, sounds_BF: torch.Tensor, corpus: str) -> tuple[torch.Tensor, dict[str, float]]:
    """(bands as the judge sees them, figures of the codes)."""
    codec: Any = Trained.open(run).load()
    codes = torch.cat([codec.encode(part) for part in sounds_BF.split(16)])
    made = torch.cat([codec.decode(part) for part in codes.split(16)])
    shares = torch.bincount(codes.flatten(), minlength=codec.codes) / codes.numel()
    bits = codes[0].numel() * torch.tensor(float(codec.codes)).log2() / _SECONDS[corpus]
    figures = {"live": float((shares > 0).float().mean()), "bits_per_second": float(bits)}
    if codec.mel is not None:
        assert codec.mel.config == _BANDS[corpus], "the judge's bands are the codec's"
        return made[..., : codec.mel.config.hops(sounds_BF.shape[1])], figures
    _write(run, sounds_BF, made)
    return LogMel(_BANDS[corpus])(made[:, : sounds_BF.shape[1]]), figures


def _write(run: Path, sounds_BF: torch.Tensor, made_BF: torch.Tensor, count: int = 8) -> None:
    import soundfile

    rate = 8000 if sounds_BF.shape[1] < 16000 else 16000
    for number, pair in enumerate(zip(sounds_BF[:count], made_BF[:count], strict=True)):
        for name, sound in zip(("original", "restored"), pair, strict=True):
            soundfile.write(run / f"{number}-{name}.wav", sound.numpy(), rate)


if __name__ == "__main__":
    main()
