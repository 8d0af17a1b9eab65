"""A tiny prepared corpus and configuration, and a runner of scenarios."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_world

CONFIG = """
[data]
manifest = "{manifest}"
sequence_length = 64
window = 32
[model]
kind = "qwen3"
[model.config]
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 1
head_dim = 16
[train]
batch = 8
micro_batch = 1
[engine]
precision = "fp32"
"""


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of 300 short documents of words from a small vocabulary."""
    from millrace.data.prepare import PrepareConfig, prepare

    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 7))) for _ in range(200)]
    lines = [json.dumps({"text": " ".join(rng.choices(words, k=rng.randint(1, 120)))}) for _ in range(300)]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    prepare(PrepareConfig(inputs=[str(folder / "text.jsonl")], out=str(folder / "manifest"), vocab_size=320))
    return folder / "manifest"


@pytest.fixture(scope="session")
def config_file(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.toml"
    path.write_text(CONFIG.format(manifest=corpus))
    return path


class Scenarios:
    """Runs scenarios of `worker.py` and returns their results by name."""

    def __init__(self, config: Path, folder: Path) -> None:
        self.config, self.folder, self.count = config, folder, 0

    def __call__(self, world: int, scenarios: list[dict[str, Any]], timeout: float = 300) -> dict[str, Any]:
        self.count += 1
        job = self.folder / f"job-{self.count}.json"
        job.write_text(json.dumps({"config": str(self.config), "scenarios": scenarios}))
        out = run_world(Path(__file__).with_name("worker.py"), world, [str(job)], timeout)
        line = next(line for line in out.splitlines() if line.startswith("RESULT "))
        return {r["name"]: r for r in json.loads(line[7:])}


@pytest.fixture(scope="session")
def scenarios(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Scenarios:
    return Scenarios(config_file, tmp_path_factory.mktemp("jobs"))


def close(a: list[str], b: list[str]) -> float:
    """Largest relative difference of two lists of losses."""
    pairs = [(float.fromhex(x), float.fromhex(y)) for x, y in zip(a, b, strict=True)]
    return max(abs(x - y) / abs(x) for x, y in pairs)
