"""Hand a batch script to Slurm."""

from __future__ import annotations

import os
import shutil
import subprocess
from itertools import count
from pathlib import Path

from millrace.core.errors import UserError


def submit(script: str, run_dir: str | Path, dry_run: bool = False) -> str | None:
    """Save `script` as RUN/slurm/job-N.sbatch, submit it and return the job's id.

    With `dry_run` the script is printed on stdout, nothing is written or submitted, and None is returned.

    Raises:
        UserError: no `sbatch` here, a run directory that cannot be written, or sbatch's own refusal.
    """
    if dry_run:
        print(script, end="")
        return None
    if shutil.which("sbatch") is None:
        raise UserError(
            "sbatch is not on this machine's PATH; run this on a login node of the cluster, "
            "or add --dry-run to print the script"
        )
    path = _save(script, Path(os.path.abspath(run_dir)) / "slurm")
    done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}"
        raise UserError(f"Slurm refused {path}: {said}; change the [slurm] section and submit again")
    # "123", or "123;cluster" on a federation.
    return done.stdout.strip().partition(";")[0]


def _save(script: str, folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number in count(1):
            path = folder / f"job-{number}.sbatch"
            try:
                with open(path, "x", encoding="utf-8") as file:
                    file.write(script)
                return path
            except FileExistsError:
                continue
    except OSError as error:
        raise UserError(f"cannot write the batch script into {folder}: {error}") from None
    raise AssertionError("unreachable")
