"""Samples of a decoder of several modalities in training: answers to prompts, what was given beside what is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from millrace.core.errors import UserError
from millrace.eval.any_to_any import AnyToAny
from millrace.eval.decoding import Sampling
from millrace.eval.media import png, wav
from millrace.models.vocabulary import TEXT


class Shown:
    """Answers to `eval.prompts`: to words every modality that a template has behind them; to `image=FILE` text."""

    def __init__(self, subject: AnyToAny, prompts: list[str], how: Sampling) -> None:
        """Everything is read here, so that a mistake is told before the first step.

        Raises:
            UserError: a file that cannot be read, or a prompt that is too long.
        """
        self._subject, self._how = subject, how
        self._asked = [(prompt, *self._parse(prompt)) for prompt in prompts]
        for _, given, to in self._asked:
            for each in to:
                subject.check(given, each)

    def _parse(self, prompt: str) -> tuple[dict[str, Any], list[str]]:
        """(what is given, the modalities of its answers)."""
        name, mark, path = prompt.partition("=")
        given: dict[str, Any] = {TEXT: prompt}
        if mark and name in self._subject.media:
            try:
                raw = Path(path).read_bytes()
            except OSError as error:
                raise UserError(f"eval.prompts: {path} cannot be read: {error.strerror}") from None
            given = {name: self._subject.media[name].given(raw)}
        found = [
            answer
            for template in self._subject.templates
            for number, answer in enumerate(template.parts)
            if set(template.parts[:number]) == set(given) and answer in template.answer
        ]
        return given, list(dict.fromkeys(found)) or [TEXT]

    def __call__(self) -> list[dict[str, Any]]:
        """Entries for the ledger, each with the bytes of its `files` by name."""
        entries = []
        for prompt, given, to in self._asked:
            for answer in to:
                (made,) = self._subject.generate([given], answer, self._how)
                entry: dict[str, Any] = {"prompt": prompt, "to": answer}
                files = {f"given{suffix}": raw for name in given if name != TEXT
                         for suffix, raw in [self._encoded(name, np.asarray(given[name]))]}  # fmt: skip
                if answer == TEXT:
                    entry["text"] = made
                else:
                    suffix, raw = self._encoded(answer, made)
                    files[f"made{suffix}"] = raw
                entries.append(entry | ({"files": files} if files else {}))
        return entries

    def _encoded(self, modality: str, value: np.ndarray) -> tuple[str, bytes]:
        return (".png", png(value)) if value.ndim == 3 else (".wav", wav(value, self._subject.rate(modality)))
