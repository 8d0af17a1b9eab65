"""Weights from a Hugging Face folder, tensor by tensor, whole or partitioned."""

from __future__ import annotations

import contextlib
import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from millrace.core.errors import UserError

ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def hub_file(name: str, file: str) -> str:
    """Path of `file` in the folder or hub repository `name`.

    Raises:
        UserError: it is not there.
    """
    from transformers.utils import cached_file

    if Path(name).is_dir():
        if not (Path(name) / file).is_file():
            raise UserError(f"model.init = '{name}': the folder has no {file}; give a folder that has one")
        return str(Path(name) / file)
    try:
        return str(cached_file(name, file))
    except OSError as error:
        raise UserError(f"model.init = '{name}' is neither a folder nor on the hub: {error}") from None


@dataclass(frozen=True)
class Group:
    """Checkpoint tensors that together make one or more of the model's: (name, pattern of the converter)."""

    target: str
    converter: WeightConverter | None
    sources: list[tuple[str, str]]

    def convert(self, model: PreTrainedModel, read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        """The model's tensors by name."""
        if self.converter is None:
            return {self.target: read(self.sources[0][0])}
        converter = copy.deepcopy(self.converter)
        for key, pattern in self.sources:
            converter.add_tensor(self.target, key, pattern, read(key))  # type: ignore[arg-type]
        made = converter.convert(self.target, model=model, config=model.config)
        return {key: value[0] if isinstance(value, list) else value for key, value in made.items()}


@torch.no_grad()
def load_weights(model: PreTrainedModel, name: str) -> None:
    """Fill `model` from the safetensors of folder or hub name `name`, reading one parameter at a time.

    Names and layouts are converted as `from_pretrained` does (fused experts, renamed modules). Everything is
    checked from the files' headers before the first weight is written. Partitioned parameters are gathered
    one by one.

    Raises:
        UserError: no safetensors, or tensors that are missing, unexpected or of another shape, by name.
    """
    with Checkpoint(name) as checkpoint:
        groups = _groups(model, checkpoint)
        written = _check(model, groups, checkpoint)
        tensors = _tensors(model)
        for group, keys in zip(groups, written, strict=True):
            with _gathered([tensors[key] for key in keys]) as writes:
                values = group.convert(model, checkpoint.read) if writes else {}
                for key, value in values.items():
                    if key in keys:
                        tensors[key].data.copy_(value)


class Checkpoint:
    """The tensors of one or several safetensors files by name; headers are read at once, tensors when asked for."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.stack = contextlib.ExitStack()
        self.files: dict[str, Any] = {}

    def __enter__(self) -> Checkpoint:
        for path in self._paths():
            try:
                file = self.stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path} is torn or no safetensors file ({error}); fetch it again") from None
            self.files |= dict.fromkeys(file.keys(), file)
        return self

    def __exit__(self, *exception: object) -> None:
        self.stack.close()

    def _paths(self) -> list[str]:
        if not Path(self.name).is_dir() or (Path(self.name) / INDEX).is_file():
            with contextlib.suppress(UserError):
                index = json.loads(Path(hub_file(self.name, INDEX)).read_text(encoding="utf-8"))
                return [hub_file(self.name, file) for file in sorted(set(index["weight_map"].values()))]
        return [hub_file(self.name, ONE_FILE)]

    def shape(self, key: str) -> list[int]:
        """Of the tensor `key`."""
        return self.files[key].get_slice(key).get_shape()

    def read(self, key: str) -> torch.Tensor:
        """The tensor `key`, in memory."""
        return self.files[key].get_tensor(key)

    def empty(self, key: str) -> torch.Tensor:
        """A tensor of its shape on the meta device."""
        return torch.empty(self.shape(key), device="meta")


def _tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name, tied ones under every name."""
    saved = model.state_dict().keys()
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {key: tensor for key, tensor in named if key in saved}


def _shape(tensor: torch.Tensor) -> list[int]:
    return list(getattr(tensor, "ds_shape", tensor.shape))


def _groups(model: PreTrainedModel, checkpoint: Checkpoint) -> list[Group]:
    """The checkpoint's tensors, grouped and renamed by transformers' own rules."""
    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    known = (model.base_model_prefix, _tensors(model))
    groups: dict[str, Group] = {}
    for key in sorted(checkpoint.files, key=dot_natural_key):
        target, pattern = rename_source_key(key, renamings, converters, *known)
        if target not in known[1] and key in known[1]:
            target, pattern = key, None
        group = groups.setdefault(target, Group(target, by_pattern.get(pattern or ""), []))
        group.sources.append((key, pattern or key))
    return list(groups.values())


def _check(model: PreTrainedModel, groups: list[Group], checkpoint: Checkpoint) -> list[set[str]]:
    """Names that each group writes, from shapes alone, so that all ranks refuse alike before anything is written."""
    tensors = _tensors(model)
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    made: list[dict[str, list[int]]] = []
    for group in groups:
        if group.target not in tensors:
            made.append({group.target: []})
            continue
        try:
            values = group.convert(model, checkpoint.empty)
        except Exception as error:  # whatever transformers' operations raise on shapes that do not fit together
            raise UserError(
                f"model.init = '{checkpoint.name}': tensors {[key for key, _ in group.sources]} do not make "
                f"'{group.target}' ({error}); the folder's config.json and weights do not belong together"
            ) from None
        made.append({key: list(value.shape) for key, value in values.items()})
    found = {key: shape for shapes in made for key, shape in shapes.items()}
    filled = {id(tensors[key]) for key in found if key in tensors}
    missing = [key for key, tensor in tensors.items() if id(tensor) not in filled]
    unexpected = [key for key in found if key not in tensors]
    missing = _not_matching(missing, model._keys_to_ignore_on_load_missing)
    unexpected = _not_matching(unexpected, model._keys_to_ignore_on_load_unexpected)
    misshapen = [
        f"{key} is {found[key]}, expected {_shape(tensors[key])}"
        for key in found
        if key in tensors and found[key] != _shape(tensors[key])
    ]
    for what, names in (("missing", missing), ("unexpected", unexpected), ("mis-shaped", misshapen)):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise UserError(
                f"model.init = '{checkpoint.name}': {what} tensors: {', '.join(names[:5])}{more}; "
                "the weights do not fit the folder's config.json and [model.config]"
            )
    return [{k for k in shapes if k in tensors and not (k in tied and tied[k] in found)} for shapes in made]


def _not_matching(names: list[str], patterns: Any) -> list[str]:
    return [name for name in names if not any(re.search(pattern, name) for pattern in patterns or ())]


@contextlib.contextmanager
def _gathered(tensors: list[torch.Tensor]) -> Iterator[bool]:
    """Gather partitioned parameters; true where this rank's writes count."""
    partitioned = [t for t in tensors if hasattr(t, "ds_id")]
    if not partitioned:
        yield True
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0):
        yield torch.distributed.get_rank() == 0
