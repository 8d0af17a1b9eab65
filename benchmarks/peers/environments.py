"""A virtual environment per peer, since their requirements clash: made once, with pinned versions.

Every environment decodes with the same Pillow, soundfile and tokenizers, and batches with the same torch. All come from
the index that pip is configured for; the CPU build of torch must be what `torch==` finds there, as for the project.

torchvision is left out, whose wheels fit builds of torch for GPUs: mosaicml-streaming and litdata declare it. litdata
imports it only for its own image tensors and video, which this benchmark does not use. mosaicml-streaming imports two
names of it for its ready-made vision data sets, which this benchmark does not use either; a stub gives it these names.
Both libraries are installed with `--no-deps`, unaltered, beside the requirements that their imports really need.

mosaicml-streaming also declares transformers<5, of which it uses two classes in an `isinstance`. transformers 5 has
them, and transformers 4 would bring another tokenizers, that is another speed of the very work that all arms must do
alike.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

DECODERS = ("torch==2.13.0", "Pillow==13.0.0", "soundfile==0.14.0", "tokenizers==0.23.3")
_NUMPY = "numpy==2.4.6"


@dataclass(frozen=True)
class Environment:
    """Requirements that are resolved, then packages that are added without theirs."""

    resolved: tuple[str, ...]
    bare: tuple[str, ...] = ()
    stubs: tuple[tuple[str, str], ...] = ()  # (file below site-packages, its text)


ENVIRONMENTS = {
    "ceiling": Environment((*DECODERS, _NUMPY)),
    "mosaicml": Environment(
        (
            *DECODERS, "numpy==2.1.3", "transformers==5.23.0", "boto3==1.44.5", "Brotli==1.2.1", "zstd==1.5.7.2",
            "python-snappy==0.7.3", "xxhash==3.8.1", "catalogue==2.0.10", "tqdm==4.70.1", "filelock==4.2.11",
            "requests==2.34.2",
        ),
        ("mosaicml-streaming==0.13.0",),
        (
            ("torchvision/__init__.py", ""),
            ("torchvision/datasets.py", "class VisionDataset: ...\n"),
            ("torchvision/transforms/__init__.py", ""),
            ("torchvision/transforms/functional.py", "def to_tensor(image): raise NotImplementedError\n"),
        ),
    ),
    "litdata": Environment(
        (
            *DECODERS, _NUMPY, "lightning-utilities==0.15.3", "filelock==4.2.11", "boto3==1.44.5", "requests==2.34.2",
            "urllib3==2.8.0", "tifffile==2026.3.3", "obstore==0.12.1",
        ),
        ("litdata==0.2.76",),
    ),
    "webdataset": Environment((*DECODERS, _NUMPY, "webdataset==1.0.2")),
    "datasets": Environment(
        (*DECODERS, _NUMPY, "datasets==5.2.0", "torchdata==0.11.0", "pyarrow==26.0.1", "s3fs==2026.9.0")
    ),
}  # fmt: skip


def python(name: str, folder: Path) -> Path:
    """The interpreter of environment `name` below `folder`, made or made anew where its requirements changed.

    Raises:
        subprocess.CalledProcessError: pip could not install a requirement; its output says which.
    """
    wanted = ENVIRONMENTS[name]
    path = folder / name
    stamp, key = path / "stamp", hashlib.sha256(repr(wanted).encode()).hexdigest()
    if not stamp.exists() or stamp.read_text() != key:
        shutil.rmtree(path, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(path)], check=True)
        pip = [str(path / "bin" / "python"), "-m", "pip", "install", "-qqq", "--disable-pip-version-check"]
        subprocess.run([*pip, *wanted.resolved], check=True)
        if wanted.bare:
            subprocess.run([*pip, "--no-deps", *wanted.bare], check=True)
        (packages,) = (path / "lib").glob("python*/site-packages")
        assert not list(packages.glob("torchvision*")) and not list(packages.glob("torchaudio*"))
        for stub, text in wanted.stubs:
            (packages / stub).parent.mkdir(parents=True, exist_ok=True)
            (packages / stub).write_text(text)
        stamp.write_text(key)
    return path / "bin" / "python"
