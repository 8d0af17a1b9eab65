"""A checkpoint as transformers sees it: its configuration, its model class, and its weights by that model's names."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, initialization
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from millrace.core.config import build
from millrace.core.errors import UserError
from millrace.core.registry import load
from millrace.data.modalities.base import modality, names
from millrace.engine.checkpoint.read import Checkpoint, open_verified
from millrace.models import CLASSES
from millrace.models.architecture import adopt
from millrace.models.vision import bare_encoder

# An objective keeps the model that it is judged by under this name; what else it holds is its own.
PREFIX = "model."
# What a view is without what was random about it, by role.
STEADY = {"image": ("role", "size"), "audio": ("role", "rate", "seconds")}


@dataclass(frozen=True)
class Trained:
    """The transformers model inside a verified checkpoint; tensors are read one at a time."""

    checkpoint: Checkpoint
    config: PretrainedConfig
    model_class: Any  # AutoModelForCausalLM, or the class that the checkpoint's configuration names
    prefix: str = PREFIX  # of its weights

    @classmethod
    def open(cls, source: str | Path, part: str = "model", prefix: str = PREFIX) -> Trained:
        """The newest good checkpoint of a run directory, or a `step-N` folder; `part` is where its configuration lies.

        Raises:
            UserError: missing, torn or altered, or written by an objective without a transformers model.
        """
        checkpoint = open_verified(Path(source))
        folder = checkpoint.path / part
        if not (folder / "config.json").is_file():
            raise UserError(
                f"{checkpoint.path} has no {part}/config.json; it was not written by `millrace pretrain` or `finetune`"
            )
        trained = cls(checkpoint, *_config_and_class(folder), prefix)
        trained._check()
        return trained

    def build(self, device: str = "cpu") -> PreTrainedModel:
        """The model without its weights: on "meta" no memory is taken, elsewhere the content is undefined."""
        with initialization.no_init_weights(), torch.device(device):
            make = getattr(self.model_class, "from_config", None) or self.model_class._from_config
            if self.model_class is MODEL_MAPPING.get(type(self.config), None):
                make = bare_encoder
            model: PreTrainedModel = make(self.config)
        adopt(model)
        model.tie_weights()
        return model

    def load(self) -> PreTrainedModel:
        """The model with its weights, fp32 on the CPU, in evaluation mode."""
        model = self.build()
        with torch.no_grad():
            for name, tensor in _named(model):
                tensor.copy_(self.read(name))
        model.tie_weights()
        return model.eval()

    def names(self) -> list[str]:
        """Parameters and persistent buffers in the model's order, tied ones once."""
        return [name for name, _ in _named(self.build("meta"))]

    def read(self, name: str) -> torch.Tensor:
        """A tensor in its shape: the fp32 master, or a frozen parameter or a buffer in its own dtype."""
        key = self.prefix + name
        if key in self.checkpoint.manifest["params"]:
            return self.checkpoint.master(key)
        with safe_open(str(self.checkpoint.path / "fixed.safetensors"), framework="pt") as file:
            return file.get_tensor(key)

    def fixed(self, prefix: str) -> dict[str, torch.Tensor]:
        """What the objective holds beside the model: frozen parameters and buffers by their names behind `prefix`."""
        with safe_open(str(self.checkpoint.path / "fixed.safetensors"), framework="pt") as file:
            names = [key for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118 (not a dict)
            return {name.removeprefix(prefix): file.get_tensor(name) for name in names}

    def tokenizer_files(self) -> dict[str, str]:
        """Text by file name."""
        found = [name for name in self.checkpoint.manifest["files"] if name.startswith("tokenizer/")]
        return {name.removeprefix("tokenizer/"): self.checkpoint.text(name) for name in found}

    def sequence_length(self) -> int | None:
        """Tokens in a row of the training, where the run's configuration says so."""
        length = self._settings().get("data", {}).get("sequence_length")
        return length if isinstance(length, int) else None

    def view(self) -> dict[str, Any] | None:
        """How a model of images or sounds looked at them, a table as in `data.views` without what was random about it.

        None where the run's configuration does not say so.
        """
        settings, encodes = self._settings(), hasattr(self.config, "num_channels")
        role, objective = getattr(self.config, "modality", "image" if encodes else None), settings.get("objective", {})
        wanted = objective.get("view") or objective.get("large") or role
        for given in settings.get("data", {}).get("views", ()):
            if role in STEADY and given.get("role") == role:
                view = build(modality(role).view, given)
                if wanted in (view.name, *names(view)):
                    return {name: getattr(view, name) for name in STEADY[role]}
        return None

    def _settings(self) -> dict[str, Any]:
        path = self.checkpoint.path / "config.toml"
        return tomllib.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def origin(self) -> dict[str, Any]:
        """Where it comes from: path, step, run id and the data's fingerprint, as far as the checkpoint knows."""
        path = self.checkpoint.path / "trainer.json"
        trainer = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        stages = trainer.get("loader", {}).get("stages") or [{}]
        return {
            "path": str(self.checkpoint.path),
            "step": self.checkpoint.step,
            "run_id": trainer.get("run_id"),
            "manifests": stages[-1].get("manifests"),
        }

    def _check(self) -> None:
        """Every tensor of the model must be there in its shape, and every tensor of the checkpoint be used."""
        wanted = {name: list(tensor.shape) for name, tensor in _named(self.build("meta"))}
        there = dict(self.checkpoint.manifest["params"])
        with safe_open(str(self.checkpoint.path / "fixed.safetensors"), framework="pt") as file:
            there |= {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 (not a dict)
        found = {key.removeprefix(self.prefix): shape for key, shape in there.items() if key.startswith(self.prefix)}
        odd = sorted(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n))
        if odd:
            name = odd[0]
            raise UserError(
                f"{self.checkpoint.path}: its weights and its model/config.json do not belong together: {name} is "
                f"{found.get(name)} in the weights and {wanted.get(name)} in the model ({len(odd)} such tensors)"
            )


def _config_and_class(folder: Path) -> tuple[PretrainedConfig, Any]:
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (name, *_) = written.get("architectures") or ["AutoModelForCausalLM"]
    if name in CLASSES:
        own = load(CLASSES[name])
        return own.config_class.from_pretrained(folder), own
    if not hasattr(transformers, name):
        raise UserError(f"{folder}/config.json names the class {name}, unknown to the installed transformers")
    return AutoConfig.from_pretrained(folder), getattr(transformers, name)


def _named(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters once each, then persistent buffers."""
    saved = model.state_dict().keys()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in saved:
            yield name, tensor
