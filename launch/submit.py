"""`millrace submit`: render a Slurm batch script for a run and hand it to sbatch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from millrace.core.config import load_config
from millrace.core.errors import UserError
from millrace.core.registry import load
from millrace.launch.arguments import Parser
from millrace.launch.train import CLASSES
from millrace.slurm.config import SlurmConfig
from millrace.slurm.render import render
from millrace.slurm.submit import submit


def main(argv: Sequence[str]) -> int:
    """Print the job's number on stdout, or with --dry-run the script."""
    parser = Parser(
        prog="millrace submit",
        description="Submit a run as a Slurm job. What the job asks for comes from --site (a TOML file) and from "
        "slurm.key=value; everything else is as for `millrace pretrain`.",
        epilog="example: millrace submit configs/tiny.toml train.micro_batch=2 slurm.nodes=2 slurm.gpus_per_node=8 "
        "slurm.time=12:00:00 --dry-run",
    )
    parser.add_argument("arguments", nargs="+", metavar="CONFIG.toml section.key=value")
    parser.add_argument("--site", metavar="FILE.toml", help="keys of SlurmConfig that your cluster needs")
    parser.add_argument("--for", dest="command", choices=sorted(CLASSES), default="pretrain")
    parser.add_argument("--dry-run", action="store_true", help="print the script and submit nothing")
    options = parser.parse_intermixed_args(list(argv))
    mine = [a.removeprefix("slurm.") for a in options.arguments if a.startswith("slurm.")]
    passed_on = [a for a in options.arguments if not a.startswith("slurm.")]
    files = [a for a in passed_on if "=" not in a]
    if len(files) != 1:
        raise UserError(f"give one configuration file, not {', '.join(files) or 'none'}")
    config = load_config(load(CLASSES[options.command]), files[0], [a for a in passed_on if "=" in a])
    run_dir = Path(config.run.dir) / config.run.name
    command = ["-m", f"millrace.{options.command}", *passed_on]
    script = render(
        load_config(SlurmConfig, options.site, mine), command, run_dir, config.train.batch // config.train.micro_batch
    )
    job = submit(script, run_dir, options.dry_run)
    if job is not None:
        print(job)
    return 0
