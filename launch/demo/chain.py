"""The stages of the demo, in order; each returns the rows that the last table shows."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from millrace.core.console import get_console, say
from millrace.core.errors import UserError
from millrace.core.ledger import read
from millrace.core.units import fmt_count, fmt_seconds, fmt_size
from millrace.launch import train
from millrace.launch.demo import twins
from millrace.launch.demo.corpus import Corpus, standard_library, write_corpus
from millrace.launch.demo.media import JUDGED, Files, judge, write_media

Row = tuple[str, str]

_CONFIGS = Path(__file__).resolve().parent.parent.parent / "configs"
_VOCABULARY = 4096
_EVALUATED = 12  # held-out documents
_AGREEMENT = 0.01  # relative
# Enough steps to kill in the middle of, on a small batch: it is about equality, not about quality.
_TWIN = {
    "train.duration": f"{twins.STEPS} steps", "checkpoint.every": f"{twins.CHECKPOINT_EVERY} steps",
    "schedule.warmup": "4 steps", "eval.every": "1000 steps", "eval.rows": "8",
    "track.norms_every": "0", "run.sample_ids": "true",
}  # fmt: skip


class Stopped(Exception):
    """A run ended before its time, because it was asked to, or with an error that it has told itself."""

    def __init__(self, code: int) -> None:
        self.code = code


@dataclass(frozen=True)
class Demo:
    """Where this demo writes, and how many ranks its runs have."""

    folder: Path
    ranks: int
    batch: int = 4

    def ours(self, name: str, **more: Any) -> list[str]:
        """Overrides that every run of the demo gets."""
        given = {
            "run.name": name, "run.dir": self.folder, "run.processes": self.ranks,
            "train.batch": max(self.batch, self.ranks), "train.micro_batch": max(1, self.batch // self.ranks),
        }  # fmt: skip
        return [f"{key}={value}" for key, value in (given | more).items()]

    def ledger(self, name: str) -> Path:
        """Of the run `name`."""
        return self.folder / name / "ledger.jsonl"

    def events(self, name: str, event: str) -> list[dict[str, Any]]:
        """Its records of one kind."""
        return [record for record in read(self.ledger(name)) if record["event"] == event]


def play(demo: Demo, seconds: dict[str, str]) -> list[Row]:
    """All stages. `seconds` may shorten them: {"codecs": "10 s", "pretrain": "20 s", "finetune": "10 s"}.

    Raises:
        UserError: something did not come out as it must; Stopped: a run was asked to stop.
    """
    made = corpus(demo)
    rows = codecs(demo, made, seconds.get("codecs"))
    rows += prepare(demo, made)
    rows += pretrain(demo, seconds.get("pretrain"))
    rows += kill_show(demo)
    rows += export_and_evaluate(demo, made)
    rows += finetune(demo, made, seconds.get("finetune"))
    return rows


def _config(name: str) -> str:
    path = _CONFIGS / name
    if not path.is_file():
        raise UserError(f"{path} is missing: run the demo from a checkout of the repository, with `make demo`")
    return str(path)


def _title(text: str) -> None:
    get_console().rule(f"[bold]{text}", align="left")


def _run(start: Callable[[list[str]], int], arguments: list[str]) -> None:
    code = start(arguments)
    if code:
        raise Stopped(code)


@dataclass(frozen=True)
class Made:
    """Everything that is trained on, made on this machine."""

    text: Corpus
    media: Files


def corpus(demo: Demo) -> Made:
    """Python's standard library as text; glyphs with their names; dial tones with their digits."""
    _title("1/7  text: Python's standard library; pictures: glyphs; sounds: dial tones")
    text = write_corpus(standard_library(), demo.folder / "text")
    media = write_media(demo.folder / "text")
    say(
        f"{text.modules} modules with {fmt_size(text.bytes)} of source and docstrings; {text.modules_held_out} "
        "modules, chosen by a hash of their names, are held out"
    )
    return Made(text, media)


def codecs(demo: Demo, made: Made, seconds: str | None) -> list[Row]:
    """What turns pictures and sounds into codes, and back."""
    _title("2/7  a codec of pictures, and one of sounds")
    from millrace.data.prepare import PrepareConfig
    from millrace.data.prepare import prepare as prepare_files

    rows = []
    for role, what, path in (("image", "pictures", made.media.glyphs), ("audio", "sounds", made.media.tones)):
        folder = demo.folder / "data" / role
        options: dict[str, Any] = {role: role, "heldout": 0.05}
        prepare_files(PrepareConfig(inputs=[str(path)], out=str(folder), **options))
        name = f"{role}_codec"
        more: dict[str, Any] = {"train.batch": 32, "train.micro_batch": 32 // demo.ranks, "data.manifest": folder}
        more |= {"train.duration": seconds} if seconds else {}
        _run(train.pretrain, [_config(f"demo_{role}.toml"), *demo.ours(name, **more)])
        held = demo.events(name, "eval")[-1]["reconstruction"]
        rows.append((f"codec of {what}", f"{held:.3f} mean difference from held-out ones, of signals from -1 to 1"))
    return rows


def prepare(demo: Demo, made: Made) -> list[Row]:
    """Tokenizer and manifests; pictures and sounds become codes."""
    _title("3/7  one vocabulary: tokens of text, codes of pictures and sounds")
    from millrace.data.prepare import PrepareConfig
    from millrace.data.prepare import prepare as prepare_files
    from millrace.eval.coder import open_coder

    text, media = made.text, made.media
    library, bpe = demo.folder / "data" / "stdlib", str(demo.folder / "data" / "stdlib" / "tokenizer")
    train_part = prepare_files(PrepareConfig(inputs=[f"stdlib={text.train}"], out=str(library), vocab_size=_VOCABULARY))
    held = prepare_files(PrepareConfig(inputs=[str(text.heldout)], out=str(library / "heldout"), tokenizer=bpe))
    tokens = [sum(source["tokens"] for source in part) for part in (train_part.train, held.train)]
    for name, role, path in (("glyphs", "image", media.glyphs), ("tones", "audio", media.tones)):
        options: dict[str, Any] = {role: role, "text": "text", "tokenizer": bpe, "heldout": 0.05}
        coder = open_coder(role, demo.folder / f"{role}_codec")
        out = str(demo.folder / "data" / name)
        prepare_files(PrepareConfig(inputs=[f"{name}={path}"], out=out, **options), coders={role: coder})
    say(f"{fmt_count(tokens[0])} tokens of text to train on, {fmt_count(tokens[1])} held out; {_VOCABULARY:,} in all")
    return [("text", f"{fmt_size(text.bytes)}, {text.modules} modules, {text.modules_held_out} of them held out")]


def _data(demo: Demo) -> dict[str, Any]:
    return {"data.manifest": json.dumps([str(demo.folder / "data" / name) for name in ("stdlib", "glyphs", "tones")])}


def pretrain(demo: Demo, seconds: str | None) -> list[Row]:
    """The main run."""
    _title(f"4/7  pretraining on {demo.ranks} ZeRO-2 rank(s)")
    more = _data(demo) | ({"train.duration": seconds, "eval.every": seconds} if seconds else {})
    _run(train.pretrain, [_config("demo.toml"), *demo.ours("pretrain", **more)])
    start, steps = demo.events("pretrain", "start")[0], demo.events("pretrain", "step")
    tokens, spent = steps[-1]["tokens_total"], sum(step["seconds"] for step in steps)
    waited = sum(step["data_wait"] for step in steps) / spent
    mfu = tokens / spent * start["flops_per_token"] / start["peak_flops"]
    return [
        ("model", f"{fmt_count(start['params'])} parameters, {start['precision']}, {start['world']} ZeRO-2 rank(s)"),
        ("pretraining", f"{len(steps):,} steps, {fmt_count(tokens)} tokens in {fmt_seconds(spent)}"),
        ("speed", f"{tokens / spent:,.0f} tokens/s, {mfu:.0%} of the peak, {waited:.1%} waiting for data"),
    ]


def kill_show(demo: Demo) -> list[Row]:
    """The same short run twice, once killed with SIGKILL and resumed."""
    _title("5/7  kill -9 in the middle of a run, against a twin that lives")
    both = {**_data(demo), **_TWIN, "train.batch": 2 * demo.ranks, "train.micro_batch": 2}
    config = _config("demo.toml")
    _run(train.pretrain, [config, *demo.ours("twin", **both)])
    arguments = [config, *demo.ours("killed", **both)]
    killed_at = twins.kill_in_the_middle(twins.pretrain_command(arguments), demo.ledger("killed"))
    get_console().print()  # the killed display could not end its line
    say(f"killed all processes with SIGKILL after step {killed_at}; the same command again:")
    _run(train.pretrain, arguments)
    proof = twins.compare(demo.ledger("twin"), demo.ledger("killed"), killed_at)
    said = (
        f"killed after step {proof.killed_at}, resumed from {proof.resumed_from}: {proof.steps} losses equal to the "
        f"last bit, {proof.samples} sample spans equal"
    )
    say(f"{said} (the ledgers hold every step; the display shows averages since a start)")
    return [("SIGKILL", said)]


def export_and_evaluate(demo: Demo, made: Made) -> list[Row]:
    """A Hugging Face folder, its bits per byte beside the run's, and pictures, sounds and texts that it makes.

    Raises:
        UserError: the two figures differ.
    """
    _title("6/7  export to Hugging Face; what the export says, draws, dials and hears")
    from millrace.core.units import parse_size
    from millrace.engine.export import export
    from millrace.eval.evaluate import Request, evaluate, show_result, write_result

    run, text = demo.folder / "pretrain", str(made.text.heldout)
    exported = export(str(run), str(demo.folder / "exported"), "fp32", parse_size("5 GB"))
    found = [
        evaluate(Request(source=str(path), text=[text], dtype="fp32", limit=_EVALUATED))
        for path in (run, exported.path)
    ]
    show_result(found[1])
    write_result(found[1], demo.folder / "eval.json")
    theirs, ours = (result["text"][text]["bits_per_byte"] for result in found)
    if abs(ours / theirs - 1) > _AGREEMENT:
        raise UserError(
            f"the exported model has {ours:.4f} bits per byte on the held-out text, but the checkpoint that it is "
            f"made from {theirs:.4f}; see {demo.folder / 'eval.json'}"
        )
    rows = [
        (
            "export",
            f"{fmt_size(exported.bytes)}; {ours:.3f} bits per byte of held-out text, its checkpoint {theirs:.3f}",
        )
    ]
    return rows + _generate(demo, Path(exported.path))


def _generate(demo: Demo, exported: Path) -> list[Row]:
    """What the export makes of held-out pictures, sounds and texts; judged, and kept as files."""
    from millrace.eval.any_to_any import AnyToAny
    from millrace.eval.media import save

    model = AnyToAny.from_pretrained(exported)
    rows = []
    for judged in judge(model):
        to = judged.way.rpartition(" ")[2]
        for number, made in enumerate(judged.made if to != "text" else ()):
            save(
                demo.folder / "made" / f"{to}-{number:02d}-{judged.wanted[number].replace(' ', '-')}",
                made,
                model.rate(to),
            )
        said = f"{judged.right:.0%} of {JUDGED} right" + (
            f", {judged.errors:.0%} of characters wrong" if to != "image" else ""
        )
        rows.append((judged.way, said))
    say(f"pictures and sounds that were made: {demo.folder / 'made'}")
    return rows


def finetune(demo: Demo, made: Made, seconds: str | None) -> list[Row]:
    """LoRA on short questions, and an answer to a held-out one before and after."""
    _title("7/7  fine-tuning with LoRA; an answer before and after")
    asked = json.loads(made.text.tuning_heldout.read_text(encoding="utf-8").splitlines()[0])
    more = {
        "source": demo.folder / "pretrain", "data.train": made.text.tuning, "data.heldout": made.text.tuning_heldout,
        "eval.prompts": json.dumps([asked["prompt"]]), **({"train.duration": seconds} if seconds else {}),
    }  # fmt: skip
    _run(train.finetune, [_config("demo_finetune.toml"), *demo.ours("finetune", **more)])
    samples, steps = demo.events("finetune", "sample"), demo.events("finetune", "step")
    start = demo.events("finetune", "start")[0]
    for label, text in (
        ("question (held out)", asked["prompt"]), ("before", samples[0]["text"]),
        ("after", samples[-1]["text"]), ("the docstring says", asked["response"]),
    ):  # fmt: skip
        get_console().print(f"[bold]{label}[/]")
        get_console().print(re.sub(r"\n\s*\n", "\n", text.strip()) or "(nothing)", markup=False, highlight=False)
    held = demo.events("finetune", "eval")[-1]["loss"]
    return [
        ("LoRA", f"{fmt_count(start['trained'])} of {fmt_count(start['params'])} parameters, {len(steps)} steps, "
                 f"loss {steps[0]['loss']:.2f} → {steps[-1]['loss']:.2f}, held out {held:.2f}"),
    ]  # fmt: skip


def clock(began: float) -> Row:
    """How long the demo took."""
    return ("time", fmt_seconds(time.monotonic() - began))
