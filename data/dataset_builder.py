"""What `datasets` knows about a data set before any row is read: its files, splits and configs. Loaded lazily."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import datasets
import huggingface_hub.constants

from millrace.core.errors import UserError, did_you_mean
from millrace.data.dataset_files import DATASET, DatasetName
from millrace.data.dataset_values import Inside
from millrace.data.stores.guard import LinkLocal, refuse_link_local


def load_builder(name: DatasetName) -> Any:
    """What `datasets` knows about a data set before reading it.

    Raises:
        UserError: there is none, or its files lie elsewhere.
    """
    path, files = _where(name.path)
    with told(name):
        if files is None and not Path(path).is_dir():
            refuse_link_local(urlsplit(huggingface_hub.constants.ENDPOINT).hostname or "")
        try:
            builder = datasets.load_dataset_builder(path, name.config or None, data_files=files)
        except ValueError as error:
            raise _no_config(name, path) or error from None
    if builder.repo_id is None and not Path(path).is_dir():
        raise UserError(
            f"'{name.text}' names a format, not a data set; name the folder or the files: {DATASET}'data/*.{name.path}'"
        )
    inside = inside_of(builder)
    for file in _files(builder):
        if not inside.holds(file):
            raise UserError(f"the data set '{name.text}' lists {file}, which is not one of its files; this is refused")
    return builder


def prepared_files(name: DatasetName) -> list[Path] | None:
    """Files in the cache of `datasets`, where the data set was prepared before and the split is a whole one."""
    builder = load_builder(name)
    if not name.whole or not is_prepared(builder) or name.split not in builder.info.splits:
        return None
    with told(name):
        return [Path(file["filename"]) for file in builder.as_dataset(split=name.split).cache_files]


def is_prepared(builder: Any) -> bool:
    """Whether the cache of `datasets` has it.

    For a folder whose README.md lists configs `datasets` does not notice that files have changed since.
    """
    info = Path(builder.cache_dir) / "dataset_info.json"
    if not info.is_file() or not builder.info.splits:
        return False
    if builder.repo_id is not None:
        return True  # a commit, which never changes
    found = [Path(file).stat() for file in _files(builder)]
    newest, size = max((stat.st_mtime_ns for stat in found), default=0), sum(stat.st_size for stat in found)
    return newest <= info.stat().st_mtime_ns and size == builder.info.download_size


def inside_of(builder: Any) -> Inside:
    """Where files of the data set may lie: its folder, or its repository and the hub's cache of that."""
    extracted = Path(datasets.config.DOWNLOADED_DATASETS_PATH)  # archives, where it was prepared
    if builder.repo_id is None:
        return Inside(Path(builder.base_path), extracted)
    owned = "datasets--" + builder.repo_id.replace("/", "--")
    kept = Path(huggingface_hub.constants.HF_HUB_CACHE) / owned
    return Inside(kept, extracted, url=f"hf://datasets/{builder.repo_id}@")


def _files(builder: Any) -> list[str]:
    return [str(file) for files in (builder.config.data_files or {}).values() for file in files]


def origin_of(builder: Any) -> list[Any]:
    """Files of each split with what tells their versions."""
    found = builder.config.data_files or {}
    return [[str(split), list(map(str, files)), list(files.origin_metadata)] for split, files in found.items()]


def _where(path: str) -> tuple[str, str | None]:
    """(folder, files in it) of what lies on this machine; else a name of the hub."""
    local = Path(path).expanduser().absolute()
    if local.is_dir():
        return str(local), None
    if not glob.glob(str(local), recursive=True):
        return path, None
    folder = next(above for above in local.parents if above.is_dir())
    return str(folder), str(local.relative_to(folder))


def _no_config(name: DatasetName, path: str) -> UserError | None:
    """What is wrong with CONFIG, if it is that."""
    known = datasets.get_dataset_config_names(path)
    if name.config in known or (not name.config and len(known) < 2):
        return None
    if not name.config:
        return UserError(
            f"the data set '{name.text}' has several configs ({', '.join(known)}); "
            f"name one, as in {DATASET}{name.path}:{known[0]}"
        )
    hint = did_you_mean(name.config, known) or f"; it has: {', '.join(known)}"
    return UserError(f"the data set '{name.text}' has no config '{name.config}'{hint}")


@contextmanager
def told(name: DatasetName, what: str = "load", mend: str = "; check name, config and split") -> Iterator[None]:
    """`datasets` raises errors of many kinds; all of them mean that the data set cannot be had."""
    try:
        yield
    except UserError:
        raise
    except LinkLocal as error:
        raise UserError(f"HF_ENDPOINT is refused: {error}") from None
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        reason = lines[0][:300] if lines else type(error).__name__
        if isinstance(error, ConnectionError):
            offline = "HF_HUB_OFFLINE is set" if huggingface_hub.constants.HF_HUB_OFFLINE else "is there a network?"
            mend = f" ({offline}); name a folder to read from this machine"
        raise UserError(f"cannot {what} the data set '{name.text}': {reason}{mend}") from None
