"""A codec of emoji, with and without an adversary, beside the mean image and JPEG and WebP of the same size.

    python benchmarks/codec_images.py [--seeds 0] [--arms plain adversary longer] [section.key=value …]

Every arm is the recipe configs/codec_emoji.toml: `plain` without its adversary, `adversary` as it stands, `longer` for
three times as many steps. Judged on held-out emoji by a classifier that predicts their English keywords and has seen
training emoji only, no codec (judges.py): the distance of its features between original and reconstruction (LPIPS's
formula), and how much of the original's scores is left. A code is live if any held-out emoji uses it. JPEG and WebP
are given the codec's bytes and as much more as their headers take; the best of several sizes is shown, scaled back.
Writes a sheet of pictures: originals, then each arm, then WebP and JPEG.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from pathlib import Path
from typing import Any

import common
import corpora
import judges
import numpy as np
import recipe_runs
import torch

from millrace.engine.trained import Trained

_SIZE = 32
_LEAST = 10  # training emoji of a keyword that is judged by
_EPOCHS = 12
_SHOWN = 24
ARMS = {"plain": {"objective.adversary.weight": 0.0}, "adversary": {}, "longer": {}}


def main() -> None:
    parser = recipe_runs.parser(__doc__, "codec_images")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    options = parser.parse_intermixed_args()
    result: dict[str, Any] = {"environment": common.environment(), "overrides": options.overrides, "arms": {}}
    data = recipe_runs.manifests("emoji", options.dir, image="image", text="text")
    parts = {part: recipe_runs.pictures(options.dir / "parquet" / f"{part}.parquet", _SIZE) for part in _PARTS}
    real = parts["heldout"]
    judge = _judge(options.dir, parts["train"])
    found: dict[str, Any] = {}
    shown = [real[:_SHOWN]]
    for seed in options.seeds:
        for arm in options.arms:
            run = options.dir / f"{arm}-{seed}"
            done = _train(arm, run, seed, data, options.overrides)
            made, codes, bits = _restored(run, real)
            found[f"{arm}, seed {seed}"] = done | codes | _distances(judge, real, made) | {"bytes": bits / 8}
            shown += [made[:_SHOWN]] if seed == options.seeds[0] else []
            size = bits / 8
    found["mean image"] = _distances(judge, real, np.broadcast_to(parts["train"].mean(0).round(), real.shape))
    for kind in ("WEBP", "JPEG"):
        made, taken = same_size(real, kind, size)
        found[kind] = _distances(judge, real, made) | {"bytes": taken}
        shown.append(made[:_SHOWN])
    result["arms"] = found
    path = common.save("codec_images", result)
    recipe_runs.sheet(shown, options.dir / "sheet.png")
    titles = ("feature", "absolute", "psnr", "live", "bytes", "seconds")
    rows = [(name, *(f"{row[t]:.4g}" if t in row else "" for t in titles)) for name, row in found.items()]
    common.report("Held-out emoji, originals against reconstructions", ["", *titles], rows, path)


_PARTS = ("train", "heldout")


def _judge(folder: Path, real: np.ndarray) -> judges.Judge:
    rows = corpora.read_rows(folder / "parquet" / "train.parquet")
    count = Counter(word for row in rows for word in row["keywords"].split(", "))
    words = [word for word, number in count.items() if number >= _LEAST]
    aims = torch.tensor([[word in row["keywords"].split(", ") for word in words] for row in rows]).float()
    return judges.kept(folder / "judge.pt", _tensor(real), aims, _EPOCHS)


def _tensor(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(images)).movedim(-1, 1).float() / 127.5 - 1


def _train(arm: str, run: Path, seed: int, data: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    more = dict(ARMS[arm])
    given = data | more
    if arm == "longer":
        given |= {"train.duration": _longer(overrides)}
    kept = [text for text in overrides if arm != "longer" or not text.startswith("train.duration")]
    return recipe_runs.train("codec_emoji", run, seed, given, kept)


def _longer(overrides: list[str]) -> str:
    """Three times the steps of the recipe, or of an override of it."""
    import tomllib

    named = [text.partition("=")[2] for text in overrides if text.startswith("train.duration=")]
    recipe = tomllib.loads((common.ROOT / "configs" / "codec_emoji.toml").read_text())
    count, unit = (named[-1] if named else recipe["train"]["duration"]).split()
    return f"{3 * int(count)} {unit}"


@torch.inference_mode()
def _restored(run: Path, real: np.ndarray) -> tuple[np.ndarray, dict[str, float], float]:
    """(reconstructions, figures of the codes, bits of a picture)."""
    codec: Any = Trained.open(run).load()
    codes = codec.encode(torch.from_numpy(real))
    made = codec.decode(codes).numpy()
    shares = torch.bincount(codes.flatten(), minlength=codec.codes) / codes.numel()
    live = float((shares > 0).float().mean())
    perplexity = float(torch.special.entr(shares).sum().exp())
    return made, {"live": live, "perplexity": perplexity}, codes[0].numel() * math.log2(codec.codes)


def _distances(judge: judges.Judge, real: np.ndarray, made: np.ndarray) -> dict[str, float]:
    a, b = _tensor(real), _tensor(made)
    square = float((a - b).square().mean())
    feature = float(judges.perceptual(judge, a, b).mean())
    return {"feature": feature, "absolute": float((a - b).abs().mean()), "psnr": 10 * math.log10(4 / square)}


def same_size(images: np.ndarray, kind: str, size: float) -> tuple[np.ndarray, float]:
    """(pictures after JPEG or WebP, their mean bytes without headers), of at most `size` bytes where that is possible.

    For each picture the sides and the quality are taken with the least squared difference; where none is small enough,
    the smallest file, which is larger than the codec's.
    """
    empty = len(_encoded(np.full((8, 8, 3), 128, np.uint8), kind, 1))
    restored, taken = [], []
    for image in images:
        best: tuple[bool, float, float, np.ndarray] | None = None
        for side in (4, 6, 8, 12, 16, 24, 32):
            small = _resized(image, side)
            for quality in (1, 5, 10, 20, 35, 50, 75, 95):
                raw = _encoded(small, kind, quality)
                cost = max(0, len(raw) - empty)
                if best is not None and cost > size:
                    break
                made = _resized(_decoded(raw), image.shape[0])
                apart = float(np.square(made.astype(float) - image).mean())
                here = (cost > size, cost if cost > size else apart, cost, made)
                best = here if best is None or here[:2] < best[:2] else best
        assert best is not None
        taken.append(best[2])
        restored.append(best[3])
    return np.stack(restored), float(np.mean(taken))


def _resized(image: np.ndarray, side: int) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC))


def _encoded(image: np.ndarray, kind: str, quality: int) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    more = {"method": 6} if kind == "WEBP" else {"optimize": True}
    Image.fromarray(image).save(out, kind, quality=quality, **more)
    return out.getvalue()


def _decoded(raw: bytes) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(raw)).convert("RGB"))


if __name__ == "__main__":
    main()
