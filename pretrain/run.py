"""From a configuration to a finished run: build the component tree, resume if there is something to resume, fit."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from millrace.core.config import to_dict, to_toml
from millrace.core.console import say, warn
from millrace.core.ledger import read_event
from millrace.core.process import start_times
from millrace.core.registry import lookup
from millrace.core.rundir import RunDir, write_atomic
from millrace.core.units import fmt_count
from millrace.data.corpus import Corpus
from millrace.data.loader import Loader, build_loader, heldout_batches, heldout_manifests
from millrace.data.state import LoaderState
from millrace.engine.checkpoint.download import restore
from millrace.engine.checkpoint.saver import Saver
from millrace.engine.distributed import World, join_world, leave_world, world_size
from millrace.engine.engine import Engine
from millrace.engine.guard import Guard
from millrace.engine.owner import owned
from millrace.engine.peak import peak_flops
from millrace.engine.precision import choose_precision
from millrace.engine.watchdog.watch import Watch
from millrace.engine.zero import deepspeed_config, gather_by_block
from millrace.eval.generate import continue_text
from millrace.eval.report import write_report
from millrace.models.bridge import build_model, hf_config
from millrace.models.counts import flops_per_token
from millrace.models.packing import check_packable
from millrace.pretrain.config import PretrainConfig, fingerprint, resolve
from millrace.pretrain.loop import Parts, fit
from millrace.pretrain.objectives import REGISTRY as OBJECTIVES
from millrace.pretrain.resume import resume, tell_resumed
from millrace.pretrain.tracking import Tracker
from millrace.pretrain.uploads import begin_uploads, end_uploads


def pretrain(config: PretrainConfig) -> int:
    """Run, or continue, the run that `config` describes, as one rank of the world the launcher made.

    Returns:
        The outcome: 0 done, 75 continue me.

    Raises:
        UserError: on every rank, before anything of another run is touched.
    """
    derived = resolve(config, world_size())
    precision = choose_precision(config.engine.precision)
    settings = deepspeed_config(
        config.engine,
        precision,
        micro_batch=config.train.micro_batch,
        accumulation=derived.accumulation,
        clip=config.optim.clip,
    )
    world = join_world(settings)
    try:
        return _run(config, world, settings, precision)
    finally:
        leave_world()


def _run(config: PretrainConfig, world: World, settings: dict[str, Any], precision: str) -> int:
    corpus = Corpus.load(config.data.manifest)
    rundir = RunDir(Path(config.run.dir) / config.run.name)
    with build_loader_at(config, world, None) as probe:
        tokenizer = probe.tokenizer
    check_packable(hf_config(config.model, tokenizer.vocab_size, config.data.sequence_length).model_type)
    identity = _identity(config, rundir, corpus)
    with owned(rundir, identity, world) as owner, Watch(config.watchdog, rundir.path, world, owner.number) as watch:
        run_id = world.on_main(lambda: _claim(config, rundir, identity))
        engine, model = build_engine(config, world, settings, tokenizer.vocab_size)
        resumed = resume(rundir.checkpoints, engine)
        files = run_files(config, model.config, tokenizer)
        peak = sum(world.gather_objects(peak_flops(world.device, precision)))
        with (
            Tracker(config.track, rundir.path, to_dict(config), world.main, owner.number) as tracker,
            build_loader_at(config, world, resumed.loader) as loader,
        ):
            parts = Parts(
                config=config,
                engine=engine,
                loader=loader,
                rundir=rundir,
                owner=owner,
                tracker=tracker,
                files=files,
                flops_per_token=flops_per_token(model.config, config.data.sequence_length),
                peak_flops=peak,
                heldout=_heldout(config, world),
                sample=_sampler(config, model, tokenizer),
                saver=Saver(rundir.checkpoints, engine.adapter, world, owner, background=config.checkpoint.background),
                watch=watch,
                guard=Guard(config.guard, resumed.guard),
                point=resumed.point,
                identity={"run_id": run_id},
                uploader=begin_uploads(config.checkpoint.upload, rundir, world, resumed.point.step),
            )
            loader.exclude(world.on_main(lambda: _quarantined(rundir)))
            tell_resumed(parts, resumed)
            how = (run_id, precision, resumed.step)
            tracker.log("start", **_start_record(parts, model, how, corpus))
            if world.main:
                write_atomic(rundir.config, to_toml(config))
                _announce(parts, model, precision)
            outcome = fit(parts)
            end_uploads(parts, outcome)
    if world.main:
        _report(rundir)
    return outcome


def _quarantined(rundir: RunDir) -> dict[int, str]:
    """Samples that earlier starts of this run could not use, and why."""
    return {r["sample"]: r["why"] for r in read_event(rundir.ledger, "quarantine")}


def build_loader_at(config: PretrainConfig, world: World, state: LoaderState | None) -> Loader:
    """The training stream of this rank, from `state` or from its start."""
    return build_loader(
        config.data,
        seed=config.run.seed,
        batch_rows=config.train.batch,
        micro_batch=config.train.micro_batch,
        rank=world.rank,
        world=world.size,
        state=state,
    )


def build_engine(config: PretrainConfig, world: World, settings: dict[str, Any], vocab_size: int) -> tuple[Engine, Any]:
    """Model, objective and optimiser inside a DeepSpeed engine; returns (engine, model)."""
    stage = settings["zero_optimization"]["stage"]
    zero3 = {**settings, "train_batch_size": config.train.batch} if stage == 3 else None
    model = build_model(config.model, vocab_size, config.data.sequence_length, config.run.seed, zero3)
    if config.engine.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    objective = lookup(OBJECTIVES, config.objective.kind, "objective")(model, config.objective)
    if stage == 3:
        gather_by_block(model)
    engine = Engine(world, objective, config.optim.build(objective), config.optim.clip)
    if config.engine.compile:
        engine.compile()
    return engine, model


def _identity(config: PretrainConfig, rundir: RunDir, corpus: Corpus) -> dict[str, Any]:
    begun = rundir.known().get("manifests", [])
    manifests = begun if corpus.extends(begun) else corpus.fingerprints  # shards may join while a run is under way
    return fingerprint(config, manifests)


def _claim(config: PretrainConfig, rundir: RunDir, identity: dict[str, Any]) -> str:
    restore(config.checkpoint.upload, rundir, identity)
    run_id = rundir.claim(identity)
    rundir.outcome.unlink(missing_ok=True)
    return run_id


def run_files(config: PretrainConfig, hf_config: Any, tokenizer: Any) -> dict[str, str]:
    """The text files that later stages need beside the weights, by their name in a checkpoint."""
    files = {"config.toml": to_toml(config), "model/config.json": hf_config.to_json_string(use_diff=False)}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        for path in Path(folder).iterdir():
            files[f"tokenizer/{path.name}"] = path.read_text(encoding="utf-8")
    return files


def _heldout(config: PretrainConfig, world: World) -> Callable[[], Iterator[Any]] | None:
    if not heldout_manifests(config.data):
        return None
    rows = config.eval.rows or None
    return lambda: heldout_batches(config.data, config.train.micro_batch, world.rank, world.size, rows)


def _sampler(config: PretrainConfig, model: Any, tokenizer: Any) -> Callable[[], list[tuple[str, str]]] | None:
    prompts = config.eval.prompts
    if not prompts:
        return None

    def sample() -> list[tuple[str, str]]:
        texts = continue_text(model, tokenizer, prompts, tokens=config.eval.sample_tokens, seed=config.run.seed)
        return list(zip(prompts, texts, strict=True))

    return sample


def _start_record(parts: Parts, model: Any, how: tuple[str, str, int | None], corpus: Corpus) -> dict[str, Any]:
    run_id, precision, resumed = how
    ds = parts.engine.ds
    return {
        **start_times(),
        "run_id": run_id,
        "world": parts.engine.world.size,
        "zero_stage": ds.zero_optimization_stage(),
        "precision": precision,
        "resumed_from": resumed,
        "parent": parts.rundir.parent,
        "manifests": list(corpus.fingerprints),
        "params": sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters()),
        "flops_per_token": parts.flops_per_token,
        "peak_flops": parts.peak_flops,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of what decides a run's numbers."""
    from importlib.metadata import version

    names = ("millrace", "torch", "deepspeed", "accelerate", "transformers", "tokenizers")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def _announce(parts: Parts, model: Any, precision: str) -> None:
    world, config = parts.engine.world, parts.config
    count = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    say(
        f"{config.run.name}: {config.model.kind} with {fmt_count(count)} parameters, ZeRO "
        f"{parts.engine.ds.zero_optimization_stage()} on {world.size} rank(s), {precision}, "
        f"batch {config.train.batch} x {config.data.sequence_length}, until {config.train.duration}"
        + (f", continued from step {parts.point.step}" if parts.point.step else "")
    )
    say(f"run directory: {parts.rundir.path}")


def _report(rundir: RunDir) -> None:
    """Write report.html; a report that fails must not fail the run that it is about."""
    try:
        say(f"report: {write_report(rundir.path)}")
    except Exception as problem:
        warn(f"no report: {problem} (try `millrace report {rundir.path}`)")
