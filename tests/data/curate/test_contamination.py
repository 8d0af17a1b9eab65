"""13-grams of evaluation files, planted and as datatrove's filter finds them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datatrove.data import Document
from datatrove.pipeline.decont import NGramsDecontConfig, NGramsDecontFilter
from datatrove.utils.hashing import HashConfig, create_hash_func

from millrace.core.errors import UserError
from millrace.data.curate import contamination
from millrace.data.curate.words import _EVALUATION, WORDS, evaluation_words
from millrace.data.inputs import resolve

QUESTION = "Which of the twelve wooden mills beside the river Lea, built in 1776, grinds the most wheat?"
TASK = [
    {"question": "Too short?", "choices": ["yes", "no"], "answer": 0},
    {"question": QUESTION, "choices": ["House Mill", "Clock Mill"], "answer": 0},
]


def _write(path: Path, rows: list[dict]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def _read(path: Path) -> contamination.Evaluation:
    return contamination.read_evaluation(resolve([str(path)], "auto", path.parent / "out"))


WORDS_13 = "which of the twelve wooden mills beside the river lea built in 1776"


@pytest.mark.parametrize(
    ("planted", "found"),
    [
        (WORDS_13, True),
        (WORDS_13.removesuffix(" 1776"), False),  # 12 words
        (WORDS_13.upper().replace(" ", ",\n  ") + "!", True),
        (WORDS_13.replace("e", "é"), True),  # diacritics do not count
        (WORDS_13.replace("1776", "1777"), False),  # numbers do
        (WORDS_13.replace("twelve", "twelve old"), False),
        ("the most wheat House Mill Clock Mill " + WORDS_13[:40], False),
        (
            "river Lea, built in 1776, grinds the most wheat? House Mill / Clock Mill",
            True,
        ),  # a question and its choices
    ],
)
def test_planted(tmp_path: Path, made: SimpleNamespace, planted: str, found: bool) -> None:
    evaluation = _read(_write(tmp_path / "mills.jsonl", TASK))
    prose = made.prose(0)
    match = evaluation.match(f"{prose}\n{planted}\n{made.prose(1)}")
    assert (match is not None) is found
    assert evaluation.match(prose) is None
    if match:
        assert match.first in " ".join(evaluation_words(planted)) and len(match.first.split()) == 13
        assert evaluation.place(int(match.lines[0])) == (str(tmp_path / "mills.jsonl"), 2)
        assert match.ngrams == len(evaluation_words(planted)) - 12


def test_against_datatroves_filter(tmp_path: Path, made: SimpleNamespace) -> None:
    """Texts torn out of evaluation texts in runs of 5 to 20 words; its index is written as its indexer writes it."""
    draw, sha1 = random.Random(0), HashConfig(hash_fc="sha1")
    lines = [made.prose(seed, 40) for seed in range(30)]
    evaluation = _read(_write(tmp_path / "e.jsonl", [{"text": line} for line in lines]))
    words = [evaluation_words(line) for line in lines]
    grams = {" ".join(w[at : at + 13]) for w in words for at in range(len(w) - 12)}
    (tmp_path / "index").mkdir()
    np.array([create_hash_func(sha1)(gram) for gram in grams], np.uint64).tofile(tmp_path / "index/e.index.hashes")
    config = NGramsDecontConfig(n_grams=13, norm_config=_EVALUATION, hash_config=sha1)
    theirs = NGramsDecontFilter(str(tmp_path / "index"), config, language=WORDS)
    found = 0
    for seed in range(300):
        line = draw.choice(words)
        at, length = draw.randrange(20), draw.randrange(8, 20)
        text = made.prose(1000 + seed, 30) + " " + " ".join(line[at : at + length])
        kept = theirs.filter(Document(text=text, id="")) is True
        assert (evaluation.match(text) is None) is kept
        found += not kept
    assert 100 < found < 250


def test_formats_and_counts(tmp_path: Path) -> None:
    _write(tmp_path / "a.jsonl", [*TASK, {"context": [{"turn": QUESTION}]}])
    pq.write_table(pa.table({"id": [1, 2], "passage": [QUESTION[::-1], QUESTION]}), tmp_path / "b.parquet")
    (tmp_path / "c.txt").write_text(QUESTION)
    evaluation = _read(tmp_path)
    counted = [(Path(f["path"]).name, f["lines"], f["checkable"], f["first"]) for f in evaluation.files]
    assert counted == [("a.jsonl", 3, 2, 0), ("b.parquet", 2, 2, 3), ("c.txt", 1, 1, 5)]
    match = evaluation.match(QUESTION)
    assert match is not None and match.lines.tolist() == [1]  # the first line that has them
    contamination.save(evaluation, tmp_path / "saved")
    again = contamination.load(tmp_path / "saved").match("x " + QUESTION)
    assert again is not None and (again.ngrams, again.first) == (match.ngrams, match.first)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("e.jsonl", b'{"answer": 3}\n', "e.jsonl has no text"),
        ("e.jsonl", b"", "e.jsonl has no text"),
        ("e.jsonl", b"{no\n", "cannot read the evaluation file .*e.jsonl as jsonl"),
        ("e.jsonl", b'{"text": "\xff"}\n', "cannot read the evaluation file .*e.jsonl as jsonl"),
        ("e.parquet", b"nothing", "cannot read the evaluation file .*e.parquet as parquet"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        _read(tmp_path / name)


@pytest.mark.parametrize("action", ["remove", "report"])
def test_what_happens_to_contaminated_documents(tmp_path: Path, made: SimpleNamespace, action: str) -> None:
    task = _write(tmp_path / "mills.jsonl", TASK)
    texts = [made.prose(0), made.prose(1) + "\n" + QUESTION, made.prose(2)]
    result = made.run(tmp_path, texts, eval=[str(task)], contaminated=action)
    out = tmp_path / "out"
    ids = [int(row["id"].rpartition("#")[2]) for row in made.rows(out)]
    (record,) = made.rows(out, "removed" if action == "remove" else "flagged")
    assert ids == ([0, 2] if action == "remove" else [0, 1, 2])
    assert not made.rows(out, "flagged" if action == "remove" else "removed")
    assert (record["step"], record["rule"], record["value"]) == ("contamination", str(task), 5.0)
    assert record["detail"] == f"“{WORDS_13}” in {task}:2"
    assert result.report["evaluation"] == [{"path": str(task), "lines": 2, "checkable": 1, "found": 1}]
    (rule,) = result.report["sources"][0]["rules"]
    assert rule["kept"] is (action == "report") and rule["documents"] == 1
