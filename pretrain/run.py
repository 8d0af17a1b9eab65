"""From a configuration to a finished run: build the component tree, resume if there is something to resume, fit."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

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
from millrace.data.tokenizer import Tokenizer
from millrace.engine.checkpoint.download import restore
from millrace.engine.checkpoint.saver import Saver
from millrace.engine.distributed import World, join_world, leave_world, world_size
from millrace.engine.engine import Engine
from millrace.engine.engines import Engines
from millrace.engine.guard import Guard
from millrace.engine.owner import owned
from millrace.engine.peak import peak_flops
from millrace.engine.precision import choose_precision
from millrace.engine.watchdog.watch import Watch
from millrace.engine.zero import deepspeed_config, gather_by_block
from millrace.eval.report import write_report
from millrace.pretrain.config import PretrainConfig, fingerprint, resolve
from millrace.pretrain.loop import Parts, fit
from millrace.pretrain.objectives import REGISTRY as OBJECTIVES
from millrace.pretrain.objectives.base import Objective, Setting
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
    precision = precision_of(config)
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


def precision_of(config: PretrainConfig) -> str:
    """The precision of a run: what `engine.precision` asks for, as its objective and architecture allow."""
    kind: type[Objective] = lookup(OBJECTIVES, config.objective.kind, "objective")
    return choose_precision(config.engine.precision, fp32_weights=kind.fp32_weights(config))


def _run(config: PretrainConfig, world: World, settings: dict[str, Any], precision: str) -> int:
    corpus = Corpus.load(config.data.manifest)
    rundir = RunDir(Path(config.run.dir) / config.run.name)
    with build_loader_at(config, world, None) as probe:
        tokenizer, costs = probe.tokenizer, probe.corpus.costs
    kind, setting = objective_of(config, settings, tokenizer, costs)
    kind.check(setting)
    identity = _identity(config, rundir, corpus)
    with owned(rundir, identity, world) as owner, Watch(config.watchdog, rundir.path, world, owner.number) as watch:
        run_id = world.on_main(lambda: _claim(config, rundir, identity))
        objective = kind.build(setting)
        engine = build_engines(config, world, objective)
        resumed = resume(rundir.checkpoints, engine)
        peak = sum(world.gather_objects(peak_flops(world.device, precision)))
        with (
            Tracker(config.track, rundir.path, to_dict(config), world.main, owner.number) as tracker,
            build_loader_at(config, world, resumed.loader) as loader,
        ):
            parts = Parts(
                config=config,
                objective=objective,
                engine=engine,
                loader=loader,
                rundir=rundir,
                owner=owner,
                tracker=tracker,
                files=run_files(config, objective),
                peak_flops=peak,
                heldout=_heldout(config, world),
                sample=objective.sampler(),
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
            tracker.log("start", **_start_record(parts, how, corpus))
            if world.main:
                write_atomic(rundir.config, to_toml(config))
                _announce(parts, precision)
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


def objective_of(
    config: PretrainConfig, settings: dict[str, Any], tokenizer: Tokenizer, costs: Mapping[str, Any] | None = None
) -> tuple[type[Objective], Setting]:
    """The kind of objective that the configuration names, and what it is built from; `settings` are DeepSpeed's.

    `costs` are the corpus's.
    """
    stage = settings["zero_optimization"]["stage"]
    kind: type[Objective] = lookup(OBJECTIVES, config.objective.kind, "objective")
    return kind, Setting(
        objective=config.objective,
        model=config.model,
        eval=config.eval,
        tokenizer=tokenizer,
        sequence_length=config.data.sequence_length,
        rows=config.data.rows,
        seed=config.run.seed,
        manifests=tuple([config.data.manifest] if isinstance(config.data.manifest, str) else config.data.manifest),
        zero3={**settings, "train_batch_size": config.train.batch} if stage == 3 else None,
        costs=costs or {},
    )


def build_engines(config: Any, world: World, objective: Objective) -> Engines:
    """Every module of the objective, with an optimiser, inside a DeepSpeed engine.

    `config` has the sections `engine` and `optim`.
    """
    engines = {}
    stage = world.accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage"]
    for name, module in objective.modules.items():
        for model in (part for part in module.modules() if isinstance(part, PreTrainedModel)):
            if config.engine.activation_checkpointing and model.supports_gradient_checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            if stage == 3:
                gather_by_block(model)
        optimizer = config.optim.build(module)
        engines[name] = Engine(world, module, optimizer, config.optim.clip, objective.factors.get(name, 1.0))
    made = Engines(engines)
    if config.engine.compile:
        made.compile()
    return made


def _identity(config: PretrainConfig, rundir: RunDir, corpus: Corpus) -> dict[str, Any]:
    begun = rundir.known().get("manifests", [])
    manifests = begun if corpus.extends(begun) else corpus.fingerprints  # shards may join while a run is under way
    return fingerprint(config, manifests)


def _claim(config: PretrainConfig, rundir: RunDir, identity: dict[str, Any]) -> str:
    restore(config.checkpoint.upload, rundir, identity)
    run_id = rundir.claim(identity)
    rundir.outcome.unlink(missing_ok=True)
    return run_id


def run_files(config: PretrainConfig, objective: Objective) -> dict[str, str]:
    """The text files that later stages need beside the weights, by their name in a checkpoint."""
    files = {"config.toml": to_toml(config), **objective.files()}
    if objective.tokenizer is None:
        return files
    with tempfile.TemporaryDirectory() as folder:
        objective.tokenizer.save(folder)
        for path in Path(folder).iterdir():
            files[f"tokenizer/{path.name}"] = path.read_text(encoding="utf-8")
    return files


def _heldout(config: PretrainConfig, world: World) -> Callable[[], Iterator[Any]] | None:
    if not heldout_manifests(config.data):
        return None
    rows = config.eval.rows or None
    return lambda: heldout_batches(config.data, config.train.micro_batch, world.rank, world.size, rows)


def _start_record(parts: Parts, how: tuple[str, str, int | None], corpus: Corpus) -> dict[str, Any]:
    run_id, precision, resumed = how
    return {
        **start_times(),
        "run_id": run_id,
        "world": parts.engine.world.size,
        "zero_stage": parts.engine.zero_stage,
        "precision": precision,
        "resumed_from": resumed,
        "parent": parts.rundir.parent,
        "manifests": list(corpus.fingerprints),
        "params": count_parameters(parts.engine),
        "flops_per_token": parts.objective.flops_per_target,
        "peak_flops": parts.peak_flops,
        "versions": versions(),
    }


def count_parameters(engines: Engines, *, trained: bool = False) -> int:
    """Of all engines; with `trained` those alone that are not frozen."""
    found = (p for p in engines.parameters() if p.requires_grad or not trained)
    return sum(getattr(p, "ds_numel", p.numel()) for p in found)


def versions() -> dict[str, str]:
    """Versions of what decides a run's numbers."""
    from importlib.metadata import version

    names = ("millrace", "torch", "deepspeed", "accelerate", "transformers", "tokenizers")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def _announce(parts: Parts, precision: str) -> None:
    world, config = parts.engine.world, parts.config
    say(
        f"{config.run.name}: {parts.objective.name} with {fmt_count(count_parameters(parts.engine))} parameters, ZeRO "
        f"{parts.engine.zero_stage} on {world.size} rank(s), {precision}, "
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
