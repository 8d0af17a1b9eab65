"""Which nodes are bad, from what every node reported of itself and of its talks with the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Report:
    """What one node found: what is wrong with itself, with the run's directory, and with whom it could not talk."""

    own: list[str] = field(default_factory=list)
    shared: list[str] = field(default_factory=list)
    pairs: dict[str, str] = field(default_factory=dict)  # other node → what went wrong


@dataclass(frozen=True)
class Verdict:
    """Bad nodes with the reason, and what is wrong without a node that is to blame."""

    bad: dict[str, str]
    unclear: list[str]


def judge(nodes: Sequence[str], reports: Mapping[str, Report]) -> Verdict:
    """A node is bad that did not report, found itself bad, or cannot talk with most of the nodes that are not bad.

    What all nodes find wrong with the run's directory is not a node's fault, and neither is a silence of all. Two
    nodes that cannot talk with each other, and with nobody else to ask, are both named and neither is bad.
    """
    if not reports:
        return Verdict({}, ["no node reported: the check itself could not run"])
    bad = {node: "it did not report in time" for node in nodes if node not in reports}
    everybody = len(reports) > 1 and all(report.shared for report in reports.values())
    for node, report in reports.items():
        found = report.own + ([] if everybody else report.shared)
        if found:
            bad[node] = "; ".join(found)
    unclear = ["; ".join(next(iter(reports.values())).shared)] if everybody else []
    pairs = _failed_pairs(reports)
    while worst := _worst([node for node in nodes if node not in bad], pairs):
        others = sorted(other for pair in pairs if worst in pair for other in pair - {worst} if other not in bad)
        bad[worst] = f"no talk with {', '.join(others)}: {pairs[frozenset((worst, others[0]))]}"
    left = {pair: why for pair, why in pairs.items() if not pair & bad.keys()}
    unclear += [f"{' and '.join(sorted(pair))} cannot talk with each other: {why}" for pair, why in left.items()]
    return Verdict(bad, unclear)


def _failed_pairs(reports: Mapping[str, Report]) -> dict[frozenset[str], str]:
    return {
        frozenset((node, other)): why
        for node, report in sorted(reports.items(), reverse=True)
        for other, why in report.pairs.items()
    }


def _worst(nodes: Sequence[str], pairs: Mapping[frozenset[str], str]) -> str | None:
    """The one node that fails with more of the others than any other does, and with more than half of them."""
    failed = {node: sum(pair <= set(nodes) for pair in pairs if node in pair) for node in nodes}
    ranked = sorted(nodes, key=lambda node: failed[node], reverse=True)
    if len(ranked) < 2 or failed[ranked[0]] == failed[ranked[1]]:
        return None
    return ranked[0] if 2 * failed[ranked[0]] > len(nodes) - 1 else None
