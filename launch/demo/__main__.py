"""`python -m millrace.launch.demo`: what `make demo` runs after the installation."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from millrace.core.console import error, get_console, say, table
from millrace.core.errors import CONTINUE, UserError


def main(argv: list[str]) -> int:
    """Play the demo in a new numbered folder; the exit code is 0 only if everything came out as it must."""
    parser = argparse.ArgumentParser(
        prog="python -m millrace.launch.demo",
        description="Codecs of pictures and sounds; one model of Python's standard library, glyphs and dial tones; "
        "kill and resume, export, generate, evaluate, fine-tune with LoRA. "
        "Every call starts afresh in a new numbered folder below --dir.",
    )
    parser.add_argument("--dir", type=Path, default=Path("runs/demo"), help="where demos are kept (runs/demo)")
    parser.add_argument("--codecs", metavar="TIME", help="length of training each codec (configs/demo_image.toml)")
    parser.add_argument("--pretrain", metavar="TIME", help="length of pretraining, such as '60 s' (configs/demo.toml)")
    parser.add_argument("--finetune", metavar="TIME", help="length of fine-tuning (configs/demo_finetune.toml)")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    options = parser.parse_args(argv)
    try:
        return _play(options)
    except (UserError, OSError) as problem:
        if options.debug:
            raise
        error(str(problem))
        return 1
    except KeyboardInterrupt:
        error("the demo was interrupted; nothing is left running, and the next `make demo` starts a new one")
        return 130


def _play(options: argparse.Namespace) -> int:
    from millrace.launch.demo.chain import Demo, Stopped, clock, play

    began = time.monotonic()
    demo = Demo(new_folder(options.dir), ranks())
    say(f"everything is written to {demo.folder}")
    seconds = {name: value for name in ("codecs", "pretrain", "finetune") if (value := getattr(options, name))}
    try:
        rows = play(demo, seconds)
    except Stopped as stopped:
        if stopped.code in (CONTINUE, 130):
            raise KeyboardInterrupt from None
        error(f"the demo ends here, since a run failed (exit code {stopped.code}); its files are in {demo.folder}")
        return 1
    rows.append(clock(began))
    shown = table("millrace demo", ("", ""), rows)
    shown.show_header = False
    shown.columns[1].justify = "left"
    get_console().print(shown)
    _report(demo.folder / "pretrain")
    return 0


def _report(run: Path) -> None:
    report = run / "report.html"
    if not report.exists():
        from millrace.eval.report import write_report

        report = write_report(run)
    say("open the report of the run in a browser:")
    print(report.resolve())


def new_folder(parent: Path) -> Path:
    """`parent`/N with the first free N."""
    number = 1
    while True:
        folder = parent / str(number)
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1


def ranks() -> int:
    """Two ranks on a CPU; one per GPU (a power of two, as it must divide the batch) where there are GPUs."""
    from millrace.launch.train import _devices

    found = _devices()
    return 2 if found == 1 and not _has_gpu() else 1 << (min(found, 64).bit_length() - 1)


def _has_gpu() -> bool:
    import shutil

    return shutil.which("nvidia-smi") is not None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
