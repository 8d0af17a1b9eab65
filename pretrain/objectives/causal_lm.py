"""Causal language modelling over packed documents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from millrace.eval.generate import continue_text
from millrace.models.bridge import build_model, hf_config
from millrace.models.counts import flops_per_token
from millrace.models.heads import backbone_and_head, logits_transform
from millrace.models.packing import check_packable, document_inputs
from millrace.pretrain.objectives.base import OneModule, Setting, model_files
from millrace.pretrain.objectives.config import CausalLMConfig
from millrace.pretrain.objectives.head_loss import LossHead


class CausalLMModule(nn.Module):
    """A causal model of `transformers` whose forward returns the loss summed over this micro-batch's targets.

    The sum, not the mean: the loop divides by the number of targets in the *global* batch, so that a step is the same
    whatever the accumulation and the number of ranks.
    """

    figures = ("loss", "max_logit")

    def __init__(self, model: Any, config: CausalLMConfig) -> None:
        super().__init__()
        self.model = model
        _, head = backbone_and_head(model)
        transform = logits_transform(model.config)
        LossHead.adopt(head, z_loss=config.z_loss, transform=transform, chunk=config.chunk)

    def inputs(self, micro: Any, device: torch.device) -> dict[str, Any]:
        """The arguments of `forward` from a `MicroBatch`, made outside it: a compiled forward must not see lists."""
        positions_BT = micro.position_ids_BT.to(device, non_blocking=True)
        return {
            "input_ids_BT": micro.input_ids_BT.to(device, non_blocking=True),
            "labels_BT": micro.labels_BT.to(device, non_blocking=True),
            "documents": document_inputs(positions_BT, micro.seq_lens, self.model.config._attn_implementation),
        }

    def forward(self, input_ids_BT: Tensor, labels_BT: Tensor, documents: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """`input_ids_BT`, `labels_BT` int64, labels aligned with the inputs and -100 for none.

        Returns:
            (loss summed over targets, float32 scalar with gradient; [summed nll, largest logit], detached).
        """
        backbone, head = self.model.base_model, self.model.get_output_embeddings()
        hidden_BTD = backbone(input_ids=input_ids_BT, **documents).last_hidden_state
        return head(hidden_BTD, labels=labels_BT)


class CausalLM(OneModule):
    """Predict every next token of every document."""

    module: ClassVar[type[CausalLMModule]] = CausalLMModule

    def __init__(self, model: Any, setting: Setting) -> None:
        super().__init__(self.module(model, setting.objective))
        self._model, self._setting = model, setting
        self.name, self.tokenizer = setting.model.kind, setting.tokenizer
        self.flops_per_target = flops_per_token(model.config, setting.sequence_length)

    @classmethod
    def check(cls, setting: Setting) -> None:
        kind = hf_config(setting.model, setting.tokenizer.vocab_size, setting.sequence_length).model_type
        if setting.rows == "packed":
            check_packable(kind)

    @classmethod
    def build(cls, setting: Setting) -> CausalLM:
        vocabulary, length = setting.tokenizer.vocab_size, setting.sequence_length
        return cls(build_model(setting.model, vocabulary, length, setting.seed, setting.zero3), setting)

    def files(self) -> dict[str, str]:
        return model_files(self._model)

    def sampler(self) -> Callable[[], list[dict[str, Any]]] | None:
        setting, model = self._setting, self._model
        prompts = setting.eval.prompts
        if not prompts:
            return None

        def sample() -> list[dict[str, Any]]:
            tokens = setting.eval.sample_tokens
            texts = continue_text(model, setting.tokenizer, prompts, tokens=tokens, seed=setting.seed)
            return [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)]

        return sample
