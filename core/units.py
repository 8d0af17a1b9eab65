"""Quantities with units: counts ("32k"), sizes ("8 MiB") and durations ("2k steps", "1B tokens", "30 min")."""

from __future__ import annotations

import re
from dataclasses import dataclass

from millrace.core.errors import UserError

_COUNT = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}
_SIZE = {"B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
_SECONDS = {"s": 1, "sec": 1, "min": 60, "h": 3600, "hours": 3600, "days": 86400}
_NUMBER = re.compile(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)\s*([A-Za-z]*)\s*")


def _split(text: str | int | float, example: str) -> tuple[float, str, str]:
    match = _NUMBER.fullmatch(str(text))
    if isinstance(text, bool) or match is None:
        raise UserError(f"cannot read {text!r} as a quantity; write it like {example}")
    return float(match[1].replace("_", "")), match[2], match[3]


def _whole(value: float, text: object) -> int:
    if abs(value - round(value)) > 1e-6:
        raise UserError(f"{text!r} is not a whole number")
    return round(value)


def parse_count(text: str | int) -> int:
    """`"32k"` → 32000, `"1.5M"` → 1500000; plain integers pass through.

    Raises:
        UserError: not a number with one of the suffixes k, M, B, T.
    """
    value, suffix, rest = _split(text, "'32k', '1.5M' or 2000")
    if suffix not in _COUNT or rest:
        raise UserError(f"unknown suffix in {text!r}; use k, M, B or T")
    return _whole(value * _COUNT[suffix], text)


def parse_size(text: str | int) -> int:
    """`"8 MiB"` → 8388608 bytes; plain integers are bytes.

    Raises:
        UserError: not a number with a unit of bytes.
    """
    value, unit, rest = _split(text, "'8 MiB' or '1.5 GB'")
    if (unit or "B") not in _SIZE or rest:
        raise UserError(f"unknown unit in {text!r}; use one of {', '.join(_SIZE)}")
    return _whole(value * _SIZE[unit or "B"], text)


@dataclass(frozen=True)
class Duration:
    """A length of training: `value` in `unit`, which is "steps", "tokens", "epochs" or "s" (seconds)."""

    value: int
    unit: str

    @classmethod
    def parse(cls, text: str | Duration) -> Duration:
        """Read `"2k steps"`, `"1B tokens"`, `"2 epochs"`, `"30 min"`.

        Raises:
            UserError: no unit, or one that is not known.
        """
        if isinstance(text, Duration):
            return text
        value, first, second = _split(text, "'2k steps', '1B tokens', '2 epochs' or '30 min'")
        suffix, unit = (first, second) if second else ("", first)
        if unit in _SECONDS and not suffix:
            return cls(_whole(value * _SECONDS[unit], text), "s")
        unit = {"step": "steps", "token": "tokens", "epoch": "epochs"}.get(unit, unit)
        if unit not in ("steps", "tokens", "epochs") or suffix not in _COUNT:
            raise UserError(
                f"cannot read {text!r} as a duration; write '2k steps', '1B tokens', '2 epochs' or '30 min'"
            )
        return cls(_whole(value * _COUNT[suffix], text), unit)

    def __str__(self) -> str:
        return f"{self.value} {self.unit}"


def fmt_count(value: float) -> str:
    """1234567 → '1.23M'."""
    for suffix, factor in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        # 999,999 is 1M, not 1e+03k.
        if abs(value) >= 0.9995 * factor and abs(value) >= 1000:
            return f"{value / factor:.3g}{suffix}"
    return f"{value:.3g}" if isinstance(value, float) and value != int(value) else str(int(value))


def fmt_size(value: float) -> str:
    """8388608 → '8.0 MiB'."""
    for unit, factor in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(value) >= factor:
            return f"{value / factor:.1f} {unit}"
    return f"{int(value)} B"


def fmt_seconds(value: float) -> str:
    """3725 → '1h02m', 75 → '1m15s', 4.2 → '4.2s'."""
    if value >= 3600:
        return f"{int(value // 3600)}h{int(value % 3600 // 60):02d}m"
    if value >= 60:
        return f"{int(value // 60)}m{int(value % 60):02d}s"
    return f"{value:.1f}s"
