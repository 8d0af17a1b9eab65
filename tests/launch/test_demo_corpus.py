"""The demo's corpus: what is read, how it is split, and what is made of it."""

from __future__ import annotations

import json

import pytest

from millrace.core.errors import UserError
from millrace.launch.demo import corpus
from millrace.launch.demo.corpus import Module, documents, examples, read_modules, standard_library, write_corpus

FUNCTION = '''
def add(a, b):
    """Return the sum of two numbers.

    More about it.
    """
    return a + b


def bare(a):
    return a
'''


def _lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def library(tmp_path):
    """Forty modules, a test, a package's folder, a file that is not UTF-8 and one that is no Python."""
    folder = tmp_path / "lib"
    for number in range(40):
        path = folder / f"package{number % 4}" / f"module{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(FUNCTION.replace("add", f"add{number}"))
    for name in ("test/test_a.py", "site-packages/other.py", "package0/tests/b.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("left = 'out'")
    (folder / "latin.py").write_bytes(b"# caf\xe9\nx = 1\n")
    (folder / "broken.py").write_text("def (:\n")
    (folder / "empty.py").write_text("\n")
    return folder


def test_modules_are_walked_without_tests_and_packages(library):
    modules = list(read_modules(library))
    assert len(modules) == 42
    assert [m.name for m in modules] == sorted((m.name for m in modules), key=lambda n: n.split("."))
    assert not any("left" in m.text for m in modules)
    assert "caf\N{REPLACEMENT CHARACTER}" in next(m.text for m in modules if m.name == "latin")


def test_the_split_is_by_module_name_alone(library, tmp_path):
    names = {m.name: m.held_out for m in read_modules(library)}
    assert {n: Module(n, "other text").held_out for n in names} == names
    share = sum(Module(f"some.module{n}", "").held_out for n in range(4000)) / 4000
    assert share == pytest.approx(corpus.HELD_OUT_SHARE, abs=0.015)


def test_nothing_held_out_is_trained_on(library, tmp_path):
    made = write_corpus(library, tmp_path / "out")
    train, heldout = ({d["text"] for d in _lines(p)} for p in (made.train, made.heldout))
    assert heldout and not train & heldout
    assert len(train) + len(heldout) == made.modules == 42
    prompts = [{e["prompt"] for e in _lines(p)} for p in (made.tuning, made.tuning_heldout)]
    assert not prompts[0] & prompts[1]
    assert made.bytes == sum(len(text.encode()) for text in train | heldout)


def test_writing_twice_gives_equal_files(library, tmp_path):
    first, second = (write_corpus(library, tmp_path / name) for name in ("a", "b"))
    assert first.train.read_bytes() == second.train.read_bytes()
    assert first.tuning.read_bytes() == second.tuning.read_bytes()


def test_sizeable_docstrings_are_documents_of_their_own():
    long = "word " * 100
    found = documents(Module("m", f'"""{long}"""\ndef f():\n    """short"""\n'))
    assert len(found) == 2 and found[1].strip() == long.strip()
    assert documents(Module("broken", "def (:")) == ["def (:"]


def test_an_example_asks_for_the_first_sentence_without_showing_it():
    (found,) = examples(Module("m", FUNCTION))
    assert found["response"] == "Return the sum of two numbers."
    assert "def add(a, b):" in found["prompt"] and "return a + b" in found["prompt"]
    assert "sum of two" not in found["prompt"] and "More" not in found["prompt"]


def test_a_library_without_sources_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds 0 Python modules"):
        write_corpus(tmp_path, tmp_path / "out")


def test_this_machines_library_gives_megabytes(tmp_path):
    made = write_corpus(standard_library(), tmp_path)
    assert made.bytes > 5e6 and made.modules_held_out >= 10
    assert len(_lines(made.tuning)) > 500
