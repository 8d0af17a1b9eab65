"""The three loops of step_speed.py, each in the process that calls `measure`."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import step_model
import torch
from common import Turns, worker_result
from step_model import CLIP, LENGTH, LR, ROWS

DEVICE = (
    torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else torch.device("cpu")
)


def measure(job: dict[str, Any]) -> None:
    """Run the job's arm and hand its figures to the parent."""
    from millrace.engine.peak import measure_matmul
    from millrace.models.bridge import hf_config
    from millrace.models.counts import flops_per_token

    torch.manual_seed(0)
    matmul = measure_matmul(DEVICE, torch.bfloat16 if job["precision"] == "bf16" else torch.float32, seconds=1.0)
    # Counted first: at stage 3 the Trainer tells transformers to partition whatever is built after it.
    flops = flops_per_token(hf_config(step_model.model_config(), step_model.VOCABULARY, LENGTH), LENGTH)
    loop: Callable[[dict[str, Any], Turns], float] = globals()[f"_{job['loop']}"]
    profiler = _profiled(job) if job["profile"] else contextlib.nullcontext({})
    with profiler as found:
        loss = loop(job, Turns(job["warmup"], job["steps"]))
    worker_result(matmul_flops=matmul * job["ranks"], flops_per_token=flops, last_loss=loss, **found)


def _total(job: dict[str, Any]) -> int:
    return int(job["warmup"] + job["steps"] * job["turns"])


def _millrace(job: dict[str, Any], turns: Turns) -> float:
    """The real run: configuration, loader, engine, loop, ledger, final checkpoint."""
    from millrace.core.config import load_config
    from millrace.engine.engine import Engine
    from millrace.pretrain.config import PretrainConfig
    from millrace.pretrain.run import pretrain

    name = f"run-{os.environ['MASTER_PORT']}"
    overrides = {
        "run.dir": job["folder"], "run.name": name, "data.manifest": job["manifest"],
        "data.sequence_length": LENGTH, "train.batch": ROWS, "train.micro_batch": ROWS // job["ranks"],
        "train.duration": f"{_total(job)} steps", "engine.zero_stage": job["stage"],
        "engine.precision": job["precision"], "engine.compile": json.dumps(job["compile"]),
        "optim.lr": LR, "optim.clip": CLIP, "schedule.warmup": "1 steps",
        "checkpoint.every": "100000 steps", "eval.every": "100000 steps",
    }  # fmt: skip
    step = Engine.step

    def step_and_wait(engine: Engine, lr: float) -> float:
        norm = step(engine, lr)
        turns.step_done()  # what the loop does between two of these is timed too
        return norm

    Engine.step = step_and_wait  # type: ignore[method-assign]
    sizes = [f"model.config.{key}={json.dumps(value)}" for key, value in step_model.SIZES.items()]
    pretrain(load_config(PretrainConfig, None, [*(f"{k}={v}" for k, v in overrides.items()), *sizes]))
    records = [json.loads(line) for line in (Path(job["folder"]) / name / "ledger.jsonl").read_text().splitlines()]
    return float([record for record in records if record["event"] == "step"][-1]["loss"])


def _bare(job: dict[str, Any], turns: Turns) -> float:
    """What one writes without a framework: full logits, one backward, clip, fused AdamW."""
    model = step_model.plain_model().to(DEVICE)
    inputs, labels = (torch.from_numpy(a) for a in step_model.rows_of(Path(job["manifest"])))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def loss_of(ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=job["precision"] == "bf16"):
            logits = model(input_ids=ids, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    forward = torch.compile(loss_of) if job["compile"] else loss_of
    loss = 0.0
    for step in range(_total(job)):
        rows = slice(step * ROWS % len(inputs), step * ROWS % len(inputs) + ROWS)
        value = forward(inputs[rows].to(DEVICE), labels[rows].to(DEVICE))
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        loss = float(value)
        turns.step_done()
    return loss


def _trainer(job: dict[str, Any], turns: Turns) -> float:
    """transformers' Trainer, with our DeepSpeed configuration where the arm has a stage."""
    import torch.distributed as dist
    from transformers import Trainer, TrainerCallback, TrainingArguments

    if "stage" in job or job["ranks"] > 1:
        dist.init_process_group("nccl" if DEVICE.type == "cuda" else "gloo")
    # Before the arguments, which tell transformers to partition whatever is built after them at stage 3.
    model = step_model.plain_model()
    deepspeed = _deepspeed(job, sum(p.numel() for p in model.parameters()))
    arguments = TrainingArguments(
        output_dir=job["folder"], max_steps=_total(job), learning_rate=LR, max_grad_norm=CLIP,
        per_device_train_batch_size=ROWS // job["ranks"], lr_scheduler_type="constant", optim="adamw_torch_fused",
        adam_beta2=0.95, weight_decay=0.1, bf16=job["precision"] == "bf16", torch_compile=job["compile"], report_to=[],
        save_strategy="no", logging_steps=1, disable_tqdm=True, deepspeed=deepspeed, ddp_backend=None,
        use_cpu="stage" not in job and DEVICE.type == "cpu",
    )  # fmt: skip

    class Clock(TrainerCallback):
        def on_step_end(self, *_args: Any, **_more: Any) -> None:
            turns.step_done()

    rows = [{"input_ids": i, "labels": i} for i in step_model.rows_of(Path(job["manifest"]))[0]]
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[Clock()])  # type: ignore[arg-type]
    trainer.train()
    return next(r["loss"] for r in reversed(trainer.state.log_history) if "loss" in r)


def _deepspeed(job: dict[str, Any], parameters: int) -> dict[str, Any] | None:
    if "stage" not in job:
        return None
    from millrace.engine.config import EngineConfig
    from millrace.engine.zero import deepspeed_config, fit_buckets

    os.environ.setdefault("DS_ACCELERATOR", "cuda" if DEVICE.type == "cuda" else "cpu")
    settings = EngineConfig(zero_stage=job["stage"])
    made = deepspeed_config(settings, job["precision"], micro_batch=ROWS // job["ranks"], accumulation=1, clip=CLIP)
    fit_buckets(made, parameters)
    return {**made, "gradient_clipping": CLIP}


@contextlib.contextmanager
def _profiled(job: dict[str, Any]) -> Iterator[dict[str, str]]:
    """Profile the timed steps of the block and name the engine's parts in them.

    At ZeRO 2 and 3 half as many of each: there DeepSpeed steps the optimiser once for each group of parameters.
    """
    from torch.optim.optimizer import register_optimizer_step_post_hook
    from torch.profiler import ProfilerActivity, profile, record_function, schedule

    from millrace.engine.engine import Engine

    for part in ("forward", "backward", "step"):
        whole = getattr(Engine, part)

        def named(*args: Any, _whole: Any = whole, _part: str = part, **more: Any) -> Any:
            with record_function(f"millrace: {_part}"):
                return _whole(*args, **more)

        setattr(Engine, part, named)
    found: dict[str, str] = {}
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (DEVICE.type == "cuda")
    timed = schedule(wait=0, warmup=job["warmup"], active=job["steps"] * job["turns"], repeat=1)
    with profile(activities=activities, schedule=timed, acc_events=True) as seen:
        hook = register_optimizer_step_post_hook(lambda *_: seen.step())  # every loop steps a torch optimiser
        yield found
        hook.remove()
    events = seen.key_averages()
    by = "self_cuda_time_total" if DEVICE.type == "cuda" else "self_cpu_time_total"
    found["profile"] = events.table(sort_by=by, row_limit=30, max_name_column_width=60)
    ours = [e for e in events if e.key.startswith("millrace: ")]
    found["parts"] = "\n".join(f"{e.key:<20} {e.cpu_time_total / e.count / 1e3:9.1f} ms, {e.count} times" for e in ours)
