"""One causal decoder that reads and writes text, images and sounds, as in Chameleon (https://arxiv.org/abs/2405.09818).

Images and sounds are codes of a frozen codec each, in one vocabulary with the text. A sample becomes a row of one of
the templates, and rows are packed documents. Some prompts are left out, so that what is made can be guided (Ho and
Salimans, https://arxiv.org/abs/2207.12598). B rows of packed documents, T positions, N targets.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from millrace.core.errors import UserError
from millrace.data.batch import IGNORED, MicroBatch
from millrace.data.tokenizer import Tokenizer
from millrace.engine.export import BESIDE
from millrace.eval.any_to_any import ABOUT, Medium
from millrace.eval.any_to_any import AnyToAny as Subject
from millrace.eval.decoding import Sampling
from millrace.models.bridge import build_model, hf_config
from millrace.models.counts import flops_per_token
from millrace.models.packing import check_packable
from millrace.models.templates import Emphasis, Layout, Parts, Row, choose, kinds
from millrace.models.vocabulary import TEXT, Vocabulary, tags
from millrace.pretrain.objectives.base import OneModule, Setting, model_files
from millrace.pretrain.objectives.causal_lm import CausalLMModule
from millrace.pretrain.objectives.codecs import Codecs, load_codecs
from millrace.pretrain.objectives.documents import Documents, laid, relaid
from millrace.pretrain.objectives.showing import Shown

_GUIDANCE = 2.0  # of samples in training
_ROW = 4096  # positions of packed documents: attention's mask grows with their square where it is a mask


class AnyToAny(OneModule):
    """Write the answers of templates, and with less weight their prompts."""

    of_text = False
    tokenizer: Tokenizer

    def __init__(self, model: Any, codecs: Codecs, setting: Setting) -> None:
        section = setting.objective
        self.tokenizer, self.vocabulary = _vocabulary(setting, codecs.counts)
        names = ["_".join(kind) for kind in kinds(self.vocabulary)]
        super().__init__(AnyToAnyModule(model, section, codecs.modules, names))
        self.per = {name: f"{name}_targets" for name in names}
        self.name = f"{setting.model.kind} of {', '.join(self.vocabulary.modalities)}"
        self.flops_per_target = flops_per_token(model.config, setting.sequence_length)
        self._model, self._codecs, self._setting, self._templates = model, codecs, setting, section.built()
        emphasis = Emphasis(section.prompt, section.weights)
        borders = (self.tokenizer.bos_id, self.tokenizer.eos_id)
        self._layout = Layout(self.vocabulary, borders, emphasis, setting.sequence_length)

    @classmethod
    def check(cls, setting: Setting) -> None:
        if setting.tokenizer.sha256 is None:
            raise UserError("objective.kind = 'any_to_any' writes words, and the samples have no text; prepare it too")
        _, vocabulary = _vocabulary(setting, load_codecs(setting).counts)
        config = hf_config(setting.model, setting.tokenizer.vocab_size, setting.sequence_length)
        if setting.model.init != "random" or "vocab_size" in setting.model.config:
            vocabulary.check_fits(config.vocab_size)
        if setting.rows != "alone":
            check_packable(config.model_type)

    @classmethod
    def build(cls, setting: Setting) -> AnyToAny:
        codecs = load_codecs(setting)
        size = _vocabulary(setting, codecs.counts)[1].size
        return cls(
            build_model(setting.model, size, setting.sequence_length, setting.seed, setting.zero3), codecs, setting
        )

    def view(self, micro: Any) -> Documents:
        if isinstance(micro, MicroBatch):
            return relaid(micro, self._row, self._text, self.tokenizer.eos_id)
        rows = []
        for number, (seed, good) in enumerate(zip(micro.seeds.tolist(), micro.good, strict=True)):
            parts = {name: _part(micro, name, number) for name in self.vocabulary.modalities} if good else {}
            row = self._row(parts, np.random.default_rng(seed))
            rows += [] if row is None else [row]
        return laid(rows, max(_ROW, self._setting.sequence_length), self.tokenizer.eos_id)

    def _row(self, parts: Parts, random: np.random.Generator) -> Row | None:
        template, left_out = choose(self._templates, parts, random), random.random()
        if template is None:
            return None
        dropped = bool(template.prompt) and left_out < self._setting.objective.drop
        return self._layout.row(template, parts, dropped=dropped)

    def _text(self, inputs: np.ndarray, labels: np.ndarray) -> Row | None:
        wanted = any(template.parts == (TEXT,) for template in self._templates)
        return self._layout.text(inputs, labels) if wanted else None

    def weight(self, micro: Documents) -> float:
        return float(micro.shares_BT.double().sum())

    @property
    def about(self) -> dict[str, Any]:
        """What whoever generates must know; see `millrace.eval.any_to_any`."""
        rows = [template.row for template in self._templates]
        return {"vocabulary": self.vocabulary.to_dict(), "rows": rows, "longest": self._setting.sequence_length}

    def files(self) -> dict[str, str]:
        text = json.dumps(self.about, indent=1) + "\n"
        return {**model_files(self._model), **self._codecs.files(), f"{BESIDE}{ABOUT}": text}

    def sampler(self) -> Callable[[], list[dict[str, Any]]] | None:
        setting = self._setting
        if not setting.eval.prompts:
            return None
        media = {name: Medium.of(codec, self._codecs.views[name]) for name, codec in self._codecs.modules.items()}
        how = Sampling(guidance=_GUIDANCE if setting.objective.drop else 0.0, seed=setting.seed)
        return Shown(Subject(self._model, self.tokenizer, self.about, media), setting.eval.prompts, how)


def _vocabulary(setting: Setting, counts: Mapping[str, int]) -> tuple[Tokenizer, Vocabulary]:
    """The tokenizer that knows all tags, and the vocabulary with so many codes of each modality."""
    wanted, text = tags(list(counts)), setting.tokenizer.vocab_size
    missing = [tag for tag in wanted if setting.tokenizer.backend.token_to_id(tag) is None]
    tokenizer = setting.tokenizer.extended({}, missing) if missing else setting.tokenizer
    known = {tag: int(tokenizer.backend.token_to_id(tag)) for tag in wanted}  # type: ignore[arg-type]
    return tokenizer, Vocabulary.lay_out(text, known, counts)


def _part(micro: Any, modality: str, row: int) -> np.ndarray:
    """What a sample has of a modality, empty if it has nothing."""
    role = "tokens" if modality == TEXT else f"{modality}_codes"
    values = micro.values.get(role)
    if values is None:
        return np.empty(0, np.int64)
    found: np.ndarray = values[row, : int(micro.lengths[role][row])].numpy()
    return found


class AnyToAnyModule(CausalLMModule):
    """A causal model of `transformers` over all modalities, beside the frozen codecs that their codes are of."""

    def __init__(self, model: Any, section: Any, codecs: Mapping[str, nn.Module], names: Sequence[str]) -> None:
        """`names` of the kinds of targets, each of which is a figure."""
        super().__init__(model, section)
        self.codecs = nn.ModuleDict(codecs)
        self.figures = ("loss", "max_logit", *names, *(f"{name}_targets" for name in names))  # type: ignore[assignment]

    def inputs(self, micro: Documents, device: torch.device) -> dict[str, Any]:
        """The arguments of `forward`."""
        found = super().inputs(micro, device)
        return found | {name: getattr(micro, name).to(device, non_blocking=True) for name in ("shares_BT", "kinds_BT")}

    def forward(  # type: ignore[override]
        self, input_ids_BT: Tensor, labels_BT: Tensor, documents: dict[str, Any], shares_BT: Tensor, kinds_BT: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns: (loss summed by share, float32 with gradient; the figures, detached)."""
        backbone, head = self.model.base_model, self.model.get_output_embeddings()
        hidden_BTD = backbone(input_ids=input_ids_BT, **documents).last_hidden_state
        loss, metrics, nll_N = head(hidden_BTD, labels=labels_BT, shares=shares_BT)
        kinds_N, real_N = kinds_BT.flatten(), (labels_BT.flatten() != IGNORED).float()
        each = torch.zeros((len(self.figures) - 2) // 2, 2, device=loss.device)
        sums = each.index_add(0, kinds_N, torch.stack([nll_N, real_N], 1))
        weighted = (nll_N * shares_BT.flatten()).sum()
        return loss, torch.cat([weighted[None], metrics[1:], sums.T.flatten()])
