"""Registries are dicts of lazy strings, `"llama": "millrace.models.llama:Llama"`; nothing scans folders."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from millrace.core.errors import UserError, did_you_mean


def load(target: str) -> Any:
    """Import `"package.module:attribute"` and return the attribute."""
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def lookup(registry: Mapping[str, str], kind: str, what: str) -> Any:
    """Return the object registered as `kind`; `what` names the registry in the error ("source", "objective").

    Raises:
        UserError: `kind` is not registered.
    """
    if kind not in registry:
        known = ", ".join(sorted(registry))
        raise UserError(f"unknown {what} '{kind}'{did_you_mean(kind, registry)} (known: {known})")
    return load(registry[kind])
