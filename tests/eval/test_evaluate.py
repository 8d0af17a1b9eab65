"""The commands eval, export and generate, as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from millrace.eval.generate import continue_text
from millrace.eval.subject import Subject
from millrace.launch.cli import main
from tests.handmade import TEXT, alter, small_model, write_checkpoint

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "mill.txt").write_text(TEXT[0])
    rows = [{"question": "What turns?", "choices": ["The wheel", "The mill"], "answer": 0}] * 4
    (tmp_path / "turns.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_eval_writes_a_result_and_shows_tables(run: Path, files: Path, capsys: Capture) -> None:
    out = files / "results" / "one.json"
    text, tasks = str(files / "text"), str(files / "turns.jsonl")
    assert main(["eval", str(run), "--text", text, "--tasks", tasks, "--out", str(out), "--batch", "2"]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{out}\n"
    assert "bits per byte" in shown.err and "acc_norm" in shown.err and "step 7" in shown.err
    result = json.loads(out.read_text())
    assert result["format"] == "millrace-eval"
    assert result["source"]["step"] == 7 and result["source"]["manifests"] == ["f00d"]
    assert result["source"]["dtype"] == "fp32" or result["source"]["device"] == "cuda"
    assert result["text"][text]["bytes"] == len(TEXT[0]) and result["text"][text]["bits_per_byte"] > 0
    assert result["tasks"]["turns"]["samples"] == 4 and result["request"]["batch"] == 2
    assert {"torch", "transformers", "lm-eval", "python"} <= result["versions"].keys()


def test_eval_limit_and_earlier_result(
    run: Path, files: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files)
    assert main(["eval", str(run), "--tasks", "turns.jsonl", "--limit", "2"]) == 0
    assert capsys.readouterr().out == "eval-tiny.json\n"
    assert json.loads(Path("eval-tiny.json").read_text())["tasks"]["turns"]["samples"] == 2
    assert main(["eval", str(run), "--tasks", "turns.jsonl"]) == 0  # an earlier result is replaced
    Path("notes.json").write_text("{}")
    assert main(["eval", str(run), "--tasks", "turns.jsonl", "--out", "notes.json"]) == 1
    assert "notes.json exists and is no earlier result" in capsys.readouterr().err
    assert Path("notes.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to evaluate; give --text"),
        (["--text", "nowhere.txt"], "no text nowhere.txt"),
        (["--tasks", "nowhere.jsonl"], "no task file nowhere.jsonl"),
        (["--tasks", "turns.jsonl", "--batch", "0"], "--batch 0 and --limit None must be at least 1"),
        (["--text", "text", "--stride", "99"], "a stride of 99 tokens"),
    ],
)
def test_eval_mistakes(
    arguments: list[str], message: str, run: Path, files: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files)
    assert main(["eval", str(run), *arguments]) == 1
    shown = capsys.readouterr().err
    assert message in shown and "Traceback" not in shown
    assert not list(files.glob("*.json"))


def test_export(run: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    assert main(["export", str(run), str(out), "--dtype", "bf16", "--max-shard", "100 kB"]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{out}\n" and "step 7" in shown.err
    assert len(list(out.glob("model-*.safetensors"))) > 1
    assert AutoModelForCausalLM.from_pretrained(out).num_parameters() == small_model("qwen3").num_parameters()


def test_export_of_an_altered_checkpoint(tmp_path: Path, capsys: Capture) -> None:
    path = write_checkpoint(tmp_path, small_model("qwen3"))
    alter(path / "rank-00000.safetensors")
    assert main(["export", str(path), str(tmp_path / "out")]) == 1
    shown = capsys.readouterr().err
    assert "rank-00000.safetensors was altered" in shown.replace("\n", " ") and "Traceback" not in shown
    assert not (tmp_path / "out").exists()


def test_generate(run: Path, subject: Subject, capsys: Capture) -> None:
    command = ["generate", str(run), "--prompt", "The mill", "--prompt", "Water", "--tokens", "8", "--dtype", "fp32"]
    assert main([*command, "--temperature", "0"]) == 0
    greedy = capsys.readouterr().out
    texts = continue_text(subject.model, subject.tokenizer, ["The mill", "Water"], tokens=8, temperature=0)
    assert greedy == f"The mill{texts[0]}\nWater{texts[1]}\n"
    assert main([*command, "--seed", "1"]) == 0
    first = capsys.readouterr().out
    assert main([*command, "--seed", "1"]) == 0
    assert capsys.readouterr().out == first
    assert main([*command, "--seed", "2"]) == 0
    assert capsys.readouterr().out != first


def test_generate_answers_in_the_chat_template(run: Path, tmp_path: Path, capsys: Capture) -> None:
    """The same tokens as transformers' own template and greedy search give."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "model"
    assert main(["export", str(run), str(folder)]) == 0
    command = ["generate", str(folder), "--chat", "--prompt", "mill?", "--tokens", "6", "--temperature", "0"]
    capsys.readouterr()
    assert main(command) == 1
    assert "has no chat template" in capsys.readouterr().err
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}Q {{ m['content'] }} A {% endfor %}"
    tokenizer.save_pretrained(folder)
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "mill?"}], tokenize=False)
    ids = tokenizer(asked, add_special_tokens=False, return_tensors="pt").input_ids
    out = model.generate(ids, attention_mask=ids.new_ones(ids.shape), max_new_tokens=6, do_sample=False)
    assert main(command) == 0
    answer = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert capsys.readouterr().out == answer.strip() + "\n"


def test_generate_of_a_mistyped_run_does_not_ask_a_hub(run: Path, capsys: Capture) -> None:
    assert main(["generate", f"{run}x"]) == 1
    assert f"did you mean '{run}'?" in capsys.readouterr().err.replace("\n", "")


def test_generate_beyond_the_positions(run: Path, capsys: Capture) -> None:
    assert main(["generate", str(run), "--prompt", "The mill", "--tokens", "62"]) == 1
    assert "exceed the 64 positions of the model; ask for at most 61 tokens" in capsys.readouterr().err.replace(
        "\n", " "
    )
    assert main(["generate", str(run), "--tokens", "0"]) == 1


@pytest.mark.parametrize("command", ["eval", "export", "generate"])
def test_help_has_an_example(command: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"example: millrace {command} runs/tiny" in capsys.readouterr().out
