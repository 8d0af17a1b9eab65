"""Instruction tuning: a causal model learns the assistant's tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from millrace.core.console import warn
from millrace.core.errors import UserError
from millrace.eval.generate import continue_text
from millrace.finetune.chat import Chat, Message, Question, fit_length
from millrace.finetune.config import FinetuneConfig
from millrace.finetune.examples import Example, Record, field, text_field
from millrace.finetune.source import quietly, without_dropout
from millrace.finetune.task import Build, Task
from millrace.models.bridge import build_model
from millrace.models.config import ModelConfig
from millrace.models.packing import PACKABLE
from millrace.pretrain.objectives.causal_lm import CausalLMModule


class Instruct(Task):
    """Examples are {"prompt", "response"} or {"messages": [{"role", "content"}, …]}."""

    peft_type = "CAUSAL_LM"
    per_example = False

    def __init__(self, config: FinetuneConfig, tokenizer: Any) -> None:
        self.config, self.chat = config, Chat(tokenizer)
        self.heads: list[str] = []

    def encode(self, train: Iterable[Record], heldout: Iterable[Record]) -> tuple[list[Example], list[Example]]:
        return self._encode(train), self._encode(heldout)

    def _encode(self, records: Iterable[Record]) -> list[Example]:
        found: list[Example] = []
        dropped: list[str] = []
        for record in records:
            messages = self.messages(record)
            fitted = fit_length(self.chat.encode(messages, record.where), self.config.data.sequence_length)
            if fitted is None:
                dropped.append(record.where)
                continue
            size = sum(len(m["content"].encode()) for m in messages if m["role"] == "assistant")
            found.append(Example(*fitted, bytes=size, where=record.where))
        if dropped:
            warn(
                f"{len(dropped)} example(s) left out, whose answers do not fit into data.sequence_length = "
                f"{self.config.data.sequence_length} (first: {dropped[0]}); raise it to keep them"
            )
        return found

    def messages(self, record: Record) -> list[Message]:
        """The conversation of a record.

        Raises:
            UserError: a field is missing or of the wrong type, or nobody answers; by FILE:LINE.
        """
        columns = self.config.data.columns
        if "messages" not in record.fields:
            asked, answer = (text_field(record, name, columns) for name in ("prompt", "response"))
            return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        messages = field(record, "messages", columns)
        if not isinstance(messages, list) or not all(_is_message(m) for m in messages):
            raise UserError(
                f'{record.where}: messages is {str(messages)[:80]!r}; write [{{"role": "user", "content": "…"}}, '
                '{"role": "assistant", "content": "…"}]'
            )
        if not any(m["role"] == "assistant" for m in messages):
            raise UserError(f"{record.where}: no message has the role 'assistant', so there is nothing to learn")
        return messages

    def packs(self, kind: str) -> bool:
        return kind in PACKABLE

    def model(self, build: Build) -> Any:
        section = self.config.model
        changes = without_dropout(build.folder) | section.config
        config = ModelConfig(init=build.folder, config=changes, attention=section.attention)
        length, seed = self.config.data.sequence_length, self.config.run.seed
        model = build_model(config, len(self.chat.tokenizer), length, seed, build.zero3)
        model.config.architectures = [type(model).__name__]
        return model

    def objective(self, model: Any) -> CausalLMModule:
        return CausalLMModule(model, self.config.objective)

    def sampler(self, model: Any) -> Callable[[], list[dict[str, Any]]] | None:
        prompts = self.config.eval.prompts
        if not prompts:
            return None
        tokens, seed = self.config.eval.sample_tokens, self.config.run.seed

        def sample() -> list[dict[str, Any]]:
            texts = [
                continue_text(model, Question(self.chat, p), [p], tokens=tokens, temperature=0, seed=seed)[0]
                for p in prompts
            ]
            return [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)]

        return sample

    def load(self, folder: Path, config: Any) -> Any:
        from transformers import AutoModelForCausalLM

        return quietly(
            lambda: AutoModelForCausalLM.from_pretrained(
                folder, config=config, dtype=torch.float32, use_safetensors=True
            )
        )


def _is_message(item: Any) -> bool:
    return isinstance(item, dict) and all(isinstance(item.get(key), str) for key in ("role", "content"))
