"""The training loop: every objective runs in it, and it can be read from top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from millrace.core.console import warn
from millrace.core.errors import CONTINUE, DONE, STOP
from millrace.core.rundir import RunDir
from millrace.core.units import Duration
from millrace.data.loader import Loader, spans_sha
from millrace.engine.checkpoint.read import load_checkpoint, open_before
from millrace.engine.checkpoint.saver import Saver
from millrace.engine.checkpoint.upload import Uploader
from millrace.engine.engines import Engines
from millrace.engine.guard import RETURNS, Guard
from millrace.engine.owner import Ownership, taken_over
from millrace.engine.pace import Pace, Straggler
from millrace.engine.replicas import compare_replicas
from millrace.engine.signals import StopRequest
from millrace.engine.watchdog.watch import Watch
from millrace.eval.heldout import evaluate, means
from millrace.pretrain.config import PretrainConfig
from millrace.pretrain.objectives.base import Objective, gather
from millrace.pretrain.progress import Progress
from millrace.pretrain.samples import kept
from millrace.pretrain.saving import end, finish_save, save, too_late
from millrace.pretrain.schedule import Point
from millrace.pretrain.tracking import Tracker


@dataclass
class Parts:
    """What a run is made of; `pretrain.run` builds it, people's own scripts may."""

    config: PretrainConfig
    objective: Objective
    engine: Engines
    loader: Loader
    rundir: RunDir
    owner: Ownership
    tracker: Tracker
    saver: Saver
    guard: Guard
    watch: Watch
    files: dict[str, str]  # written into every checkpoint: configuration, model and tokenizer
    peak_flops: float  # of all ranks together
    heldout: Callable[[], Iterable[Any]] | None = None
    sample: Callable[[], list[dict[str, Any]]] | None = None
    point: Point = field(default_factory=Point)
    identity: dict[str, Any] = field(default_factory=dict)  # run id and lineage, into every checkpoint
    uploader: Uploader | None = None  # on rank 0


def fit(parts: Parts) -> int:
    """Train to the configured duration, or until a signal asks to stop; returns the run's outcome code.

    Every step is: draw a whole global step, add up its targets over all ranks, accumulate the gradient of the summed
    losses divided by that number, judge it, step once. The same decisions are taken on every rank, because they are
    functions of all-reduced values only. A step that is not taken is counted like any other: the step's number says
    which samples were drawn, and the learning rate follows it.
    """
    config, engine = parts.config, parts.engine
    world, duration = engine.world, config.train.duration
    point, last_saved = parts.point, parts.point.step
    pace = Pace(world, parts.watch.hosts)
    steps, stepping, at = iter(parts.loader), 0.0, parts.watch.enter
    names = {"steps": "total_steps", "tokens": "total_tokens", "s": "total_seconds"}
    total: dict[str, Any] = {names[duration.unit]: duration.value}
    with StopRequest() as stop, Progress(**total, enabled=world.main) as progress:
        while point.fraction(duration) < 1:
            number = point.step + 1
            at("data", number)
            began = time.perf_counter()
            batch = next(steps)
            views = [parts.objective.view(micro) for micro in batch.micro_batches]
            waited = time.perf_counter() - began
            at("collective", number)
            tokens, weight, size, bad, asked, writing = _agree(parts, batch, views, bool(stop))
            if asked:
                break
            lr = config.optim.lr * config.schedule.factor(point, duration)
            at("first" if point is parts.point else "step", number)
            figures, square = accumulate(parts.objective, engine, views, weight, pace)
            tracked = _due(Duration(config.track.norms_every, "steps"), point, Point(point.step + 1))
            gradients = engine.norms(gradients=True) if tracked else None
            # Rank 0's clock is everybody's: what is due by time must be due on all ranks. The time of the optimiser,
            # which comes after this last exchange, is counted with the next step.
            spent = time.perf_counter() - began + stepping
            at("collective", number)
            sums, square, clock = _add_up(parts, figures, square, spent)
            norm, before, loss = math.sqrt(square), point, sums["loss"] / (weight or 1.0)
            point = Point(point.step + 1, point.tokens + int(tokens), point.seconds + clock)
            fault = parts.guard.judge(point.step, len(batch.state.stages), loss, norm)
            at("step", number)
            began = time.perf_counter()
            engine.discard() if fault else engine.step(lr)
            parts.objective.end_step(engine, taken=not fault)
            stepping = time.perf_counter() - began
            parts.identity["loader"] = batch.state.to_dict()
            found = means(sums, parts.objective.per, tokens) | {"loss": loss}
            values = {"tokens": tokens, "bytes": size, "nats": sums["loss"], "lr": lr, "grad_norm": norm}
            record = _record(point, found, values)
            record |= {"seconds": clock, "data_wait": waited, **_rates(parts, tokens, clock), "data": _data(batch)}
            parts.tracker.log("step", **record, **({"samples": batch.spans} if config.run.sample_ids else {}))
            progress.update(record)
            if tracked:
                parts.tracker.log("norms", step=point.step, grad=gradients, **_weights(engine, figures))
            for slow in pace.step():
                _tell_straggler(parts, point, slow)
            if bad:
                _quarantine(parts, point, batch.quarantined)
            if fault:
                _tell_skipped(parts, point, fault)
            finish_save(parts, point, writing=bool(writing))  # here, outside of what is timed as a step
            if parts.guard.lost and (stuck := _go_back(parts, point)):
                return end(parts, point, STOP, stuck)
            regular = _due(config.checkpoint.every, before, point)
            saves = regular or _due(config.checkpoint.between, before, point)
            if odd := _odd_replicas(parts, before, point, saves):
                return end(parts, point, CONTINUE, odd)
            heldout = None
            if _due(config.eval.every, before, point) and point.fraction(duration) < 1:
                heldout = _evaluate(parts, point, progress)
            if saves:
                save(parts, point, heldout=heldout, ephemeral=not regular)
                last_saved = point.step
        return _finish(parts, point, stop, progress, unsaved=point.step > last_saved)


def _agree(parts: Parts, batch: Any, views: list[Any], asked: bool) -> list[float]:
    """One all-reduce before the first backward: [targets, weight, text, bad samples, asked to stop, still writing]."""
    objective = parts.objective
    targets, weight = (sum(map(count, views)) for count in (objective.targets, objective.weight))
    size = batch.local_bytes if objective.of_text else 0
    mine = (targets, weight, size, len(batch.quarantined), asked, parts.saver.writing)
    *agreed, lost = parts.engine.world.sum(*mine, parts.owner.lost())
    if lost:
        raise taken_over(parts.rundir.path)
    return agreed


def accumulate(
    objective: Objective, engine: Engines, views: list[Any], weight: float, pace: Pace
) -> tuple[dict[str, float], float]:
    """Forward and backward of every loss of a step; this rank's (figures by name, share of |gradient|²)."""
    losses, found = objective.losses(views, engine), []
    while True:
        with pace.forward():
            loss = next(losses, None)
        if loss is None:
            break
        engine[loss.engine].backward(loss.value, weight or 1.0, last=loss.last)
        found.append(loss.figures)
    figures = gather(found, objective.figures, engine.world.device)
    *values, square = torch.cat([figures, engine.gradient_square()[None]]).tolist()  # the step's only host read
    return dict(zip(objective.figures, values, strict=True)), square


def _add_up(
    parts: Parts, figures: dict[str, float], square: float, spent: float
) -> tuple[dict[str, float], float, float]:
    """Over all ranks: figures that are sums, |gradient|², and the seconds of rank 0."""
    world = parts.engine.world
    (first, loss), *others = ((name, value) for name, value in figures.items() if not name.startswith("max_"))
    found = world.sum(loss, square, spent if world.main else 0.0, *(value for _, value in others))
    return {first: found[0], **dict(zip(dict(others), found[3:], strict=True))}, found[1], found[2]


def _due(every: Duration | None, before: Point, after: Point) -> bool:
    """Whether a multiple of `every` lies in (before, after]."""
    if every is None or not every.value:
        return False
    if every.unit == "steps":
        return after.step // every.value > before.step // every.value
    return after.seconds // every.value > before.seconds // every.value


def _weights(engine: Engines, figures: dict[str, float]) -> dict[str, Any]:
    everywhere = engine.world.gather_objects({n: v for n, v in figures.items() if n.startswith("max_")})
    largest = {name: max(rank[name] for rank in everywhere) for name in everywhere[0]}
    return {"weight": engine.norms(gradients=False), **largest}


def _record(point: Point, found: dict[str, float], values: dict[str, float]) -> dict[str, Any]:
    loss = found.pop("loss")
    return {
        "step": point.step,
        "loss": loss,
        "loss_hex": float(loss).hex(),
        **({"bpb": values["nats"] / math.log(2) / values["bytes"]} if values["bytes"] else {}),
        **({"figures": found} if found else {}),
        "lr": values["lr"],
        "grad_norm": values["grad_norm"],
        "tokens": int(values["tokens"]),
        "tokens_total": point.tokens,
        "seconds_total": point.seconds,
    }


def _rates(parts: Parts, tokens: float, seconds: float) -> dict[str, float]:
    rate, flops = tokens / seconds, parts.objective.flops_per_target
    return {"tokens_per_s": rate, **({} if flops is None else {"mfu": rate * flops / parts.peak_flops})}


def _data(batch: Any) -> dict[str, Any]:
    return {"to": [batch.state.window, batch.state.packs_done], "sha": spans_sha(batch.step_spans)}


def _quarantine(parts: Parts, point: Point, found: list[dict[str, Any]]) -> None:
    """Every rank's entries into the ledger, and to every rank: the budget is one, and nobody takes them later."""
    entries = [entry for rank in parts.engine.world.gather_objects(found) for entry in rank]
    for entry in entries:
        parts.tracker.log("quarantine", step=point.step, **entry)
        if parts.engine.world.main:
            warn(f"step {point.step}: left out sample {entry['sample']} of {entry['shard']}: {entry['why']}")
    parts.loader.exclude({entry["sample"]: entry["why"] for entry in entries})


def _tell_straggler(parts: Parts, point: Point, slow: Straggler) -> None:
    parts.tracker.log("straggler", step=point.step, **asdict(slow))
    if parts.engine.world.main:
        times = f"{slow.seconds:.3f} s for the forward passes of a step, the typical rank {slow.typical:.3f} s"
        warn(f"step {point.step}: rank {slow.rank} on {slow.host} takes {times}")


def _tell_skipped(parts: Parts, point: Point, fault: str) -> None:
    parts.tracker.log("skip", step=point.step, why=fault)
    if parts.engine.world.main:
        warn(f"step {point.step} was not taken: {fault}")


def _go_back(parts: Parts, point: Point) -> str:
    """Load the newest checkpoint that is older than the last step taken; empty, or why the run must stop.

    The loader stays where it is: the samples since that checkpoint are stepped over.
    """
    finish_save(parts, point)  # it may be the one to go back to
    guard, engine, folder = parts.guard, parts.engine, parts.rundir.checkpoints
    why = f"{guard.skipped} steps on end were not taken, the last of them {point.step} (see guard in the configuration)"
    if guard.returns >= RETURNS:
        return f"{why}, after {guard.returns} returns to a checkpoint"
    found = open_before(folder, guard.taken, engine.world)
    if found is None:
        return f"{why}, and no checkpoint is older than the last step taken, {guard.taken}"
    load_checkpoint(found, engine.adapter)
    parts.tracker.log("rollback", step=point.step, to=found.step, why=why)
    guard.go_back(found.json("trainer").get("guard", {}))
    if engine.world.main:
        warn(f"{why}: weights and moments are those of {found.path} now; the samples since are stepped over")
    return ""


def _odd_replicas(parts: Parts, before: Point, point: Point, saves: bool) -> str:
    """What is wrong with the ranks' copies of the weights; looked at now and then, and before they are saved."""
    every = Duration(parts.config.guard.replicas, "steps")
    if not every.value or not (saves or _due(every, before, point)):
        return ""
    odd = compare_replicas(parts.engine.adapter, parts.engine.world, parts.watch.hosts)
    if odd:
        finish_save(parts, point)  # it was looked at before it was begun
        parts.tracker.log("replicas", step=point.step, why=odd)
    return odd


def _evaluate(parts: Parts, point: Point, progress: Progress) -> float | None:
    """Held-out loss (returned, where there is a held-out part) and samples, on every rank; into the ledger."""
    loss = None
    parts.watch.enter("eval", point.step)
    if parts.heldout is not None:
        began = time.perf_counter()
        found = evaluate(parts.objective, parts.engine, parts.heldout())
        loss = found.loss
        text = {"bpb": found.bpb} if parts.objective.of_text and found.bytes else {}  # elsewhere bytes mean nothing
        parts.tracker.log(
            "eval", step=point.step, loss=found.loss, **text, tokens=found.tokens, bytes=found.bytes,
            seconds=time.perf_counter() - began, **found.averages,
        )  # fmt: skip
        more = f" nats/token, {found.bpb:.4f} bits per byte" if text else ""
        more += "".join(f", {name} {value:.4f}" for name, value in found.averages.items())
        progress.say(f"step {point.step}: held-out {found.loss:.4f}{more}")
    for number, entry in enumerate(parts.sample() if parts.sample is not None else ()):
        shown = kept(parts.rundir, point.step, number, entry, main=parts.engine.world.main)
        parts.tracker.log("sample", step=point.step, **shown)
    return loss


def _finish(parts: Parts, point: Point, stop: StopRequest, progress: Progress, *, unsaved: bool) -> int:
    """After the last step of this start: save it, if there is time, and say why it was the last."""
    duration = parts.config.train.duration
    if late := too_late(parts, stop, unsaved):
        return end(parts, point, CONTINUE, late)
    if unsaved:
        if odd := _odd_replicas(parts, point, point, True):
            return end(parts, point, CONTINUE, odd)
        save(parts, point, ephemeral=point.fraction(duration) < 1)
    finish_save(parts, point)
    if not stop and point.fraction(duration) >= 1:
        _evaluate(parts, point, progress)
        earlier = "" if point.step > parts.point.step else " before; raise train.duration to go on"
        return end(parts, point, DONE, f"reached {duration}{earlier}")
    return end(parts, point, CONTINUE, f"asked to stop by {stop.name or 'another rank'}")
