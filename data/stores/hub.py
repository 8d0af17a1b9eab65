"""Files of data sets on the Hugging Face hub: hf://datasets/OWNER/NAME[@REVISION]/PATH.

`huggingface_hub` knows the hub and the token (HF_ENDPOINT, HF_TOKEN or a login); what it finds is read like any other
file behind HTTP.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from millrace.data.stores.base import StoreError
from millrace.data.stores.guard import LinkLocal, refuse_link_local
from millrace.data.stores.http import HttpAnswer, HttpBlob, host_of
from millrace.data.stores.waiting import PATIENCE, Patience, Transient, persist

if TYPE_CHECKING:
    from huggingface_hub import HfFileSystem

T = TypeVar("T")
_FORM = "hf://datasets/OWNER/NAME[@REVISION]/PATH"
_lock = threading.Lock()  # the file system's cache of listings is not made for threads


class HubBlob(HttpBlob):
    """A file, at the commit that its revision named when this process first looked: later commits change nothing."""

    def __init__(self, url: str, patience: Patience = PATIENCE) -> None:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        repo, revision, path = split_hub_url(url)
        if not path:
            raise StoreError(f"{url} names no file: write {_FORM}")
        commit = commit_of(repo, revision, patience)
        info = ask_hub(lambda fs: fs.info(f"datasets/{repo}@{commit}/{path}"), url, patience)
        if info["type"] != "file":
            raise StoreError(f"{url} is a folder: write {_FORM}")
        self.url, self.patience, self._headers = url, patience, build_hf_headers()
        self._source = self._target = hf_hub_url(repo, path, repo_type="dataset", revision=commit)
        self.host = host_of(self._source)
        self.size, self._version = int(info["size"]), str(info.get("blob_id") or commit)

    def _same(self, answer: HttpAnswer) -> bool:
        # A commit never changes, and mirrors of the file may each have an ETag of their own.
        return answer.size == self.size


def split_hub_url(url: str) -> tuple[str, str, str]:
    """("OWNER/NAME", "REVISION", "PATH") of an hf:// URL.

    Raises:
        StoreError: it is not one of a data set.
    """
    from huggingface_hub.errors import HfUriError
    from huggingface_hub.utils import parse_hf_uri

    try:
        parsed = parse_hf_uri(url)
    except HfUriError as error:
        raise StoreError(f"{url} cannot be read: {error}") from None
    if parsed.type != "dataset":
        raise StoreError(f"{url} is no data set: write {_FORM}")
    return parsed.id, parsed.revision or "main", parsed.path_in_repo


@lru_cache(maxsize=256)
def commit_of(repo: str, revision: str, patience: Patience) -> str:
    """The commit that a revision names, looked up once per process."""
    found = ask_hub(
        lambda fs: fs._api.repo_info(repo, repo_type="dataset", revision=revision),
        f"hf://datasets/{repo}@{revision}",
        patience,
    )
    return str(found.sha)


@lru_cache(maxsize=1)
def _file_system() -> HfFileSystem:
    from huggingface_hub import HfFileSystem, constants

    try:
        refuse_link_local(urlsplit(constants.ENDPOINT).hostname or "")
    except LinkLocal as error:
        raise StoreError(f"HF_ENDPOINT is refused: {error}") from None
    return HfFileSystem(skip_instance_cache=True)


def ask_hub(question: Callable[[HfFileSystem], T], url: str, patience: Patience) -> T:
    """Ask the hub something about `url`, with retries.

    Raises:
        StoreError: it cannot be answered, or not within the deadline.
    """
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    def attempt(end: float) -> T:
        try:
            with _lock:
                return question(_file_system())
        except OfflineModeIsEnabled:
            raise StoreError(f"cannot read {url}: HF_HUB_OFFLINE is set") from None
        except HfHubHTTPError as error:
            status = getattr(error.response, "status_code", 500)
            if status in (408, 429) or status >= 500:
                raise Transient(f"the hub answers {status}", answered=True) from None
            raise StoreError(f"cannot read {url}: {_line(error)}") from None
        except FileNotFoundError:
            raise StoreError(f"{url} does not exist") from None
        except StoreError:
            raise
        except Exception as error:  # its HTTP library has changed before, and every failure left is the network's
            raise Transient(f"{type(error).__name__}: {_line(error)}") from None

    return persist(attempt, url, "hf://", patience)


def _line(error: Exception) -> str:
    lines: list[Any] = [line for line in str(error).splitlines() if line.strip()]
    return str(lines[0]) if lines else type(error).__name__
