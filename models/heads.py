"""Taking a causal language model apart: backbone, head, and what is done to the logits after the head.

A loss in chunks never holds all logits, so it calls the head itself. That is right only if
`transform(head(backbone(x)))` is `model(x).logits`; here is where that is made sure of.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from millrace.core.errors import UserError
from millrace.models import REGISTRY
from millrace.models.architecture import adopt


def backbone_and_head(model: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
    """(backbone, head): hidden_BTE = backbone(input_ids, ...).last_hidden_state, logits_BTV =
    transform(head(hidden)).

    Architectures without an entry in `REGISTRY` are checked here: both ways must run the same operations.

    Raises:
        UserError: the architecture does something else between backbone and logits, or has no separate head.
    """
    backbone, head = model.base_model, model.get_output_embeddings()
    kind = model.config.model_type
    if backbone is model or head is None:
        raise UserError(f"model.kind = '{kind}': transformers gives it no separate head; choose another kind")
    if kind not in REGISTRY:
        _check_by_operations(model.config)
    return backbone, head


# What transformers' families call the cap: Gemma and nanochat, RecurrentGemma, xLSTM.
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@dataclass(frozen=True)
class LogitsTransform:
    """What an architecture does to its head's output: logits · factor, then soft-capped, cap · tanh(logits /
    cap).

    Soft-capping is that of Gemma 2 (arXiv:2408.00118, section 2) and nanochat; Cohere multiplies, Granite
    divides. A loss with a gradient of its own relies on these two steps being all there is.
    """

    factor: float = 1.0
    cap: float = 0.0  # 0: none

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Apply it to logits of any shape."""
        if self.factor != 1.0:
            logits = logits * self.factor
        return torch.tanh(logits / self.cap) * self.cap if self.cap else logits


def logits_transform(config: PretrainedConfig) -> LogitsTransform:
    """The transform of an architecture's configuration; the identity for most."""
    if divisor := getattr(config, "logits_scaling", None):
        return LogitsTransform(factor=1 / divisor)
    caps = [getattr(config, key, None) for key in _CAPS]
    return LogitsTransform(
        factor=getattr(config, "logit_scale", None) or 1.0, cap=next((cap for cap in caps if cap), 0.0)
    )


def _check_by_operations(config: PretrainedConfig) -> None:
    """Run the whole model and its parts without weights; their operations must be the same, in order."""
    small = without_weights(config)
    transform = logits_transform(config)
    head = small.get_output_embeddings()
    assert isinstance(head, nn.Module)

    def parts(**inputs: Any) -> torch.Tensor:
        return transform(head(small.base_model(**inputs)[0]))

    try:
        traces = [_operations(small), _operations(parts)]
    except Exception as error:  # any architecture may fail in its own way without weights
        raise UserError(
            f"model.kind = '{config.model_type}': cannot be checked without weights ({error}); choose another kind"
        ) from None
    if traces[0] != traces[1]:
        raise UserError(
            f"model.kind = '{config.model_type}' computes its logits in a way that is not supported "
            "(something other than a known cap or factor stands around the head); choose another kind"
        )


def without_weights(config: PretrainedConfig) -> PreTrainedModel:
    """The model on the meta device, in a form that runs there: plain attention, experts by gathered weights."""
    config = copy.deepcopy(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    adopt(model)
    if getattr(model, "_can_set_experts_implementation", lambda: False)():
        model.set_experts_implementation("batched_mm")
    return model.eval()


def run_without_weights(forward: Callable[..., Any], length: int, *modes: Any) -> None:
    """Call `forward` on one row of `length` fake tokens inside the dispatch `modes`.

    Fake tensors, because transformers asks for values of plain meta tensors (positions, masks) and spares
    fake ones.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        for mode in modes:
            stack.enter_context(mode)
        forward(input_ids=torch.ones(1, length, dtype=torch.long, device="meta"), use_cache=False)


_VIEWS = ("alias", "slice", "view", "_unsafe_view", "detach", "unsqueeze", "expand", "t", "transpose")


def _operations(forward: Callable[..., Any]) -> list[str]:
    """Operations with their shapes and numbers, views left out."""
    seen: list[str] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "aten" and func.overloadpacket.__name__ not in _VIEWS:
                plain = [tuple(a.shape) if isinstance(a, torch.Tensor) else a for a in args]
                if func is torch.ops.aten.div.Tensor and isinstance(args[1], float | int):
                    func_name, plain = "aten.mul.Tensor", [plain[0], 1 / args[1]]  # Granite divides
                else:
                    func_name = str(func)
                seen.append(f"{func_name} {plain}")
            return func(*args, **(kwargs or {}))

    run_without_weights(forward, 2, Recorder())
    return seen
