"""Sequence classification: one label for each text.

B rows, T positions, C labels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForSequenceClassification, PretrainedConfig
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, MODEL_MAPPING

from millrace.core.console import warn
from millrace.core.errors import UserError
from millrace.finetune.config import FinetuneConfig
from millrace.finetune.examples import Example, Record, field, text_field
from millrace.finetune.source import quietly, without_dropout
from millrace.finetune.task import Build, Task

_HEADS = ("score", "classifier")  # what transformers' families call it


class Classify(Task):
    """Examples are {"text", "label"}; labels are texts or whole numbers."""

    peft_type = "SEQ_CLS"
    per_example = True

    def __init__(self, config: FinetuneConfig, tokenizer: Any) -> None:
        self.config, self.tokenizer = config, tokenizer
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        if tokenizer.pad_token_id is None:
            raise UserError("the tokenizer has neither a padding nor an end token; set one in tokenizer_config.json")
        self.names: list[str] = []
        self.heads: list[str] = []

    def encode(self, train: Iterable[Record], heldout: Iterable[Record]) -> tuple[list[Example], list[Example]]:
        both = [[(self._text(r), self._label(r), r.where) for r in records] for records in (train, heldout)]
        counts = Counter(label for _, label, _ in both[0] + both[1])
        wanted = self.config.objective.labels
        self.names = list(wanted) or sorted(counts, key=lambda n: (int(n), n) if n.isdigit() else (0, n))
        self._check(counts)
        index = {name: number for number, name in enumerate(self.names)}
        made = [[self._example(part, index) for part in half if part[1] in index] for half in both]
        return made[0], made[1]

    def _check(self, counts: Counter[str]) -> None:
        left = {label: n for label, n in counts.items() if label not in self.names}
        if left:
            warn(f"{sum(left.values())} example(s) left out, whose labels are not in objective.labels: {left}")
        if missing := [name for name in self.names if name not in counts]:
            raise UserError(f"objective.labels: no example has the label '{missing[0]}' (there are: {sorted(counts)})")
        if len(self.names) < 2:
            raise UserError(f"{self.config.data.train} has only the label(s) {self.names}; two are needed")
        for name in self.names:
            if counts[name] == 1:
                warn(f"label '{name}' occurs once; is it a mistake? objective.labels = […] would leave it out")

    def _text(self, record: Record) -> str:
        return text_field(record, "text", self.config.data.columns)

    def _label(self, record: Record) -> str:
        value = field(record, "label", self.config.data.columns)
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            raise UserError(f"{record.where}: the label is {value!r}; write a text or a whole number")
        return str(value)

    def _example(self, part: tuple[str, str, str], index: dict[str, int]) -> Example:
        text, label, where = part
        # As a user of the tuned model would call the tokenizer; the end of a long text is cut off.
        ids = self.tokenizer(text, truncation=True, max_length=self.config.data.sequence_length)["input_ids"]
        ids = ids or [self.tokenizer.pad_token_id]
        # One "byte", so that what the loop calls bits per byte is bits per example.
        return Example(np.array(ids, np.int32), np.array([index[label]]), 1, where)

    def packs(self, kind: str) -> bool:
        return False

    def model(self, build: Build) -> Any:
        config = AutoConfig.from_pretrained(build.folder)
        changes = without_dropout(build.folder) | self.config.model.config
        changes |= {
            "num_labels": len(self.names),
            "id2label": dict(enumerate(self.names)),
            "label2id": {name: number for number, name in enumerate(self.names)},
            "pad_token_id": self.tokenizer.pad_token_id,
            "problem_type": "single_label_classification",
        }
        for key, value in changes.items():
            setattr(config, key, value)
        if config.vocab_size < len(self.tokenizer):
            raise UserError(
                f"the tokenizer has {len(self.tokenizer):,} tokens but the source's vocab_size is "
                f"{config.vocab_size:,}; take the source's own tokenizer"
            )
        register_classifier(config)
        attention = self.config.model.attention
        chosen = {} if attention == "auto" else {"attn_implementation": attention}
        # The head is new: its weights are drawn from the run's seed. Under ZeRO 3 the engine partitions afterwards.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.run.seed)
            model, info = quietly(
                lambda: AutoModelForSequenceClassification.from_pretrained(
                    build.folder,
                    config=config,
                    dtype=torch.float32,
                    output_loading_info=True,
                    use_safetensors=True,
                    **chosen,
                )
            )
        new = {key.partition(".")[0] for key in info["missing_keys"]}
        self.heads = sorted(new | {head for head in _HEADS if hasattr(model, head)})
        model.config.use_cache = False
        model.config.architectures = [type(model).__name__]
        return model.train()

    def objective(self, model: Any) -> Classifier:
        return Classifier(model)

    def sampler(self, model: Any) -> Callable[[], list[dict[str, Any]]] | None:
        return None

    def load(self, folder: Path, config: Any) -> Any:
        register_classifier(config)
        return quietly(
            lambda: AutoModelForSequenceClassification.from_pretrained(
                folder, config=config, dtype=torch.float32, use_safetensors=True
            )
        )


class Classifier(nn.Module):
    """A classifier of `transformers` whose forward returns the loss summed over this micro-batch's examples."""

    figures = ("loss", "max_logit", "accuracy")

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def inputs(self, micro: Any, device: torch.device) -> dict[str, Tensor]:
        """The arguments of `forward` from a `MicroBatch` with one example in each row."""
        positions_BT = torch.arange(micro.input_ids_BT.shape[1]).expand(micro.input_ids_BT.shape)
        lengths_B1 = torch.tensor([[sum(lengths) or 1] for lengths in micro.seq_lens])
        return {
            "input_ids_BT": micro.input_ids_BT.to(device, non_blocking=True),
            "attention_mask_BT": (positions_BT < lengths_B1).long().to(device, non_blocking=True),
            "labels_B": micro.labels_BT[:, 0].to(device, non_blocking=True),
        }

    def forward(self, input_ids_BT: Tensor, attention_mask_BT: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
        """Padding is on the right; `labels_B` is -100 in rows without an example.

        Returns:
            (loss summed over examples, float32 with gradient; [summed loss, largest logit, correct], detached).
        """
        logits_BC = self.model(input_ids=input_ids_BT, attention_mask=attention_mask_BT).logits.float()
        loss = F.cross_entropy(logits_BC, labels_B, reduction="sum", ignore_index=-100)
        correct = (logits_BC.argmax(-1) == labels_B).sum().float()
        return loss, torch.stack([loss.detach(), logits_BC.detach().amax(), correct])


def register_classifier(config: PretrainedConfig) -> None:
    """Let `AutoModelForSequenceClassification` know architectures for which transformers has no classifier.

    They get transformers' own generic one: a linear layer on the last token's hidden state. A folder saved from it
    loads wherever `millrace.finetune.classify` was imported and this was called.

    Raises:
        UserError: transformers has no backbone of this kind.
    """
    cls = type(config)
    if cls in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return
    if cls not in MODEL_MAPPING:
        raise UserError(f"transformers has no backbone for '{config.model_type}' to put a classifier on")
    backbone: Any = MODEL_MAPPING[cls]
    family = next(base for base in backbone.__mro__ if base.__name__.endswith("PreTrainedModel"))
    name = family.__name__.replace("PreTrainedModel", "ForSequenceClassification")
    prefix = {"base_model_prefix": family.base_model_prefix, "__module__": __name__}
    made = type(name, (GenericForSequenceClassification, family), prefix)
    AutoModelForSequenceClassification.register(cls, made)
