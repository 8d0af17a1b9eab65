"""The passes that run in the workers: note every document; judge a unit's.

A pass writes its last file last; a unit that has it is not done again.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

import numpy as np

from millrace.core.errors import UserError
from millrace.data.curate.contamination import Evaluation, Match, load
from millrace.data.curate.exact import content_hash
from millrace.data.curate.units import WIDTH, Document, Unit, read, scan
from millrace.data.curate.verdicts import Job, Verdict, save_array


def note_run(run: Unit, job: Job) -> None:
    """Pass 1, over a run of files: for every document its file, bytes of text, hash (0 without that step) and place.

    Raises:
        UserError: an undecodable document where those stop the work.
    """
    rows = array("Q")
    bad: list[Verdict] = []
    for file, place, document in scan(run, job.text):
        high, low = content_hash(document.text) if "exact" in job.steps else (0, 0)
        rows.extend((file, len(document.text.encode()), high, low, *place))
        if document.bad:
            if job.on_bad == "stop":
                raise UserError(
                    f"{document.id}: {document.bad}; mend the file, or leave such documents out with --on-bad skip"
                )
            bad.append(Verdict(document.number, "undecodable", 0.0, document.bad))
    job.save("undecoded", run.number, bad)
    save_array(job.path("noted", run.number, ".npy"), np.array(rows, np.uint64).reshape(-1, WIDTH))


def judge_unit(unit: Unit, job: Job) -> None:
    """Pass 2, over what is no exact duplicate: quality, contamination, and signatures of what has the quality."""
    judge = _Judge(unit, job)
    if "near" in job.steps:
        import datatrove.data

        from millrace.data.curate.near import Signatures

        with open(job.path("rows", unit.number), "wb") as rows:
            texts = (datatrove.data.Document(text=d.text, id=d.id) for d in judge.good_documents())
            Signatures(job.work / "signatures", rows).run(texts, unit.number)
    else:
        for _ in judge.good_documents():
            pass
    judge.save()


class _Judge:
    def __init__(self, unit: Unit, job: Job) -> None:
        self._unit, self._job = unit, job
        self._gone = {v.number for step in ("unreadable", "exact") for v in job.load(step, unit.number)}
        self._evaluation = load(job.work / "evaluation") if "contamination" in job.steps else None
        self._good = array("q")
        self._quality: list[Verdict] = []
        self._contaminated: list[Verdict] = []
        self._lines: set[int] = set()

    def good_documents(self) -> Iterator[Document]:
        """Documents that pass the rules of quality."""
        for document in read(self._unit, self._job.noted(self._unit.run), self._job.text, self._gone):
            if self._passes(document):
                self._good.append(document.number)
                self._check(document)
                yield document

    def _passes(self, document: Document) -> bool:
        if "quality" not in self._job.steps:
            return True
        from millrace.data.curate.quality import RULES, judge

        found = judge(document.text)
        if found:
            rule, value = found
            self._quality.append(Verdict(document.number, rule, value, str(RULES[rule])))
        return found is None

    def _check(self, document: Document) -> None:
        match = self._evaluation.match(document.text) if self._evaluation else None
        if self._evaluation and match:
            self._lines.update(match.lines.tolist())
            self._contaminated.append(_contaminated(document.number, self._evaluation, match))

    def save(self) -> None:
        """Write the verdicts; the numbers of the good documents last."""
        number = self._unit.number
        self._job.save("quality", number, self._quality)
        self._job.save("contamination", number, self._contaminated)
        save_array(self._job.path("lines", number, ".npy"), np.array(sorted(self._lines), np.int64))
        save_array(self._job.path("judged", number, ".npy"), np.array(self._good, np.int64))


def _contaminated(number: int, evaluation: Evaluation, match: Match) -> Verdict:
    path, line = evaluation.place(int(match.lines[0]))
    return Verdict(number, path, float(match.ngrams), f"“{match.first}” in {path}:{line}")


def find_pairs(band: int, job: Job) -> None:
    """Near duplicates that share a band."""
    from millrace.data.curate.near import band_pairs

    links = band_pairs(band, job.work / "signatures", job.work / "rows", job.work / "pairs")
    save_array(job.path("bands", band, ".npy"), links)
