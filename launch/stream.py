"""`millrace data stat`, `peek` and `simulate`: a run's stream, looked at from its configuration."""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from millrace.core.config import load_config
from millrace.core.console import say, show_table, warn
from millrace.core.errors import UserError
from millrace.core.units import fmt_count, fmt_seconds, fmt_size, parse_count
from millrace.launch.arguments import Parser, quantity


def _parser(name: str, what: str, example: str) -> Parser:
    parser = Parser(prog=f"millrace data {name}", description=what, epilog=f"example: millrace data {name} {example}")
    parser.add_argument("arguments", nargs="*", metavar="CONFIG.toml section.key=value")
    return parser


def _config(parser: Parser, argv: Sequence[str]) -> tuple[argparse.Namespace, Any]:
    from millrace.pretrain.config import PretrainConfig

    options = parser.parse_intermixed_args(list(argv))
    files = [a for a in options.arguments if "=" not in a]
    if files and Path(files[0]).is_dir():
        raise UserError(f"{files[0]} is a folder, not a configuration file; write data.manifest={files[0]}")
    if len(files) > 1:
        parser.error(f"give one configuration file, not {', '.join(files)}")
    overrides = [a for a in options.arguments if "=" in a]
    return options, load_config(PretrainConfig, files[0] if files else None, overrides)


def _open(config: Any, world: int = 1, rank: int = 0) -> Any:
    from millrace.data.builder import Opened, Spec
    from millrace.data.stream import Deal

    deal = Deal(config.train.batch, config.train.micro_batch, rank, world)
    return Opened(Spec(config=config.data, seed=config.run.seed, deal=deal), None)


def stat(argv: Sequence[str]) -> int:
    """What the corpus holds, how long its samples are, how well they pack, and how often a budget repeats them."""
    parser = _parser("stat", "What a corpus holds and what a run makes of it.", "data.manifest=data/books")
    parser.add_argument(
        "--tokens", type=quantity(parse_count), help="token budget, such as 10B (default: train.duration)"
    )
    options, config = _config(parser, argv)
    from millrace.data.stat import lengths, packing

    opened = _open(config)
    corpus = opened.corpus
    budget = options.tokens or (config.train.duration.value if config.train.duration.unit == "tokens" else 0)
    steps = config.train.duration.value if config.train.duration.unit == "steps" else 0
    budget = budget or steps * config.train.batch * config.data.sequence_length
    shares = _shares(opened)
    rows = [
        (
            s.name,
            fmt_count(s.samples),
            fmt_count(s.tokens),
            fmt_size(s.bytes),
            f"{share:.1%}",
            _epochs(s, share, budget),
        )
        for s, share in zip(corpus.sources(), shares, strict=True)
    ]
    columns = ["source", "samples", "tokens", "text", "share of tokens", f"epochs in {fmt_count(budget)} tokens"]
    show_table(corpus.folder, columns, rows)
    if not corpus.counted:
        say("not counted: no lengths and no packing; prepare with token counts to see them")
        return 0
    found = lengths(corpus)
    total, positions = found.samples.sum(), found.positions.sum()
    bars = [
        (
            f"{a:,} – {b - 1:,}",
            f"{n:,}",
            f"{n / total:.1%}",
            f"{p / positions:.1%}",
            "█" * round(16 * n / max(found.samples)),
        )
        for a, b, n, p in zip(found.edges[:-1], found.edges[1:], found.samples, found.positions, strict=True)
    ]
    show_table("positions of a sample", ["positions", "samples", "of samples", "of positions", ""], bars)
    if config.data.rows != "samples":
        packed = packing(opened)
        say(
            f"rows of {config.data.sequence_length}: {packed.efficiency:.1%} of the positions hold a token "
            f"({packed.windows} windows planned); {packed.cut:.1%} of the samples are cut"
        )
        if corpus.media and (longer := corpus.count_longer(config.data.sequence_length)):
            warn(
                f"{longer:,} samples ({longer / total:.1%}) cost more positions than a row has, and are never used; "
                "raise data.sequence_length, or prepare them with a smaller --image-most"
            )
    return 0


def _shares(opened: Any) -> list[float]:
    sources = opened.corpus.sources()
    stage = opened.state.stages[-1]
    sizes = [max(s.tokens or s.bytes, 1) / max(s.samples, 1) for s in sources]
    drawn = stage.counts if len(stage.counts) == len(sources) > 1 else [s.samples for s in sources]
    tokens = [size * count for size, count in zip(sizes, drawn, strict=True)]
    return [t / sum(tokens) for t in tokens]


def _epochs(source: Any, share: float, budget: int) -> str:
    return f"{share * budget / source.tokens:.2f}" if source.tokens else "?"


def peek(argv: Sequence[str]) -> int:
    """A batch exactly as the model will see it."""
    parser = _parser("peek", "Show a batch exactly as the model will see it.", "configs/tiny.toml --step 100 --rows 2")
    parser.add_argument("--step", type=int, default=1, help="which step, from 1 (default: 1)")
    parser.add_argument("--rows", type=int, default=4, help="rows to show (default: 4)")
    parser.add_argument("--images", metavar="FOLDER", help="save images and sounds of the rows shown here")
    options, config = _config(parser, argv)
    if options.step < 1:
        raise UserError(f"--step = {options.step}: steps are counted from 1")
    from millrace.data.collate import to_step_batch

    if options.images:
        _make_folder(Path(options.images))
    config = replace(config, train=replace(config.train, micro_batch=config.train.batch))
    opened = _open(config)
    state, before = opened.state, options.step - 1
    if opened.corpus.counted:  # the steps before need not be built
        stream = opened.plan()
        for _ in range(before):
            state = stream.step(state).after
        before = 0
    builder = opened.builder()
    batch = to_step_batch(*next(itertools.islice(builder.steps(state), before, None)))
    builder.documents.close()
    (micro,) = batch.micro_batches
    print(f"step {options.step}: {len(batch.spans)} spans, {batch.local_tokens:,} targets, window {batch.state.window}")
    for entry in batch.quarantined:
        print(f"bad: sample {entry['sample']} of {entry['shard']}: {entry['why']}")
    options.bad = {entry["sample"] for entry in batch.quarantined}
    show = _show_samples if hasattr(micro, "values") else _show_rows
    show(micro, opened, options)
    return 0


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise UserError(f"cannot write to {folder}: {problem.strerror}; name another folder") from None


def _show_rows(micro: Any, opened: Any, options: argparse.Namespace) -> None:
    tokenizer, length = opened.tokenizer, micro.input_ids_BT.shape[1]
    for row in range(min(options.rows, len(micro.spans))):
        used = sum(micro.seq_lens[row])
        print(f"\n━━ row {row}: {len(micro.spans[row])} documents, {used} of {length} positions used")
        at = 0
        for (sample, start, end), count in zip(micro.spans[row], micro.seq_lens[row], strict=True):
            ids, labels = (t[row, at : at + count].tolist() for t in (micro.input_ids_BT, micro.labels_BT))
            masked = sum(label == -100 for label in labels)
            where = opened.corpus.shard_url(sample)
            note = f", {masked} without target" if masked else ""
            print(f"── sample {sample}, positions {start}–{end}{note} ({where})")
            media = [m for m in micro.media if m.row == row and at <= m.start < at + count]
            print("⟨left empty⟩" if sample in options.bad else _shown(tokenizer, ids, media, at))
            for medium in media:
                _show_value(medium.role, medium.value.numpy(), f"row{row}-sample{sample}", options)
            at += count


def _shown(tokenizer: Any, ids: list[int], media: list[Any], at: int) -> str:
    """Text of a document, with media named where they stand."""
    parts, done = [], 0
    for medium in media:
        start = medium.start - at
        parts += [tokenizer.decode(ids[done:start]), f"⟨{medium.role}: {medium.positions} positions⟩"]
        done = start + medium.positions
    return "".join([*parts, tokenizer.decode(ids[done:])])


def _show_samples(batch: Any, opened: Any, options: argparse.Namespace) -> None:
    for row, sample in enumerate(batch.samples[: options.rows]):
        print(f"\n── sample {sample}{'' if batch.good[row] else ': bad'} ({opened.corpus.shard_url(sample)})")
        for role, values in batch.values.items():
            if not batch.has(role)[row]:
                continue
            value = values[row].numpy()
            value = value[: int(batch.lengths[role][row])] if role in batch.lengths else value
            if role == "tokens":
                print(opened.tokenizer.decode(value.tolist()))
            else:
                _show_value(role, value, f"row{row}-sample{sample}", options)


def _show_value(role: str, value: Any, name: str, options: argparse.Namespace) -> None:
    print(f"{role}: {value.dtype} {value.shape}")
    if not options.images:
        return
    folder = Path(options.images)
    if value.ndim == 3:
        from PIL import Image

        Image.fromarray(value).save(folder / f"{name}.png")
    elif value.dtype.kind == "f":
        import soundfile

        soundfile.write(folder / f"{name}.wav", value, 16000)


def simulate(argv: Sequence[str]) -> int:
    """Plan a stream at any number of nodes without reading data."""
    parser = _parser(
        "simulate",
        "Plan a stream at any number of nodes, reading no data.",
        "run.toml --nodes 128 --ranks 8 --steps 100",
    )
    parser.add_argument("--nodes", type=int, default=1, help="nodes (default: 1)")
    parser.add_argument("--ranks", type=int, default=1, help="ranks of a node (default: 1)")
    parser.add_argument("--steps", type=int, default=100, help="steps to plan (default: 100)")
    options, config = _config(parser, argv)
    from millrace.data.simulate import simulate as plan

    began = time.perf_counter()
    opened = _open(config, world=options.nodes * options.ranks)
    found = plan(opened, options.steps, options.nodes, time.perf_counter() - began)
    fetched = "?" if found.fetched_per_needed is None else f"{found.fetched_per_needed:.2f}"
    rows = [
        ("rows, samples, tokens", f"{found.rows:,}, {found.samples:,}, {fmt_count(found.tokens)}"),
        ("positions that hold a token", f"{found.efficiency:.1%}"),
        ("shuffle: entropy of distances, of a permutation's", f"{found.shuffle:.3f}"),
        ("shards in a step, in use at once", f"{found.shards_per_step:.1f}, {found.shards_open}"),
        ("bytes fetched per byte needed, of a node", fetched),
        ("state", fmt_size(found.state_bytes)),
        (
            "time to open, to plan a step",
            f"{fmt_seconds(found.start_seconds)}, {1000 * found.seconds / found.steps:.1f} ms",
        ),
        ("tokens planned in a second", fmt_count(found.tokens / found.seconds)),
        ("memory of a rank's planner, at most", fmt_size(found.peak_bytes)),
        ("order (SHA-256)", found.order[:16]),
    ]
    show_table(f"{options.steps} steps on {options.nodes} × {options.ranks} ranks", ["what is planned", ""], rows)
    return 0
