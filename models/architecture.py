"""What was proven about an architecture of transformers, in one record each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from millrace.core.errors import UserError
from millrace.models import REGISTRY

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """One family.

    `mlp` tells the depth dial how wide the feed-forward part is (None: the dial does not size this family).
    `packable` means that `packed == alone` is tested; `why_not` is the reason otherwise. `masked` is a family of
    masked language models, tested as those, with the masks of `pretrain.objectives.masked_lm`.
    `documents` means that the attention of `millrace.models.attention` was proven equal to the mask.
    `attention` names the only implementation that computes the family right, None if any does.
    `adopt` names a function that puts ours in the place of some of a built model's computations, "" for none.
    `fp32` means that weights must not be rounded to bf16: decays near 1 would become 1.
    """

    mlp: Literal["gated", "plain", "experts"] | None = None
    expert_size_key: str = "intermediate_size"
    packable: bool = True
    documents: bool = True
    attention: str | None = None
    why_not: str = ""
    masked: bool = False
    adopt: str = ""
    fp32: bool = False


GATED = Architecture(mlp="gated")
PLAIN = Architecture(mlp="plain")
MIXTRAL = Architecture(mlp="experts")
QWEN3_MOE = Architecture(mlp="experts", expert_size_key="moe_intermediate_size")
# Gemma 2 soft-caps attention scores, which only the eager attention does.
GEMMA2 = Architecture(mlp="gated", attention="eager", documents=False)
ENCODER = Architecture(mlp="plain", documents=False, masked=True)
RECURRENT_GEMMA = Architecture(adopt="millrace.models.recurrent_gemma:adopt", fp32=True)
MAMBA2 = Architecture(documents=False, adopt="millrace.models.mamba2:adopt", fp32=True)
LSTM = Architecture(attention="documents")  # it has none: the table of documents comes that way
RECURRENT = Architecture(
    packable=False, documents=False, fp32=True, why_not="its recurrent state runs on across document borders"
)


def architecture(kind: str) -> Architecture | None:
    """The record of `kind`, or None when nothing is known about it."""
    from millrace.core.registry import load

    return load(REGISTRY[kind]) if kind in REGISTRY else None


def adopt(model: PreTrainedModel) -> None:
    """Let a model that transformers built compute as its record says, in place."""
    from millrace.core.registry import load

    record = architecture(model.config.model_type)
    if record is not None and record.adopt:
        load(record.adopt)(model)


def depth_sizes(kind: str, depth: int, given: dict[str, object]) -> dict[str, object]:
    """Sizes that the depth dial gives, by transformers' common names, to be filtered by what the family
    knows.

    `given` holds the user's own keys; width, heads and active experts found there shape the rest.

    nanochat's rule (karpathy/nanochat, scripts/base_train.py: `--depth`, `--aspect-ratio 64`): layers =
    depth, width = 64 · depth, as many key-value heads as heads. Heads are 64 wide here, not nanochat's 128,
    so that heads = depth and small models keep several. The feed-forward part has 8 · width² weights in every
    family: 4 · width neurons without a gate (as nanochat), 8/3 · width rounded up to a multiple of 64 with
    one, and the same divided over the active experts of a mixture.

    Raises:
        UserError: depth below 1, or a family that the dial does not size.
    """
    record = architecture(kind)
    if record is None or record.mlp is None:
        from millrace.core.registry import load

        sized = ", ".join(sorted(k for k, v in REGISTRY.items() if load(v).mlp))
        raise UserError(
            f"model.depth = {depth} cannot size '{kind}'; give its sizes in [model.config], or take one of: {sized}"
        )
    if depth < 1:
        raise UserError(f"model.depth = {depth}: a model has at least one layer; set model.depth = 1 or more")
    width = _integer(given, "hidden_size", 64 * depth)
    heads = _integer(given, "num_attention_heads", max(1, width // 64))
    inner = 4 * width if record.mlp == "plain" else _round_up(-(-8 * width // 3), 64)
    sizes: dict[str, object] = {
        "num_hidden_layers": depth,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": width // heads,
        "intermediate_size": inner,
        "tie_word_embeddings": False,
        # Gemma and Granite name the scale of attention scores apart, with defaults of their released sizes.
        "query_pre_attn_scalar": width // heads,
        "attention_multiplier": (width // heads) ** -0.5,
    }
    if record.mlp == "experts":
        active = _integer(given, "num_experts_per_tok", 2)
        sizes |= {
            "num_local_experts": 8,
            "num_experts_per_tok": active,
            record.expert_size_key: _round_up(-(-inner // active), 64),
        }
    return sizes


def _integer(given: dict[str, object], key: str, default: int) -> int:
    value = given.get(key, default)
    if not isinstance(value, int) or value < 1:
        raise UserError(f"model.config.{key} = {value!r}: expected a whole number above 0")
    return value


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
