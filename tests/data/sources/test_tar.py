from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.core.errors import UserError
from millrace.data.sources.base import MAX_SAMPLE_BYTES, BadSample
from millrace.data.stores.base import open_blob
from tests.data.sources.check import agree, contents, cut_everywhere, make, scan

BOTH = {"image": "jpg", "text": "txt"}
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def info(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, **more: object) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.size, made.type = size, kind
    for key, value in more.items():
        setattr(made, key, value)
    return made


def write(path: Path, members: Sequence[tuple[str | tarfile.TarInfo, bytes]], form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as archive:
        for member, raw in members:
            member = info(member, len(raw)) if isinstance(member, str) else member
            archive.addfile(member, io.BytesIO(raw))
    return path


def pairs(count: int, folder: str = "") -> list[tuple[str, bytes]]:
    return [
        (f"{folder}{i:05d}.{end}", raw)
        for i in range(count)
        for end, raw in (("jpg", os.urandom(1 + 700 * i)), ("txt", f"caption {i} é".encode()))
    ]


def records(members: list[tuple[str, bytes]]) -> list[dict]:
    return [{"image": a[1], "text": b[1].decode()} for a, b in zip(members[::2], members[1::2], strict=True)]


def why(path: Path, columns: dict[str, str] = BOTH) -> list[str]:
    """Why each sample is bad, an empty string where it is not."""
    found = contents(scan("tar", columns, path))
    return [content.why if isinstance(content, BadSample) else "" for content in found]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("folder", ["", "./a.b/c/", "x" * 90 + "/" + "y" * 90 + "/", "z" * 300 + "/é/"])
def test_archives_of_tarfile_in_every_format(tmp_path: Path, form: str, folder: str) -> None:
    if form == "ustar" and len(folder) > 255:
        pytest.skip("ustar has no names of that length")
    members = pairs(6, folder)
    path = write(tmp_path / "a.tar", members, FORMATS[form])
    samples = agree("tar", BOTH, path, records(members))
    assert samples[0].place[0] == 0 and sum(samples[0].place) == samples[1].place[0]
    agree("tar", {"text": "txt"}, path, [{"text": record["text"]} for record in records(members)])


def test_samples_are_those_of_webdataset(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    draw = np.random.default_rng(0)
    with webdataset.TarWriter(str(path)) as sink:
        for i in range(40):
            tokens = draw.integers(0, 2**16, i, np.uint16)
            sample = {"__key__": f"f.old/{i:04d}", "seg.PNG": draw.bytes(i), "txt": f"é{i}", "npy": tokens, "json": {}}
            sink.write(sample)
    columns = {"image": "seg.png", "text": "txt", "tokens": "npy"}
    expected = [
        {"image": s["seg.png"], "text": s["txt"].decode(), "tokens": np.load(io.BytesIO(s["npy"])).tolist()}
        for s in webdataset.WebDataset(str(path), shardshuffle=False)
    ]
    agree("tar", columns, path, expected)


def test_alternatives_are_tried_in_order_and_case_does_not_matter(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.tar", [("a.PNG", b"1"), ("a.txt", b"x"), ("b.jpg", b"2"), ("b.png", b"3"), ("b.txt", b"")]
    )
    for ends in ("jpg;png;jpeg", "jpg|png|jpeg", ".jpg|.PNG"):
        agree("tar", BOTH | {"image": ends}, path, [{"image": b"1", "text": "x"}, {"image": b"2", "text": ""}])


def test_folders_metadata_and_names_without_extension_are_not_samples(tmp_path: Path) -> None:
    one = pairs(1)
    extra = [(info("d/", kind=tarfile.DIRTYPE), b""), ("__meta__/x.json", b"{}"), ("README", b"x"), (".hidden", b"x")]
    path = write(tmp_path / "a.tar", [*extra, *one, *extra])
    agree("tar", BOTH, path, records(one))


def test_a_missing_member_is_named_with_those_that_are_there(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", [("a.jpg", b""), ("a.cls", b""), *pairs(1)])
    assert why(path) == ["byte 0: 'a' has no member .txt beside the others (it has: jpg, cls)", ""]
    assert "has no member .jpeg or .png" in why(path, {"image": "jpeg|png"})[0]


def test_members_that_lie_apart_or_twice_are_refused(tmp_path: Path) -> None:
    apart = write(tmp_path / "a.tar", [("a.txt", b""), ("b.txt", b""), ("a.jpg", b"")])
    first, second, third = why(apart, {"text": "txt|jpg"})
    assert (first, second) == ("", "") and "members of 'a' lie apart; write the archive with sorted names" in third
    twice = write(tmp_path / "b.tar", [("a.txt", b"1"), ("a.txt", b"2")])
    assert "two members 'a.txt' with the same extension" in why(twice, {"text": "txt"})[0]


HOSTILE = {
    "absolute": (info("/etc/passwd.txt"), "is named by an absolute path"),
    "parent": (info("../../a.txt"), r"is named by a path with '..'"),
    "hard link": (info("a.txt", kind=tarfile.LNKTYPE, linkname="/etc/passwd"), "is a hard link"),
    "symlink": (info("a.txt", kind=tarfile.SYMTYPE, linkname="../x"), "is a symbolic link"),
    "long symlink": (info("a.txt", kind=tarfile.SYMTYPE, linkname="x" * 300), "is a symbolic link"),
    "character device": (info("a.txt", kind=tarfile.CHRTYPE), "is a character device"),
    "block device": (info("a.txt", kind=tarfile.BLKTYPE), "is a block device"),
    "fifo": (info("a.txt", kind=tarfile.FIFOTYPE), "is a FIFO"),
    "unknown": (info("a.txt", kind=b"Z"), "is of the unknown type b'Z'"),
    "pyd": (info("a.pyd"), "is a pickle, which runs code when it is read"),
    "pkl": (info("a.x.pkl"), "is a pickle"),
    "pickle": (info("a.PICKLE"), "is a pickle"),
    "pth": (info("a.pth"), "is a pickle"),
    "pax sparse": (info("a.txt", pax_headers={"GNU.sparse.major": "1"}), "is a sparse file"),
}


@pytest.mark.parametrize("form", ["gnu", "pax"])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_members_make_their_sample_bad_and_no_other(tmp_path: Path, name: str, form: str) -> None:
    if name == "pax sparse" and form == "gnu":
        pytest.skip("a pax header")
    member, reason = HOSTILE[name]
    members = pairs(2)
    path = write(tmp_path / "a.tar", [*members[:2], (member, b""), *members[2:]], FORMATS[form])
    first, bad, last = why(path)
    assert (first, last) == ("", "") and reason in bad, bad
    assert sorted(os.listdir(tmp_path)) == ["a.tar"]


def test_a_pickle_is_not_read_when_it_is_asked_for_either(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="members '.pyd' are pickles, which run code when they are read"):
        make("tar", {"tokens": "npy|pyd"})
    array = io.BytesIO()
    np.save(array, np.array([{"a": 1}], object), allow_pickle=True)
    path = write(tmp_path / "a.tar", [("a.npy", array.getvalue())])
    assert "not a one-dimensional array of integers" in why(path, {"tokens": "npy"})[0]


def test_sparse_files_of_gnu_tar_are_refused(tmp_path: Path) -> None:
    with open(tmp_path / "a.txt", "wb") as file:
        for piece in range(3):
            file.seek(piece * 2**20)
            file.write(b"x" * 4096)
    subprocess.run(["tar", "-C", tmp_path, "--sparse", "--format=gnu", "-cf", tmp_path / "a.tar", "a.txt"], check=True)
    assert why(tmp_path / "a.tar", {"text": "txt"}) == ["byte 0: the member 'a.txt' is a sparse file"]
    subprocess.run(["tar", "-C", tmp_path, "--sparse", "--format=pax", "-cf", tmp_path / "a.tar", "a.txt"], check=True)
    assert "is a sparse file" in why(tmp_path / "a.tar", {"text": "txt"})[0]


def test_a_sample_beyond_the_limit_is_skipped_unread(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    large, good = info("a.jpg", MAX_SAMPLE_BYTES), write(tmp_path / "b.tar", pairs(1)).read_bytes()
    with open(path, "wb") as file:
        file.write(large.tobuf())
        file.seek(MAX_SAMPLE_BYTES, 1)
        file.write(good)
    bad, last = why(path)
    assert f"'a' has more than {MAX_SAMPLE_BYTES} bytes with all its members" in bad and last == ""


@pytest.mark.parametrize(("size", "reason"), [(2**40, "reaches beyond the end"), (-5, "which is none")])
def test_a_size_that_cannot_be_is_refused(tmp_path: Path, size: int, reason: str) -> None:
    header = info("a.jpg", size).tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "a.tar").write_bytes(header + bytes(2048))
    with pytest.raises(UserError, match=reason):
        scan("tar", BOTH, tmp_path / "a.tar")


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"\xff" * 512, "damaged record"),
        (b"12 path=ab", "damaged record"),
        (b"0 path=a\n", "damaged record"),
        (b"99999999999999999999 path=a\n", "damaged record"),
        (b"14 size=1e999\n", "which is none"),
        (b"", ""),
    ],
)
def test_damaged_pax_headers_are_refused(tmp_path: Path, raw: bytes, reason: str) -> None:
    header = info("x", len(raw), kind=b"x").tobuf() + raw.ljust(512, b"\0") * bool(raw)
    (tmp_path / "a.tar").write_bytes(header + write(tmp_path / "b.tar", pairs(1)).read_bytes())
    if reason:
        with pytest.raises(UserError, match=reason):
            scan("tar", BOTH, tmp_path / "a.tar")
    else:
        assert why(tmp_path / "a.tar") == [""]


def test_an_extended_header_of_a_gigabyte_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    for kind in (b"L", b"x", b"g"):
        with open(path, "wb") as file:
            file.write(info("a", 2**30, kind=kind).tobuf())
            file.truncate(2**30 + 4096)
        with pytest.raises(UserError, match=f"the extended header at byte 0 has {2**30} bytes"):
            scan("tar", BOTH, path)


def test_global_headers_that_would_change_every_member_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", pax_headers={"comment": "of git archive"}) as archive:
        archive.addfile(info("a.txt", 1), io.BytesIO(b"x"))
    agree("tar", {"text": "txt"}, tmp_path / "a.tar", [{"text": "x"}])
    with tarfile.open(tmp_path / "a.tar", "w", pax_headers={"path": "b.txt"}) as archive:
        archive.addfile(info("a.txt", 1), io.BytesIO(b"x"))
    with pytest.raises(UserError, match="the global pax header at byte 0 sets 'path' of all members"):
        scan("tar", {"text": "txt"}, tmp_path / "a.tar")


def test_text_that_is_not_utf8_is_bad(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", [("a.txt", b"ab\xff")])
    assert why(path, {"text": "txt"}) == ["byte 0: 'a.txt': not UTF-8 at byte 2 (invalid start byte: 0xff)"]


def test_an_archive_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", pairs(3, "f" * 120 + "/"), tarfile.GNU_FORMAT)
    end = sum(scan("tar", BOTH, path)[-1].place)
    cuts = [n + d for n in range(0, end + 1, 512) for d in (-1, 0, 1, 100) if n + d <= end]
    assert cut_everywhere("tar", BOTH, path, cuts) == []


def test_archives_that_were_joined_are_refused_rather_than_half_read(tmp_path: Path) -> None:
    one = write(tmp_path / "a.tar", pairs(2)).read_bytes()
    (tmp_path / "b.tar").write_bytes(one + one)
    with pytest.raises(UserError, match="b.tar is not a whole tar archive: there is more behind its end mark"):
        scan("tar", BOTH, tmp_path / "b.tar")


def test_a_flipped_bit_is_never_a_crash(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", pairs(2, "f" * 120 + "/"))
    good, raw = scan("tar", BOTH, path), path.read_bytes()
    for bit in range(0, 8 * sum(good[-1].place), 61):
        damaged = bytearray(raw)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            scan("tar", BOTH, path)
        except UserError as error:
            assert "is not a whole tar archive" in str(error)
        for content in make("tar", BOTH).read(open_blob(path), [sample.place for sample in good]):
            assert isinstance(content, BadSample) or set(content) == {"image", "text"}


LIMITED = """
import resource, sys
from millrace.data.sources.tar import TarSource
from millrace.data.stores.base import open_blob
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
count = sum(not hasattr(s.content, "why") for s in TarSource({"image": "jpg"}).scan(open_blob(sys.argv[1])))
print(count, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_a_scan_holds_one_sample_at_a_time(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for i in range(150):
            archive.addfile(info(f"{i}.jpg", 2**20), io.BytesIO(bytes(2**20)))
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "a.tar")], capture_output=True, text=True, check=True
    )
    count, mebibytes = map(int, done.stdout.split())
    assert count == 150 and mebibytes < 30


NAMES = st.text(st.characters(blacklist_categories=["C"], blacklist_characters="./\0"), min_size=1, max_size=120)


@settings(max_examples=30)
@given(
    st.dictionaries(NAMES, st.tuples(st.binary(max_size=2000), st.text(max_size=50)), max_size=8),
    st.sampled_from(["gnu", "pax"]),
)
def test_any_samples_come_back(samples: dict[str, tuple[bytes, str]], form: str) -> None:
    samples = {k: (a, b.encode("utf-8", "replace").decode()) for k, (a, b) in samples.items() if not k.startswith("__")}
    members = [(f"d/{k}.{end}", v) for k, (a, b) in samples.items() for end, v in (("jpg", a), ("txt", b.encode()))]
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / "a.tar", members, FORMATS[form])
        agree("tar", BOTH, path, [{"image": a, "text": b} for a, b in samples.values()])
