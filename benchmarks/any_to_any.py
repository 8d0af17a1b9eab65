"""One decoder of words, pictures and sounds of digits, from nothing: what each modality is worth in each other.

    python benchmarks/any_to_any.py                  # every part; not yet timed as a whole
    python benchmarks/any_to_any.py --parts judge    # the last part again
    python benchmarks/any_to_any.py optim.lr=1e-3    # overrides of the decoder

MNIST's test part (its last 1,000 pictures held out) and the Free Spoken Digit Dataset (takes 0 to 4 held out): pictures
with words and sounds with words, never all three together. Trained are a codec of pictures, one of sounds, and the
decoder (configs/any_to_any*.toml). Sounds are few, so the decoder sees copies of each, at other speeds, places and
loudnesses; pictures are moved. Judges are classifiers of real pictures and sounds that never saw anything made; what
they know of real held-out ones is the ceiling of what they can find. Sounds are judged by their bands, without the
phases that Griffin and Lim's method finds.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import common
import corpora
import numpy as np

COPIES = {"pictures": 2, "sounds": 24}  # the first is as it was
SPEEDS = (0.85, 1.18)
TARGETS = {"image > text": 0.80, "audio > text": 0.65, "text > image": 0.85, "text > audio": 0.75,
           "audio > text > image": 0.50}  # fmt: skip
ROLES = {"pictures": "image", "sounds": "audio"}
PARTS = ("data", "codecs", "codes", "decoder", "judge")


def main() -> None:
    """Run the parts and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of the decoder")
    parser.add_argument("--dir", type=Path, default=common.ROOT / "runs" / "any_to_any", help="where all is kept")
    parser.add_argument("--name", default="decoder", help="of the decoder's run")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--guidance", type=float, nargs="+", default=[2.0, 0.0, 1.0, 4.0], help="the first counts")
    options = parser.parse_args()
    if "data" in options.parts:
        with measured(options.dir, "data"):
            write_data(options.dir)
    if "codecs" in options.parts:
        for name in ROLES:
            with measured(options.dir, f"codec of {name}"):
                train_codec(options.dir, name)
    if "codes" in options.parts:
        with measured(options.dir, "codes"):
            make_codes(options.dir)
    if "decoder" in options.parts:
        with measured(options.dir, options.name):
            train_decoder(options.dir, options.name, options.overrides)
    if "judge" in options.parts:
        report(options)


@contextmanager
def measured(folder: Path, part: str) -> Iterator[None]:
    """Keep the seconds of a part, on the clock and of processors, for the report."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "costs.json"
    began, before = time.perf_counter(), _processors()
    yield
    costs = json.loads(path.read_text()) if path.exists() else {}
    costs[part] = {"seconds": time.perf_counter() - began, "cpu_seconds": _processors() - before}
    path.write_text(json.dumps(costs, indent=1))


def _processors() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def write_data(folder: Path) -> None:
    """Both corpora, and altered copies of their training parts as Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name, corpus in (("pictures", "mnist"), ("sounds", "fsdd")):
        role, paths = ROLES[name], corpora.write(corpus, folder / corpus)
        rows, made = pq.read_table(paths["train"]).to_pylist(), []
        for number, row in enumerate(rows):
            for copy in range(COPIES[name]):
                random = np.random.default_rng([number, copy])
                made.append({"text": row["text"], role: altered(role, row[role], random) if copy else row[role]})
        np.random.default_rng(0).shuffle(made)  # type: ignore[arg-type]
        pq.write_table(pa.Table.from_pylist(made), folder / f"{name}.parquet", row_group_size=256)


def altered(role: str, raw: bytes, random: np.random.Generator) -> bytes:
    """Another picture or sound of the same word."""
    from millrace.data.decoders import audio
    from millrace.data.modalities.audio import AudioView, resample
    from millrace.data.modalities.image import ImageModality, ImageView
    from millrace.eval.media import png, wav

    if role == "image":
        view = ImageView(size=32, shift=0.07)
        return png(view.make(ImageModality().decode(raw), raw, random))
    _, rate, _ = audio.length(raw)
    sound = resample(audio.decode(raw), rate, round(rate * random.uniform(*SPEEDS)))
    made = AudioView(rate=rate, seconds=0.6, anywhere=len(sound) < 0.45 * rate, gain=6.0, noise=35.0)
    return wav(made.make(sound, raw, random), rate)


def millrace(*arguments: Any) -> None:
    """A command, as from a shell."""
    subprocess.run([sys.executable, "-m", "millrace.launch", *map(str, arguments)], check=True, cwd=common.ROOT)


def prepare(folder: Path, name: str, out: str, *more: Any) -> None:
    """Prepare one of the corpora; words are one vocabulary."""
    words = folder / "plain_pictures" / "tokenizer"
    tokenizer = ["--tokenizer", words] if words.exists() else ["--vocab-size", "300"]
    role = ROLES[name]
    millrace("prepare", f"{name}={folder / f'{name}.parquet'}", "--out", folder / out, f"--{role}", role,
             "--text", "text", *tokenizer, *more)  # fmt: skip


def train_codec(folder: Path, name: str) -> None:
    """The codec of pictures or of sounds."""
    prepare(folder, name, f"plain_{name}")
    recipe = common.ROOT / "configs" / f"any_to_any_{ROLES[name]}.toml"
    millrace("pretrain", recipe, f"data.manifest={folder / f'plain_{name}'}", f"run.dir={folder}", f"run.name={name}")


def make_codes(folder: Path) -> None:
    """Both corpora as codes."""
    for name, role in ROLES.items():
        prepare(folder, name, f"coded_{name}", "--codec", f"{role}={folder / name}")


def train_decoder(folder: Path, name: str, overrides: Sequence[str]) -> None:
    """The decoder, on as many pictures as sounds."""
    manifests = json.dumps([str(folder / f"coded_{part}") for part in ROLES])
    given = [f"data.manifest={manifests}", "data.mixture.weights={pictures = 1, sounds = 1}"]
    where = [f"run.dir={folder}", f"run.name={name}"]
    millrace("pretrain", common.ROOT / "configs" / "any_to_any.toml", *given, *where, *overrides)


def report(options: argparse.Namespace) -> None:
    """Judge the run, and write and show what was found."""
    from any_to_any_judge import judged

    with measured(options.dir, "judge"):
        found = judged(options.dir, options.dir / options.name, options.guidance)
    costs = json.loads((options.dir / "costs.json").read_text())
    parts = ["data", *(f"codec of {name}" for name in ROLES), "codes", options.name, "judge"]
    costs = {part: costs[part] for part in parts if part in costs}
    rows = [(name, f"{value:.3f}", TARGETS.get(name, "")) for name, value in found.items()]
    rows += [
        (f"seconds, {part}", f"{c['seconds']:.0f} ({c['cpu_seconds']:.0f} of a core)", "") for part, c in costs.items()
    ]
    result = {"environment": common.environment(), "overrides": options.overrides, "found": found, "costs": costs}
    common.report(
        "digits: words, pictures, sounds", ["what", "found", "target"], rows, common.save("any_to_any", result)
    )


if __name__ == "__main__":
    main()
