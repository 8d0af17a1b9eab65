"""Lazy registries."""

from __future__ import annotations

import sys

import pytest

from millrace.core.errors import UserError, did_you_mean
from millrace.core.registry import load, lookup

TABLE = {"counter": "collections:Counter", "ordered": "collections:OrderedDict", "broken": "millrace.nowhere:Thing"}


def test_load_and_lookup() -> None:
    from collections import Counter

    assert load("collections:Counter") is Counter
    assert lookup(TABLE, "counter", "container") is Counter


def test_unknown_kinds_name_the_near_one_and_all_there_are() -> None:
    with pytest.raises(UserError) as caught:
        lookup(TABLE, "countr", "container")
    expected = "unknown container 'countr'; did you mean 'counter'? (known: broken, counter, ordered)"
    assert str(caught.value) == expected
    with pytest.raises(UserError, match=r"^unknown container 'zzz' \(known: broken, counter, ordered\)$"):
        lookup(TABLE, "zzz", "container")


def test_a_broken_target_is_our_mistake_and_no_user_error() -> None:
    with pytest.raises(ModuleNotFoundError):
        lookup(TABLE, "broken", "container")


def test_looking_at_a_registry_imports_nothing() -> None:
    lookup(TABLE, "counter", "container")
    assert "millrace.nowhere" not in sys.modules


def test_did_you_mean() -> None:
    assert did_you_mean("momentun", ["lr", "momentum"]) == "; did you mean 'momentum'?"
    assert did_you_mean("zzz", ["lr", "momentum"]) == ""
    assert did_you_mean("x", []) == ""
