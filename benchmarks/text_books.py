"""Ten minutes of real training on books: held-out bits per byte, beside xz and zstd on the same text.

    python benchmarks/text_books.py [BOOKS] [--seeds 0 1 2] [--minutes 10] [optim.lr=3e-3 …]

BOOKS is a folder of .txt files. They are cut into chapter-sized blocks, every twentieth is held out. Each seed is a run
of configs/text_books.toml (overrides are passed on). A primed compressor has seen the training text: its figure is the
size of training and held-out text compressed together minus that of the training text alone. About 40 minutes on 2
cores.
"""

from __future__ import annotations

import argparse
import lzma
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import books_corpus
import common

from millrace.core.console import say
from millrace.core.ledger import read
from millrace.data.prepare import PrepareConfig, prepare
from millrace.launch.train import pretrain

_VOCABULARY = 4096
_SHOWN_MINUTES = 2.0  # between points of the printed curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rest", nargs="*", metavar="BOOKS | section.key=value")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--vocab-size", type=int, default=_VOCABULARY)
    parser.add_argument("--dir", type=Path, default=common.ROOT / "runs" / "text_books", help="where runs are kept")
    parser.add_argument("--no-compressors", action="store_true", help="only train")
    options = parser.parse_intermixed_args()
    overrides = [text for text in options.rest if "=" in text]
    folders = [text for text in options.rest if "=" not in text]
    books = Path(folders[0]) if folders else common.ROOT.parent / "shared" / "data" / "text_books_en"
    common.warn_if_busy()
    environment = common.environment()
    paths = books_corpus.write_corpus(books, options.dir / "text")
    data = prepare_books(paths, options.dir, options.vocab_size)
    runs = {seed: _train(seed, data, options, overrides) for seed in options.seeds}
    sizes = (
        {}
        if options.no_compressors
        else compressors(*(books_corpus.read_texts(paths[p]) for p in ("train", "heldout")))
    )
    _report(runs, sizes, {"environment": environment, "overrides": overrides, "minutes": options.minutes})


def prepare_books(paths: dict[str, Path], folder: Path, vocabulary: int) -> dict[str, Any]:
    """Overrides that name the two manifests; the tokenizer has seen the training text only."""
    train, heldout = (folder / f"{part}-{vocabulary}" for part in ("train", "heldout"))
    made = PrepareConfig(inputs=[str(paths["train"])], out=str(train), vocab_size=vocabulary, tokenize=True)
    prepare(made)
    bpe = str(train / "tokenizer")
    prepare(PrepareConfig(inputs=[str(paths["heldout"])], out=str(heldout), tokenizer=bpe, tokenize=True))
    return {"data.manifest": train, "data.heldout": heldout}


def _train(seed: int, data: dict[str, Any], options: argparse.Namespace, overrides: list[str]) -> dict[str, Any]:
    """One run from the start: its curve of (minutes, tokens, bits per byte) and its speed."""
    name = f"seed-{seed}"
    shutil.rmtree(options.dir / name, ignore_errors=True)
    given = {
        **data, "run.dir": options.dir, "run.name": name, "run.seed": seed,
        "train.duration": f"{round(options.minutes * 60)} s", "eval.every": f"{round(_SHOWN_MINUTES * 60)} s",
    }  # fmt: skip
    recipe = str(common.ROOT / "configs" / "text_books.toml")
    code = pretrain([recipe, *(f"{key}={value}" for key, value in given.items()), *overrides])
    if code:
        raise SystemExit(f"the run of seed {seed} ended with exit code {code}; see {options.dir / name}")
    return _summary(read(options.dir / name / "ledger.jsonl"))


def _summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    start = next(r for r in records if r["event"] == "start")
    seconds, tokens, curve = 0.0, 0, []
    for record in records:
        if record["event"] == "step":
            seconds, tokens = seconds + record["seconds"], record["tokens_total"]
        elif record["event"] == "eval":
            curve.append({"minutes": seconds / 60, "tokens": tokens, "bits_per_byte": record["bpb"]})
    rate = tokens / seconds
    steps = sum(r["event"] == "step" for r in records)
    return {
        "bits_per_byte": curve[-1]["bits_per_byte"],
        "curve": curve,
        "steps": steps,
        "tokens": tokens,
        "tokens_per_s": rate,
        "mfu": rate * start["flops_per_token"] / start["peak_flops"],
        "params": start["params"],
        "world": start["world"],
        "zero_stage": start["zero_stage"],
        "heldout_bytes_per_evaluation": next(r["bytes"] for r in reversed(records) if r["event"] == "eval"),
    }


def compressors(train: bytes, heldout: bytes) -> dict[str, float]:
    """Bits per byte of `heldout` by compressor, alone and primed with `train`."""
    found = {}
    window = len(train) + len(heldout)
    for name, compress in (("xz -9e", _xz(window)), ("zstd -19 --long", _zstd(window))):
        say(f"compressing with {name} …")
        found[f"{name}, alone"] = 8 * compress(heldout) / len(heldout)
        found[f"{name}, primed"] = 8 * (compress(train + heldout) - compress(train)) / len(heldout)
    return found


def _xz(window: int) -> Callable[[bytes], int]:
    """-9e's settings with a dictionary that holds everything, as -9e's 64 MiB does up to that size."""
    spec = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": max(window, 2**26)}
    return lambda data: len(lzma.compress(data, format=lzma.FORMAT_XZ, filters=[spec]))


def _zstd(window: int) -> Callable[[bytes], int]:
    import zstandard

    log = max(27, window.bit_length())  # --long=27, or as much as holds everything
    settings = zstandard.ZstdCompressionParameters.from_level(19, window_log=log, enable_ldm=True)
    return lambda data: len(zstandard.ZstdCompressor(compression_params=settings).compress(data))


def _report(runs: dict[int, dict[str, Any]], sizes: dict[str, float], result: dict[str, Any]) -> None:
    scores = [run["bits_per_byte"] for run in runs.values()]
    result |= {"runs": runs, "compressors": sizes, "bits_per_byte_mean": statistics.mean(scores)}
    path = common.save("text_books", result)
    curves = [run["curve"] for run in runs.values()]
    rows = []
    for points in zip(*curves, strict=False):
        values = [f"{point['bits_per_byte']:.3f}" for point in points]
        rows.append((f"{statistics.mean(p['minutes'] for p in points):.1f}", *values))
    titles = [f"seed {seed}" for seed in runs]
    common.show_table("Held-out bits per byte in training", ["minutes", *titles], rows)
    # Runs of equal length in time need not have as many evaluations: the last row of each is given here.
    table = [
        (f"millrace, seed {seed}", f"{r['bits_per_byte']:.4f}", f"{r['tokens_per_s']:,.0f}", f"{r['mfu']:.0%}")
        for seed, r in runs.items()
    ]
    spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
    table.append(("millrace, mean", f"{statistics.mean(scores):.4f} ± {spread:.4f}", "", ""))
    table += [(name, f"{value:.4f}", "", "") for name, value in sizes.items()]
    common.report("Bits per byte of the held-out text", ["", "bits per byte", "tokens/s", "MFU"], table, path)


if __name__ == "__main__":
    main()
