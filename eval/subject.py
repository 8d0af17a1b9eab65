"""What is evaluated: a run directory, a `step-N` folder, or a Hugging Face folder or hub name."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from millrace.core.errors import UserError, did_you_mean, is_missing_path
from millrace.data.tokenizer import Tokenizer, load_tokenizer
from millrace.engine.precision import choose_precision
from millrace.engine.trained import Trained
from millrace.models.architecture import adopt, architecture

LONGEST = 4096  # tokens of context where neither the run nor the user says: pretrained models name up to a million
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Subject:
    """A causal model of `transformers` in evaluation mode, its tokenizer, and how many tokens it may see at once."""

    model: Any
    tokenizer: Tokenizer
    context: int
    description: dict[str, Any]  # kind, path, step, run_id, manifest, parameters, dtype, device, context

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.get_input_embeddings().weight.device

    def check_length(self, prompts: Sequence[str], tokens: int) -> None:
        """Refuse to generate beyond the positions that the model has.

        Raises:
            UserError: a prompt and `tokens` new ones do not fit.
        """
        room = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        longest = 1 + max(len(ids) for ids in self.tokenizer.encode(prompts))
        if room is not None and longest + tokens > room:
            raise UserError(
                f"a prompt of {longest:,} tokens and {tokens:,} new ones exceed the {room:,} positions of the model; "
                f"ask for at most {max(0, room - longest):,} tokens, or shorten the prompt"
            )


def open_subject(path: str | Path, *, dtype: str = "auto", context: int | None = None) -> Subject:
    """Open what `path` names; on the GPU where there is one.

    Args:
        path: a run directory (its newest good checkpoint, or what LoRA merged), a `step-N` folder, a Hugging Face
            folder or hub name.
        dtype: "fp32", "bf16" or "auto", which is fp32 on a CPU and what the hardware is fast at on a GPU.
        context: tokens that the model sees at once; by default the training's sequence length, for models from
            elsewhere their `max_position_embeddings`, at most 4,096.

    Raises:
        UserError: nothing of that name, a torn or altered checkpoint, weights that do not fit, a tokenizer larger
            than the vocabulary, or a context longer than the model's.
    """
    name = Path(path)
    if (name / "merged" / "config.json").is_file():
        path = name = (
            name / "merged"
        )  # a LoRA run: its checkpoints hold the adapters apart, this is the model with them
    if is_ours(name):
        model, tokenizer, trained_on, origin = _open_ours(name)
    else:
        model, tokenizer, trained_on, origin = _open_theirs(str(path))  # a Path would turn ./name into a hub name
    if model.get_output_embeddings() is None:
        raise UserError(f"{path} is no language model ({type(model).__name__}): it has no output over tokens")
    _check_vocabulary(model, tokenizer, path)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    record = architecture(model.config.model_type)
    plain = device == "cpu" or (record is not None and record.fp32)
    wanted = ("fp32" if plain else choose_precision("auto")) if dtype == "auto" else dtype
    model = model.to(device=device, dtype=DTYPES[wanted]).eval()
    adopt(model)
    if record is not None and record.attention is not None:
        model.set_attn_implementation(record.attention)
    context = _context(model, context, trained_on)
    description = {
        **origin,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": wanted,
        "device": device,
        "context": context,
    }
    return Subject(model, tokenizer, context, description)


def is_ours(path: Path) -> bool:
    """Whether it is a run directory or a checkpoint, there or not."""
    return (path / "checkpoints").is_dir() or (path / "MANIFEST.json").is_file() or path.name.startswith("step-")


Opened = tuple[Any, Tokenizer, int | None, dict[str, Any]]


def _open_ours(path: Path) -> Opened:
    trained = Trained.open(path)
    tokenizer = load_tokenizer(trained.checkpoint.path / "tokenizer")
    return trained.load(), tokenizer, trained.sequence_length(), {"kind": "checkpoint", **trained.origin()}


def _open_theirs(name: str) -> Opened:
    folder = Path(name)
    if folder.is_dir() and not any((folder / f).is_file() for f in ("config.json", "adapter_config.json")):
        raise UserError(
            f"{name} is neither a run directory (checkpoints/), nor a checkpoint (MANIFEST.json), nor a Hugging Face "
            "folder (config.json)"
        )
    if is_missing_path(name):
        near = [str(p) for p in folder.parent.glob("*")]
        raise UserError(
            f"no run directory, checkpoint or folder {name}{did_you_mean(name, near) or '; check the path'}"
        )
    if folder.is_file():
        raise UserError(f"{name} is a file; give its folder")
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    tokenizer = load_tokenizer(name)
    return (
        from_pretrained(name, AutoModelForImageTextToText if _sees(name) else AutoModelForCausalLM),
        tokenizer,
        None,
        {"kind": "huggingface", "path": name, "step": None},
    )


def _sees(name: str) -> bool:
    """Whether it is a `llava`; what cannot be read is told of later."""
    from transformers import AutoConfig, LlavaConfig

    with suppress(OSError, ValueError, KeyError):
        return isinstance(AutoConfig.from_pretrained(name), LlavaConfig)
    return False


def from_pretrained(name: str, auto: Any, spare: str = "") -> Any:
    """The model in a folder of transformers or on the hub, fp32 on the CPU, by one of its automatic classes.

    Tensors whose names begin with `spare` may be missing.

    Raises:
        UserError: it cannot be loaded, or its weights are not all there.
    """
    from safetensors import SafetensorError

    try:
        with _quiet_transformers():
            loaded: Any = auto.from_pretrained(
                name, dtype=torch.float32, trust_remote_code=False, use_safetensors=True, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"transformers cannot load {name}: {reason}") from None
    model, info = loaded
    # transformers would draw what is missing at random, and evaluate that.
    missing = [*info["missing_keys"], *(key for key, *_ in info.get("mismatched_keys") or ())]
    missing = [key for key in missing if not (spare and key.startswith(spare))]
    if missing:
        raise UserError(f"{name}: its weights do not fit its config.json: {', '.join(sorted(missing)[:5])} missing")
    return model


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without its report of missing tensors (raised here instead) and its progress bar."""
    from transformers.utils import logging as theirs

    level, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity(logging.CRITICAL)
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()


def _check_vocabulary(model: Any, tokenizer: Tokenizer, path: str | Path) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"{path}: the tokenizer has {tokenizer.vocab_size:,} tokens but the model's vocabulary is {rows:,}; "
            "put the model's own tokenizer.json there"
        )


def _context(model: Any, wanted: int | None, trained_on: int | None) -> int:
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if wanted is None:
        return trained_on or min(longest or LONGEST, LONGEST)
    if wanted < 2 or (longest is not None and wanted > longest):
        raise UserError(f"a context of {wanted:,} tokens: give 2 to {longest or 'any':,}, which the model is made for")
    return wanted
