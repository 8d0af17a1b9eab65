"""One decoder for text, images and sounds: the same on any ranks and stages, though a rank lacks a modality."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn import functional as F

from millrace.core.config import build
from millrace.core.errors import UserError
from millrace.data.batch import Media, MicroBatch
from millrace.data.config import DataConfig
from millrace.data.loader import build_loader
from millrace.data.modalities.base import modality
from millrace.data.prepare import PrepareConfig, prepare
from millrace.eval.coder import CodecCoder
from millrace.eval.decoding import Sampling, Wanted, decode
from millrace.models.bridge import build_sized
from millrace.models.codec import Codec, CodecConfig
from millrace.models.config import ModelConfig
from millrace.models.templates import Row
from millrace.models.vocabulary import NOTHING, closing, opening
from millrace.pretrain.objectives.documents import laid
from tests.eval.test_any_to_any import png, wav
from tests.pretrain.samples_worker import BAD, CODES, LR, ROWS, objective_of, samples
from tests.pretrain.stages import HALF, STAGES, Found

SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16,
}  # fmt: skip
TEMPLATES = [
    {"row": "image > text", "weight": 2.0}, {"row": "text > image"}, {"row": "audio > text"}, {"row": "text audio"},
    {"row": "text", "weight": 0.5},
]  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {
    "image": {"widths": [8, 8], "strides": [2, 2], "latent": 4},
    "audio": {"modality": "audio", "widths": [8], "strides": [2], "latent": 4,
              "mel": {"rate": 8000, "window": 64, "hop": 32, "bands": 16}},
}  # fmt: skip
VIEWS = {"image": {"role": "image", "size": 12}, "audio": {"role": "audio", "rate": 8000, "seconds": 0.05}}


def prepared(folder: Path) -> list[str]:
    """Manifests of a few coded pictures and sounds, with the codecs beside them."""
    made, files, tokenizer = [], {"image": png(0), "audio": wav(0)}, None
    for name, sizes in SIZES.items():
        codec: Codec = build_sized(ModelConfig(kind="codec", config=sizes | {"codes": CODES[name]}), CodecConfig, 0)
        coder = CodecCoder(codec.eval(), build(modality(name).view, VIEWS[name]))
        pq.write_table(pa.table({name: [files[name]] * 2, "text": ["mill", "race"]}), folder / f"{name}.parquet")
        how: dict[str, Any] = {"vocab_size": 257} if tokenizer is None else {"tokenizer": str(tokenizer)}
        config = PrepareConfig(
            inputs=[str(folder / f"{name}.parquet")], out=str(folder / name), text="text", media={name: name}, **how
        )
        prepare(config, coders={name: coder})
        tokenizer = tokenizer or folder / name / "tokenizer"
        made.append(str(folder / name))
    return made


def kind_of(manifests: list[str]) -> dict[str, Any]:
    chosen = {"kind": "any_to_any", "templates": TEMPLATES, "drop": 0.3, "prompt": 0.1, "weights": {"text": 2.0}}
    return {"objective": chosen, "model": {"kind": "qwen3", "config": SMALL}, "manifests": manifests}


@pytest.fixture(scope="module")
def kind(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return kind_of(prepared(tmp_path_factory.mktemp("manifest")))


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory, kind: dict[str, Any]) -> Found:
    bf16 = {**kind, "name": "bf16", "stage": 2, "precision": "bf16"}
    shown = [
        {**kind, "name": f"shown {stage}", "stage": stage, "threshold": 0, "steps": 2, "shown": f"{__name__}:written"}
        for stage in (0, 3)
    ]
    return Found(tmp_path_factory.mktemp("quick"), {"any": kind}, ("zero0", "zero3"), [bf16, *shown])


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, kind: dict[str, Any]) -> Found:
    return Found(tmp_path_factory.mktemp("any"), {"any": kind}, STAGES)


def test_ranks_with_other_modalities_are_as_one_process(quick: Found) -> None:
    """Rank 0 has the images, rank 1 the sounds; see `samples`."""
    quick.check("any")
    losses = quick.losses("any")
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_at_every_stage(found: Found) -> None:
    found.check("any")


def written(objective: Any, engines: Any) -> list[list[int]]:
    """What the model in training writes; called on every rank."""
    model, codes = engines.main.module.model, objective.vocabulary.codes["image"]
    prompts = [objective._layout.prompt([("text", np.array(words))], "image") for words in ([5, 6], [7])]
    null = objective._layout.prompt([], "image")
    return decode(model, prompts, null, Wanted(codes, frozenset(), 9), Sampling(guidance=1.0))


def test_partitioned_models_write_as_whole_ones(quick: Found) -> None:
    """In training, at ZeRO 3."""
    whole, partitioned = quick.results["shown 0"], quick.results["shown 3"]
    assert partitioned["shown"] == whole["shown"]
    assert [len(row) for row in partitioned["shown"]] == [9, 9]


def test_codecs_stay_exact_in_bf16(quick: Found) -> None:
    kept = {name: dtype for name, dtype in quick.results["bf16"]["buffers"].items() if name.startswith("codecs.")}
    assert len(kept) > 20 and set(kept.values()) == {"torch.float32"}


def test_equals_plain_torch(quick: Found, kind: dict[str, Any]) -> None:
    """Every row alone, its loss by torch's cross-entropy on all logits, weighted by hand."""
    result = quick.results["any 2 zero3 whole"]
    names = result["figures"]
    for step, expected in zip(result["found"][:HALF], _reference(kind, HALF), strict=True):
        got = dict(zip(names, step, strict=False))
        for name, value in expected.items():
            assert got[name] == pytest.approx(value, rel=1e-3, abs=1e-6), name


def _reference(kind: dict[str, Any], steps: int) -> Iterator[dict[str, float]]:
    objective: Any = objective_of(kind)
    model = objective.modules["model"].model
    optimiser = torch.optim.AdamW(model.parameters(), LR)
    for number in range(steps):
        batch = samples(number, 0, ROWS)
        sums: dict[str, Any] = {"loss": 0.0}
        weight = 0.0
        for row in range(ROWS):
            if row == BAD:
                continue
            made = _row(objective, batch, row)
            logits = model(input_ids=made.tokens[None, :-1]).logits[0]
            nll = F.cross_entropy(logits, made.tokens[1:], reduction="none")
            sums["loss"] = sums["loss"] + (nll * made.shares).sum()
            weight += made.shares.sum().item()
            for place, name in enumerate(objective.per):
                mine = (made.kinds == place) & (made.shares > 0)
                sums[name] = sums.get(name, 0.0) + nll[mine].sum().item()
                sums[objective.per[name]] = sums.get(objective.per[name], 0.0) + mine.sum().item()
        optimiser.zero_grad()
        (sums["loss"] / weight).backward()
        optimiser.step()
        yield {name: float(torch.as_tensor(value).detach()) / weight for name, value in sums.items()}


def _row(objective: Any, batch: Any, row: int) -> Any:
    """The row that sample `row` alone becomes, as tensors."""
    parts = {"text": batch.values["tokens"][row, : batch.lengths["tokens"][row]].numpy()}
    for name in ("image", "audio"):
        parts[name] = batch.values[f"{name}_codes"][row, : batch.lengths[f"{name}_codes"][row]].numpy()
    made = objective._row(parts, np.random.default_rng(int(batch.seeds[row])))
    shares = torch.from_numpy(made.shares).float()
    return dataclasses.replace(
        made, tokens=torch.from_numpy(made.tokens), shares=shares, kinds=torch.tensor(made.kinds)
    )


def test_a_row_is_the_same_in_any_micro_batch(kind: dict[str, Any]) -> None:
    objective: Any = objective_of(kind)
    whole = objective.view(samples(3, 0, ROWS))
    parts = [objective.view(samples(3, first, first + 2)) for first in range(0, ROWS, 2)]
    assert whole.input_ids_BT.shape[0] == 1 and whole.input_ids_BT.shape[1] % 64 == 0
    assert whole.seq_lens[0] == [length for part in parts for length in part.seq_lens[0]]
    used = [part.input_ids_BT[0, : sum(part.seq_lens[0])] for part in parts]
    assert torch.equal(whole.input_ids_BT[0, : sum(whole.seq_lens[0])], torch.cat(used))
    assert objective.weight(whole) == pytest.approx(sum(objective.weight(part) for part in parts))
    assert objective.targets(whole) == sum(objective.targets(part) for part in parts)


def test_a_share_of_the_prompts_is_left_out(kind: dict[str, Any]) -> None:
    section = kind["objective"] | {"templates": [{"row": "image > text"}], "drop": 0.25}
    objective: Any = objective_of({**kind, "objective": section})
    nothing = objective.vocabulary.tags[NOTHING]
    batches = [objective.view(samples(number, 0, 4)) for number in range(300)]
    count = sum((batch.input_ids_BT == nothing).sum().item() for batch in batches)
    assert count / 1200 == pytest.approx(0.25, abs=0.05)  # four deviations
    for batch in batches[:20]:
        assert not batch.shares_BT[batch.labels_BT == -100].any()
        assert not (batch.labels_BT == nothing).any()


def test_rows_without_a_template_have_no_targets(kind: dict[str, Any]) -> None:
    section = kind["objective"] | {"templates": [{"row": "image > text"}]}
    objective: Any = objective_of({**kind, "objective": section})
    empty = objective.view(samples(0, ROWS // 2, ROWS))  # sounds and text alone
    assert (objective.targets(empty), objective.weight(empty), empty.seq_lens) == (0, 0.0, [[]])
    module = objective.modules["model"]
    loss, figures = module(**module.inputs(empty, torch.device("cpu")))
    loss.backward()
    assert loss.item() == 0 and not figures.isnan().any()
    assert not any(p.grad.isnan().any() or p.grad.any() for p in module.parameters() if p.grad is not None)


def test_long_micro_batches_take_several_rows() -> None:
    rows = [Row(np.arange(31) + number, np.ones(30), np.zeros(30, np.int64)) for number in range(5)]
    packed = laid(rows, 64, 0)
    assert packed.seq_lens == [[30, 30], [30, 30], [30]] and packed.input_ids_BT.shape == (3, 64)
    assert packed.labels_BT[1, 30:60].tolist() == list(range(4, 34))
    assert packed.position_ids_BT[2].tolist() == [*range(30), *range(34)]


@pytest.mark.parametrize("whole", [True, False])
def test_rows_of_a_loader_keep_their_places(kind: dict[str, Any], whole: bool) -> None:
    """Two spans of text around a sample with a picture: the text stays, the sample becomes its template's row."""
    templates = [{"row": "text", "weight": 1e-9}, *([{"row": "text > image"}] if whole else [])]
    section = kind["objective"] | {"templates": templates, "drop": 0.0, "prompt": 0.25, "weights": {}}
    objective: Any = objective_of({**kind, "objective": section})
    codes = torch.arange(9, dtype=torch.int32)
    inputs, labels = torch.arange(40)[None] % 50, torch.arange(1, 41)[None] % 50
    lengths, fill = [6, 1 + 11 + 4, 5], 13  # BOS, nine codes between two tags, four words
    labels[0, 27:] = -100
    positions = torch.cat([*(torch.arange(length) for length in lengths), torch.arange(fill)])[None]
    spans = np.array([[0, 3, 9], [1, 0, 16], [2, 0, 5]])
    micro = MicroBatch(inputs, labels, positions, [spans], [Media("image_codes", 0, 7, 11, codes)], np.array([3]))
    made = objective.view(micro)
    assert made.seq_lens == [lengths] and torch.equal(made.position_ids_BT, positions)
    for part in (slice(0, 6), slice(22, 27)):
        assert torch.equal(made.input_ids_BT[0, part], inputs[0, part])
        assert torch.equal(made.labels_BT[0, part], labels[0, part])
    known, words = objective.vocabulary.tags, [18, 19, 20, 21]
    row = [0, *words, 0]
    if whole:
        picture = (codes + objective.vocabulary.codes["image"].start).tolist()
        row = [0, *words, known[opening("image")], *picture, known[closing("image")], 0]
    rest = 16 - (len(row) - 1)
    assert made.input_ids_BT[0, 6:22].tolist() == row[:-1] + [0] * rest
    assert made.labels_BT[0, 6:22].tolist() == row[1:] + [-100] * rest
    assert made.shares_BT[0, 6:22].tolist() == [0.25 if whole else 1.0] * 4 + [1.0] * (len(row) - 5) + [0.0] * rest
    assert not (made.labels_BT[0, 27:] != -100).any() and not made.shares_BT[0, 27:].any()


def test_rows_of_the_loader_hold_whole_samples_and_pieces_of_text(kind: dict[str, Any], tmp_path: Path) -> None:
    """Pictures with words and sounds with words beside long texts, packed: every code is a target once an epoch."""
    tokenizer = Path(kind["manifests"][0]) / "tokenizer"
    (tmp_path / "long.txt").write_text("\n\n".join("the mill " * 20 for _ in range(3)))
    prepare(PrepareConfig(inputs=[str(tmp_path / "long.txt")], out=str(tmp_path / "long"), tokenizer=str(tokenizer)))
    templates = [{"row": "text > image"}, {"row": "audio > text"}, {"row": "text", "weight": 1e-9}]
    objective: Any = objective_of({**kind, "objective": kind["objective"] | {"templates": templates, "drop": 0.0}})
    config = DataConfig(manifest=[*kind["manifests"], str(tmp_path / "long")], sequence_length=64, prefetch=0)
    counts = dict.fromkeys(objective.per, 0)
    with build_loader(config, seed=0, batch_rows=4, micro_batch=4, rank=0, world=1) as loader:
        seen: set[int] = set()
        while len(seen) < 5:
            micro = next(loader).micro_batches[0]
            seen |= {int(sample) for spans in micro.row_spans for sample in spans[:, 0]}
            made = objective.view(micro)
            assert made.seq_lens == micro.seq_lens and torch.equal(made.position_ids_BT, micro.position_ids_BT)
            for place, name in enumerate(objective.per):
                counts[name] += int(((made.kinds_BT == place) & (made.shares_BT > 0)).sum())
            texts = torch.tensor([[not any(m.row == r for m in micro.media)] for r in range(4)]).expand(4, 64)
            assert torch.equal(made.labels_BT[texts], micro.labels_BT[texts])
    assert counts["text_prompt"] > 0 and counts["text_answer"] > counts["text_prompt"]
    assert counts["image_answer"] % 12 == 0 < counts["image_answer"]  # nine codes, two tags, the end
    assert counts["audio_prompt"] % 9 == 0 < counts["audio_prompt"]  # seven codes, two tags


def test_what_a_row_takes_is_drawn_span_by_span(kind: dict[str, Any]) -> None:
    section = kind["objective"] | {"templates": [{"row": "text > image"}, {"row": "image > text"}], "drop": 0.0}
    objective: Any = objective_of({**kind, "objective": section})
    count, length = 40, 1 + 11 + 2
    inputs = torch.ones(1, count * length, dtype=torch.long)
    spans = np.stack([np.arange(count), np.zeros(count), np.full(count, length)], 1).astype(np.int64)
    media = [Media("image_codes", 0, 1 + n * length, 11, torch.arange(9)) for n in range(count)]
    positions = torch.arange(length).repeat(count)[None]
    made = objective.view(MicroBatch(inputs, inputs, positions, [spans], media, np.array([5])))
    first = made.input_ids_BT[0, 1::length]
    pictures = int((first == objective.vocabulary.tags[opening("image")]).sum())
    assert 8 <= pictures <= 32  # four deviations of a half


@pytest.mark.parametrize(
    ("section", "why"),
    [
        ({"templates": []}, "objective.templates: name the rows"),
        (
            {"templates": [{"row": "video > text"}]},
            "there are no codes of 'video', only of image, audio, and text",
        ),
        ({"templates": [{"rows": "text"}]}, "must be such as"),
        ({"weights": {"smell": 1.0}}, "no template has smell"),
        ({"drop": 1.0}, "needs drop from 0 to below 1"),
    ],
)
def test_bad_sections(kind: dict[str, Any], section: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=why):
        objective_of({**kind, "objective": kind["objective"] | section})


def test_a_model_that_is_too_small_is_told(kind: dict[str, Any]) -> None:
    model = {"kind": "qwen3", "config": SMALL | {"vocab_size": 64}}
    with pytest.raises(UserError, match="with 16 codes of image, 12 codes of audio that is 83, but the model has 64"):
        objective_of({**kind, "model": model})


def test_another_codec_is_refused(tmp_path: Path) -> None:
    manifests = prepared(tmp_path)
    other = kind_of(manifests)
    objective_of(other)
    weights = tmp_path / "audio" / "codecs" / "audio" / "model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(UserError, match="is not the one that made the codes of"):
        objective_of(other)
    with pytest.raises(UserError, match="has no codes of 'audio'; prepare it with --codec audio="):
        objective_of(other | {"manifests": manifests[:1]})
