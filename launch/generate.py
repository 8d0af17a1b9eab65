"""`millrace generate`: continue a prompt."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from millrace.core.errors import UserError


def main(argv: Sequence[str]) -> int:
    """Print each prompt with its continuation on stdout."""
    parser = argparse.ArgumentParser(
        prog="millrace generate",
        description="Continue prompts with a run's newest good checkpoint, a step-N folder, or a Hugging Face folder "
        "or hub name.",
        epilog="example: millrace generate runs/tiny --prompt 'Once upon a time' --tokens 100",
    )
    parser.add_argument("source", help="the model")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times (empty)")
    parser.add_argument("--tokens", type=int, default=128, metavar="N", help="at most (128); fewer where the text ends")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0 takes the likeliest (0.8)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the sampling (0)")
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="auto")
    options = parser.parse_args(list(argv))
    if options.tokens < 1 or options.temperature < 0:
        raise UserError(
            f"--tokens {options.tokens} must be 1 or more and --temperature {options.temperature} 0 or more"
        )
    from millrace.eval.generate import continue_text
    from millrace.eval.subject import open_subject

    subject = open_subject(options.source, dtype=options.dtype)
    prompts = options.prompt or [""]
    subject.check_length(prompts, options.tokens)
    texts = continue_text(
        subject.model, subject.tokenizer, prompts,
        tokens=options.tokens, temperature=options.temperature, seed=options.seed,
    )  # fmt: skip
    for prompt, text in zip(prompts, texts, strict=True):
        print(prompt + text)
    return 0
