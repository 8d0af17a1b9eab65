"""Tokenizers: load, hash, train a byte-level BPE, save a folder that `AutoTokenizer` loads."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers

from millrace.core.errors import UserError
from millrace.core.rundir import write_atomic
from millrace.data.words import Words, cuts_at_spaces

if TYPE_CHECKING:
    from millrace.data.corpus import Corpus

END_OF_TEXT = "<|endoftext|>"
_BATCH_CHARACTERS = 2**19  # tokenised at a time
_PIECE_CHARACTERS = 2**14  # read at a time by the trainer, which counts words of 256 pieces at once
# Read in this order where a bare tokenizer.json names no border tokens.
_KNOWN_EOS = (END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>", "[SEP]")
_KNOWN_BOS = ("<s>", "<bos>", "<|begin_of_text|>", "[CLS]")


class Tokenizer:
    """A `tokenizers.Tokenizer` with its border tokens and its hash.

    A document is encoded without special tokens added, and text that spells a special token stays text.
    """

    def __init__(self, spec: Mapping[str, Any], config: Mapping[str, Any], origin: str) -> None:
        """`spec` is a parsed tokenizer.json, `config` a parsed tokenizer_config.json (may be empty)."""
        self._spec, self._config = dict(spec), dict(config)
        try:
            self.backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{origin} is not a tokenizer that `tokenizers` reads: {error}") from None
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = True
        self.vocab_size = 1 + max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1)
        eos = self._border("eos_token", _KNOWN_EOS)
        bos = self._border("bos_token", _KNOWN_BOS)
        if eos is None:
            raise UserError(
                f"{origin} names no end-of-text token; set eos_token in the tokenizer_config.json beside it"
            )
        self.eos_id, self.bos_id = eos, eos if bos is None else bos
        self.sha256 = self._hash()

    def _border(self, name: str, known: Sequence[str]) -> int | None:
        given = self._config.get(name)
        if isinstance(given, Mapping):
            given = given.get("content")
        names = [given] if isinstance(given, str) else ([] if self._config else known)
        return next((i for n in names if (i := self.backend.token_to_id(n)) is not None), None)

    def _hash(self) -> str:
        """SHA-256 of what decides the tokens of a document: the specification and the border tokens."""
        aside = {"truncation", "padding", "post_processor"}
        kept = {key: value for key, value in self._spec.items() if key not in aside}
        text = json.dumps([kept, self.bos_id, self.eos_id], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def extended(self, tokens: Mapping[str, str], others: Sequence[str] = ()) -> Tokenizer:
        """The tokenizer with special tokens behind its vocabulary, by what transformers calls them ("mask_token").

        Those that it has already stay what they are. `others` have no such name.
        """
        config = self._saved_config()
        named = {name: token for name, token in tokens.items() if config.get(name) is None}
        if others:
            named["additional_special_tokens"] = [*config.get("additional_special_tokens", ()), *others]  # type: ignore[assignment]
        behind = [token for name, token in named.items() if name in tokens] + list(others)
        added = [
            {"id": self.vocab_size + number, "content": token, "special": True, "normalized": False}
            | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
            for number, token in enumerate(behind)
        ]
        spec = self._spec | {"added_tokens": [*self._spec.get("added_tokens", ()), *added]}
        return Tokenizer(spec, config | named, "the extended tokenizer")

    def special(self, name: str) -> int:
        """The id of a special token by what transformers calls it."""
        given = self._config[name]
        found = self.backend.token_to_id(given["content"] if isinstance(given, Mapping) else given)
        assert found is not None, name
        return int(found)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids (int32, shape (n,)) of each text, without border tokens.

        Works through `texts` in batches, as an encoding takes about 100 bytes of memory per byte of text.
        """
        ids: list[np.ndarray] = []
        for start, stop in _batches([len(text) for text in texts]):
            encodings = self.backend.encode_batch_fast(list(texts[start:stop]), add_special_tokens=False)
            ids += [np.array(encoding.ids, np.int32) for encoding in encodings]
        return ids

    def encode_words(self, texts: Sequence[str]) -> list[np.ndarray]:
        """What `encode` gives, with less work where many texts are encoded one after the other, but on one core."""
        if not self._words:
            return self.encode(texts)
        batches = _batches([len(text) for text in texts])
        return [ids for start, stop in batches for ids in self._words.encode(texts[start:stop])]

    @cached_property
    def _words(self) -> Words | None:
        return Words(self.backend) if cuts_at_spaces(self._spec) else None

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, special tokens included."""
        return str(self.backend.decode([int(i) for i in ids], skip_special_tokens=False))

    def text_bytes(self, ids: Sequence[np.ndarray]) -> list[int]:
        """Bytes of UTF-8 text that each of `ids` stands for; special tokens stand for none.

        A byte-level vocabulary spells a byte as a character, so lengths are summed; others are decoded.
        """
        if (self._spec.get("decoder") or {}).get("type") == "ByteLevel":
            return [int(self._lengths[i].sum()) for i in ids]
        texts = self.backend.decode_batch([i.tolist() for i in ids], skip_special_tokens=True)
        return [len(text.encode()) for text in texts]

    @cached_property
    def _lengths(self) -> np.ndarray:
        lengths = np.zeros(self.vocab_size, np.int64)
        for token, number in self.backend.get_vocab(with_added_tokens=False).items():
            lengths[number] = len(token)
        for number, added in self.backend.get_added_tokens_decoder().items():
            lengths[number] = 0 if added.special else len(added.content.encode())
        return lengths

    def _saved_config(self) -> dict[str, Any]:
        return self._config or {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.backend.id_to_token(self.bos_id),
            "eos_token": self.backend.id_to_token(self.eos_id),
            "clean_up_tokenization_spaces": False,
        }

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write tokenizer.json and tokenizer_config.json for `AutoTokenizer.from_pretrained`."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        config = json.dumps(self._saved_config(), indent=2, ensure_ascii=False)
        write_atomic(target / "tokenizer_config.json", config)
        write_atomic(target / "tokenizer.json", json.dumps(self._spec, ensure_ascii=False))


class NoText:
    """In the place of a tokenizer, for samples without text: every text is empty."""

    vocab_size, eos_id, bos_id, sha256 = 1, 0, 0, None

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """No tokens."""
        return [np.empty(0, np.int32) for _ in texts]

    encode_words = encode

    def decode(self, ids: Iterable[int]) -> str:
        """No text."""
        return ""


def _batches(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    start = size = 0
    for stop, length in enumerate(lengths):
        if stop > start and size + length > _BATCH_CHARACTERS:
            yield start, stop
            start, size = stop, 0
        size += length
    if start < len(lengths):
        yield start, len(lengths)


def load_tokenizer(name: str | os.PathLike[str]) -> Tokenizer:
    """Load from a tokenizer.json, a folder that holds one, or a name on the Hugging Face hub.

    Raises:
        UserError: nothing of that name, or not a tokenizer.
    """
    path = Path(name)
    if path.is_dir():
        path = path / "tokenizer.json"
    elif not path.is_file():
        return _from_hub(os.fspath(name))
    if not path.is_file():
        raise UserError(f"the folder {path.parent} holds no tokenizer.json; name a tokenizer or a folder with one")
    return Tokenizer(_json(path), _json(path.with_name("tokenizer_config.json")), str(path))


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is not readable JSON: {error}") from None


def _from_hub(name: str) -> Tokenizer:
    problem = f"no tokenizer '{name}': no such file or folder"
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(".json"):
        raise UserError(f"{problem}; name a folder with a tokenizer.json, or a name on the Hugging Face hub")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        spec = _json(Path(hf_hub_download(name, "tokenizer.json")))
        try:
            config = _json(Path(hf_hub_download(name, "tokenizer_config.json")))
        except EntryNotFoundError:
            config = {}
    except Exception as error:  # many kinds: offline, gated, unknown
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise UserError(f"{problem}, and the Hugging Face hub did not give it ({reason})") from None
    return Tokenizer(spec, config, name)


def _pieces(text: str) -> Iterator[str]:
    """Cut a long text after line ends (or anywhere, where lines are longer than a piece)."""
    start = 0
    while len(text) - start > _PIECE_CHARACTERS:
        stop = text.rfind("\n", start, start + _PIECE_CHARACTERS) + 1 or start + _PIECE_CHARACTERS
        yield text[start:stop]
        start = stop
    yield text[start:]


def train_bpe(texts: Iterable[str], vocab_size: int, progress: bool = False) -> Tokenizer:
    """Train a byte-level BPE whose round trip is lossless; `<|endoftext|>` (id 0) marks both borders.

    Raises:
        UserError: `vocab_size` below 257 (256 bytes and the border token).
    """
    if vocab_size < 257:
        raise UserError(f"vocab_size = {vocab_size} is too small: 256 bytes and {END_OF_TEXT} need 257")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=progress,
    )
    pieces = (piece for text in texts for piece in _pieces(text))
    backend.train_from_iterator(pieces, trainer)
    return Tokenizer(json.loads(backend.to_str()), {}, "the trained tokenizer")


def stored_tokenizer(manifest_folder: Path) -> Path | None:
    """The tokenizer stored with a manifest: in its folder, or beside a held-out manifest's folder."""
    for folder in (manifest_folder, manifest_folder.parent):
        if (folder / "tokenizer" / "tokenizer.json").is_file():
            return folder / "tokenizer"
    return None


def open_tokenizer(corpus: Corpus, name: str | None) -> Tokenizer:
    """The tokenizer of that name, or the one stored with the first manifest that has text; others need none.

    Raises:
        UserError: there is none, or another than the one that the corpus was counted with.
    """
    owner = (corpus.texts or corpus.manifests)[0]
    found = name or stored_tokenizer(owner.folder)
    if found is None and not corpus.texts:
        return NoText()  # type: ignore[return-value]  # what is asked of one by those who read samples
    if found is None:
        raise UserError(f"no tokenizer lies beside {corpus.folder}; set data.tokenizer to a folder or hub name")
    loaded = load_tokenizer(found)
    owner.check_tokenizer(loaded.sha256, str(found))
    return loaded
