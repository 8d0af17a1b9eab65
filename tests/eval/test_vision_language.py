"""A model that sees, from images and captions on disk to an exported folder."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

from millrace.core.config import build
from millrace.core.errors import UserError
from millrace.data.loader import build_loader
from millrace.data.prepare import PrepareConfig, prepare
from millrace.engine.export import export
from millrace.eval.subject import open_subject
from millrace.eval.vision_language import describe, look, read_image, sees, text_nll
from millrace.launch.generate import main
from millrace.pretrain.config import PretrainConfig
from millrace.pretrain.run import objective_of
from tests.handmade import small_model, small_tokenizer, write_checkpoint

COUNT, PATCH = 8, 8
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = VISION | {"num_key_value_heads": 1, "head_dim": 16}


def png(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (9 + 8 * (number % 3), 24 - number, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


TEXTS = [f"a text of {number}, without a picture" for number in range(COUNT)]
CAPTIONS = [f"picture {number} of {'some ' * (number % 3)}noise" for number in range(COUNT)]


class Run:
    """Pictures with captions beside texts, an objective on them, and a checkpoint of its first weights, made louder."""

    def __init__(self, folder: Path) -> None:
        (folder / "0.png").write_bytes(png(0))
        table = pa.table({"png": [png(n) for n in range(COUNT)], "caption": CAPTIONS})
        pq.write_table(table, folder / "a.parquet")
        options: dict[str, Any] = {"text": "caption", "image": "png", "costs": {"image": {"patch": PATCH, "most": 9}}}
        prepare(PrepareConfig(inputs=[str(folder / "a.parquet")], out=str(folder / "out"), vocab_size=280, **options))
        pq.write_table(pa.table({"text": TEXTS}), folder / "b.parquet")
        alone = {"out": str(folder / "texts"), "tokenizer": str(folder / "out" / "tokenizer"), "text": "text"}
        prepare(PrepareConfig(inputs=[str(folder / "b.parquet")], **alone))
        manifests = [str(folder / "out"), alone["out"]]
        tree = {
            "data": {"manifest": manifests, "sequence_length": 96, "prefetch": 0, "threads": 1},
            "model": {"kind": "qwen3", "config": TEXT},
            "objective": {"kind": "vision_language", "vision": {"config": VISION}},
        }
        config: Any = build(PretrainConfig, tree)
        how = {"seed": 0, "batch_rows": 4, "micro_batch": 4, "rank": 0, "world": 1}
        with build_loader(config.data, **how) as loader:
            settings = {"zero_optimization": {"stage": 0}}
            kind, setting = objective_of(config, settings, loader.tokenizer, loader.corpus.costs)
            kind.check(setting)
            self.objective: Any = kind.build(setting)
            self.micro = next(loader).micro_batches[0]
        self.module = self.objective.modules["model"]
        self.model, self.tokenizer = self.module.model, self.objective.tokenizer
        with torch.no_grad():
            for number, param in enumerate(self.model.parameters()):
                param += 0.05 * torch.randn(param.shape, generator=torch.Generator().manual_seed(number))
        self.files, self.path = self.objective.files(), folder / "run"
        write_checkpoint(self.path / "checkpoints", self.model, self)  # type: ignore[arg-type]
        self.image = read_image(png(0))

    def save(self, folder: Path) -> None:
        """The tokenizer with what the objective puts beside it, as a run saves them."""
        self.tokenizer.save(folder)
        for name, text in self.files.items():
            if name.startswith("tokenizer/"):
                (folder.parent / name).write_text(text)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("seen"))


@pytest.fixture(scope="module")
def exported(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "out"
    export(run.path, folder)
    return folder


def test_training_and_evaluation_agree(run: Run) -> None:
    """The loss of packed rows from a loader is what captions are found to be unlikely by, one by one."""
    module, objective = run.module, run.objective
    with torch.no_grad():
        loss, _ = module(**module.inputs(objective.view(run.micro), torch.device("cpu")))
    samples = [divmod(sample, 1 << 40) for spans in run.micro.spans for sample, *_ in spans]
    assert len(samples) > 4 and {corpus for corpus, _ in samples} == {0, 1}, "rows hold several, of both kinds"
    alone = 0.0
    for corpus, sample in samples:
        pixels = None if corpus else np.asarray(Image.open(io.BytesIO(png(sample))))
        alone += text_nll(run.model, run.tokenizer, pixels, [(TEXTS if corpus else CAPTIONS)[sample]])[0]
    assert loss.item() == pytest.approx(alone, rel=1e-5)


def test_texts_are_found_as_likely_together_as_alone(run: Run) -> None:
    for image in (run.image, None):
        together = text_nll(run.model, run.tokenizer, image, CAPTIONS)
        alone = [text_nll(run.model, run.tokenizer, image, [caption])[0] for caption in CAPTIONS]
        assert together == pytest.approx(alone, rel=1e-5) and len(set(together)) > 1
    other = text_nll(run.model, run.tokenizer, 255 - run.image, CAPTIONS)
    assert other != pytest.approx(text_nll(run.model, run.tokenizer, run.image, CAPTIONS), rel=1e-3)


def test_export_is_loaded_with_equal_logits(run: Run, exported: Path) -> None:
    model, info = AutoModelForImageTextToText.from_pretrained(exported, output_loading_info=True)
    assert not any(info.values()) and isinstance(model, LlavaForConditionalGeneration)
    looking, given = look(run.model, run.tokenizer, run.image)
    ids = torch.tensor([[looking.bos_id, *looking.encode(["picture"])[0]]])
    left, right = (one(input_ids=ids, use_cache=False, **given).logits for one in (run.model, model))
    torch.testing.assert_close(left, right, rtol=0, atol=1e-5)


def test_export_knows_how_images_are_prepared(run: Run, exported: Path) -> None:
    """Their own processor makes the same of a picture that needs no scaling down."""
    from transformers import AutoImageProcessor

    made = AutoImageProcessor.from_pretrained(exported)(Image.fromarray(run.image), return_tensors="pt")
    _, given = look(run.model, run.tokenizer, run.image)
    torch.testing.assert_close(made["pixel_values"], given["pixel_values"], rtol=0, atol=1e-5)
    assert made["image_sizes"].tolist() == [list(size) for size in given["image_sizes"]]


def test_run_and_export_say_the_same(run: Run, exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    how, said = {"tokens": 12, "temperature": 0}, []
    for source in (run.path, exported):
        assert sees(source)
        said.append(describe(open_subject(source), [run.image] * 2, ["", "picture"], **how))
    assert said[0] == said[1] and said[0][0]
    asked = ["--image", str(run.path.parent / "0.png"), "--prompt", "", "--prompt", "picture", "--tokens", "12"]
    assert main([str(run.path), *asked, "--temperature", "0"]) == 0
    assert capsys.readouterr().out == f"{said[0][0]}\npicture{said[0][1]}\n"
    looking, given = look(run.model, run.tokenizer, run.image)
    ids = [looking.bos_id, *looking.encode(["picture"])[0].tolist()]
    for _ in range(12):  # the likeliest, one after the other, without a cache
        logits = run.model(input_ids=torch.tensor([ids]), use_cache=False, **given).logits
        ids.append(int(logits[0, -1].argmax()))
        if ids[-1] == looking.eos_id:
            break
    assert said[0][1] == looking.decode([i for i in ids[-12:] if i != looking.eos_id])


def test_what_is_not_there_is_told(run: Run) -> None:
    with pytest.raises(UserError, match="a 'qwen3' does not see"):
        look(small_model(), small_tokenizer(), run.image)
    with pytest.raises(UserError, match="cannot be decoded"):
        read_image(b"no picture")
    with pytest.raises(UserError, match="ask for at most"):
        describe(open_subject(run.path), [run.image], ["picture"], tokens=100)
    with pytest.raises(UserError, match="reads pictures and writes text"):
        main([str(run.path), "--to", "text"])
