"""`millrace export`: a folder that transformers loads."""

from __future__ import annotations

from collections.abc import Sequence

from millrace.launch.arguments import Parser


def main(argv: Sequence[str]) -> int:
    """Write the folder and print its path."""
    parser = Parser(
        prog="millrace export",
        description="Write a Hugging Face folder (safetensors, no code) that AutoModelForCausalLM.from_pretrained and "
        "AutoTokenizer.from_pretrained load; one of a codec or a generator is loaded by AutoModel, after `import "
        "millrace.models.bridge`. One CPU process, with memory for a few copies of the largest tensor.",
        epilog="example: millrace export runs/tiny exported/ --dtype bf16",
    )
    parser.add_argument("source", help="run directory (its newest good checkpoint) or a step-N folder")
    parser.add_argument("out", help="folder to write; an earlier export there is replaced, anything else is refused")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the weights (fp32)")
    parser.add_argument("--max-shard", default="5 GB", metavar="SIZE", help="of one weights file (5 GB)")
    options = parser.parse_args(list(argv))
    from millrace.core.console import say
    from millrace.core.units import fmt_count, fmt_size, parse_size
    from millrace.engine.export import export

    made = export(options.source, options.out, options.dtype, parse_size(options.max_shard))
    say(
        f"step {made.source['step']} of {options.source}: {fmt_count(made.parameters)} parameters in {made.dtype}, "
        f"{fmt_size(made.bytes)}"
    )
    print(made.path)
    return 0
