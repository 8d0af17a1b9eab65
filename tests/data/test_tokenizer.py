from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.core.errors import UserError
from millrace.data import tokenizer as module
from millrace.data.tokenizer import END_OF_TEXT, Tokenizer, load_tokenizer, train_bpe


@pytest.fixture(scope="module")
def tokenizer(corpora: Any) -> Tokenizer:
    return train_bpe(corpora.make_documents(200), 310)


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(path)
    return path


def text_without_surrogates() -> st.SearchStrategy[str]:
    return st.text(st.characters(exclude_categories=["Cs"]))


@given(text=text_without_surrogates())
def test_round_trip_is_lossless(tokenizer: Tokenizer, text: str) -> None:
    (ids,) = tokenizer.encode([text])
    assert tokenizer.decode(ids) == text


@given(texts=st.lists(text_without_surrogates(), max_size=3))
def test_the_bytes_of_tokens_are_those_of_their_text(tokenizer: Tokenizer, texts: list[str]) -> None:
    ids = tokenizer.encode(texts)
    assert tokenizer.text_bytes(ids) == [len(text.encode()) for text in texts]
    bordered = [np.concatenate([i, [tokenizer.eos_id]]) for i in ids]
    assert tokenizer.text_bytes(bordered) == tokenizer.text_bytes(ids)
    spec = json.loads(tokenizer.backend.to_str())
    decoded = Tokenizer(spec | {"decoder": {"type": "Sequence", "decoders": [spec["decoder"]]}}, {}, "the same")
    assert decoded.text_bytes(bordered) == tokenizer.text_bytes(ids)


def test_added_tokens_stand_for_their_text(tokenizer: Tokenizer) -> None:
    spec = json.loads(tokenizer.backend.to_str())
    spec["added_tokens"].append(spec["added_tokens"][0] | {"id": 310, "content": "é!", "special": False})
    assert Tokenizer(spec, {}, "a test").text_bytes([np.array([310, 0, 310], np.uint16)]) == [6]


def test_every_byte_is_in_the_vocabulary(tokenizer: Tokenizer) -> None:
    text = "".join(map(chr, range(256))) + "\U0010fffe"
    assert tokenizer.decode(tokenizer.encode([text])[0]) == text
    assert tokenizer.vocab_size == 310


def test_auto_tokenizer_loads_the_folder_and_agrees(tokenizer: Tokenizer, folder: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    text = " a naïve fox\n\tjumps  3.14 "
    assert theirs(text)["input_ids"] == tokenizer.encode([text])[0].tolist()
    assert theirs.decode(theirs(text)["input_ids"]) == text
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    assert theirs.eos_token == END_OF_TEXT and len(theirs) == tokenizer.vocab_size


def test_what_transformers_saves_has_the_same_hash(tokenizer: Tokenizer, folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).sha256 == tokenizer.sha256
    assert load_tokenizer(folder / "tokenizer.json").sha256 == tokenizer.sha256


@given(st.lists(st.integers(0, 30), max_size=20))
def test_batches_cover_all_texts_in_order(lengths: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BATCH_CHARACTERS", 40)
        batches = list(module._batches(lengths))
    assert [i for start, stop in batches for i in range(start, stop)] == list(range(len(lengths)))
    assert all(stop - start == 1 or sum(lengths[start:stop]) <= 40 for start, stop in batches)


@given(st.text("ab\n", max_size=200))
def test_pieces_are_bounded_and_lose_nothing(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PIECE_CHARACTERS", 20)
        pieces = list(module._pieces(text))
    assert "".join(pieces) == text and all(len(piece) <= 20 for piece in pieces)


def test_text_that_spells_the_border_token_stays_text(tokenizer: Tokenizer) -> None:
    (ids,) = tokenizer.encode([f"a {END_OF_TEXT} b"])
    assert tokenizer.eos_id not in ids.tolist()
    assert tokenizer.decode(ids) == f"a {END_OF_TEXT} b"


def test_training_is_deterministic_and_the_hash_tells_tokenizers_apart(corpora: Any, tokenizer: Tokenizer) -> None:
    assert train_bpe(corpora.make_documents(200), 310).sha256 == tokenizer.sha256
    assert train_bpe(corpora.make_documents(200), 309).sha256 != tokenizer.sha256


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="vocab_size = 100 is too small"):
        train_bpe(["a"], 100)
    with pytest.raises(UserError, match="holds no tokenizer.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="no tokenizer './nowhere': no such file"):
        load_tokenizer("./nowhere")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer.json is not readable JSON"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="is not a tokenizer that `tokenizers` reads"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_border_tokens_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": None, "bos_token": None}))
    with pytest.raises(UserError, match="names no end-of-text token; set eos_token"):
        load_tokenizer(tmp_path)
