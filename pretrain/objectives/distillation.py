"""Learning from a larger causal language model: Hinton et al., https://arxiv.org/abs/1503.02531.

The teacher stands beside the engine, whole on every rank: it has neither gradients nor moments, so that it takes 2 or 4
bytes a weight where the student takes 16, and no rank waits for parts of it. No checkpoint holds it. The SHA-256 of its
weights is a buffer of the student's engine, which a checkpoint does hold: a run goes on under the same teacher only.

B rows, T positions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from millrace.core.errors import UserError
from millrace.engine.engines import Engines
from millrace.eval.subject import open_subject
from millrace.models import attention
from millrace.models.architecture import architecture
from millrace.models.counts import flops_per_token
from millrace.models.heads import backbone_and_head, logits_transform
from millrace.models.packing import check_packable, document_inputs
from millrace.pretrain.objectives.base import MAIN, Loss, Setting
from millrace.pretrain.objectives.causal_lm import CausalLM, CausalLMModule
from millrace.pretrain.objectives.distil_loss import DistilHead, Taught, Terms


class FrozenTeacher:
    """A causal model that is not trained, and is no part of any module."""

    def __init__(self, setting: Setting) -> None:
        """Open `objective.teacher`.

        Raises:
            UserError: as `open_subject`; or another tokenizer, too few positions, or rows that it cannot read.
        """
        self.path = setting.objective.teacher
        subject = open_subject(self.path, dtype="fp32")
        if subject.tokenizer.sha256 != setting.tokenizer.sha256:
            raise UserError(
                f"objective.teacher = '{self.path}' has another tokenizer ({subject.tokenizer.sha256[:12]}) than the "
                f"data ({setting.tokenizer.sha256[:12]}): prepare the data with --tokenizer of the teacher's folder"
            )
        self.model = subject.model.requires_grad_(False)
        self.sha256 = _sha256(self.model)
        self._check_rows(setting)
        self._backbone, head = backbone_and_head(self.model)
        self._head: Any = head
        self.transform = logits_transform(self.model.config)

    def _check_rows(self, setting: Setting) -> None:
        config, record = self.model.config, architecture(self.model.config.model_type)
        longest = getattr(config, "max_position_embeddings", None)
        if longest is not None and longest < setting.sequence_length:
            raise UserError(
                f"objective.teacher = '{self.path}' has {longest:,} positions, fewer than data.sequence_length = "
                f"{setting.sequence_length:,}; shorten the sequences"
            )
        if setting.rows == "packed":
            check_packable(config.model_type)
        if record is not None and record.documents:
            self.model.set_attn_implementation(attention.NAME)

    def check(self, engines: Engines) -> None:
        """Refuse another teacher than the run's, or than another rank's; call it on every rank.

        Raises:
            UserError: the hashes that differ.
        """
        known = bytes(engines.main.module.teacher_sha256.tolist()).hex()
        everywhere = engines.world.gather_objects((known, self.sha256))
        if len(found := {sha[:12] for pair in everywhere for sha in pair}) > 1:
            raise UserError(
                f"objective.teacher = '{self.path}' is not the teacher that this run began with, or not the same on "
                f"every rank: SHA-256 of weights {', '.join(sorted(found))}. Put the old one back; of a run that goes "
                "on itself, name a step-N folder"
            )

    @torch.no_grad()
    def __call__(
        self, input_ids_BT: Tensor, positions_BT: Tensor, seq_lens: list[list[int]], dtype: torch.dtype
    ) -> Taught:
        """What it makes of packed documents, computed in `dtype`; see `document_inputs`."""
        if self._head.weight.dtype != dtype:
            for param in self.model.parameters():  # not the buffers: rotary frequencies stay fp32
                param.data = param.data.to(dtype)
        documents = document_inputs(positions_BT, seq_lens, self.model.config._attn_implementation)
        hidden_BTE = self._backbone(input_ids=input_ids_BT, **documents).last_hidden_state
        return Taught(hidden_BTE, self._head.weight, self._head.bias)


def _sha256(model: torch.nn.Module) -> str:
    """Of all weights by name, whatever file they came from."""
    sums = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        sums.update(f"{name} {tuple(tensor.shape)}".encode())
        sums.update(tensor.contiguous().cpu().numpy())
    return sums.hexdigest()


class DistillationModule(CausalLMModule):
    """As `CausalLMModule`, under a teacher. The figure `loss` is that of the text alone, as `causal_lm`'s."""

    figures = ("loss", "divergence", "max_logit")  # type: ignore[assignment]
    teacher: FrozenTeacher

    def learn_from(self, teacher: FrozenTeacher, setting: Setting) -> None:
        """Once, before anything else."""
        self.teacher, section = teacher, setting.objective
        self.register_buffer("teacher_sha256", torch.tensor(list(bytes.fromhex(teacher.sha256)), dtype=torch.uint8))
        head: Any = self.model.get_output_embeddings()
        DistilHead.adopt(head, z_loss=section.z_loss, transform=head.transform, chunk=section.chunk)
        head.terms = Terms(
            section.weight, section.temperature, section.z_loss, setting.tokenizer.vocab_size,
            transform=head.transform, theirs=teacher.transform,
        )  # fmt: skip

    def inputs(self, micro: Any, device: torch.device) -> dict[str, Any]:
        """As `CausalLMModule.inputs`, with what the teacher makes of them."""
        found, dtype = super().inputs(micro, device), next(self.model.parameters()).dtype
        positions_BT = found["documents"]["position_ids"]
        return found | {"taught": self.teacher(found["input_ids_BT"], positions_BT, micro.seq_lens, dtype)}

    def forward(  # type: ignore[override]
        self, input_ids_BT: Tensor, labels_BT: Tensor, documents: dict[str, Any], taught: Taught
    ) -> tuple[Tensor, Tensor]:
        """As `CausalLMModule.forward`; figures are [summed nll, summed divergence, largest logit]."""
        backbone, head = self.model.base_model, self.model.get_output_embeddings()
        hidden_BTD = backbone(input_ids=input_ids_BT, **documents).last_hidden_state
        return head(hidden_BTD, labels=labels_BT, taught=taught)  # type: ignore[no-any-return]


class Distillation(CausalLM):
    """Predict every next token as a teacher does, and as the text does."""

    module = DistillationModule

    def __init__(self, model: Any, setting: Setting) -> None:
        super().__init__(model, setting)
        self._teacher, self._checked = FrozenTeacher(setting), False
        module: Any = self.modules[MAIN]
        module.learn_from(self._teacher, setting)
        assert self.flops_per_target is not None
        # A forward pass is a third of training.
        self.flops_per_target += flops_per_token(self._teacher.model.config, setting.sequence_length) / 3

    @classmethod
    def check(cls, setting: Setting) -> None:
        super().check(setting)
        if not setting.objective.teacher:
            raise UserError("objective.teacher is not set; name a run directory, or a Hugging Face folder")

    def losses(self, micros: Sequence[Any], engines: Engines) -> Iterator[Loss]:
        if not self._checked:
            self._teacher.check(engines)
            self._checked = True
        yield from super().losses(micros, engines)
