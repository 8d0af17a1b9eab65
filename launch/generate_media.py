"""`millrace generate … --to image|audio|text`: prompts of several modalities, answers as texts and files."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from millrace.core.errors import UserError
from millrace.launch.arguments import Parser


def add_media(parser: Parser) -> None:
    """The options of models that read and write several modalities."""
    group = parser.add_argument_group("models of several modalities (objective.kind = 'any_to_any', 'vision_language')")
    group.add_argument("--to", metavar="MODALITY", help="what to write: text, image or audio")
    group.add_argument("--image", action="append", metavar="FILE", help="a picture in the prompt; several are a batch")
    group.add_argument("--audio", action="append", metavar="FILE", help="a sound in the prompt; several are a batch")
    group.add_argument("--out", metavar="FOLDER", help="for pictures (PNG) and sounds (WAV), and texts too if given")
    group.add_argument("--guidance", type=float, default=0.0, metavar="G", help="away from what has no prompt (0)")
    group.add_argument("--top-k", type=int, default=0, metavar="K", help="draw from the likeliest alone; 0: from all")


def answer(options: Namespace) -> int:
    """Answer each prompt; texts on stdout, of files their names."""
    to = options.to or "text"
    if to != "text" and not options.out:
        raise UserError(f"--to {to} writes files; say into which folder with --out")
    prompts = _prompts(options)
    from millrace.eval.vision_language import sees

    if sees(options.source):
        return _describe(options, prompts)
    from millrace.eval.any_to_any import AnyToAny
    from millrace.eval.decoding import Sampling
    from millrace.eval.media import save

    temperature = 1.0 if options.temperature is None else options.temperature
    how = Sampling(guidance=options.guidance, temperature=temperature, top_k=options.top_k, seed=options.seed)
    subject = AnyToAny.open(options.source)
    for number, made in enumerate(subject.generate(prompts, to, how)):
        if to == "text":
            print(made)
        if options.out:
            print(save(Path(options.out) / f"{number:04d}", made, subject.rate(to)))
    return 0


def _describe(options: Namespace, prompts: list[dict[str, Any]]) -> int:
    """Print each text, and how it goes on after its picture."""
    if options.to not in (None, "text") or options.audio or not options.image:
        raise UserError(f"{options.source} reads pictures and writes text: give --image, and neither --audio nor --to")
    from millrace.eval.subject import open_subject
    from millrace.eval.vision_language import describe, read_image

    temperature = 0.8 if options.temperature is None else options.temperature
    subject = open_subject(options.source, dtype=options.dtype)
    images, texts = [read_image(prompt["image"]) for prompt in prompts], [prompt.get("text", "") for prompt in prompts]
    how = {"tokens": options.tokens, "temperature": temperature, "seed": options.seed}
    for text, more in zip(texts, describe(subject, images, texts, **how), strict=True):
        print(text + more)
    return 0


def _prompts(options: Namespace) -> list[dict[str, Any]]:
    """Prompt n has the n-th text, picture and sound; of what is given once all prompts have the same."""
    given = {
        "text": options.prompt,
        "image": [_read(name) for name in options.image or ()],
        "audio": [_read(name) for name in options.audio or ()],
    }
    given = {name: values for name, values in given.items() if values}
    count = max(map(len, given.values()), default=1)
    if odd := [f"{len(values)} of {name}" for name, values in given.items() if len(values) not in (1, count)]:
        raise UserError(f"{' and '.join(odd)} make no batch of {count} prompts; give one of each, or as many")
    return [{name: values[n if len(values) > 1 else 0] for name, values in given.items()} for n in range(count)]


def _read(name: str) -> bytes:
    try:
        return Path(name).read_bytes()
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}") from None
