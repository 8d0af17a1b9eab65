"""Where fine-tuning starts: our own checkpoints become a Hugging Face folder first, so that there is one way on."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from millrace.core.errors import UserError, did_you_mean, is_missing_path
from millrace.engine.checkpoint.read import list_checkpoints
from millrace.engine.export import export

TUNED = ("merged", "model")  # what a fine-tuning run leaves behind


@dataclass(frozen=True)
class Source:
    """`checkpoint` is ours (None: `folder` is a Hugging Face folder or hub name); `tokenizer` lies beside it."""

    name: str
    checkpoint: Path | None
    folder: str
    tokenizer: str


def find_source(name: str) -> Source:
    """What `source` names: a run directory (a finished fine-tuning run's result, else the newest checkpoint), a
    checkpoint, a Hugging Face folder or a hub name.

    Raises:
        UserError: nothing of the kind is there.
    """
    path = Path(name)
    if not path.is_dir():
        if is_missing_path(name):
            near = [str(p) for p in path.parent.glob("*")] if path.parent.is_dir() else []
            raise UserError(f"source = '{name}': no such folder{did_you_mean(name, near)}")
        return Source(name, None, name, name)
    if (path / "MANIFEST.json").is_file():
        return Source(name, path, "", str(path / "tokenizer"))
    for tuned in TUNED:
        if (path / tuned / "config.json").is_file():
            return Source(name, None, str(path / tuned), str(path / tuned))
    if (path / "config.json").is_file():
        return Source(name, None, name, name)
    found = list_checkpoints(path / "checkpoints")
    if not found:
        raise UserError(
            f"source = '{name}' holds neither checkpoints/step-N nor a config.json; give a run directory that has a "
            "checkpoint, or a Hugging Face folder"
        )
    return Source(name, found[0], "", str(found[0] / "tokenizer"))


def pin(source: Source, out: Path) -> str:
    """The Hugging Face folder to start from: the source's own, or an export of our checkpoint into `out`.

    An export that is there already stays, so that a restart begins with the weights of the first start, however far
    the source has gone since. Call it on one rank.
    """
    if source.checkpoint is None:
        return source.folder
    if not (out / "config.json").is_file():
        export(source.checkpoint, out)
    return str(out)


def open_tokenizer(name: str) -> Any:
    """The tokenizer of a folder or hub name, as transformers loads it.

    Raises:
        UserError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # many kinds: offline, missing files, an unknown class
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"no tokenizer at '{name}' ({reason}); set data.tokenizer to a folder or hub name") from None


def without_dropout(folder: str) -> dict[str, float]:
    """The source's dropout keys, all set to 0: a resumed run then repeats to the bit."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"source = '{folder}' has no configuration that transformers reads: {reason}") from None
    return {k: 0.0 for k, v in config.to_dict().items() if ("drop" in k) and isinstance(v, float)}


def quietly(load: Callable[[], Any]) -> Any:
    """Call without transformers' bars and its reports of heads that are missing or unexpected: they are meant to be."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return load()
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
