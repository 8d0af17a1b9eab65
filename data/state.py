"""Where a run stands in its stream: a handful of integers that count what the trainer consumed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from millrace.core.errors import UserError

VERSION = 2
SAMPLES = 1  # as sequence length: a row is one whole sample

# What may differ from one stage to the next. Anything else that changed means another stream.
_MAY_CHANGE = ("start_window", "manifests", "components", "counts", "batch", "sequence_length")


@dataclass(frozen=True)
class Stage:
    """What the plan depends on from window `start_window` on (until the next stage starts)."""

    start_window: int
    manifests: tuple[str, ...]  # fingerprints
    components: tuple[str, ...]  # what is mixed
    counts: tuple[int, ...]  # samples of each component in a mixture block
    batch: int  # rows in a global step
    sequence_length: int
    window: int  # samples
    shuffle_blocks: int
    pack: bool | Literal["alone"]  # best-fit; in order; every span in a row of its own


@dataclass(frozen=True)
class LoaderState:
    """Consumed so far: all windows before `window`, and `packs_done` rows of that one, by all ranks."""

    seed: int
    stages: tuple[Stage, ...]
    window: int = 0
    packs_done: int = 0
    steps: int = 0  # consumed
    tokens: int = 0  # planned in all windows before `window`
    version: int = VERSION

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        stages = [{k: list(v) if isinstance(v, tuple) else v for k, v in vars(stage).items()} for stage in self.stages]
        return vars(self) | {"stages": stages}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> LoaderState:
        """Read what `to_dict` gave.

        Raises:
            UserError: another version of the format, or keys that are missing or unknown.
        """
        if saved.get("version") != VERSION:
            raise UserError(
                f"the loader state has version {saved.get('version')!r}, this release reads {VERSION}; "
                "resume with the release that wrote the checkpoint"
            )
        try:
            plain: list[dict[str, Any]] = [
                {k: tuple(v) if isinstance(v, list) else v for k, v in s.items()} for s in saved["stages"]
            ]
            return cls(**{**saved, "stages": tuple(Stage(**stage) for stage in plain)})
        except (KeyError, TypeError) as error:
            raise UserError(f"the loader state in the checkpoint is damaged: {error}") from None

    def check(self, wanted: Stage, seed: int, may_change: Sequence[str] = _MAY_CHANGE) -> None:
        """Refuse to continue with another plan than the one that was begun; a field of `may_change` may differ.

        Raises:
            UserError: the seed or a field that may not change differs, or components are gone; every one is named.
        """
        last = self.stages[-1]
        pairs = {"seed": (self.seed, seed)} | {
            name: (getattr(last, name), getattr(wanted, name))
            for name in last.__dataclass_fields__
            if name not in may_change
        }
        for name in ("manifests", "components"):
            old, new = getattr(last, name), getattr(wanted, name)
            if len(new) < len(old) or (name == "components" and new[: len(old)] != old):
                pairs[name] = (list(old), list(new))
        changed = [f"{name} was {old!r} and is now {new!r}" for name, (old, new) in pairs.items() if old != new]
        if changed:
            raise UserError(
                f"cannot resume the data stream: {'; '.join(changed)}. Put these back to continue exactly, "
                "or start a new run from the weights"
            )
