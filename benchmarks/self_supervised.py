"""Self-supervised encoders against the same encoders with random weights: nearest neighbours and a linear probe.

    python benchmarks/self_supervised.py [--corpora mnist xrays] [--methods masked self] [--seeds 0] [--minutes 4]
        [--dir FOLDER] [section.key=value …]

`masked` is objective.kind = masked_image (MAE), `self` is self_distillation (DINO); both train a ViT of 3 layers and
patches of 4 pixels (0.3M parameters) on the training images of a corpus without their labels. Then labels are used: the
frozen features of training and held-out images are judged as `millrace eval --probe` does. Of X-rays the 3 held-out
images that are also among those of training are left out. About 5 minutes a run on 2 cores.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import common
import corpora
import pyarrow.parquet as pq

from millrace.core.ledger import read
from millrace.data.prepare import PrepareConfig, prepare
from millrace.eval.encoder import open_encoder
from millrace.eval.probe import probe
from millrace.launch.train import pretrain

_VIT = {
    "image_size": 20, "patch_size": 4, "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 3,
    "intermediate_size": 384,
}  # fmt: skip
_DECODER = {
    "decoder_hidden_size": 64, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 4,
    "decoder_intermediate_size": 256,
}  # fmt: skip
# What does not change the meaning of a picture, by corpus.
_LOOKS: dict[str, dict[str, Any]] = {"mnist": {"flip": False}, "xrays": {"flip": True}}


def methods(corpus: str) -> dict[str, dict[str, Any]]:
    """Overrides of each method."""
    look = {"role": "image", **_LOOKS[corpus]}
    large = look | {"name": "large", "count": 2, "size": 20, "scale": [0.5, 1.0], "strength": 0.3}
    small = look | {"name": "small", "count": 2, "size": 8, "scale": [0.2, 0.5], "strength": 0.3}
    return {
        "masked": {
            "objective.kind": "masked_image", "model.kind": "vit_mae", "model.config": _VIT | _DECODER,
            "data.views": [look | {"size": 20, "scale": [0.6, 1.0]}], "train.batch": 64, "train.micro_batch": 64,
            "optim.lr": 1.5e-3, "optim.weight_decay": 0.05,
        },
        "self": {
            "objective.kind": "self_distillation", "model.kind": "vit", "model.config": _VIT,
            "objective.outputs": 64, "objective.hidden": 256, "objective.bottleneck": 64, "objective.decay": 0.996,
            "objective.sharpness": 0.01, "objective.centre": 0.5,
            "data.views": [large, small], "train.batch": 32, "train.micro_batch": 32,
            "optim.lr": 5e-4, "optim.weight_decay": 0.05,
        },
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--corpora", nargs="+", default=list(_LOOKS), choices=list(_LOOKS))
    parser.add_argument("--methods", nargs="+", default=["masked", "self"], choices=["masked", "self"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument(
        "--dir", type=Path, default=common.ROOT / "runs" / "self_supervised", help="where runs are kept"
    )
    options = parser.parse_intermixed_args()
    common.warn_if_busy()
    environment, found = common.environment(), []
    for corpus in options.corpora:
        data = _prepare(corpus, options.dir / corpus)
        for method in options.methods:
            for seed in options.seeds:
                found.append(_arm((corpus, method, seed), data, options))
    result = {"environment": environment, "overrides": options.overrides, "minutes": options.minutes, "runs": found}
    columns = ("corpus", "method", "seed", "steps", "neighbours", "untrained", "probe", "untrained")
    rows = [_row(run) for run in found]
    common.report("frozen features, held-out accuracy", columns, rows, common.save("self_supervised", result))


def _row(run: dict[str, Any]) -> tuple[object, ...]:
    pairs = [(run["trained"][how], run["untrained"][how]) for how in ("knn", "linear")]
    figures = [f"{share:.3f}" for pair in pairs for share in pair]
    return run["corpus"], run["method"], run["seed"], run["steps"], *figures


def _prepare(corpus: str, folder: Path) -> dict[str, str]:
    """Manifests of both parts; no held-out image is among those of training."""
    paths = corpora.write(corpus, folder)
    train, heldout = (pq.read_table(paths[part]) for part in ("train", "heldout"))
    seen = set(train.column("image").to_pylist())
    fresh = folder / "fresh.parquet"
    new = [place for place, image in enumerate(heldout.column("image").to_pylist()) if image not in seen]
    pq.write_table(heldout.take(new), fresh, row_group_size=256)
    made = {}
    for part, path in (("train", paths["train"]), ("heldout", fresh)):
        made[part] = str(folder / part)
        shutil.rmtree(made[part], ignore_errors=True)
        prepare(PrepareConfig(inputs=[str(path)], out=made[part], image="image", count_tokens=False))
    return made


def _arm(arm: tuple[str, str, int], data: dict[str, str], options: argparse.Namespace) -> dict[str, Any]:
    corpus, method, seed = arm
    name = "-".join(map(str, arm))
    shutil.rmtree(options.dir / name, ignore_errors=True)
    given = {
        "data.manifest": data["train"], "data.rows": "samples", "run.dir": str(options.dir), "run.name": name,
        "run.seed": seed, "train.duration": f"{round(options.minutes * 60)} s", "checkpoint.every": "100k steps",
        "engine.precision": "fp32", "engine.zero_stage": 0,
        "schedule.kind": "cosine", "optim.betas": [0.9, 0.95], **methods(corpus)[method],
    }  # fmt: skip
    code = pretrain([*_toml(given), *options.overrides])
    if code:
        raise SystemExit(f"the run {name} ended with exit code {code}; see {options.dir / name}")
    steps = [record for record in read(options.dir / name / "ledger.jsonl") if record["event"] == "step"]
    judged = {
        what: probe(open_encoder(options.dir / name, untrained=what == "untrained"), list(data.values()), "label")
        for what in ("trained", "untrained")
    }
    last = {"loss": steps[-1]["loss"], "figures": steps[-1].get("figures", {})}
    size = {"steps": len(steps), "images": steps[-1]["tokens_total"], "seconds": steps[-1]["seconds_total"]}
    return {"corpus": corpus, "method": method, "seed": seed, **size, "last": last, **judged}


def _toml(given: dict[str, Any]) -> list[str]:
    """Overrides; kinds first, for they clear their sections."""
    order = sorted(given, key=lambda key: not key.endswith(".kind"))
    return [f"{key}={_value(given[key])}" for key in order]


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_value(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    return f'"{value}"' if isinstance(value, str) else str(value).lower()


if __name__ == "__main__":
    main()
