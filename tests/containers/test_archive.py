"""Outer zip, tar, gz, bz2 and xz made by the standard library's own writers; links, bombs and names that climb out."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from upparam.containers import archive, head_of, open_all, open_file, safetensors, tars
from upparam.errors import AmbiguousError, LimitError, MalformedError, UnreadableError, UpparamError
from upparam.sources import MemorySource
from upparam.tensors import Tensor


def adapter(value: float = 1.0) -> bytes:
    stream = io.BytesIO()
    safetensors.write(stream, {"w": Tensor.of(np.full((4, 3), value, np.float32))})
    return stream.getvalue()


def tarred(files: dict[str, bytes], form: int = tarfile.GNU_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as out:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            out.addfile(entry, io.BytesIO(data))
    return stream.getvalue()


def zipped(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as out:
        for name, data in files.items():
            out.writestr(name, data)
    return stream.getvalue()


PACKERS: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


def contents(data: bytes, name: str = "x") -> archive.Contents:
    return archive.contents(MemorySource(data, name), Path(name))


def everything(found: archive.Contents) -> dict[str, bytes]:
    return {name: source.read(0, source.size) for name, source in found.members}


FILES = {
    "adapter/w.safetensors": adapter(),
    "notes": b"hello",
    "deep/" * 30 + "x" * 90 + ".bin": b"long name",
    "empty.bin": b"",
    "ünï.bin": b"u",
}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_in_every_form(form: int) -> None:
    files = dict(FILES)
    if form == tarfile.USTAR_FORMAT:
        files = {name: data for name, data in files.items() if len(name) < 100} | {"a" * 100 + "/" + "b" * 60: b"prefix"}
    data = tarred(files, form)
    assert tars.sniff(head_of(MemorySource(data), Path("x"))) and archive.sniff(head_of(MemorySource(data), Path("x")))
    found = contents(data)
    assert found.kind == "tar" and everything(found) == files and not found.findings


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zip(method: int) -> None:
    found = contents(zipped(FILES, method))
    assert found.kind == "zip" and everything(found) == FILES and not found.findings


@pytest.mark.parametrize("kind", PACKERS)
def test_packed_files(kind: str) -> None:
    data = adapter()
    found = contents(PACKERS[kind](data), f"w.safetensors.{kind}")
    assert (found.kind, everything(found)) == (kind, {"w.safetensors": data})
    two = PACKERS[kind](data[:50]) + PACKERS[kind](b"") + PACKERS[kind](data[50:]) + bytes(512)
    assert everything(contents(two, "w")) == {"w": data}, "several streams and padding"


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(PACKERS)), st.binary(max_size=3000), st.integers(1, 2000))
def test_packed_bytes_come_back(kind: str, data: bytes, times: int) -> None:
    data = data * min(times, 1 + 2_000_000 // (len(data) + 1))
    packed = PACKERS[kind](data)
    if len(data) > len(packed) * 1000:
        return
    assert everything(contents(packed)) == {"x": data}


@pytest.mark.parametrize("kind", PACKERS)
def test_large_packed_files_are_spooled_to_disk(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MAX_UNPACKED_IN_MEMORY", 100_000)
    data = np.random.default_rng(0).integers(0, 4, 3_000_000, np.uint8).tobytes()
    ((_, source),) = contents(PACKERS[kind](data)).members
    assert isinstance(source, archive.SpooledSource) and source._stream._rolled  # type: ignore[attr-defined]
    assert source.read(0, source.size) == data and source.read(source.size - 7, 7) == data[-7:]
    with pytest.raises(MalformedError, match="outside"):
        source.read(source.size, 1)


def test_no_room_to_unpack_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def write(self, data: bytes) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.SpooledTemporaryFile", lambda max_size: Full())
    with pytest.raises(UnreadableError, match="No space left"):
        contents(gzip.compress(b"data"))


def test_a_tar_without_end_and_one_with_more_behind_it() -> None:
    data = tarred({"a": bytes(600)})
    (finding,) = contents(data[:1536]).findings
    assert finding.code == "tar-no-end"
    (finding,) = contents(data + tarred({"b": b"hidden"})).findings
    assert finding.code == "trailing-bytes" and f"byte {len(data)}" in finding.evidence[0]


def test_tensors_inside_are_opened(tmp_path: Path) -> None:
    for kind, data in {
        "zip": zipped({"a/w.safetensors": adapter(), "config.json": b"{}"}),
        "tar": tarred({"a/w.safetensors": adapter(), "readme.txt": b"hi"}),
        "gz": gzip.compress(adapter()),
    }.items():
        path = tmp_path / f"w.{kind}"
        path.write_bytes(data)
        file = open_file(path)
        assert file.wrapping == (kind,) and file.container == "safetensors" and file.tensors["w"].read().sum() == 12
    path = tmp_path / "w.tar.gz"
    path.write_bytes(gzip.compress(tarred({"w.safetensors": adapter()})))
    assert open_file(path).wrapping == ("gz", "tar")
    (tmp_path / "two.zip").write_bytes(zipped({"a.safetensors": adapter(1), "b.safetensors": adapter(2)}))
    assert [file.path.name for file in open_all(tmp_path / "two.zip")] == ["a.safetensors", "b.safetensors"]
    with pytest.raises(AmbiguousError, match="several"):
        open_file(tmp_path / "two.zip")


def test_plain_files_are_passed_over_by_name() -> None:
    found = contents(tarred({"a.json": b"{}", "b.PNG": b"x", "c.bin": b"y"}))
    assert [name for name, _ in found.members] == ["c.bin"] and [name for name, _ in found.passed_over] == ["a.json", "b.PNG"]


def test_links_and_devices_are_said_and_not_followed(tmp_path: Path) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as out:
        for name, kind, target in (
            ("soft", tarfile.SYMTYPE, "/etc/passwd"),
            ("hard", tarfile.LNKTYPE, "soft"),
            ("tty", tarfile.CHRTYPE, ""),
            ("disk", tarfile.BLKTYPE, ""),
            ("pipe", tarfile.FIFOTYPE, ""),
            ("folder", tarfile.DIRTYPE, ""),
        ):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, target
            out.addfile(entry)
        entry = tarfile.TarInfo("w.safetensors")
        entry.size = len(adapter())
        out.addfile(entry, io.BytesIO(adapter()))
    found = contents(stream.getvalue())
    assert [name for name, _ in found.members] == ["w.safetensors"]
    assert [finding.code for finding in found.findings] == ["tar-special-member"] * 5
    assert "soft -> /etc/passwd" in found.findings[0].evidence and "symbolic link" in found.findings[0].message
    (tmp_path / "a.tar").write_bytes(stream.getvalue())
    assert len(open_file(tmp_path / "a.tar").findings) == 5, "the archive's findings ride with the file"


@pytest.mark.parametrize("make", [tarred, zipped])
@pytest.mark.parametrize(
    "name", ["/etc/w.safetensors", "../w.safetensors", "a/../../w.safetensors", "..\\w.safetensors", "C:w.safetensors"]
)
def test_names_that_climb_out_are_said_and_left_out(make: Callable[[dict[str, bytes]], bytes], name: str) -> None:
    found = contents(make({name: adapter(), "ok.safetensors": adapter()}))
    assert [member for member, _ in found.members] == ["ok.safetensors"]
    assert any("unsafe-name" in finding.code and finding.severity.name == "ERROR" for finding in found.findings)


def test_a_name_given_twice_is_said() -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as out:
        for _ in range(2):
            out.addfile(tarfile.TarInfo("a"), None)
    assert [finding.code for finding in contents(stream.getvalue()).findings] == ["tar-duplicate"]


def test_sparse_files_are_said() -> None:
    entry = tarfile.TarInfo("s")
    entry.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "100000"}
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as out:
        out.addfile(entry)
    found = contents(stream.getvalue())
    assert not found.members and "sparse" in found.findings[0].message


def test_encrypted_zip_members_are_said() -> None:
    data = bytearray(zipped({"w.bin": b"secret"}, zipfile.ZIP_STORED))
    data[6] |= 1
    data[data.index(b"PK\1\2") + 8] |= 1
    found = contents(bytes(data))
    assert not found.members and any("encrypted" in finding.message for finding in found.findings)


@pytest.mark.parametrize("kind", PACKERS)
def test_bombs_are_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Deflate cannot pass the default ratio by itself; bzip2 and xz can.
    monkeypatch.setattr(archive, "MAX_INFLATE_RATIO", 500)
    bomb = PACKERS[kind](bytes(20_000_000))
    with pytest.raises(LimitError, match="honest ratio"):
        contents(bomb)


def test_a_zip_bomb_member_is_refused_before_it_inflates() -> None:
    data = bytearray(zipped({"w.bin": bytes(1000)}))
    at = data.index(b"PK\1\2")
    data[at + 24 : at + 28] = (1 << 30).to_bytes(4, "little")
    found = contents(bytes(data))
    assert not found.members and any("inflate" in finding.message for finding in found.findings)


def test_many_tiny_streams_are_refused() -> None:
    with pytest.raises(LimitError, match="streams in a row"):
        contents(gzip.compress(b"") * 20_000)


@pytest.mark.parametrize("kind", PACKERS)
def test_broken_packed_data(kind: str) -> None:
    good = PACKERS[kind](adapter() * 20)
    with pytest.raises(MalformedError, match="ends early"):
        contents(good[:-12])
    with pytest.raises(MalformedError, match="ends early"):
        contents(good[:16])
    with pytest.raises(MalformedError, match="follows"):
        contents(good + b"extra")
    middle = bytearray(good)
    middle[len(good) // 2] ^= 0xFF
    middle[len(good) // 2 + 1] ^= 0xFF
    with pytest.raises(MalformedError):
        contents(bytes(middle))


@pytest.mark.parametrize("start", [b"\x1f\x8b", b"\x1f\x8b\x08\xff", b"BZh", b"BZh9numbers", b"PK", b"\xfd7zX"])
def test_headerless_data_that_starts_alike_is_no_archive(start: bytes) -> None:
    data = start + np.random.default_rng(0).standard_normal(500).astype(np.float32).tobytes()
    assert not archive.sniff(head_of(MemorySource(data), Path("up-param.bin")))


def test_nesting_is_limited(tmp_path: Path) -> None:
    data = adapter()
    for _ in range(3):
        data = gzip.compress(data)
    (tmp_path / "ok.gz").write_bytes(data)
    assert open_file(tmp_path / "ok.gz").wrapping == ("gz",) * 3
    (tmp_path / "deep.gz").write_bytes(gzip.compress(data))
    with pytest.raises(LimitError, match="nested deeper"):
        open_file(tmp_path / "deep.gz")


BROKEN_TARS = {
    "shorter than a header": (lambda data: data[:500], "too short"),
    "cut in a member": (lambda data: data[:700], "ends inside a member"),
    "a wrong checksum later": (lambda data: data[:1536] + b"junk" + data[1540:], "checksum"),
}


@pytest.mark.parametrize("case", BROKEN_TARS)
def test_broken_tars(case: str) -> None:
    damage, message = BROKEN_TARS[case]
    with pytest.raises(MalformedError, match=message):
        contents(damage(tarred({"a": bytes(600), "b": bytes(600)})))


def header(name: bytes = b"a", size: bytes = b"00000000000\0", kind: bytes = b"0") -> bytes:
    block = bytearray(512)
    block[: len(name)] = name
    block[124 : 124 + len(size)] = size
    block[156:157] = kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (header(size=b"\xff" * 12), MalformedError, "negative"),
        (header(size=b"\x80" + b"\xff" * 11), MalformedError, "ends inside a member"),
        (header(size=b"9999"), MalformedError, "no number"),
        (header(size=b"77777777777\0"), MalformedError, "ends inside a member"),
        (header(kind=b"L", size=b"00077777777\0") + bytes(0o77777777 + 512), LimitError, "longer than any real"),
        (header(kind=b"x", size=b"00000000020\0") + b"99 path=boo\n".ljust(512, b"\0"), MalformedError, "pax"),
        (header(kind=b"x", size=b"00000000020\0") + b"nonsense".ljust(512, b"\0"), MalformedError, "pax"),
        (header(kind=b"x", size=b"00000000014\0") + b"12 size=abc\n".ljust(512, b"\0") + header(), MalformedError, "no number"),
    ],
)  # fmt: skip
def test_crafted_tars(data: bytes, error: type[UpparamError], message: str) -> None:
    with pytest.raises(error, match=message):
        contents(data)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damage_never_escapes_the_error_tree(data: st.DataObject) -> None:
    files = {"w.safetensors": adapter(), "long/" * 40 + "n": b"x"}
    good = bytearray(
        data.draw(
            st.sampled_from(
                [tarred(files), tarred(files, tarfile.PAX_FORMAT), zipped(files), *(pack(adapter()) for pack in PACKERS.values())]
            )
        )
    )
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(8, len(good) - 1))] = data.draw(st.integers(0, 255))
    try:
        for _, source in contents(bytes(good)).members:
            source.read(0, source.size)
    except MalformedError:
        return


def test_deflate_read_behind_itself() -> None:
    data = os.urandom(100_000)
    ((_, source),) = contents(zipped({"a.bin": data})).members
    assert source.read(90_000, 10) == data[90_000:90_010]
    assert source.read(10, 20) == data[10:30] and source.read(99_990, 10) == data[-10:]
    broken = bytearray(zipped({"a.bin": data * 3}))
    broken[150_000] ^= 0xFF
    ((_, source),) = contents(bytes(broken)).members
    first = source.read(0, 1000)
    assert first == data[:1000]
    try:
        whole = source.read(0, source.size)
    except MalformedError:
        assert source.read(0, 1000) == first, "an error does not shift what is read next"
    else:
        assert len(whole) == 300_000 and zlib.crc32(whole) != zlib.crc32(data * 3)
