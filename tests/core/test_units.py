"""Counts, sizes and durations."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.core.errors import UserError
from millrace.core.units import Duration, fmt_count, fmt_seconds, fmt_size, parse_count, parse_size


@pytest.mark.parametrize(
    ("text", "value"),
    [("32k", 32_000), ("1.5M", 1_500_000), ("2B", 2 * 10**9), ("1T", 10**12), (2000, 2000), ("1_000", 1000),
     ("1e6", 10**6), (" 7 ", 7), ("0", 0)],
)  # fmt: skip
def test_counts(text: str | int, value: int) -> None:
    assert parse_count(text) == value


@pytest.mark.parametrize(
    ("text", "value"), [("8 MiB", 2**23), ("1.5 GB", 1_500_000_000), ("1KiB", 1024), (77, 77), ("3 B", 3)]
)
def test_sizes(text: str | int, value: int) -> None:
    assert parse_size(text) == value


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [("2k steps", 2000, "steps"), ("1 step", 1, "steps"), ("1B tokens", 10**9, "tokens"), ("2 epochs", 2, "epochs"),
     ("30 min", 1800, "s"), ("1.5 h", 5400, "s"), ("2 days", 172_800, "s"), ("90s", 90, "s"),
     ("1.5M tokens", 1_500_000, "tokens")],
)  # fmt: skip
def test_durations(text: str, value: int, unit: str) -> None:
    assert Duration.parse(text) == Duration(value, unit)


@pytest.mark.parametrize("text", ["", "k", "3 x", "-3", "1.5", "3k k", "1,000", "nan", True, "8 MiB"])
def test_what_is_no_count(text: object) -> None:
    with pytest.raises(UserError, match=r"cannot read|unknown suffix|not a whole number"):
        parse_count(text)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["8 M", "8 mib", "0.3 B", "MiB", "-1 B", "1 MiB x"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UserError, match=r"cannot read|unknown unit|not a whole number"):
        parse_size(text)


@pytest.mark.parametrize("text", ["100", "2k", "5 parsecs", "-5 steps", "0.5 steps", "steps", "2k min", "1 step step"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(UserError):
        Duration.parse(text)


@given(st.integers(0, 10**15), st.sampled_from(["steps", "tokens", "epochs", "s"]))
def test_a_durations_text_reads_back(value: int, unit: str) -> None:
    duration = Duration(value, unit)
    assert Duration.parse(str(duration)) == duration == Duration.parse(duration)


@given(st.integers(0, 10**6), st.sampled_from(["", "k", "M", "B", "T"]))
def test_counts_scale_with_their_suffix(value: int, suffix: str) -> None:
    factor = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}[suffix]
    assert parse_count(f"{value}{suffix}") == value * factor


@given(st.integers(0, 2**53))
def test_plain_integers_pass_through(value: int) -> None:
    assert parse_count(value) == value == parse_size(value)


@given(st.integers(0, 999 * 10**12))
def test_a_shown_count_is_near(value: int) -> None:
    assert parse_count_back(fmt_count(value)) == pytest.approx(value, rel=0.0051)


def parse_count_back(text: str) -> float:
    factor = {"k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}.get(text[-1])
    return float(text[:-1]) * factor if factor else float(text)


@given(st.integers(0, 2**50))
def test_a_shown_size_is_near(value: int) -> None:
    number, unit = fmt_size(value).split()
    factor = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}[unit]
    assert float(number) * factor == pytest.approx(value, abs=0.051 * factor)


def test_formats() -> None:
    assert (fmt_count(1_234_567), fmt_count(12), fmt_count(0.25)) == ("1.23M", "12", "0.25")
    assert (fmt_size(2**23), fmt_size(10)) == ("8.0 MiB", "10 B")
    assert (fmt_seconds(3725), fmt_seconds(75), fmt_seconds(4.2)) == ("1h02m", "1m15s", "4.2s")
