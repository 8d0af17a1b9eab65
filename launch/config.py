"""`millrace config`: the resolved configuration, and what each key means."""

from __future__ import annotations

from collections.abc import Sequence

from millrace.core.config import explain, load_config, to_toml
from millrace.core.registry import load
from millrace.launch.arguments import Parser
from millrace.launch.train import CLASSES


def main(argv: Sequence[str]) -> int:
    """Print it to stdout: with --explain as commented text, otherwise as TOML that can be used again."""
    parser = Parser(
        prog="millrace config",
        description="Print the resolved configuration (defaults, file, overrides), and what each key means.",
        epilog="example: millrace config configs/tiny.toml optim.lr=1e-3 --toml > resolved.toml",
    )
    parser.add_argument("arguments", nargs="*", metavar="CONFIG.toml section.key=value")
    parser.add_argument("--for", dest="command", choices=sorted(CLASSES), default="pretrain")
    parser.add_argument("--toml", action="store_true", help="plain TOML, without the meanings")
    parser.add_argument("--world", type=int, help="also check the configuration for this number of ranks")
    options = parser.parse_intermixed_args(list(argv))
    files = [a for a in options.arguments if "=" not in a]
    overrides = [a for a in options.arguments if "=" in a]
    if len(files) > 1:
        parser.error(f"give one configuration file, not {', '.join(files)}")
    config = load_config(load(CLASSES[options.command]), files[0] if files else None, overrides)
    if options.world:
        from millrace.data.loader import check_batch

        check_batch(config.train.batch, config.train.micro_batch, options.world)
    print(to_toml(config) if options.toml else _explained(config))
    return 0


def _explained(config: object) -> str:
    lines = []
    for key, value, help in explain(config):
        if key.startswith("["):
            lines.append(f"\n{key}  # {help}")
        else:
            lines.append(f"{key.rpartition('.')[2] + ' = ' + value:<44} # {help}")
    return "\n".join(lines).strip()
