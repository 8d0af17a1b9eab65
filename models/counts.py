"""Parameters and floating-point operations of a configuration, counted without its weights."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PretrainedConfig

from millrace.models.heads import run_without_weights, without_weights


@dataclass(frozen=True, slots=True)
class ParameterCounts:
    """Numbers of weights. `head` is 0 when it is tied to the embedding; `active` leaves out the experts that
    one
    token does not visit."""

    total: int
    embedding: int
    head: int
    active: int


def parameter_counts(hf_config: PretrainedConfig) -> ParameterCounts:
    """Exact counts, each tied weight once. `embedding` holds every embedding table (tokens, learned positions)."""
    model = without_weights(hf_config)
    unique = {id(p): p.numel() for p in model.parameters()}
    tables = {id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding)}
    head = model.get_output_embeddings()
    own = [p for p in head.parameters() if id(p) not in tables] if isinstance(head, nn.Module) else []
    total = sum(unique.values())
    return ParameterCounts(
        total=total,
        embedding=sum(tables.values()),
        head=sum(p.numel() for p in own),
        active=total - _idle(model, hf_config),
    )


def _idle(model: nn.Module, config: PretrainedConfig) -> int:
    """Weights of the experts that a token is not routed to."""
    experts = _first(config, "num_experts", "num_local_experts", "n_routed_experts")
    active = _first(config, "num_experts_per_tok", "num_experts_per_token", "moe_topk")
    if not experts or not active:
        return 0
    stacked = sum(
        p.numel()
        for name, p in model.named_parameters()
        if ".experts." in name and p.ndim >= 2 and p.shape[0] == experts
    )
    return stacked * (experts - active) // experts


def _first(config: PretrainedConfig, *names: str) -> int:
    return next((value for name in names if isinstance(value := getattr(config, name, None), int)), 0)


def flops_per_token(hf_config: PretrainedConfig, sequence_length: int) -> float:
    """Training operations per token at this sequence length: 3 × the matrix products of one forward pass.

    The convention of PaLM (arXiv:2204.02311, appendix B): a multiply-add counts 2, the backward pass counts
    twice the forward pass, attention counts the full square of scores (no credit for causality, windows or
    document borders), embedding look-ups, norms and activations count nothing, recomputed activations count
    nothing, and of a mixture only the experts that a token visits count. For a dense decoder that is 6 ·
    (matrix weights, head included) + 12 · layers · width of all heads · sequence length.

    Counted with `torch.utils.flop_counter` on fake tensors, so no formula per architecture can go stale.
    """
    model = without_weights(hf_config)
    if any(isinstance(module, nn.RNNBase) for module in model.modules()):
        sequence_length = 1  # a token costs as much at any length, and here they are taken one by one
    counter = FlopCounterMode(display=False)
    run_without_weights(model, sequence_length, counter)
    return 3 * counter.get_total_flops() / sequence_length
