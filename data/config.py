"""Options of the stream that a run reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from millrace.core.config import build, option, section
from millrace.core.units import Duration, parse_count
from millrace.data.modalities.base import View, modality, names


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """Shares of the sources in the stream; at most one way of giving them."""

    weights: dict[str, float] = option({}, "share of the tokens by source, such as {books = 3, web = 1}")
    temperature: float | None = option(None, "shares in proportion to (tokens of the source)^(1 / temperature)")
    tokens: dict[str, Any] = option({}, 'token budget by source, such as {books = "2B", web = "1B"}')
    epochs: dict[str, float] = option({}, "passes by source, such as {books = 2, web = 0.5}")

    def __post_init__(self) -> None:
        given = [name for name in ("weights", "temperature", "tokens", "epochs") if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are two ways to say the same; keep one")
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(f"temperature = {self.temperature} must be above 0")
        object.__setattr__(self, "tokens", {name: parse_count(value) for name, value in self.tokens.items()})
        for name in ("weights", "tokens", "epochs"):
            for source, value in getattr(self, name).items():
                if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
                    raise ValueError(f"{name}.{source} = {value!r} must be a number, 0 or more")

    def __bool__(self) -> bool:
        return bool(self.weights or self.tokens or self.epochs or self.temperature)


@dataclass(frozen=True, kw_only=True, slots=True)
class MixtureConfig(Weights):
    """Shares of the sources; without any, all samples are shuffled together."""

    schedule: list[dict[str, Any]] = option(
        [], 'later shares: [{at = "10k steps", weights = {…}}, …], in effect from the next window on'
    )

    def __post_init__(self) -> None:
        super(MixtureConfig, self).__post_init__()
        if self.schedule and not self:
            raise ValueError("schedule needs shares to begin with: set weights, temperature, tokens or epochs")
        self.changes()

    def changes(self) -> list[tuple[Duration, Weights]]:
        """Shares by the point from which on they are wanted; the first at 0 steps.

        Raises:
            ValueError: an entry without `at`, or points that do not grow.
        """
        found: list[tuple[Duration, Weights]] = [(Duration(0, "steps"), self)]
        for entry in self.schedule:
            at = Duration.parse(entry.get("at", ""))
            if at.unit not in ("steps", "tokens") or (len(found) > 1 and at.unit != found[-1][0].unit):
                raise ValueError(f"schedule: at = '{at}': give steps, or tokens, in all entries alike")
            if at.value <= found[-1][0].value:
                raise ValueError(f"schedule: at = '{at}' must be later than '{found[-1][0]}'")
            weights = build(Weights, {k: v for k, v in entry.items() if k != "at"})
            if not weights:
                raise ValueError(f"schedule: the entry at '{at}' gives no shares")
            found.append((at, weights))
        return found

    def at(self, steps: int, tokens: int) -> Weights:
        """The shares that are wanted after so many steps, or tokens."""
        reached = {"steps": steps, "tokens": tokens}
        return [weights for point, weights in self.changes() if point.value <= reached[point.unit]][-1]


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """What is read, in which order, and how it is cut into rows."""

    manifest: str | list[str] = option("", "folder that `millrace prepare` wrote, or a list of them")
    mixture: MixtureConfig = section(MixtureConfig, "shares of the sources of the manifests")
    heldout: str | None = option(None, "manifest of held-out text (default: heldout/ in every manifest)")
    tokenizer: str | None = option(
        None, "tokenizer folder, tokenizer.json or hub name (default: the one stored beside the manifest)"
    )
    rows: Literal["packed", "alone", "samples"] = option(
        "packed",
        "packed: documents in rows of sequence_length; alone: one document, or part of a longer one, in a row; "
        "samples: one whole sample in a row",
    )
    sequence_length: int = option(1024, "tokens in a row; longer documents are cut into consecutive spans")
    window: int = option(1024, "samples that are packed together (fewer where the documents are long)")
    shuffle_blocks: int = option(16, "blocks (row groups, runs of lines) whose samples are mixed")
    pack: bool = option(True, "best-fit packing; false concatenates in order and cuts")
    views: list[dict[str, Any]] = option(
        [], "what samples' media become: [{role = 'image', size = 32, scale = [0.4, 1.0], flip = true}, …]"
    )
    workers: int = option(0, "processes of each rank that read, decode and tokenise; 0: a thread of the rank does")
    threads: int = option(4, "threads that read and decode, in each of them")
    prefetch: int = option(64 * 2**20, "batches prepared ahead, in bytes for each rank; 0: none", unit="bytes")
    max_bad_samples: int | None = option(
        None, "undecodable samples allowed before the run stops (default: 0.1% of the samples, at least 10)"
    )

    def __post_init__(self) -> None:
        atleast = {"sequence_length": 2, "window": 1, "shuffle_blocks": 1, "workers": 0, "threads": 1, "prefetch": 0}
        for name, least in atleast.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least {least}")
        if self.views and self.rows != "samples":
            raise ValueError(f"views are for rows = 'samples', not '{self.rows}'")
        self.views_by_role()
        if self.max_bad_samples is not None and self.max_bad_samples < 0:
            raise ValueError(f"max_bad_samples = {self.max_bad_samples} must not be negative")

    def views_by_role(self) -> dict[str, list[View]]:
        """The views of each modality.

        Raises:
            ValueError: one without a role, two of one name, or an option that its modality does not have.
        """
        found: dict[str, list[View]] = {}
        for given in self.views:
            if not isinstance(given.get("role"), str):
                raise ValueError(f"views: {given} has no role; say which modality it is of, such as role = 'image'")
            found.setdefault(given["role"], []).append(build(modality(given["role"]).view, given))
        called = [name for views in found.values() for view in views for name in names(view)]
        if twice := {name for name in called if called.count(name) > 1}:
            raise ValueError(
                f"views: {' and '.join(sorted(twice))} is the name of several; give each a name of its own"
            )
        return found
