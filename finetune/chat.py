"""From messages to tokens, with the loss on the assistant's only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from millrace.core.errors import UserError

# Given to a tokenizer that has no chat template of its own, and saved with the tuned model:
#   <bos>### User:\n…\n\n### Assistant:\n…<eos>### User:\n…
PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "### {{ message['role'] | capitalize }}:\n{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\n\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}### Assistant:\n{% endif %}"
)
Message = Mapping[str, str]


class Chat:
    """A tokenizer of transformers and its chat template; `PLAIN_TEMPLATE` where it has none."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        if tokenizer.eos_token_id is None:
            raise UserError(
                "the tokenizer names no end-of-text token, so no answer could end; "
                "set eos_token in its tokenizer_config.json"
            )
        if not tokenizer.chat_template:
            tokenizer.chat_template = PLAIN_TEMPLATE
            if tokenizer.bos_token is None:
                tokenizer.chat_template = PLAIN_TEMPLATE.replace("{{ bos_token }}", "")

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of a conversation up to where the assistant is to answer."""
        return self._encode(self._render(messages, generate=True))

    def encode(self, messages: Sequence[Message], where: str = "") -> list[tuple[list[int], bool]]:
        """Tokens of a conversation as (tokens, whether they are the assistant's) in turn.

        The assistant's parts begin where generation would, are tokenised on their own, and end with EOS.

        Raises:
            UserError: the template fails, or renders a conversation otherwise than turn by turn.
        """
        parts: list[tuple[list[int], bool]] = []
        done = ""
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            asked = self._render(messages[:number], generate=True, where=where)
            answered = self._render(messages[: number + 1], generate=False, where=where)
            if not asked.startswith(done) or not answered.startswith(asked):
                raise UserError(
                    f"{where}: the tokenizer's chat template does not render a conversation turn by turn, so the "
                    "answer cannot be told from the prompt; give single turns, or another template"
                )
            answer = self._encode(answered[len(asked) :])
            if self.tokenizer.eos_token_id not in answer[-2:]:  # some templates put a line break behind it
                answer.append(self.tokenizer.eos_token_id)
            parts += [(self._encode(asked[len(done) :]), False), (answer, True)]
            done = answered
        return parts

    def _render(self, messages: Sequence[Message], *, generate: bool, where: str = "the prompt") -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generate)
            )
        except Exception as error:  # a template may raise anything (roles that do not alternate, for one)
            raise UserError(f"{where}: the tokenizer's chat template refuses the conversation: {error}") from None

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


class Question:
    """What `continue_text` needs of a tokenizer, with one question put into the chat template."""

    def __init__(self, chat: Chat, question: str) -> None:
        self._ids = chat.prompt_ids([{"role": "user", "content": question}])
        self._tokenizer = chat.tokenizer
        self.bos_id, self.eos_id = self._ids[0], chat.tokenizer.eos_token_id

    @property
    def text(self) -> str:
        """The question as the model sees it."""
        return str(self._tokenizer.decode(self._ids))

    def encode(self, _texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids without the first one, which `continue_text` puts in front."""
        return [np.array(self._ids[1:])]

    def decode(self, ids: list[int]) -> str:
        """Text of an answer, without special tokens."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


def fit_length(parts: list[tuple[list[int], bool]], length: int) -> tuple[np.ndarray, np.ndarray] | None:
    """(inputs (n,), aligned labels (n,)) of at most `length` positions, or None.

    Too long: the left of the first prompt goes, never a part of an answer; None where that does not suffice (one
    token of prompt stays, for the first token of the answer is predicted from it).
    """
    total = sum(len(ids) for ids, _ in parts)
    first = parts[0][0]
    surplus = max(0, total - 1 - length)
    if surplus > len(first) - 1:
        return None
    kept = [(first[surplus:], False), *parts[1:]]
    ids = np.array([t for part, _ in kept for t in part], np.int32)
    mine = np.array([answer for part, answer in kept for _ in part])
    return ids[:-1], np.where(mine, ids, -100).astype(np.int64)[1:]
