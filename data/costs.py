"""What a sample costs in positions of a sequence: known before anything is decoded, so that samples can be packed.

The cost of a sample is text tokens + 1 + the positions of its media; for text alone that is n + 1, the targets of a
document of n tokens. Positions come from the header of the encoded file and from a rule of its modality that is stored
in the manifest and belongs to its fingerprint. What feeds a model must use the same rules (`ImageCost.grid`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from millrace.core.config import build
from millrace.data import MODALITIES
from millrace.data.modalities.base import Rule, modality
from millrace.data.sources.base import BadSample, Record


class Costs:
    """The rule of every modality; those that are not given have their defaults."""

    def __init__(self, **rules: Rule) -> None:
        self._rules = {role: rules.pop(role) if role in rules else modality(role).cost() for role in MODALITIES}
        assert not rules, rules

    def __getitem__(self, role: str) -> Rule:
        return self._rules[role]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Costs) and other._rules == self._rules

    def __hash__(self) -> int:
        return hash(tuple(self._rules))

    def of(self, columns: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """The rules that samples with these roles need, as the manifest stores them: those that have options."""
        rules = {role: asdict(rule) for role, rule in self._rules.items() if role in columns}  # type: ignore[arg-type]
        return {role: rule for role, rule in rules.items() if rule}

    @classmethod
    def stored(cls, rules: Mapping[str, Mapping[str, Any]]) -> Costs:
        """The rules that `of` gave, or that a user did.

        Raises:
            UserError: an unknown modality, or a rule that it does not have.
        """
        return cls(**{role: build(modality(role).cost, rule) for role, rule in rules.items()})

    def positions(self, record: Record) -> int | BadSample:
        """Positions of all media of a sample; bad where a header cannot be read."""
        total = 0
        for role, rule in self._rules.items():
            raw = record.get(role)
            if isinstance(raw, bytes):
                try:
                    total += rule.positions(raw)
                except ValueError as error:
                    return BadSample(f"the {role} cannot be read: {error}")
        return total
