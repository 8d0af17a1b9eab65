"""From a configuration to a tuned model: examples, source, adapters, engine; the loop is that of pretraining."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from millrace.core.config import to_dict, to_toml
from millrace.core.console import say
from millrace.core.errors import DONE, UserError
from millrace.core.process import start_times
from millrace.core.registry import lookup
from millrace.core.rundir import RunDir, write_atomic
from millrace.core.units import Duration, fmt_count
from millrace.data.loader import check_batch
from millrace.data.stream import Deal
from millrace.engine.checkpoint.download import restore
from millrace.engine.checkpoint.saver import Saver
from millrace.engine.distributed import World, join_world, leave_world, world_size
from millrace.engine.guard import Guard
from millrace.engine.owner import Ownership, owned
from millrace.engine.peak import peak_flops
from millrace.engine.precision import choose_precision
from millrace.engine.watchdog.watch import Watch
from millrace.engine.zero import deepspeed_config
from millrace.finetune import REGISTRY
from millrace.finetune.config import FinetuneConfig, check, fingerprint
from millrace.finetune.examples import Example, read_records
from millrace.finetune.loader import (
    ExampleLoader,
    Layout,
    heldout_batches,
    require_examples,
    split,
)
from millrace.finetune.loader import fingerprint as hash_examples
from millrace.finetune.lora import add_adapters, peft_config
from millrace.finetune.results import write_results
from millrace.finetune.source import Source, find_source, open_tokenizer, pin
from millrace.finetune.task import Build, Task
from millrace.models.bridge import needs_fp32
from millrace.models.config import ModelConfig
from millrace.pretrain.loop import Parts, fit
from millrace.pretrain.objectives.base import OneModule
from millrace.pretrain.resume import resume, tell_resumed
from millrace.pretrain.run import build_engines, count_parameters, versions
from millrace.pretrain.tracking import Tracker
from millrace.pretrain.uploads import begin_uploads, end_uploads


@dataclass(frozen=True)
class Prepared:
    """What a run is built from, before its model."""

    task: Task
    tokenizer: Any
    train: list[Example]
    heldout: list[Example]
    rundir: RunDir
    run_id: str
    base: str  # the Hugging Face folder or hub name of the first weights
    owner: Ownership
    watch: Watch


def finetune(config: FinetuneConfig) -> int:
    """Run, or continue, the run that `config` describes, as one rank of the world the launcher made.

    The finished run directory holds `adapter/` and `merged/`, or `model/` where every weight was trained.

    Returns:
        The outcome: 0 done, 75 continue me.

    Raises:
        UserError: on every rank, before anything of another run is touched.
    """
    check(config)
    batch, micro_batch = config.train.batch, config.train.micro_batch
    check_batch(batch, micro_batch, world_size())
    precision = _precision(config)
    settings = deepspeed_config(
        config.engine,
        precision,
        micro_batch=micro_batch,
        accumulation=batch // (micro_batch * world_size()),
        clip=config.optim.clip,
    )
    world = join_world(settings)
    try:
        return _run(config, world, settings, precision)
    finally:
        leave_world()


def _precision(config: FinetuneConfig) -> str:
    """What `engine.precision` asks for, as the source's architecture allows."""
    source, fp32 = find_source(config.source), False
    folder = source.folder if source.checkpoint is None else str(source.checkpoint / "model")
    with suppress(UserError):  # a source without a configuration is refused where it is read
        fp32 = needs_fp32(ModelConfig(init=folder))
    return choose_precision(config.engine.precision, fp32_weights=fp32)


def _run(config: FinetuneConfig, world: World, settings: dict[str, Any], precision: str) -> int:
    with prepare(config, world) as prepared:
        objective, model, peft = build_objective(config, prepared, settings)
        engine = build_engines(config, world, objective)
        resumed = resume(prepared.rundir.checkpoints, engine)
        layout = _layout(config, prepared.task, model)
        deal = Deal(config.train.batch, config.train.micro_batch, world.rank, world.size)
        loader = ExampleLoader(prepared.train, layout, deal, pad=_pad(prepared.tokenizer), state=resumed.loader)
        in_steps = _in_steps(config, loader)
        number = prepared.owner.number
        with Tracker(config.track, prepared.rundir.path, to_dict(config), world.main, number) as tracker:
            parts = Parts(
                config=in_steps,  # type: ignore[arg-type]  # the same sections, as far as the loop reads them
                objective=objective,
                engine=engine,
                loader=loader,  # type: ignore[arg-type]
                rundir=prepared.rundir,
                owner=prepared.owner,
                tracker=tracker,
                files=_files(config, model.config, prepared.tokenizer),
                peak_flops=sum(world.gather_objects(peak_flops(world.device, precision))),
                heldout=_heldout(config, prepared, layout, world),
                sample=prepared.task.sampler(model),
                saver=Saver(
                    prepared.rundir.checkpoints,
                    engine.adapter,
                    world,
                    prepared.owner,
                    background=config.checkpoint.background,
                ),
                watch=prepared.watch,
                guard=Guard(config.guard, resumed.guard),
                point=resumed.point,
                identity={"run_id": prepared.run_id, "source": prepared.base},
                uploader=begin_uploads(config.checkpoint.upload, prepared.rundir, world, resumed.point.step),
            )
            tell_resumed(parts, resumed)
            tracker.log("start", **_start_record(parts, prepared, precision, resumed.step))
            if world.main:
                write_atomic(prepared.rundir.config, to_toml(config))
                _announce(parts, prepared, precision)
            if resumed.found is None:
                for entry in parts.sample() if parts.sample else ():
                    tracker.log("sample", step=0, **entry)
            outcome = fit(parts)
            end_uploads(parts, outcome)
        if outcome == DONE:
            written = world.on_main(lambda: _results(prepared, peft))
            if world.main:
                say(f"written: {', '.join(map(str, written))}")
    return outcome


def _results(prepared: Prepared, peft: Any | None) -> list[Path]:
    try:
        return write_results(prepared.rundir, prepared.task, prepared.base, peft)
    except OSError as error:
        raise UserError(
            f"training is done and saved, but its results could not be written into {prepared.rundir.path}: {error}; "
            "free space and start the same command again"
        ) from None


@contextmanager
def prepare(config: FinetuneConfig, world: World) -> Iterator[Prepared]:
    """Read and encode the examples on every rank, own and claim the run directory, pin the source's weights."""
    source = find_source(config.source)
    tokenizer = open_tokenizer(config.data.tokenizer or source.tokenizer)
    task: Task = lookup(REGISTRY, config.objective.kind, "objective")(config, tokenizer)
    data = config.data
    train, heldout = task.encode(
        read_records(data.train, data.columns), read_records(data.heldout, data.columns) if data.heldout else ()
    )
    if not data.heldout:
        train, heldout = split(train, data.heldout_share)
    require_examples(train, f"data.train = '{data.train}'")
    rundir = RunDir(Path(config.run.dir) / config.run.name)
    identity = fingerprint(config, hash_examples(train))
    with owned(rundir, identity, world) as owner, Watch(config.watchdog, rundir.path, world, owner.number) as watch:
        run_id, base = world.on_main(lambda: _claim(config, rundir, identity, source))
        yield Prepared(task, tokenizer, train, heldout, rundir, run_id, base, owner, watch)


def _claim(config: FinetuneConfig, rundir: RunDir, identity: dict[str, Any], source: Source) -> tuple[str, str]:
    restore(config.checkpoint.upload, rundir, identity)
    run_id, base = rundir.claim(identity), rundir.path / "base"
    if not rundir.started:
        shutil.rmtree(base, ignore_errors=True)  # left by a start that failed, perhaps from another source
    rundir.outcome.unlink(missing_ok=True)
    return run_id, pin(source, base)


def build_objective(
    config: FinetuneConfig, prepared: Prepared, settings: dict[str, Any]
) -> tuple[OneModule, Any, Any | None]:
    """(objective, model inside it, peft's configuration or None)."""
    stage = settings["zero_optimization"]["stage"]
    zero3 = {**settings, "train_batch_size": config.train.batch} if stage == 3 else None
    model = prepared.task.model(Build(prepared.base, zero3))
    peft = None
    if config.lora.r:
        peft = peft_config(config.lora, prepared.task.peft_type, prepared.base, prepared.task.heads)
        add_adapters(model, peft, config.run.seed)
    objective = OneModule(prepared.task.objective(model))
    objective.flops_per_target = flops_per_target(model, prepared.train)
    return objective, model, peft


def _layout(config: FinetuneConfig, task: Task, model: Any) -> Layout:
    packs = config.data.pack and task.packs(model.config.model_type)
    return Layout(config.data.sequence_length, packs, config.run.seed, task.per_example)


def _pad(tokenizer: Any) -> int:
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def _in_steps(config: FinetuneConfig, loader: ExampleLoader) -> FinetuneConfig:
    """The configuration with a duration in epochs replaced by its steps."""
    duration = config.train.duration
    if duration.unit != "epochs":
        return config
    steps = Duration(loader.steps(duration.value), "steps")
    return dataclasses.replace(config, train=dataclasses.replace(config.train, duration=steps))


def _heldout(
    config: FinetuneConfig, prepared: Prepared, layout: Layout, world: World
) -> Callable[[], Iterator[Any]] | None:
    if not prepared.heldout:
        return None
    size = config.train.micro_batch
    deal = Deal(size * world.size, size, world.rank, world.size)
    # Not the run's seed: runs of several seeds are judged by the same rows.
    layout, pad = dataclasses.replace(layout, seed=0, once=True), _pad(prepared.tokenizer)
    rows = config.eval.rows or None
    return lambda: heldout_batches(prepared.heldout, layout, deal, pad=pad, max_rows=rows)


def _targets(examples: list[Example]) -> int:
    return sum(int((e.labels != -100).sum()) for e in examples)


def flops_per_target(model: Any, examples: list[Example]) -> float:
    """Training operations for each target: for each position that is read 2 per weight forward, 2 for the gradient of
    what it is given, and 2 for the weight's own gradient where it is trained. Embeddings and attention scores count
    nothing."""
    head = model.get_output_embeddings()
    tied = getattr(head, "weight", None)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding) and m.weight is not tied}
    weights = trained = 0
    for parameter in model.parameters():
        if id(parameter) not in tables:
            size = getattr(parameter, "ds_numel", parameter.numel())
            weights += size
            trained += size if parameter.requires_grad else 0
    positions = sum(len(e.input_ids) for e in examples)
    return (4.0 * weights + 2.0 * trained) * positions / max(_targets(examples), 1)


def _files(config: FinetuneConfig, hf_config: Any, tokenizer: Any) -> dict[str, str]:
    """The text files that later stages need beside the weights, by their name in a checkpoint."""
    files = {"config.toml": to_toml(config), "model/config.json": hf_config.to_json_string(use_diff=False)}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in Path(folder).iterdir():
            files[f"tokenizer/{path.name}"] = path.read_text(encoding="utf-8")
    return files


def _start_record(parts: Parts, prepared: Prepared, precision: str, resumed: int | None) -> dict[str, Any]:
    return {
        **start_times(),
        "run_id": prepared.run_id,
        "world": parts.engine.world.size,
        "zero_stage": parts.engine.zero_stage,
        "precision": precision,
        "resumed_from": resumed,
        "manifests": list(parts.loader.state.stages[-1].manifests),
        "source": prepared.base,
        "examples": {"train": len(prepared.train), "heldout": len(prepared.heldout)},
        "params": count_parameters(parts.engine),
        "trained": count_parameters(parts.engine, trained=True),
        "flops_per_token": parts.objective.flops_per_target,
        "peak_flops": parts.peak_flops,
        "versions": versions(),
    }


def _announce(parts: Parts, prepared: Prepared, precision: str) -> None:
    config, engine = parts.config, parts.engine
    whole, trained = (count_parameters(engine, trained=t) for t in (False, True))
    say(
        f"{config.run.name}: {prepared.base} with {fmt_count(whole)} parameters, {fmt_count(trained)} of them "
        f"trained, on {len(prepared.train)} examples ({len(prepared.heldout)} held out), ZeRO "
        f"{engine.zero_stage} on {engine.world.size} rank(s), {precision}, "
        f"batch {config.train.batch}, until {config.train.duration}"
        + (f", continued from step {parts.point.step}" if parts.point.step else "")
    )
    say(f"run directory: {parts.rundir.path}")
