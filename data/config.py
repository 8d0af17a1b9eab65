"""Options of the stream that a run reads."""

from __future__ import annotations

from dataclasses import dataclass

from millrace.core.config import option


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """What is read, in which order, and how it is cut into rows."""

    manifest: str = option("", "folder that `millrace prepare` wrote")
    heldout: str | None = option(None, "manifest of held-out text (default: heldout/ in the manifest)")
    tokenizer: str | None = option(
        None, "tokenizer folder, tokenizer.json or hub name (default: the one stored beside the manifest)"
    )
    sequence_length: int = option(1024, "tokens in a row; longer documents are cut into consecutive spans")
    window: int = option(1024, "samples that are packed together (fewer where the documents are long)")
    shuffle_blocks: int = option(16, "blocks (row groups, runs of lines) whose samples are mixed")
    pack: bool = option(True, "best-fit packing; false concatenates in order and cuts")
    prefetch: int = option(2, "steps prepared ahead in a background thread; 0 prepares each when asked")
    max_bad_samples: int | None = option(
        None, "undecodable samples allowed before the run stops (default: 0.1% of the samples, at least 10)"
    )

    def __post_init__(self) -> None:
        for name, least in (("sequence_length", 2), ("window", 1), ("shuffle_blocks", 1), ("prefetch", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least {least}")
        if self.max_bad_samples is not None and self.max_bad_samples < 0:
            raise ValueError(f"max_bad_samples = {self.max_bad_samples} must not be negative")
