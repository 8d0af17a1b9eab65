from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from millrace.core.errors import UserError
from millrace.finetune.chat import Chat, fit_length
from millrace.finetune.config import FinetuneConfig
from millrace.finetune.examples import Record
from millrace.finetune.instruct import Instruct
from millrace.finetune.sections import ExamplesConfig


def task(tokenizer: Any, length: int = 64) -> Instruct:
    data = ExamplesConfig(train="x", sequence_length=length)
    return Instruct(FinetuneConfig(source="x", data=data), tokenizer)


def encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def one(tokenizer: Any, fields: dict[str, Any], length: int = 64) -> Any:
    (example,) = task(tokenizer, length).encode([Record(fields, "a.jsonl:1")], [])[0]
    return example


def test_loss_is_on_the_answer_and_its_end_only(tokenizer: Any) -> None:
    example = one(tokenizer, {"prompt": "Who turns the wheel?", "response": "The river."})
    end = tokenizer.eos_token_id
    asked = [tokenizer.bos_token_id, *encode(tokenizer, "### User:\nWho turns the wheel?\n\n### Assistant:\n")]
    answer = [*encode(tokenizer, "The river."), end]
    assert example.input_ids.tolist() == [*asked, *answer[:-1]]
    assert example.labels.tolist() == [-100] * (len(asked) - 1) + answer
    assert example.bytes == len("The river.")


def test_every_turn_of_the_assistant_is_learnt(tokenizer: Any) -> None:
    turns = [("system", "Be short."), ("user", "One?"), ("assistant", "1"), ("user", "Two?"), ("assistant", "2")]
    example = one(tokenizer, {"messages": [{"role": r, "content": c} for r, c in turns]}, length=256)
    end = tokenizer.eos_token_id
    text = tokenizer.decode([*example.input_ids, example.labels[-1]])
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    assert text == (
        f"{bos}### System:\nBe short.\n\n### User:\nOne?\n\n### Assistant:\n1{eos}"
        f"### User:\nTwo?\n\n### Assistant:\n2{eos}"
    )
    learnt = [t for t in example.labels.tolist() if t != -100]
    assert learnt == [*encode(tokenizer, "1"), end, *encode(tokenizer, "2"), end]


def test_prompt_for_generation_is_what_was_trained_on(tokenizer: Any) -> None:
    example = one(tokenizer, {"prompt": "Say mill", "response": "the mill"})
    asked = Chat(tokenizer).prompt_ids([{"role": "user", "content": "Say mill"}])
    assert example.input_ids[: len(asked)].tolist() == asked
    assert example.labels[: len(asked) - 1].max() == -100 != example.labels[len(asked) - 1]


def test_own_chat_template_is_kept_and_its_end_is_not_doubled(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% if m['role'] == 'assistant' %}"
        "{{ eos_token }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    example = one(tokenizer, {"prompt": "Hi", "response": "Ho"})
    text = tokenizer.decode([*example.input_ids, example.labels[-1]])
    assert text == f"[user]Hi[assistant]Ho{tokenizer.eos_token}\n"


def test_template_that_is_not_turn_by_turn_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(UserError, match="a.jsonl:1: .*turn by turn"):
        one(tokenizer, {"prompt": "Hi", "response": "Ho"})


def test_long_prompt_loses_its_left_part_and_no_answer_is_cut() -> None:
    parts = [(list(range(10)), False), ([20, 21, 22], True)]
    whole = fit_length(parts, 12)
    cut = fit_length(parts, 5)
    assert whole is not None and cut is not None
    assert whole[0].tolist() == [*range(10), 20, 21] and whole[1].tolist() == [-100] * 9 + [20, 21, 22]
    assert cut[0].tolist() == [7, 8, 9, 20, 21] and cut[1].tolist() == [-100, -100, 20, 21, 22]
    assert fit_length(parts, 3) is not None
    assert fit_length(parts, 2) is None


def test_answer_longer_than_a_row_is_left_out_and_counted(tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    records = [
        Record({"prompt": "Hi", "response": "Ho " * 40}, "a.jsonl:1"),
        Record({"prompt": "Hi " * 40, "response": "Ho"}, "a.jsonl:2"),
    ]
    kept, _ = task(tokenizer, 24).encode(records, [])
    assert [e.where for e in kept] == ["a.jsonl:2"] and len(kept[0].input_ids) == 24
    said = " ".join(capsys.readouterr().err.split())
    assert "1 example(s) left out" in said and "a.jsonl:1" in said and "data.sequence_length" in said


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "Hi"}, "a.jsonl:1 has no field 'response' .it has: prompt.*data.columns.response"),
        ({"promt": "Hi", "response": "Ho"}, "no field 'prompt' .*did you mean 'promt'"),
        ({"prompt": "Hi", "response": 3}, "a.jsonl:1: 'response' is 3, not a text"),
        ({"messages": [{"role": "user"}]}, "a.jsonl:1: messages is"),
        ({"messages": [{"role": "user", "content": "Hi"}]}, "a.jsonl:1: no message has the role 'assistant'"),
    ],
)
def test_bad_records_are_named(tokenizer: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        one(tokenizer, fields)


def test_template_travels_with_the_tokenizer(tokenizer: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    Chat(tokenizer)
    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    messages = [{"role": "user", "content": "Hi"}]
    ids = again.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert np.array_equal(ids, Chat(again).prompt_ids(messages))
