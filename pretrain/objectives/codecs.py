"""The codecs beside manifests of codes, as frozen modules."""

from __future__ import annotations

import json
from dataclasses import dataclass

from millrace.core.errors import UserError
from millrace.data import CODES
from millrace.data.corpus import Corpus
from millrace.engine.export import BESIDE, VIEW
from millrace.eval.coder import stored_coder
from millrace.models.codec import Codec
from millrace.models.frozen import frozen
from millrace.pretrain.objectives.base import Setting


@dataclass(frozen=True)
class Codecs:
    """By modality: the codecs, and what they are given, as view.json says it."""

    modules: dict[str, Codec]
    views: dict[str, str]

    @property
    def counts(self) -> dict[str, int]:
        """Codes of each."""
        return {modality: codec.codes for modality, codec in self.modules.items()}

    def files(self) -> dict[str, str]:
        """What is beside their weights in a checkpoint."""
        found = {}
        for modality, codec in self.modules.items():
            codec.config.architectures = [type(codec).__name__]
            found[f"{BESIDE}codecs/{modality}/config.json"] = codec.config.to_json_string(use_diff=False)
            found[f"{BESIDE}codecs/{modality}/{VIEW}"] = self.views[modality]
        return found


def load_codecs(setting: Setting) -> Codecs:
    """The codecs of all modalities of the templates, from beside the manifests.

    Raises:
        UserError: no manifest has codes of a modality, or what made them is not beside it, or is another one.
    """
    if not setting.objective.templates:
        raise UserError("objective.templates: name the rows, such as [{row = 'image > text'}, {row = 'text > image'}]")
    modalities = setting.objective.media()
    if odd := [name for name in modalities if name not in CODES]:
        raise UserError(f"objective.templates: there are no codes of '{odd[0]}', only of {', '.join(CODES)}, and text")
    corpus = Corpus.load(setting.manifests) if modalities else None
    coders = {modality: stored_coder(corpus, modality, "cpu") for modality in modalities if corpus}
    views = {modality: json.dumps(coder.table) for modality, coder in coders.items()}
    return Codecs({modality: frozen(coder.model) for modality, coder in coders.items()}, views)
