"""How often what belongs together is found among many: recall at k of a contrastive run.

N samples, W width of the space that the towers share.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from dataclasses import replace
from itertools import permutations
from math import comb, prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from millrace.core.config import build
from millrace.core.errors import UserError
from millrace.data.config import DataConfig
from millrace.data.loader import heldout_batches
from millrace.engine.checkpoint.read import Checkpoint, open_verified
from millrace.models.config import TowerConfig
from millrace.models.towers import Tower, build_encoder

_CHANCE = {"scale", "flip", "shift", "strength", "anywhere", "gain", "noise", "count"}  # what makes a view random


def recall(queries_NW: Tensor, found_NW: Tensor, k: int, among: int | None = None) -> float:
    """Share of queries whose own vector is one of the k most similar; others that are as similar come before it.

    With `among`, the mean over all choices of its own and `among` - 1 others: of the N - 1 others `better` are before
    its own, and how many of them are chosen is distributed hypergeometrically.
    """
    similar_NN = queries_NW @ found_NW.T
    better = (similar_NN >= similar_NN.diagonal()[:, None]).sum(1) - 1
    others = len(better) - 1
    drawn = others if among is None else among - 1
    if not 0 <= drawn <= others:
        raise UserError(f"recall among {among} of {others + 1} samples: give 1 to {others + 1}")

    def chance(ahead: int) -> float:
        ways = sum(comb(ahead, n) * comb(others - ahead, drawn - n) for n in range(min(k, drawn + 1)))
        return ways / comb(others, drawn)

    return sum(chance(ahead) for ahead in better.tolist()) / len(better)


def retrieval(source: str | Path, manifest: str, ks: tuple[int, ...] = (1, 5, 10), among: int = 100) -> dict[str, Any]:
    """{"source", "samples", "among", "recall": {"image to tokens": {"1": …}}} of a run on a manifest's samples.

    Raises:
        UserError: a checkpoint of another objective, or a manifest that lacks what a tower is given.
    """
    checkpoint = open_verified(Path(source))
    features = embed(checkpoint, manifest)
    count = len(next(iter(features.values())))
    among = min(among, count)
    ways = {
        f"{a} to {b}": {str(k): recall(features[a], features[b], k, among) for k in ks}
        for a, b in permutations(features, 2)
    }
    parameters = sum(prod(shape) for shape in checkpoint.manifest["params"].values())
    origin = {"kind": "checkpoint", "path": str(checkpoint.path), "step": checkpoint.step, "parameters": parameters}
    origin |= {"dtype": "fp32", "device": "cpu"}
    return {"source": origin, "samples": count, "among": among, "recall": ways}


@torch.inference_mode()
def embed(checkpoint: Checkpoint, manifest: str, rows: int = 32) -> dict[str, Tensor]:
    """What each tower of a contrastive run makes of a manifest's samples, float32 (N, W), seen without chance."""
    table = tomllib.loads(checkpoint.text("config.toml"))
    data = build(DataConfig, table["data"])
    views = [{key: value for key, value in view.items() if key not in _CHANCE} for view in data.views]
    data = replace(data, heldout=manifest, views=views, tokenizer=str(checkpoint.path / "tokenizer"))
    towers = open_towers(checkpoint, table["objective"])
    found: dict[str, list[Tensor]] = {name: [] for name in towers}
    for batch, _ in heldout_batches(data, rows, 0, 1):
        for name, features in _features(towers, batch):
            found[name].append(features)
    return {name: torch.cat(parts) for name, parts in found.items()}


def open_towers(checkpoint: Checkpoint, section: dict[str, Any]) -> dict[str, Tower]:
    """The towers of a checkpoint by the name of what they are given; `section` is the objective's.

    Raises:
        UserError: the checkpoint is of another objective.
    """
    if section.get("kind") != "contrastive":
        raise UserError(f"{checkpoint.path} is of objective.kind = '{section.get('kind')}', which has no towers")
    there = {name: checkpoint.master(name) for name in checkpoint.manifest["params"]} | checkpoint.fixed()
    towers = {}
    for given in section["towers"]:
        config = build(TowerConfig, given)
        prefix = f"towers.{config.name}."
        weights = {key.removeprefix(prefix): value for key, value in there.items() if key.startswith(prefix)}
        vocabulary = next((len(v) for key, v in weights.items() if key.endswith("word_embeddings.weight")), 1)
        tower = Tower(config, build_encoder(config, vocabulary, 0, None), len(weights["projection.weight"]), 0)
        tower.load_state_dict(weights)
        towers[config.name] = tower.eval()
    return towers


def _features(towers: dict[str, Tower], batch: Any) -> Iterator[tuple[str, Tensor]]:
    good = torch.tensor(batch.good)
    for name, tower in towers.items():
        if name not in batch.values:
            raise UserError(f"samples have no '{name}'; they have {', '.join(batch.values)}")
        given = tower.inputs(batch.values[name], batch.lengths.get(name), torch.device("cpu"))
        yield name, tower(**given)[good]
