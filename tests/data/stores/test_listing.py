"""URLs behind prefixes and globs, compared with the globs of `fsspec`."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from fsspec.utils import glob_translate
from hypothesis import given
from hypothesis import strategies as st

from millrace.core.errors import UserError
from millrace.data.stores.base import StoreError
from millrace.data.stores.listing import _matches, list_urls

Put = Callable[[str, bytes], str]
KEYS = ["a/1.parquet", "a/2.parquet", "a/2.json", "a/b/3.parquet", "a/b/c/4.parquet", "ab/5.parquet", "6.parquet"]


@pytest.fixture
def filled(bucket: Put) -> None:
    for key in KEYS:
        bucket(key, b"x")
    bucket("a/b", b"")  # an empty object for a folder, as some tools make


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("a/", ["a/1.parquet", "a/2.json", "a/2.parquet", "a/b/3.parquet", "a/b/c/4.parquet"]),
        ("a/b/", ["a/b/3.parquet", "a/b/c/4.parquet"]),
        ("", sorted(KEYS)),
        ("a/*.parquet", ["a/1.parquet", "a/2.parquet"]),
        ("a/[13].*", ["a/1.parquet"]),
        ("a/?.json", ["a/2.json"]),
        ("a*/*.parquet", ["a/1.parquet", "a/2.parquet", "ab/5.parquet"]),
        ("a/**/*.parquet", ["a/1.parquet", "a/2.parquet", "a/b/3.parquet", "a/b/c/4.parquet"]),
        ("**/4.parquet", ["a/b/c/4.parquet"]),
        ("*", ["6.parquet"]),
        ("a/b/**", ["a/b/3.parquet", "a/b/c/4.parquet"]),
        ("not/there.parquet", ["not/there.parquet"]),
    ],
)
def test_patterns(pattern: str, found: list[str], filled: None) -> None:
    assert list_urls(f"s3://mill/{pattern}") == [f"s3://mill/{key}" for key in found]


@pytest.mark.parametrize("pattern", ["s3://mill/b/", "s3://mill/a/*.csv"])
def test_nothing_there(pattern: str, filled: None) -> None:
    with pytest.raises(UserError, match=re.escape(f"nothing matches {pattern}")):
        list_urls(pattern)


PART = st.text("ab.*?", min_size=1, max_size=3).filter(lambda part: "**" not in part)


@given(
    st.lists(PART | st.just("**"), min_size=1, max_size=3), st.lists(st.text("ab.", min_size=1, max_size=3), max_size=4)
)
def test_globs_match_as_elsewhere(wanted: list[str], path: list[str]) -> None:
    pattern, name = "/".join(wanted), "/".join(path)
    if name and "**/**" not in pattern:
        assert _matches(name, pattern) == bool(re.match(glob_translate(pattern), name)), (pattern, name)


def test_the_web_has_no_lists() -> None:
    assert list_urls("https://host/a.parquet?x=1") == ["https://host/a.parquet?x=1"]
    for pattern in ("https://host/a/", "http://host/*.parquet"):
        with pytest.raises(UserError, match="a web server has no list of its files"):
            list_urls(pattern)


def test_what_is_no_remote_store() -> None:
    for pattern in ("/a/b/*", "file:///a/", "ftp://x/"):
        with pytest.raises(UserError, match="no remote store"):
            list_urls(pattern)


def test_a_bucket_that_is_not_there(bucket: Put) -> None:
    with pytest.raises(StoreError, match="s3://nobucket"):
        list_urls("s3://nobucket/")
