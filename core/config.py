"""Configuration: TOML file → overrides → frozen dataclasses, with errors that name file, line and mend.

A section is a frozen, keyword-only, slotted dataclass beside the component that it configures. Its fields are made
with `option` (a value), `section` (a nested dataclass) or `variant` (a section whose class `kind` selects).
"""

from __future__ import annotations

import dataclasses
import datetime
import re
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, Union

from millrace.core.errors import UserError, did_you_mean
from millrace.core.registry import load, lookup
from millrace.core.units import Duration, parse_count, parse_size

T = TypeVar("T")


def option(default: Any, help: str, *, unit: str = "") -> Any:
    """A field with a default and the help text that `millrace config` prints; `unit="bytes"` reads sizes."""
    metadata = {"help": help, "unit": unit}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def section(cls: type, help: str) -> Any:
    """A nested section with its own defaults."""
    return field(default_factory=cls, metadata={"help": help})


def variant(registry: Mapping[str, str], default: str, help: str) -> Any:
    """A nested section whose class is `registry[kind]`; overriding `kind` clears the section's other keys."""
    return field(
        default_factory=lambda: load(registry[default])(),
        metadata={"help": help, "registry": registry, "default": default},
    )


@dataclass(frozen=True)
class Source:
    """Where values came from, for messages: the file's path and lines, and the overrides by dotted key."""

    path: str = "the configuration"
    lines: Mapping[str, int] = field(default_factory=dict)
    overrides: Mapping[str, str] = field(default_factory=dict)

    def place(self, key: str) -> str:
        """`"FILE:LINE"`, or the override that set `key`."""
        for name in (key, *(k for k in self.overrides if k.startswith(key + "."))):
            if name in self.overrides:
                return f"override '{self.overrides[name]}'"
        line = self.lines.get(key)
        return f"{self.path}:{line}" if line else self.path


def load_config(cls: type[T], path: str | Path | None, overrides: typing.Sequence[str] = ()) -> T:
    """Read `path` (TOML; None for defaults only), apply `section.key=value` overrides and build `cls`.

    Raises:
        UserError: missing or unreadable file, bad TOML, unknown key, wrong type, or a section's own check.
    """
    tree, lines = _read(path) if path is not None else ({}, {})
    used: dict[str, str] = {}
    # `kind` first: it clears its section, which must not undo an override given before it.
    for text in sorted(overrides, key=lambda item: not item.partition("=")[0].strip().endswith("kind")):
        key = _override(tree, text)
        used[key] = text
    return build(cls, tree, Source(str(path) if path else "the configuration", lines, used))


def _read(path: str | Path) -> tuple[dict[str, Any], dict[str, int]]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        near = Path(path).parent
        names = [str(p) for p in near.glob("*.toml")] if near.is_dir() else []
        raise UserError(f"no configuration file {path}{did_you_mean(str(path), names)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the configuration file {path}: {error}") from None
    try:
        return tomllib.loads(text), _key_lines(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None


def _key_lines(text: str) -> dict[str, int]:
    """Line numbers of dotted keys, for messages only."""
    found: dict[str, int] = {}
    table = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[+\s*([\w.\-\"]+)\s*\]+", line):
            table = header[1].replace('"', "")
            found.setdefault(table, number)
        elif pair := re.match(r"\s*([\w.\-\"]+)\s*=", line):
            key = pair[1].replace('"', "")
            found.setdefault(f"{table}.{key}" if table else key, number)
    return found


def _override(tree: dict[str, Any], text: str) -> str:
    """Apply one `section.key=value` to the tree in place; return the dotted key."""
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not re.fullmatch(r"[\w\-]+(\.[\w\-]+)*", key):
        raise UserError(f"cannot read the override '{text}'; write section.key=value, such as optim.lr=3e-4")
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise UserError(f"override '{text}': '{parent}' is a value, not a section")
    parsed = _toml_value(value.strip())
    if leaf == "kind" and node.get("kind") != parsed:
        node.clear()
    node[leaf] = parsed
    return key


def _toml_value(text: str) -> Any:
    """Parse as TOML; a bare word (`model.kind=llama`, `train.duration=2k steps`) is taken as a string.

    No key holds a date or a time, so `slurm.time=12:00:00` is a word too.
    """
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return text if isinstance(value, (datetime.date, datetime.time)) else value


def build(cls: type[T], tree: Mapping[str, Any], source: Source | None = None, prefix: str = "") -> T:
    """Build the dataclass `cls` from a tree of plain values.

    Raises:
        UserError: unknown key, wrong type, or a check in the section's `__post_init__`.
    """
    source = source or Source()
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if name not in fields:
            hint = did_you_mean(name, fields) or f"; known here: {', '.join(fields)}"
            raise UserError(f"unknown key '{key}' in {source.place(key)}{hint}")
        values[name] = _value(hints[name], fields[name], value, (source, key))
    try:
        return cls(**values)
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        if not prefix:
            raise UserError(f"{source.path}: {error}") from None
        raise UserError(f"[{prefix[:-1]}] in {source.place(prefix[:-1])}: {error}") from None


def _value(hint: Any, spec: dataclasses.Field[Any], value: Any, where: tuple[Source, str]) -> Any:
    source, key = where
    if "registry" in spec.metadata:
        if not isinstance(value, Mapping):
            raise _wrong(value, "a section with a 'kind'", where)
        registry = spec.metadata["registry"]
        try:
            cls = lookup(registry, value.get("kind", spec.metadata["default"]), key)
        except UserError as error:
            raise UserError(f"{source.place(key + '.kind')}: {error}") from None
        return build(cls, value, source, f"{key}.")
    if dataclasses.is_dataclass(hint) and hint is not Duration:
        if not isinstance(value, Mapping):
            raise _wrong(value, f"a section [{key}]", where)
        return build(hint, value, source, f"{key}.")  # type: ignore[arg-type]
    return _coerce(hint, value, spec.metadata.get("unit", ""), where)


def _wrong(value: Any, wanted: str, where: tuple[Source, str]) -> UserError:
    source, key = where
    return UserError(f"{key} = {value!r} in {source.place(key)}: expected {wanted}, not {type(value).__name__}")


def _coerce(hint: Any, value: Any, unit: str, where: tuple[Source, str]) -> Any:
    source, key = where
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or (origin or hint) is dict:
        if hint is not Any and not isinstance(value, dict):
            raise _wrong(value, "a table", where)
        return value
    if origin in (Union, types.UnionType):
        rest = [a for a in args if a is not type(None)]
        exact = [a for a in rest if type(value) is (typing.get_origin(a) or a)]
        return None if value is None else _coerce((exact or rest)[0], value, unit, where)
    if origin is typing.Literal:
        if value not in args:
            hint_text = did_you_mean(str(value), [str(a) for a in args])
            raise UserError(
                f"{key} = {value!r} in {source.place(key)}: expected one of {', '.join(map(repr, args))}{hint_text}"
            )
        return value
    if origin in (list, tuple):
        if not isinstance(value, (list, tuple)):
            raise _wrong(value, "a list", where)
        return origin(_coerce(args[0], item, unit, where) for item in value)
    return _scalar(hint, value, unit, where)


def _scalar(hint: Any, value: Any, unit: str, where: tuple[Source, str]) -> Any:
    source, key = where
    try:
        if hint is Duration:
            return Duration.parse(value)
        if hint is int and isinstance(value, str):
            return parse_size(value) if unit == "bytes" else parse_count(value)
    except UserError as error:
        raise UserError(f"{key} in {source.place(key)}: {error}") from None
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
        raise _wrong(value, names.get(hint, str(hint)), where)
    return value


def to_dict(config: Any) -> dict[str, Any]:
    """Plain nested dict of a built configuration; None is left out, as TOML has no null."""
    out: dict[str, Any] = {}
    for spec in dataclasses.fields(config):
        value = getattr(config, spec.name)
        if isinstance(value, Duration):
            value = str(value)
        elif dataclasses.is_dataclass(value):
            value = to_dict(value)
        elif isinstance(value, tuple):
            value = list(value)
        if value is not None:
            out[spec.name] = value
    return out


def to_toml(config: Any) -> str:
    """The configuration as TOML that `load_config` reads back to an equal object."""
    import tomli_w

    return tomli_w.dumps(to_dict(config))


def explain(config: Any, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield (dotted key, value as TOML-like text, help) for every key of a built configuration."""
    for spec in dataclasses.fields(config):
        value = getattr(config, spec.name)
        key = f"{prefix}{spec.name}"
        if dataclasses.is_dataclass(value) and not isinstance(value, Duration):
            yield f"[{key}]", "", spec.metadata.get("help", "")
            yield from explain(value, f"{key}.")
        else:
            shown = f'"{value}"' if isinstance(value, (str, Duration)) else repr(value)
            yield key, "unset" if value is None else shown, spec.metadata.get("help", "")
