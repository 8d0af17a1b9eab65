"""The [track] section: what is recorded, how often, and where it is sent besides the ledger."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from millrace.core.config import option


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackConfig:
    """The ledger is always written; wandb is an addition. Its key comes from WANDB_API_KEY only."""

    wandb: Literal["disabled", "offline", "online"] = option(
        "disabled", "where curves are also sent: disabled, offline (into the run directory) or online"
    )
    project: str = option("millrace", "wandb project")
    entity: str | None = option(None, "wandb team or user; unset takes your default one")
    tags: list[str] = option([], "wandb tags of this run")
    log_every: int = option(1, "steps between two points sent to wandb (the ledger has every step)")
    norms_every: int = option(50, "steps between two records of per-layer norms and the largest logit; 0: never")

    def __post_init__(self) -> None:
        if self.log_every < 1:
            raise ValueError(f"log_every = {self.log_every}: must be 1 or more")
        if self.norms_every < 0:
            raise ValueError(f"norms_every = {self.norms_every}: must be 0 (never) or more")
        if self.wandb != "disabled" and not self.project:
            raise ValueError("project is empty: name the wandb project")
