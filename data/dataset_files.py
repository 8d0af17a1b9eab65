"""Arrow files of data sets that the `datasets` library has written, so that they are read where they lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from millrace.core.errors import UserError, did_you_mean


def arrow_files(name: str) -> list[Path] | None:
    """Files (kind "arrow") that hold exactly the rows of `datasets:NAME[:CONFIG[:SPLIT]]`, in order.

    NAME is a folder of `save_to_disk`, or a data set that `load_dataset` has prepared on this machine before. None
    where there are no such files: it was not prepared, SPLIT is an expression like train[:10%], or rows were selected
    or shuffled by an indices mapping. Then it has to be imported. SPLIT defaults to "train".

    Raises:
        UserError: the folder is damaged, or has no such split.
    """
    path, config, split = (name.removeprefix("datasets:").split(":") + ["", ""])[:3]
    folder = Path(path)
    if (folder / "dataset_dict.json").is_file():
        splits = _read(folder / "dataset_dict.json").get("splits", [])
        if (split or "train") not in splits:
            hint = did_you_mean(split or "train", splits) or f"; it has: {', '.join(splits)}"
            raise UserError(f"the data set '{name}' has no split '{split or 'train'}'{hint}")
        return _saved(folder / (split or "train"))
    if (folder / "state.json").is_file():
        return _saved(folder)
    return _prepared(path, config, split or "train")


def _saved(folder: Path) -> list[Path] | None:
    """Files of one split that `Dataset.save_to_disk` wrote."""
    state = _read(folder / "state.json")
    if state.get("_indices_data_files"):  # releases before 2.0 kept the mapping beside the rows
        return None
    names = [entry["filename"] for entry in state.get("_data_files", []) if isinstance(entry.get("filename"), str)]
    files = [folder / name for name in names]
    for file in files:
        if file.parent != folder or not file.is_file():
            raise UserError(f"{folder / 'state.json'} names {file}, which is not a file of that folder")
    return files


def _prepared(path: str, config: str, split: str) -> list[Path] | None:
    """Files in the cache of `datasets`, if the data set was prepared before and the split is a whole one."""
    import datasets

    try:
        builder: Any = datasets.load_dataset_builder(path, config or None)
        if not Path(builder.cache_dir).joinpath("dataset_info.json").is_file() or split not in builder.info.splits:
            return None
        loaded: Any = builder.as_dataset(split=split)
    except Exception:  # `datasets` raises many kinds; importing it will say what is wrong
        return None
    if loaded._indices is not None:
        return None
    return [Path(file["filename"]) for file in loaded.cache_files]


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is not a readable part of a saved data set: {error}") from None
