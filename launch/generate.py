"""`millrace generate`: continue a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from millrace.core.errors import UserError
from millrace.launch.arguments import Parser
from millrace.launch.generate_media import add_media, answer

if TYPE_CHECKING:
    from millrace.eval.subject import Subject


def main(argv: Sequence[str]) -> int:
    """Print each prompt with its continuation on stdout."""
    parser = Parser(
        prog="millrace generate",
        description="Continue prompts with a run's newest good checkpoint, a step-N folder, or a Hugging Face folder "
        "or hub name. A model of objective.kind = 'any_to_any' answers prompts of text, images and sounds with --to.",
        epilog="example: millrace generate runs/tiny --prompt 'Once upon a time' --tokens 100; "
        "after instruction tuning: millrace generate runs/qa --chat --prompt 'What does os.walk do?'",
    )
    parser.add_argument("source", help="the model")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times (empty)")
    parser.add_argument(
        "--chat", action="store_true", help="prompts are questions: answer in the model's chat template"
    )
    parser.add_argument("--tokens", type=int, default=128, metavar="N", help="at most (128); fewer where the text ends")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 takes the likeliest (0.8, with --to 1.0)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the sampling (0)")
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="auto")
    add_media(parser)
    options = parser.parse_args(list(argv))
    if options.to or options.image or options.audio:
        return answer(options)
    temperature = 0.8 if options.temperature is None else options.temperature
    if options.tokens < 1 or temperature < 0:
        raise UserError(f"--tokens {options.tokens} must be 1 or more and --temperature {temperature} 0 or more")
    from millrace.eval.generate import continue_text
    from millrace.eval.subject import open_subject

    subject = open_subject(options.source, dtype=options.dtype)
    prompts = options.prompt or [""]
    how = {"tokens": options.tokens, "temperature": temperature, "seed": options.seed}
    if options.chat:
        print("\n".join(_answers(options.source, subject, prompts, how)))
        return 0
    subject.check_length(prompts, options.tokens)
    texts = continue_text(subject.model, subject.tokenizer, prompts, **how)
    for prompt, text in zip(prompts, texts, strict=True):
        print(prompt + text)
    return 0


def _answers(source: str, subject: Subject, prompts: Sequence[str], how: dict[str, Any]) -> list[str]:
    """The assistant's answer to each prompt as a conversation of its own."""
    from millrace.eval.generate import continue_text
    from millrace.finetune.chat import Chat, Question
    from millrace.finetune.source import find_source, open_tokenizer

    tokenizer = open_tokenizer(find_source(source).tokenizer)
    if not tokenizer.chat_template:
        raise UserError(f"{source} has no chat template, for it was not tuned on instructions; leave --chat out")
    answers = []
    for prompt in prompts:
        question = Question(Chat(tokenizer), prompt)
        subject.check_length([question.text], how["tokens"])
        answers += continue_text(subject.model, question, [prompt], **how)
    return [answer.strip() for answer in answers]
