"""What makes codes of images or sounds when data are prepared, and values of codes afterwards: a trained codec."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from millrace.core.config import build
from millrace.core.errors import UserError
from millrace.core.rundir import write_atomic
from millrace.data import CODES
from millrace.data.corpus import Corpus
from millrace.data.modalities.base import View, modality
from millrace.engine.checkpoint.tensorfile import write_tensors
from millrace.engine.export import VIEW
from millrace.engine.trained import STEADY, Trained
from millrace.eval.subject import from_pretrained, is_ours
from millrace.models.codec import Codec, CodecConfig

_OWN = [name for name in CodecConfig.__annotations__ if name != "model_type"]  # what a codec's configuration says of it


@dataclass(frozen=True)
class CodecCoder:
    """A codec with codes in evaluation mode, and how it looks at media (see `millrace.data.coding.Coder`)."""

    model: Codec
    view: View

    @cached_property
    def sha256(self) -> str:
        """Over configuration, view and weights, wherever they were read from."""
        about = [{name: getattr(self.model.config, name) for name in _OWN}, self.table]
        sha = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            sha.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return sha.hexdigest()

    @property
    def table(self) -> dict[str, Any]:
        """What view.json says: the view without what is random about it."""
        view: Any = self.view
        return {name: getattr(view, name) for name in STEADY[view.role]}

    def encode(self, values: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Codes, int64 in the grid's sizes, of images uint8 (height, width, 3) or sounds float32 (frames,)."""
        found: list[np.ndarray] = []
        for _, alike in itertools.groupby(values, key=np.shape):
            stacked = torch.from_numpy(np.stack(list(alike))).to(self.model.device)
            found += list(self.model.encode(stacked).cpu().numpy())
        return found

    def save(self, folder: Path) -> None:
        """Write config.json, model.safetensors and view.json, which `open_coder` reads."""
        self.model.config.architectures = [type(self.model).__name__]
        write_atomic(folder / "config.json", self.model.config.to_json_string())
        tensors = {name: tensor.cpu() for name, tensor in self.model.state_dict().items()}
        shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        write_tensors(folder / "model.safetensors", shapes, tensors.__getitem__, {"format": "pt"})
        write_atomic(folder / VIEW, json.dumps(self.table))


def open_coder(role: str, path: str | Path, device: torch.device | str | None = None) -> CodecCoder:
    """The codec of `role` in a run directory, a `step-N` folder, or a folder that `millrace export` or `save` wrote.

    Raises:
        UserError: nothing of that name, no codec, one of another role or without codes, or one that does not know how
            media are to be looked at.
    """
    name = Path(path)
    if is_ours(name):
        trained = Trained.open(name)
        model, view = trained.load(), trained.view()
    else:
        if not (name / "config.json").is_file():
            raise UserError(f"{path} is neither a run directory, nor a checkpoint, nor a folder with config.json")
        from transformers import AutoModel

        model, view = from_pretrained(str(name), AutoModel), _stored_view(name)
    if not isinstance(model, Codec):
        raise UserError(f"{path} is no codec ({type(model).__name__}); train one with objective.kind = 'codec'")
    config = model.config
    if role not in CODES or config.modality != role:
        raise UserError(f"{path} is a codec of '{config.modality}', not of '{role}'; write --codec {config.modality}=…")
    if not model.codes:
        raise UserError(f"{path}: its bottleneck '{config.bottleneck}' has no codes; train a codec with vq or fsq")
    if view is None or view.get("role") != role:
        raise UserError(
            f"{path} does not say at which size it looks at media: its run has no view in data.views. Write {VIEW} "
            f'into an exported folder, such as {{"role": "image", "size": 64}}'
        )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    steady = {name: view[name] for name in STEADY[role] if name in view}
    return CodecCoder(model.eval().to(device), build(modality(role).view, steady))


def stored_coder(corpus: Corpus, role: str, device: torch.device | str | None = None) -> CodecCoder:
    """The codec that made a corpus's codes of `role`, from beside the first manifest that has them.

    Raises:
        UserError: the corpus has none, its codec is gone, or it is not the one that made them.
    """
    found = next((m for m in corpus.manifests if CODES[role] in m.codecs), None)
    if found is None:
        raise UserError(f"{corpus.folder} has no codes of '{role}'; prepare it with --codec {role}=WHERE")
    folder = (found.folder.parent if found.folder.name == "heldout" else found.folder) / "codecs" / role
    coder = open_coder(role, folder, device)
    if coder.sha256 != (wanted := found.codecs[CODES[role]]):
        raise UserError(
            f"the codec {folder} (hash {coder.sha256[:12]}) is not the one that made the codes of {found.folder} "
            f"({wanted[:12]}); put that one back, or prepare again with yours"
        )
    return coder


def _stored_view(folder: Path) -> dict[str, Any] | None:
    path = folder / VIEW
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is not a readable view: {error}") from None
