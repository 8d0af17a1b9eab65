"""Tasks through lm-eval against log-likelihoods computed here, token by token."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from millrace.core.errors import UserError
from millrace.eval.bits_per_byte import bits_per_byte
from millrace.eval.generate import continue_text
from millrace.eval.subject import Subject
from millrace.eval.tasks import harness
from millrace.eval.tasks.base import TaskFile
from millrace.eval.tasks.harness import run_tasks
from tests.handmade import TEXT

QUESTIONS: list[dict[str, Any]] = [
    {"question": "What stands by the river?", "choices": ["The mill", "The grain", "Water"], "answer": 0},
    {"question": "Who counts?", "choices": ["The river", "The miller"], "answer": "B"},
    {"query": "Question: What runs?", "choices": ["Water", "The wheel", "Nothing at all"], "gold": 0},
    {"context": "The river turns", "endings": ["the wheel", "grains", "nothing"], "label": 1},
    {"context": "The miller", "choices": ["counts the grains", "é"], "answer": 1},
] * 4


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@torch.no_grad()
def loglikelihood(subject: Subject, prompt: str, answer: str) -> float:
    """log p(answer | BOS prompt), the answer's tokens being those after the prompt's in the whole."""
    tokenizer = subject.tokenizer
    whole, before = (tokenizer.encode([t])[0].tolist() for t in (prompt + answer, prompt))
    ids = torch.tensor([[tokenizer.bos_id, *whole]])
    logp = torch.log_softmax(subject.model(input_ids=ids, use_cache=False).logits[0].double(), -1)
    return sum(float(logp[place, whole[place]]) for place in range(len(before), len(whole)))


def brute_force(subject: Subject, row: dict[str, Any]) -> tuple[bool, bool]:
    """(right by likelihood, right by likelihood per character)."""
    choices = row.get("choices", row.get("endings"))
    question = row.get("question", row.get("query", "")).removeprefix("Question: ")
    prompt = row.get("context", f"Question: {question}\nAnswer:")
    gold = {"B": 1}.get(str(row.get("answer")), row.get("answer", row.get("gold", row.get("label"))))
    found = [loglikelihood(subject, prompt, " " + choice) for choice in choices]
    per_character = [value / len(choice) for value, choice in zip(found, choices, strict=True)]
    return found.index(max(found)) == gold, per_character.index(max(per_character)) == gold


def test_multiple_choice_equals_brute_force(subject: Subject, tmp_path: Path) -> None:
    file = write(tmp_path / "mill.jsonl", QUESTIONS)
    found = run_tasks(subject, [file], batch=3)["mill"]
    right, right_norm = zip(*(brute_force(subject, row) for row in QUESTIONS), strict=True)
    assert found["metrics"]["acc"]["value"] == pytest.approx(sum(right) / len(right))
    assert found["metrics"]["acc_norm"]["value"] == pytest.approx(sum(right_norm) / len(right))
    assert 0 < sum(right) + sum(right_norm) < 2 * len(right), "the figures say nothing"
    assert found["samples"] == len(QUESTIONS) and found["kind"] == "multiple_choice"
    assert found["metrics"]["acc"]["stderr"] is not None


def test_loglikelihoods_equal_brute_force(subject: Subject) -> None:
    from lm_eval.api.instance import Instance

    from millrace.eval.tasks.model import SubjectLM

    pairs = [
        ("The mill", " stands"),
        ("", "Water runs"),
        ("The river ", "turns the wheel"),
        ("Who", " counts the grains?"),
    ]
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    found = SubjectLM(subject, 3).loglikelihood(requests)
    for (prompt, answer), (value, _) in zip(pairs, found, strict=True):
        moved = len(prompt) - len(prompt.rstrip())  # lm-eval counts the space as the answer's
        expected = loglikelihood(subject, prompt.rstrip(), prompt[len(prompt) - moved :] + answer)
        assert value == pytest.approx(expected, abs=1e-4), (prompt, answer)


def test_real_questions_equal_brute_force(subject: Subject, shared: Path) -> None:
    """The first lines of ARC easy; a question longer than the context would be cut on the left, so short ones only."""
    lines = (shared / "eval_arc_easy" / "arc_easy.jsonl").read_text().splitlines()
    found = run_tasks(subject_with(subject, 10_000), [str(shared / "eval_arc_easy")], limit=12)["arc_easy"]
    right, right_norm = zip(*(brute_force(subject, json.loads(line)) for line in lines[:12]), strict=True)
    assert found["metrics"]["acc"]["value"] == pytest.approx(sum(right) / 12)
    assert found["metrics"]["acc_norm"]["value"] == pytest.approx(sum(right_norm) / 12)
    assert found["samples"] == 12


def subject_with(subject: Subject, context: int) -> Subject:
    """The same model allowed more context than it was made for (its positions are rotary)."""
    return Subject(subject.model, subject.tokenizer, context, subject.description)


def test_text_equals_our_bits_per_byte_without_eos(subject: Subject, tmp_path: Path) -> None:
    """lm-eval does not predict the EOS; for texts within the context nothing else differs."""
    found = run_tasks(subject, [write(tmp_path / "texts.jsonl", [{"text": t} for t in TEXT])])["texts"]
    size = sum(len(t.encode()) for t in TEXT)
    ours = bits_per_byte(subject, [(t, len(t.encode())) for t in TEXT])
    nats = -sum(loglikelihood(subject, "", t) for t in TEXT)
    assert found["metrics"]["bits_per_byte"]["value"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert found["metrics"]["byte_perplexity"]["value"] == pytest.approx(math.exp(nats / size), rel=1e-5)
    assert ours.nats > nats


def test_last_word(subject: Subject, tmp_path: Path) -> None:
    rows = [{"text": t} for t in TEXT]
    found = run_tasks(subject, ["last_word=" + write(tmp_path / "words.jsonl", rows)])["words"]
    values = [loglikelihood(subject, *_split(t)) for t in TEXT]
    assert found["metrics"]["perplexity"]["value"] == pytest.approx(math.exp(-sum(values) / len(values)), rel=1e-4)
    assert found["kind"] == "last_word" and found["metrics"]["acc"]["value"] in (0, 1 / 3, 2 / 3, 1)


def _split(text: str) -> tuple[str, str]:
    before, _, word = text.rpartition(" ")
    return before, " " + word


YAML = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {file}
test_split: train
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


SAYS = """
task: says
dataset_path: json
dataset_kwargs:
  data_files: q.jsonl
test_split: train
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{target}}"
generation_kwargs: {until: ["<|endoftext|>"], do_sample: false, max_gen_toks: 6}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


def test_yaml_of_lm_eval(subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of lm-eval's own tasks with data beside them, and one of its files alone."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [QUESTIONS[0], QUESTIONS[1] | {"answer": 1}] * 3
    write(folder / "questions.jsonl", rows)
    for name in ("first", "second"):
        (folder / f"{name}.yaml").write_text(YAML.format(name=name, file="questions.jsonl"))
    found = run_tasks(subject, [str(folder)])
    right = [brute_force(subject, row)[0] for row in rows]
    assert found.keys() == {"first", "second"}
    assert found["first"]["metrics"]["acc"]["value"] == pytest.approx(sum(right) / len(right))
    assert run_tasks(subject, [str(folder / "second.yaml")]).keys() == {"second"}


def test_groups_and_generation(subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group with its mean, beside a task that generates greedily from BOS and the prompt."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    prompts = ["The mill", "The river turns the", "Water runs"]
    texts = continue_text(subject.model, subject.tokenizer, prompts, tokens=6, temperature=0)
    rows = [
        {"question": p, "choices": ["a", "b"], "answer": 0, "target": t} for p, t in zip(prompts, texts, strict=True)
    ]
    write(tmp_path / "q.jsonl", rows)
    (tmp_path / "one.yaml").write_text(YAML.format(name="one", file="q.jsonl"))
    (tmp_path / "all.yaml").write_text(
        "group: all\ntask: [one]\naggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: true}]"
    )
    (tmp_path / "says.yaml").write_text(SAYS)
    found = run_tasks(subject, [str(tmp_path)], batch=3)
    assert found["all"]["metrics"]["acc"]["value"] == found["one"]["metrics"]["acc"]["value"]
    assert found["says"]["metrics"]["exact_match"]["value"] == 1.0 and all(text.strip() for text in texts)


def test_nothing_is_downloaded(subject: Subject, tmp_path: Path) -> None:
    import huggingface_hub.constants

    before = huggingface_hub.constants.HF_HUB_OFFLINE
    text = YAML.format(name="far", file="x").replace("dataset_path: json", "dataset_path: someone/something")
    (tmp_path / "far.yaml").write_text(text)
    with pytest.raises(UserError, match="cannot load the tasks of .*far.yaml.*nothing is downloaded"):
        run_tasks(subject, [str(tmp_path / "far.yaml")])
    assert before == huggingface_hub.constants.HF_HUB_OFFLINE


def test_without_lm_eval(subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install millrace\[eval\]"):
        run_tasks(subject, [write(tmp_path / "mill.jsonl", QUESTIONS)])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "?", "choices": ["a"], "answer": 0}, r"bad.jsonl:2 .*'choices' must be two or more texts"),
        ({"question": "?", "choices": ["a", "b"], "answer": 2}, "'answer' must be a number from 0 to 1"),
        ({"question": "?", "choices": ["a", "b"]}, "'answer' must be a number from 0 to 1 or a letter, not None"),
        ({"question": " ", "choices": ["a", "b"], "answer": 0}, "'question' must be text"),
        ({"choices": ["a", "b"], "answer": 0}, "it has no field 'question'"),
    ],
)
def test_bad_lines(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = TaskFile.parse(write(tmp_path / "bad.jsonl", [QUESTIONS[0], row]))
    with pytest.raises(UserError, match=message):
        file.documents()


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown kind of task 'last_world'; did you mean 'last_word'"):
        TaskFile.parse("last_world=x.jsonl")
    with pytest.raises(UserError, match="no task file .*nothing.jsonl"):
        TaskFile.parse(str(tmp_path / "nothing.jsonl"))
    with pytest.raises(UserError, match="has the fields a, b, which are those of no kind"):
        TaskFile.parse(write(tmp_path / "odd.jsonl", [{"a": 1, "b": 2}]))
    (tmp_path / "broken.jsonl").write_text('{"question": ')
    with pytest.raises(UserError, match="broken.jsonl:1 is not JSON in UTF-8"):
        TaskFile.parse(str(tmp_path / "broken.jsonl"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no task"):
        harness.find_tasks([str(tmp_path / "empty")])
    write(tmp_path / "empty" / "odd.jsonl", [{"text": "x"}])
    with pytest.raises(UserError, match="two task files are called odd.jsonl"):
        harness.find_tasks(["text=" + str(tmp_path / "odd.jsonl"), str(tmp_path / "empty")])


def test_answer_longer_than_the_context(subject: Subject, tmp_path: Path) -> None:
    row = {"question": "?", "choices": ["yes", TEXT[1] * 9], "answer": 0}
    with pytest.raises(UserError, match="is longer than the model's context of 64"):
        run_tasks(subject, [write(tmp_path / "long.jsonl", [row])])
