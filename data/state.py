"""Where a run stands in its stream: a handful of integers that count what the trainer consumed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from millrace.core.errors import UserError

VERSION = 1


@dataclass(frozen=True)
class Stage:
    """What the plan depends on from window `start_window` on (until the next stage starts)."""

    start_window: int
    manifest: str  # fingerprint
    weights: tuple[float, ...]
    batch: int  # rows in a global step
    sequence_length: int
    window: int  # samples
    shuffle_blocks: int
    pack: bool


@dataclass(frozen=True)
class LoaderState:
    """Consumed so far: all windows before `window`, and `packs_done` rows of that one, by all ranks."""

    seed: int
    stages: tuple[Stage, ...]
    window: int = 0
    packs_done: int = 0
    version: int = VERSION

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        out = asdict(self)
        out["stages"] = [stage | {"weights": list(stage["weights"])} for stage in out["stages"]]
        return out

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
            stages = tuple(Stage(**{**s, "weights": tuple(s["weights"])}) for s in saved["stages"])
            return cls(**{**saved, "stages": stages})
        except (KeyError, TypeError) as error:
            raise UserError(f"the loader state in the checkpoint is damaged: {error}") from None

    def check(self, stage: Stage, seed: int) -> None:
        """Refuse to continue with another plan than the one that was begun.

        Raises:
            UserError: the seed or a field of the last stage differs; every difference is named.
        """
        last = self.stages[-1]
        pairs = {"seed": (self.seed, seed)} | {
            name: (getattr(last, name), getattr(stage, name))
            for name in last.__dataclass_fields__
            if name != "start_window"
        }
        changed = [f"{name} was {old!r} and is now {new!r}" for name, (old, new) in pairs.items() if old != new]
        if changed:
            raise UserError(
                f"cannot resume the data stream: {'; '.join(changed)}. Put these back to continue exactly, "
                "or start a new run from the weights"
            )
