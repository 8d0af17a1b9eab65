"""`millrace prepare` and `millrace data index`: inputs → tokenizer → index (and tokenised shards) → manifest.

Interruptible at any point: units of work appear whole, and `manifest.json` appears last. The same command
continues, does nothing when all is done, and appends files that were added to the inputs since.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from millrace.core.config import option
from millrace.core.errors import UserError, did_you_mean
from millrace.core.rundir import write_atomic
from millrace.data import CODES, MODALITIES, SOURCES
from millrace.data.coding import Coder, Coding, begin, encode_files, encoded, save_codecs
from millrace.data.costs import Costs
from millrace.data.dataset_files import DATASET, dataset_files
from millrace.data.importing import Import, import_dataset
from millrace.data.inputs import InputFile, Progress, import_folder, name_inputs, resolve
from millrace.data.manifest import Header, Kept, Manifest, build_manifest
from millrace.data.modalities.base import modality
from millrace.data.prepared import Prepared, claim, codes_folder, difference, index_files, tidy
from millrace.data.ranks import Alone, Ranks
from millrace.data.stores.base import StoreError
from millrace.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from millrace.data.units import UnitOptions, documents, make_units
from millrace.data.work import Work

ROLES = ("text", "image", "audio", "tokens")  # those of other modalities are named in `media`


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareConfig:
    """What becomes a manifest, and how."""

    inputs: list[str] = option(
        [], f"files, folders, globs, URLs, or data sets as {DATASET}NAME[:CONFIG[:SPLIT]]; NAME=WHERE names one"
    )
    out: str = option("", "folder to write the manifest to")
    kind: str = option("auto", f"format of the files: auto (by suffix), {', '.join(SOURCES)}")
    text: str | None = option(None, 'column or field of the text (default: "text", if no other role is named)')
    image: str | None = option(None, "column, field or suffix of the image")
    audio: str | None = option(None, "column, field or suffix of the sound")
    tokens: str | None = option(None, "column of token ids, where the inputs are tokenised already")
    media: dict[str, str] = option({}, "column, field or suffix of other modalities, such as {lidar = 'points'}")
    costs: dict[str, dict[str, Any]] = option(
        {}, "positions that media take in a sequence, such as {image = {patch = 16}}"
    )
    tokenizer: str | None = option(None, "tokenizer folder, file or hub name (default: train a byte-level BPE)")
    vocab_size: int = option(8192, "vocabulary of the tokenizer to train")
    train_bytes: int = option(64 * 2**20, "text that the tokenizer is trained on, at most", unit="bytes")
    count_tokens: bool = option(True, "count tokens, which best-fit packing needs")
    tokenize: bool = option(False, "write tokenised Parquet shards instead of reading the inputs in place")
    shard_size: int = option(64 * 2**20, "size of the shards that are written", unit="bytes")
    heldout: float = option(0.0, "share of the documents to hold out")
    heldout_by: Literal["hash", "nth"] = option(
        "hash", "hold out by the document's hash, or every n-th document of each 64 MiB of files"
    )
    on_bad: Literal["stop", "skip"] = option("stop", "what an undecodable document does")

    def __post_init__(self) -> None:
        if self.kind != "auto" and self.kind not in SOURCES:
            known = ", ".join(("auto", *SOURCES))
            raise ValueError(f"kind = '{self.kind}': expected one of {known}{did_you_mean(self.kind, SOURCES)}")
        if not 0 <= self.heldout < 1:
            raise ValueError(f"heldout = {self.heldout} must be at least 0 and below 1")
        if self.heldout_by == "nth" and self.heldout > 0.5:
            raise ValueError(f"heldout = {self.heldout} is above 0.5, which heldout_by = 'nth' cannot do")
        for name in ("train_bytes", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1 byte")
        for role in self.media:
            modality(role)
        if self.tokenize and (not self.count_tokens or list(self.columns) != ["text"]):
            raise ValueError("tokenize = true needs count_tokens = true, and samples of text alone")
        if self.tokens and (list(self.columns) != ["tokens"] or not self.tokenizer or not self.count_tokens):
            raise ValueError(
                f"tokens = '{self.tokens}' needs the tokenizer that they were made with (set tokenizer), "
                "count_tokens = true and no other role"
            )

    @property
    def columns(self) -> dict[str, str]:
        """Column or field of each role."""
        named = {role: getattr(self, role) for role in ROLES if getattr(self, role)}
        return named | self.media or {"text": "text"}


@dataclass(frozen=True)
class Summary:
    """What `prepare` wrote: counts per source, {name, documents, bytes, tokens}, of both parts."""

    out: str
    fingerprint: str
    tokenizer: str | None
    vocab_size: int
    train: list[dict[str, Any]]
    heldout: list[dict[str, Any]]
    skipped: list[str] = field(default_factory=list)
    reused_units: int = 0
    added_files: int = 0  # appended to what was prepared before
    already_done: bool = False


def _no_progress(what: str, done: int, total: int) -> None:
    pass


@dataclass(frozen=True)
class _Job:
    config: PrepareConfig  # of the files that are indexed
    options: dict[str, Any]  # that the folder was begun with
    out: Path
    names: list[str]  # of the sources
    files: list[InputFile]
    new: list[InputFile]  # those of them that no earlier call finished
    done: Prepared | None
    progress: Progress
    coders: Mapping[str, Coder]
    bad: list[str]  # samples whose media could not be encoded


_NO_CODERS: Mapping[str, Coder] = {}


def prepare(
    config: PrepareConfig,
    progress: Progress = _no_progress,
    coders: Mapping[str, Coder] = _NO_CODERS,
    ranks: Ranks | None = None,
) -> Summary:
    """Write a manifest folder, continuing what an interrupted call with the same options left.

    In a finished folder the same call indexes the files that were added to the inputs, and appends them; without any
    it returns the summary. Inputs that changed during an unfinished preparation are prepared again.

    Media of a role that has one of `coders` are encoded into Parquet shards below `out`, which are indexed in the place
    of the inputs. `ranks` encode files in turn, all into the same folder; the rest is done by the first of them.

    Raises:
        UserError: inputs that are missing, empty, undecodable or changed; a folder that holds something else.
    """
    if not config.inputs:
        raise UserError("nothing to prepare: name at least one file, folder, glob, URL or data set")
    if not config.out:
        raise UserError("no folder to write to: set out, such as --out data/corpus")
    ranks = ranks or Alone()
    for role in coders:
        if role not in config.columns or role not in CODES:
            raise UserError(f"a codec of '{role}', which samples do not have; add --{role} COLUMN")
        if CODES[role] in config.columns:
            raise UserError(f"samples have {CODES[role]} already; leave them out, or the codec of '{role}'")
    ranks.on_main(lambda: _begin(config, coders, progress))
    if coders:
        out, files = Path(config.out).absolute(), _named_files(config)
        coding = _coding(config, coders, progress, ranks)
        with _continued(out):
            encode_files(files, codes_folder(out), coding)
        ranks.barrier()
    return ranks.on_main(lambda: _index(config, coders, progress))


def _begin(config: PrepareConfig, coders: Mapping[str, Coder], progress: Progress) -> None:
    """Take the folder, and import what has to be; what is there of other inputs or options is refused or removed."""
    out, options = Path(config.out).absolute(), _options(config, coders)
    done = Prepared.load(out)
    if done is None:
        claim(out, options)
    elif changed := difference(done.options, options):
        raise UserError(f"{out} was prepared with other options ({changed}); name a new folder")
    with _continued(out):
        _import(config, list(name_inputs(config.inputs).values()), out, done, progress)
        if coders:
            begin(_named_files(config), codes_folder(out), {url for url, *_ in done.files} if done else ())


def _index(config: PrepareConfig, coders: Mapping[str, Coder], progress: Progress) -> Summary:
    out, options, files = Path(config.out).absolute(), _options(config, coders), _named_files(config)
    bad: list[str] = []
    if coders:
        files, bad = encoded(files, codes_folder(out))
        roles = _coding(config, coders, progress, Alone()).roles.values()
        named: dict[str, Any] = {role: role if role in roles else None for role in ROLES}
        config = replace(config, **named, media={role: role for role in roles if role not in ROLES})
    done, names = Prepared.load(out), list(name_inputs(config.inputs))
    new = done.added(files, out) if done else files
    job = _Job(config, options, out, names, files, new, done, progress, coders, bad)
    if done and not job.new:
        shutil.rmtree(out / ".work", ignore_errors=True)
        tokenizer = str(out / "tokenizer") if (out / "tokenizer").is_dir() else None
        return Summary(**{**done.summary, "out": str(out), "tokenizer": tokenizer, "already_done": True})
    with _continued(out):
        (out / ".work").mkdir(exist_ok=True)
        save_codecs(coders, out / "codecs")
        return _finish(job, _tokenizer(job))


def _coding(config: PrepareConfig, coders: Mapping[str, Coder], progress: Progress, ranks: Ranks) -> Coding:
    return Coding(
        columns=config.columns,
        coders=coders,
        shard_size=config.shard_size,
        on_bad=config.on_bad,
        progress=progress,
        rank=ranks.rank,
        size=ranks.size,
    )


@contextmanager
def _continued(out: Path) -> Iterator[None]:
    """Errors of stores and disks, after which the same command continues."""
    try:
        yield
    except StoreError as error:
        raise UserError(f"{error}; run the same command again to continue") from None
    except OSError as error:
        raise UserError(
            f"cannot write to {out}: {error.strerror or error}; free space there and run the same command again "
            "to continue"
        ) from None


def _options(config: PrepareConfig, coders: Mapping[str, Coder]) -> dict[str, Any]:
    options = {
        name: value for name, value in asdict(config).items() if name != "out" and (name, value) != ("media", {})
    }
    options |= {"text": config.columns.get("text"), "costs": Costs.stored(config.costs).of(MODALITIES)}
    return options | ({"codecs": _codecs(coders)} if coders else {})


def _codecs(coders: Mapping[str, Coder]) -> dict[str, str]:
    """Hashes of what makes codes, by their role."""
    return {CODES[role]: coder.sha256 for role, coder in coders.items()}


def _import(config: PrepareConfig, inputs: Sequence[str], out: Path, done: Prepared | None, progress: Progress) -> None:
    """Import the data sets that no files on this machine hold."""
    options = Import(columns=config.columns, shard_size=config.shard_size, on_bad=config.on_bad, progress=progress)
    for number, name in enumerate(inputs):
        if name.startswith(DATASET):
            folder = import_folder(out, number)
            files = dataset_files(name, folder)
            if done and number < len(done.options["inputs"]):
                _check_same(name, files, done, out)
            elif files is None:
                import_dataset(name, folder, options)


def _named_files(config: PrepareConfig) -> list[InputFile]:
    """The files of the inputs."""
    files = resolve(list(name_inputs(config.inputs).values()), config.kind, Path(config.out).absolute())
    for file in files:
        if file.kind == "megatron" and "tokens" not in config.columns:
            raise UserError(
                f"{file.url} holds tokens; add --tokens tokens --tokenizer NAME, the one they were made with"
            )
    return files


def _check_same(name: str, files: Sequence[Path] | None, done: Prepared, out: Path) -> None:
    """Refuse a data set of which nothing is left where it was read in place."""
    known = {url for url, *_ in done.files}
    if files is None or (files and not known & set(map(str, files))):
        raise UserError(
            f"'{name}' changed after {out} was prepared, or its files in the cache of `datasets` are gone; "
            "prepare into a new folder"
        )


def _tokenizer(job: _Job) -> Tokenizer | None:
    """The one that the folder was begun with, the named one, or one that is trained on the text."""
    if job.done:
        stored = job.out / "tokenizer"
        return load_tokenizer(stored) if stored.is_dir() else None
    config = job.config
    if config.tokenizer:
        return load_tokenizer(config.tokenizer)
    if not config.count_tokens or "text" not in config.columns:
        return None
    kept, mark = job.out / ".work" / "tokenizer", job.out / ".work" / "tokenizer-key.json"
    key = json.dumps([file.key() for file in job.files])
    if not (mark.exists() and mark.read_text() == key):
        train_bpe(_sample(job), config.vocab_size).save(kept)
        write_atomic(mark, key)
    return load_tokenizer(kept)


def _sample(job: _Job) -> Iterator[str]:
    """Text for the tokenizer, spread over all units, without the held-out part."""
    options, most = _unit_options(job.config, None), job.config.train_bytes
    total = max(sum(file.size for file in job.files), 1)
    share = min(1.0, most / total)
    done = 0
    for unit in make_units(job.files):
        quota = share * sum(file.size for file in unit) if share < 1 else float("inf")
        for document in documents(unit, options, []):
            if quota <= 0:
                break
            if not document.heldout:
                quota -= document.sample.bytes
                done += document.sample.bytes
                job.progress("reading text for the tokenizer", done, min(total, most))
                yield str(document.record["text"])


def _unit_options(config: PrepareConfig, tokenizer: Tokenizer | None) -> UnitOptions:
    return UnitOptions(
        columns=config.columns,
        tokenizer=tokenizer,
        counted=config.count_tokens and (tokenizer is not None or "text" not in config.columns),
        costs=Costs.stored(config.costs),
        tokenize=config.tokenize,
        shard_size=config.shard_size,
        heldout=config.heldout,
        heldout_by=config.heldout_by,
        on_bad=config.on_bad,
    )


def _finish(job: _Job, tokenizer: Tokenizer | None) -> Summary:
    """Do the units that are left, then make the manifests visible."""
    out, done = job.out, job.done
    work = Work(out, done.units if done else 0, make_units(job.new), _unit_options(job.config, tokenizer))
    reused = work.run(job.progress)
    made = _build(job, work)
    if tokenizer and not done:
        tokenizer.save(out / "tokenizer")
    records = work.records()
    hashes = {url: sha for record in records for url, sha in record["hashes"].items()}
    before = done.summary["skipped"] if done else ()
    nothing = [{"name": name, "documents": 0, "bytes": 0, "tokens": 0} for name in job.names]
    summary = Summary(
        out=str(out),
        fingerprint=made["train"]["fingerprint"],
        tokenizer=str(out / "tokenizer") if tokenizer else None,
        vocab_size=tokenizer.vocab_size if tokenizer else 0,
        train=made["train"]["sources"],
        heldout=made["heldout"]["sources"] if "heldout" in made else nothing,
        skipped=list(dict.fromkeys([*before, *job.bad, *(why for record in records for why in record["skipped"])])),
    )
    Prepared(
        options=job.options,
        files=[*(done.files if done else ()), *([f.url, f.size, f.version, hashes[f.url]] for f in job.new)],
        units=work.first + len(work.units),
        shards={part: len(record["shards"]) for part, record in made.items()},
        index=index_files(made),
        summary={name: value for name, value in asdict(summary).items() if name not in ("out", "tokenizer")},
    ).commit(out, made)
    tidy(out, made, done)
    shutil.rmtree(out / ".work")
    return replace(summary, reused_units=reused, added_files=len(job.new) if done else 0)


def _build(job: _Job, work: Work) -> dict[str, dict[str, Any]]:
    """Write the indexes; return the records of the manifests that have samples, by part."""
    options = work.options
    shards = {part: work.shards(part, folder) for part, folder in _folders(job.out)}
    before = job.done.shards if job.done else {}
    if not shards["train"] and not before:
        where = ", ".join(job.config.inputs)
        held = sum(shard.samples for shard in shards["heldout"])
        why = f"all {held} documents were held out; lower heldout" if held else "it has no documents"
        raise UserError(f"the corpus is empty ({where}): {why}")
    counting = options.tokenizer if options.counted else None
    header = Header(
        columns={"tokens": "tokens", "bytes": "bytes"} if options.tokenize else dict(options.columns),
        tokenizer=counting.sha256 if counting else None,
        costs=options.costs.of(options.columns),
        codecs=_codecs(job.coders),
    )
    made = {}
    for part, folder in _folders(job.out):
        kept = Manifest.load(folder).keep(before[part]) if part in before else Kept()
        if kept.shards or shards[part]:
            made[part] = build_manifest(folder, header, job.names, shards[part], work.entries(part), kept)
    return made


def _folders(out: Path) -> list[tuple[str, Path]]:
    return [("heldout", out / "heldout"), ("train", out)]
