"""A decoder of text, images and sounds with its codecs: from prompts of any modality to answers of any.

Rows are laid out as in training (`millrace.models.templates`). F frames of a sound.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from millrace.core.config import build
from millrace.core.errors import UserError
from millrace.data.modalities.base import modality as modality_of
from millrace.data.tokenizer import Tokenizer, load_tokenizer
from millrace.engine.export import VIEW
from millrace.engine.trained import Trained
from millrace.eval.coder import open_coder
from millrace.eval.decoding import Sampling, Wanted, decode
from millrace.models.codec import Codec, CodecConfig
from millrace.models.frozen import frozen
from millrace.models.templates import Emphasis, Layout, Template
from millrace.models.vocabulary import TEXT, Vocabulary, closing, opening

ABOUT = "any_to_any.json"
Prompt = Mapping[str, Any]  # by modality: text, or the bytes of a file, or what the codec's view makes of it


@dataclass(frozen=True)
class Medium:
    """A codec, and the view of what it is given."""

    codec: Codec
    view: Any

    @classmethod
    def of(cls, codec: Codec, view: str) -> Medium:
        """A codec, and its view as view.json says it."""
        table = json.loads(view)
        return cls(codec, build(modality_of(table["role"]).view, table))

    def given(self, value: Any) -> torch.Tensor:
        """What the codec is given of a file's bytes, or of what is that already."""
        if not isinstance(value, bytes):
            return torch.as_tensor(np.array(value))
        decoded = modality_of(self.view.role).decode(value)
        return torch.from_numpy(np.array(self.view.make(decoded, value, np.random.default_rng(0))))

    def encode(self, value: Any) -> np.ndarray:
        """Codes (L,), row after row of their grid."""
        codes: np.ndarray = self.codec.encode(self.given(value)[None].to(self.codec.device)).flatten().cpu().numpy()
        return codes

    def signal(self) -> list[int]:
        """Sizes of the signal that is coded; empty where sounds are as long as they are."""
        if self.view.role == "image":
            return [self.view.size, self.view.size]
        frames, mel = round(self.view.rate * self.view.seconds), self.codec.config.mels()
        return [mel.hops(frames) if mel else frames] if frames else []

    @property
    def grid(self) -> list[int]:
        """Sizes of the grid of codes; empty where they differ."""
        return [-(-size // self.codec.config.stride) for size in self.signal()]

    def decode(self, codes: Sequence[int]) -> torch.Tensor:
        """A picture uint8 (height, width, 3), or a sound float32 (F,)."""
        bands = self.restore(codes)
        if self.codec.mel is None:
            return bands
        return self.codec.mel.invert(bands[None])[0]

    def restore(self, codes: Sequence[int]) -> torch.Tensor:
        """As `decode`; of a codec of mel bands the bands (M, H), which `decode` makes a sound of."""
        made = self.codec.decode(
            torch.tensor(codes, device=self.codec.device).reshape(1, *(self.grid or [len(codes)]))
        )[0]
        if self.view.role == "image":
            return made[: self.view.size, : self.view.size]
        return made[..., : self.signal()[0]] if self.grid else made


class AnyToAny:
    """The decoder, its vocabulary and its codecs."""

    def __init__(self, model: Any, tokenizer: Tokenizer, about: Mapping[str, Any], media: Mapping[str, Medium]) -> None:
        """`about` is what any_to_any.json holds."""
        self.model, self.tokenizer, self.media = model, tokenizer, dict(media)
        self.vocabulary = Vocabulary.from_dict(about["vocabulary"])
        self.templates = [Template.parse(row) for row in about["rows"]]
        borders = (tokenizer.bos_id, tokenizer.eos_id)
        self._layout = Layout(self.vocabulary, borders, Emphasis(1.0, {}), about["longest"])

    @classmethod
    def open(cls, path: str | Path) -> AnyToAny:
        """A run directory (its newest good checkpoint), a `step-N` folder, or a folder that `millrace export` wrote.

        Raises:
            UserError: it is none of these, or was trained with another objective.
        """
        folder = Path(path)
        if (folder / ABOUT).is_file():
            return cls.from_pretrained(folder)
        trained = Trained.open(folder)
        beside = trained.checkpoint.path / "beside"
        if not (beside / ABOUT).is_file():
            raise UserError(f"{path} was not trained with objective.kind = 'any_to_any': it has no {ABOUT}")
        about = json.loads((beside / ABOUT).read_text(encoding="utf-8"))
        media = {}
        for name in about["vocabulary"]["codes"]:
            codec = Codec(CodecConfig.from_pretrained(beside / "codecs" / name))
            missing = codec.load_state_dict(trained.fixed(f"codecs.{name}."), strict=False).missing_keys
            assert not missing, missing
            view = (beside / "codecs" / name / VIEW).read_text(encoding="utf-8")
            media[name] = Medium.of(_placed(frozen(codec)), view)
        tokenizer = load_tokenizer(trained.checkpoint.path / "tokenizer")
        return cls(_placed(trained.load()), tokenizer, about, media)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> AnyToAny:
        """A folder that `millrace export` wrote."""
        from transformers import AutoModelForCausalLM

        path = Path(folder)
        about = json.loads((path / ABOUT).read_text(encoding="utf-8"))
        codecs = {name: path / "codecs" / name for name in about["vocabulary"]["codes"]}
        coders = {name: open_coder(name, place) for name, place in codecs.items()}
        media = {name: Medium(_placed(frozen(coder.model)), coder.view) for name, coder in coders.items()}
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        return cls(_placed(model), load_tokenizer(path), about, media)

    def generate(self, prompts: Sequence[Prompt], to: str, how: Sampling | None = None) -> list[Any]:
        """Answers of the modality `to`: texts, pictures uint8 (height, width, 3), or sounds float32 (F,).

        An image has as many codes as its codec's grid; a sound as many, or until its closing tag where its codec takes
        any length; a text goes on until it ends, or until an image or a sound would begin. Where a text is to be
        written, a text in the prompt is what it begins with.

        Raises:
            UserError: a modality that the model does not have, or a prompt that is too long.
        """
        found = self.write(prompts, to, how or Sampling())
        if to == TEXT:
            return [self.tokenizer.decode(ids) for ids in found]
        return [self.media[to].decode(codes).cpu().numpy() for codes in found]

    def write(self, prompts: Sequence[Prompt], to: str, how: Sampling) -> list[list[int]]:
        """As `generate`, but ids of text, or codes from 0."""
        rows = [self.row(prompt, to) for prompt in prompts]
        wanted = self._wanted(to, self._layout.longest - max(map(len, rows)))
        with _evaluating(self.model):
            found = decode(self.model, rows, self._layout.prompt([], to), wanted, how)
        first = self.vocabulary.segment(to).start
        return [[token - first for token in row] for row in found]

    def check(self, prompt: Prompt, to: str) -> None:
        """Refuse what `generate` would.

        Raises:
            UserError: as there.
        """
        self._wanted(to, self._layout.longest - len(self.row(prompt, to)))

    def rate(self, modality: str) -> int:
        """Frames of a second of its sounds; 0 of what is none."""
        return int(getattr(self.media[modality].view, "rate", 0)) if modality in self.media else 0

    def row(self, prompt: Prompt, to: str) -> np.ndarray:
        """The tokens that an answer follows: the prompt and, of an image or a sound, its opening tag."""
        if odd := [name for name in [*prompt, to] if name not in self.vocabulary.modalities]:
            raise UserError(f"the model has no {odd[0]}; it has {', '.join(self.vocabulary.modalities)}")
        begun = self._ids(prompt[TEXT]) if to == TEXT and TEXT in prompt else np.empty(0, np.int64)
        names = self._order([name for name in prompt if name != to or to != TEXT], to)
        parts = [(n, self._ids(prompt[n]) if n == TEXT else self.media[n].encode(prompt[n])) for n in names]
        return np.concatenate([self._layout.prompt(parts, to), begun])

    def _ids(self, text: str) -> np.ndarray:
        return self.tokenizer.encode([text])[0]

    def _order(self, names: Sequence[str], to: str) -> Sequence[str]:
        """As a template has them, if one does; else as they are given."""
        for template in self.templates:
            before = template.prompt + template.answer[: template.answer.index(to)] if to in template.answer else ()
            if sorted(before) == sorted(names):
                return before
        return names

    def _wanted(self, to: str, room: int) -> Wanted:
        """The segment of a modality, and what ends it."""
        known, segment = self.vocabulary.tags, self.vocabulary.segment(to)
        count = int(np.prod(self.media[to].grid)) if to != TEXT and self.media[to].grid else 0
        if room < max(count, 1):
            raise UserError(
                f"the prompt leaves {max(room, 0)} of {self._layout.longest} positions, and an answer of {to} takes "
                f"{count or 'at least 1'}; shorten the prompt"
            )
        if count:
            return Wanted(segment, frozenset(), count)
        if to != TEXT:
            return Wanted([*segment, known[closing(to)]], frozenset([known[closing(to)]]), room)
        ends = {self.tokenizer.eos_id, *(known[opening(name)] for name in self.media)}
        no_text = {self.tokenizer.bos_id, *known.values(), *ends}
        return Wanted([*(token for token in segment if token not in no_text), *sorted(ends)], frozenset(ends), room)


def _placed(model: Any) -> Any:
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
