"""The bridge to transformers: from the `[model]` section to a configuration and a model with its weights."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
    PreTrainedModel,
    initialization,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
)

from millrace.core.errors import UserError, did_you_mean
from millrace.models import attention
from millrace.models import codec as codec  # registers itself with transformers, as the next two do
from millrace.models import generator as generator
from millrace.models import lstm as lstm  # registers itself with transformers
from millrace.models.architecture import adopt, architecture, depth_sizes
from millrace.models.config import ModelConfig
from millrace.models.initial import clear_padding, draw_weights
from millrace.models.weights import hub_file, load_weights

VOCABULARY_MULTIPLE = 64


@dataclasses.dataclass(frozen=True)
class Family:
    """What a text model of transformers is for: its automatic class, and the architectures that have one."""

    what: str
    auto: Any
    mapping: Any
    examples: str


CAUSAL = Family("causal language model", AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING, "qwen3, llama or gpt2")
MASKED = Family("masked language model", AutoModelForMaskedLM, MODEL_FOR_MASKED_LM_MAPPING, "bert or modernbert")
SEQ2SEQ = Family(
    "sequence-to-sequence model", AutoModelForSeq2SeqLM, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, "t5 or bart"
)


def hf_config(config: ModelConfig, vocab_size: int, sequence_length: int, family: Family = CAUSAL) -> PretrainedConfig:
    """The transformers configuration of `[model]`, for a tokenizer of `vocab_size` tokens.

    What `model.config` leaves out: sizes come from `model.depth` (see `depth_sizes`), the vocabulary is
    padded to a multiple of 64 (faster matrix products; the spare rows are never targets),
    `max_position_embeddings` is the sequence length, dropout is 0, and no token is special (a padding token's
    embedding would never be trained).

    Raises:
        UserError: unknown kind or key, a value that transformers refuses, a vocabulary or context that is too
        small.
    """
    cls = _config_class(config, family)
    given = _canonical(config.config, cls)
    if config.init == "random":
        built = _fresh(config, cls, given, (vocab_size, sequence_length))
    else:
        built = checked(lambda: AutoConfig.from_pretrained(config.init, **given))
    return trainable(built, config, (vocab_size, sequence_length), family)


def trainable(
    built: PretrainedConfig, config: ModelConfig, lengths: tuple[int, int], family: Family = CAUSAL
) -> PretrainedConfig:
    """`built`, changed in place to what training needs, for (vocabulary, sequence length); raises as `hf_config`."""
    vocab_size, sequence_length = lengths
    if built.vocab_size < vocab_size:
        raise UserError(
            f"the tokenizer has {vocab_size:,} tokens but the model's vocab_size is {built.vocab_size:,} "
            f"({_origin(config, 'vocab_size')}); raise model.config.vocab_size or take the model's own tokenizer"
        )
    _check_positions(config, built, sequence_length)
    built.use_cache = False  # a cache would silence the document masks that packing relies on
    built.dtype = torch.float32  # a folder may name another; the engine decides about precision
    built._attn_implementation = _attention(config, built, family)
    return built


def build_model(
    config: ModelConfig,
    vocab_size: int,
    sequence_length: int,
    seed: int,
    zero3_config: dict[str, Any] | None = None,
    family: Family = CAUSAL,
) -> PreTrainedModel:
    """A model of `family` in training mode, fp32 on CPU, or partitioned when `zero3_config` is given.

    Random weights are drawn module by module after seeding with (`seed`, module name), so they are equal at
    every ZeRO stage and world size. With `zero3_config` (a DeepSpeed configuration of stage 3;
    torch.distributed must be initialised) each module is partitioned right after construction and gathered
    one at a time to be filled; parameters then have that configuration's dtype. The global random state is
    left as it was.

    Raises:
        UserError: as `hf_config`; or, for `model.init`, weights that do not fit the architecture, by name.
    """
    built = hf_config(config, vocab_size, sequence_length, family)

    def make() -> PreTrainedModel:
        made: PreTrainedModel = family.auto.from_config(built, attn_implementation=built._attn_implementation)
        adopt(made)
        return made

    if config.init == "random":
        return construct(make, seed, zero3_config)
    model = construct(make, None, zero3_config)
    load_weights(model, config.init)
    return model


def build_sized(
    config: ModelConfig,
    cls: type[PretrainedConfig],
    seed: int,
    zero3_config: dict[str, Any] | None = None,
    auto: Any = AutoModel,
) -> Any:
    """A model of `auto` whose sizes are all in `model.config`, with weights as `build_model` draws or loads them.

    Raises:
        UserError: `model.depth`, keys that `cls` does not have, a folder with a model of another kind.
    """
    if config.depth is not None:
        raise UserError(f"model.depth is no size of a {cls.model_type}; give sizes in [model.config]")
    given, folder = _canonical(config.config, cls), config.init
    if folder == "random":
        built = checked(lambda: cls(**given))
    else:
        built = checked(lambda: AutoConfig.from_pretrained(hub_file(folder, "config.json"), **given))
        if not isinstance(built, cls):
            raise UserError(f"model.init = '{folder}' is a {built.model_type}, not a {cls.model_type}")
    fresh = folder == "random"
    model = construct(lambda: auto.from_config(built), seed if fresh else None, zero3_config)
    if not fresh:
        load_weights(model, folder)
    return model


def construct(
    make: Callable[[], PreTrainedModel], seed: int | None, zero3_config: dict[str, Any] | None = None
) -> PreTrainedModel:
    """What `make` makes, in training mode, with weights drawn as `build_model` says, or undefined without a seed."""
    with _construction(zero3_config), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed or 0)
        model = make()
    model.tie_weights()
    clear_padding(model)
    if seed is not None:
        draw_weights(model, seed)
    return model.train()


@contextlib.contextmanager
def _construction(zero3_config: dict[str, Any] | None) -> Iterator[None]:
    """Construct without drawing weights; under stage 3, partition each module right after construction."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_no_global_zero3())
        stack.enter_context(initialization.no_init_weights())
        stack.enter_context(_empty_is_nan())
        if zero3_config is not None:
            import deepspeed
            from transformers.integrations.deepspeed import prevent_arange_dtype_change

            stack.enter_context(prevent_arange_dtype_change())  # rotary frequencies stay fp32
            stack.enter_context(deepspeed.zero.Init(config_dict_or_path=zero3_config))
        yield


@contextlib.contextmanager
def _no_global_zero3() -> Iterator[None]:
    """Accelerate leaves a global flag at stage 3 by which transformers would partition and draw by its own rules."""
    from transformers.integrations import deepspeed as integration

    reference, integration._hf_deepspeed_config_weak_ref = integration._hf_deepspeed_config_weak_ref, None
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = reference


@contextlib.contextmanager
def _empty_is_nan() -> Iterator[None]:
    """Fill uninitialised memory with NaN, so that `draw_weights` finds what a family forgets to initialise."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def needs_fp32(config: ModelConfig) -> bool:
    """Whether the weights of `[model]` must not be rounded to bf16.

    Raises:
        UserError: `model.init` has no configuration.
    """
    record = architecture(config.kind if config.init == "random" else _in_folder(config).model_type)
    return record is not None and record.fp32


def _in_folder(config: ModelConfig) -> PretrainedConfig:
    return checked(lambda: AutoConfig.from_pretrained(hub_file(config.init, "config.json")))


def _config_class(config: ModelConfig, family: Family) -> type[PretrainedConfig]:
    if config.init != "random":
        cls = type(_in_folder(config))
    elif config.kind in CONFIG_MAPPING:
        cls = CONFIG_MAPPING[config.kind]
    else:
        known = [c.model_type for c in family.mapping]
        raise UserError(
            f"model.kind = '{config.kind}' is no architecture of the installed transformers"
            f"{did_you_mean(config.kind, known) or f'; take {family.examples}, say'}"
        )
    if cls not in family.mapping:
        raise UserError(
            f"model.kind = '{cls.model_type}' is no {family.what} in transformers; take one such as {family.examples}"
        )
    return cls


def _fields(cls: type[PretrainedConfig]) -> set[str]:
    return {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]


def _stored(cls: type[PretrainedConfig], key: str) -> str:
    """The name under which the configuration class keeps `key` (`hidden_size` → gpt2's `n_embd`)."""
    others = [cls.attribute_map.get(key, key), *(k for k, v in cls.attribute_map.items() if v == key)]
    fields = _fields(cls)
    return next((name for name in (key, *others) if name in fields), key)


def _canonical(table: dict[str, Any], cls: type[PretrainedConfig]) -> dict[str, Any]:
    """The user's keys under the names that the configuration class keeps."""
    known = _fields(cls) | set(cls.attribute_map)
    for key in table:
        if key not in known:
            hint = did_you_mean(key, known) or f"; known: {', '.join(sorted(known))}"
            raise UserError(f"unknown key 'model.config.{key}' for kind '{cls.model_type}'{hint}")
    return {_stored(cls, key): value for key, value in table.items()}


def _fresh(
    config: ModelConfig, cls: type[PretrainedConfig], given: dict[str, Any], lengths: tuple[int, int]
) -> PretrainedConfig:
    vocab_size, sequence_length = lengths
    fields = _fields(cls)
    defaults: dict[str, Any] = {
        "vocab_size": -(-vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE,
        "max_position_embeddings": sequence_length,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "cls_token_id", "sep_token_id")),
        **without_dropout(cls),
    }
    if config.depth is not None:
        names = ("hidden_size", "num_attention_heads", "num_experts_per_tok")
        common = {name: given[_stored(cls, name)] for name in names if _stored(cls, name) in given}
        defaults |= depth_sizes(config.kind, config.depth, common)
    elif not given:
        raise UserError(
            f"model.kind = '{config.kind}' has no size; set model.depth = 6, say, or sizes in [model.config]"
        )
    table = {_stored(cls, key): value for key, value in defaults.items() if _stored(cls, key) in fields} | given
    return checked(lambda: cls(**table))


def without_dropout(cls: type[PretrainedConfig]) -> dict[str, float]:
    """The dropout keys of a configuration class, all 0: a run that goes on then repeats to the bit."""
    return {key: 0.0 for key in _fields(cls) if "pdrop" in key or "dropout" in key or key == "drop_path_rate"}


def checked(make: Callable[[], PretrainedConfig]) -> PretrainedConfig:
    """Run transformers' own checks, giving their message without their traceback."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        return make()
    except UserError:
        raise
    except (StrictDataclassError, ValueError, TypeError, KeyError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"[model]: transformers refuses this model: {reason}; mend [model.config]") from None


def _check_positions(config: ModelConfig, built: PretrainedConfig, sequence_length: int) -> None:
    longest = getattr(built, "max_position_embeddings", None)
    if longest is not None and longest < sequence_length:
        raise UserError(
            f"the sequence length is {sequence_length:,} but the model's max_position_embeddings is {longest:,} "
            f"({_origin(config, 'max_position_embeddings')}); shorten the sequences or raise "
            "model.config.max_position_embeddings"
        )


def _origin(config: ModelConfig, key: str) -> str:
    if key in config.config or config.init == "random":
        return f"model.config.{key}"
    return f"in {config.init}/config.json"


def _attention(config: ModelConfig, built: PretrainedConfig, family: Family) -> str:
    record = architecture(built.model_type)
    wanted = config.attention
    model_class: Any = family.mapping[type(built)]
    plain = "sdpa" if model_class._supports_sdpa else "eager"
    if wanted == "auto":
        if record is None:
            return plain
        return record.attention or (attention.NAME if record.documents else plain)
    if wanted == attention.NAME and not (record and record.documents):
        raise UserError(
            f"model.attention = 'documents' is not proven for kind '{built.model_type}'; use model.attention = 'auto'"
        )
    if record and record.attention not in (None, wanted):
        raise UserError(
            f"model.attention = '{wanted}' computes kind '{built.model_type}' wrongly; use model.attention = 'auto'"
        )
    if wanted not in AttentionInterface().valid_keys() and wanted != "eager":
        names = sorted({*AttentionInterface().valid_keys(), "eager", "auto"})
        raise UserError(
            f"model.attention = '{wanted}' is unknown{did_you_mean(wanted, names)} (known: {', '.join(names)})"
        )
    return wanted
