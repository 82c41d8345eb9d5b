"""Look into one file as every loader might: from its first byte and from its end, through archives, pickle by pickle. Nothing is run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from upparam.containers import archive, file_source, ggla, gguf, head_of, lookalikes, npy, pickles, safetensors, tars, torchfile, zips
from upparam.containers.base import Head, leaves
from upparam.containers.evidence import about_unread, about_uses
from upparam.containers.machine import Examination, Use, examine, new_budget
from upparam.containers.symbols import Broken, clean
from upparam.errors import LimitError, MalformedError, UnreadableError, UpparamError
from upparam.findings import Finding, error, info, warning
from upparam.limits import MAX_ARCHIVE_NESTING, MAX_PICKLE_BYTES
from upparam.operations.scan import lenient
from upparam.operations.scan.fast import safetensors_tensors
from upparam.operations.scan.verdict import FileScan
from upparam.sources import Source
from upparam.tensors import Tensor

_MAX_PICKLES = 10_000
"""Pickles one after another in a file that are looked at."""
_DISTRUSTED = {"zip-encrypted", "zip-method", "zip-header-mismatch", "zip-hidden-member", "zip-overlap", "zip-sizes", "zip-gap"}
"""Oddities of a zip that make another reader find other bytes: then pickles are looked for behind every local header too."""
_PROGRAM, _DATA = "program", "data"
_NAMED = {".safetensors": "safetensors", ".gguf": "GGUF", ".npy": "npy", ".npz": "npz"}


def scan_file(path: Path) -> FileScan:
    """The scan of one file. Never raises for what the file holds; a path that cannot be opened becomes an 'unreadable' finding."""
    report = FileScan(path)
    try:
        source = file_source(path)
        report.size = source.size
        _Look(report).at(source, path, ())
        source.close()
    except UnreadableError as problem:
        if isinstance(problem, MalformedError):
            report.findings.append(_broken(problem, path))
        else:
            report.unreadable = True
            report.findings.append(error("unreadable", path.name, problem.line()))
    except OSError as problem:
        report.unreadable = True
        report.findings.append(error("unreadable", path.name, problem.strerror or str(problem)))
    return report


def _broken(problem: UpparamError, path: Path) -> Finding:
    code = "limit" if isinstance(problem, LimitError) else "malformed"
    return error(code, path.name, problem.line())


class _Look:
    """The scan of one file in progress. Each `_xxx` method handles one format and says whether it was that."""

    def __init__(self, report: FileScan) -> None:
        self.report = report

    def at(self, source: Source, path: Path, wrapping: tuple[str, ...]) -> None:
        """Look at a source: the file itself, or a member of an archive."""
        head = head_of(source, path)
        try:
            known = self.formats(head, source, path, wrapping)
        except UpparamError as problem:
            self.broken(problem, path)
            known = _DATA
        if not known:
            self.unknown(head, source, path, wrapping)
        if known is not _PROGRAM:
            self.started(head, path)
        self.polyglot(head, source, path, wrapping)

    def formats(self, head: Head, source: Source, path: Path, wrapping: tuple[str, ...]) -> str:
        """Try every format by its first bytes: _PROGRAM for pickles read from the first byte on, _DATA for others, empty for none."""
        start = head.data[:8]
        if safetensors.sniff(head):
            self.named("safetensors")
            count = safetensors_tensors(source, path)
            if count is None:
                file = safetensors.read(source, path)
                for found in file.findings:
                    self.odd(found.code, path, found.message, *found.evidence)
                count = len(file.tensors)
            self.report.tensors += count
            return _DATA
        if start[:4] == b"PK\x03\x04" or start[:4] == b"PK\x05\x06":
            self.zip(source, path, wrapping)
            return _DATA
        if tars.sniff(head):
            self.tar(source, path, wrapping)
            if torchfile.legacy.marked(head) or pickles.sniff(head):
                self.odd("polyglot", path, "a tar archive that is a pickle too: loaders differ in which one they read")
                self.pickles(head, source, path)
            return _DATA
        if torchfile.legacy.sniff(head):
            self.named(torchfile.legacy.name)
            try:
                seen, findings = torchfile.legacy.take_apart(source, path)
            except UpparamError:
                self.pickles(head, source, path)
                raise
            self.report.findings += findings
            self.examined(seen, path)
            return _PROGRAM
        for container in (gguf, ggla):
            if container.sniff(head):
                self.named(container.name)
                file = container.read(source, path)
                self.report.findings += file.findings
                self.report.tensors += len(file.tensors)
                return _DATA
        if head.data.startswith(npy.MAGIC):
            self.named("npy")
            self.npy(source, path)
            return _DATA
        if archive.sniff(head):
            self.packed(source, path, wrapping)
            return _DATA
        if pickles.sniff(head) or (start[:1] == b"\x80" and len(start) > 1 and start[1] <= 5):
            return _PROGRAM if self.pickles(head, source, path, wrapping) else ""
        return ""

    def named(self, name: str) -> None:
        self.report.read = True
        if name not in self.report.formats:
            self.report.formats.append(name)

    def odd(self, code: str, path: Path, message: str, *evidence: str) -> None:
        self.report.findings.append(error(code, path.name, message, *evidence))

    def broken(self, problem: UpparamError, path: Path) -> None:
        code = "limit" if isinstance(problem, LimitError) else "malformed"
        self.report.findings.append(error(code, path.name, problem.line()))

    def uses(self, uses: Mapping[str, Use], path: Path, where: str = "") -> None:
        self.report.findings += about_uses(uses, path.name, where)
        self.report.uses += [use.facts() | ({"member": where} if where else {}) for use in uses.values()]

    def examined(self, seen: Examination, path: Path, where: str = "") -> None:
        """Add what a pickle's examination says; its tensors count when their bytes are there."""
        self.uses(seen.uses, path, where)
        if seen.problem is not None:
            self.broken(seen.problem, path)
            return
        try:
            self.report.tensors += sum(1 for _ in leaves(seen.value, Tensor))
            self.report.findings += about_unread(seen.value, path.name)
            for name, bad in leaves(seen.value, Broken):
                self.odd("malformed", path, bad.problem.line(), clean(name))
                break
        except LimitError as problem:
            self.broken(problem, path)

    def pickles(self, head: Head, source: Source, path: Path, wrapping: tuple[str, ...] = ()) -> bool:
        """Pickles one after another from the start. False when it is none after all (no mark, nothing named, broken at once)."""
        size = min(source.size, MAX_PICKLE_BYTES)
        data = source.read(0, size)
        budget = new_budget(source.size)
        at = count = 0
        while at < size:
            if count >= _MAX_PICKLES:
                self.odd("limit", path, "more pickles in a row than in any real file", f"byte {at}")
                break
            outside = lenient.Outside()
            seen = examine(data, source=source, start=at, budget=budget, persistent=outside)
            if seen.problem is not None and count and not seen.code and not isinstance(seen.problem, LimitError):
                self.report.findings.append(
                    warning("trailing-bytes", path.name, f"{size - at} bytes follow the pickle", f"it ends at byte {at}")
                )
                break
            if seen.problem is not None and not count and not seen.uses and not (head.data[0] == 0x80 and seen.stop > 8):
                return False
            self.named(pickles.name)
            self.examined(seen, path)
            count += 1
            if outside.asked and not wrapping:
                self.odd("malformed", path, "the pickle refers to data stored outside, where there is none", f"{outside.asked} references")
            if seen.problem is not None:
                break
            at = seen.stop
            if not data[at : at + 4096].strip(b"\0\r\n "):
                break
        if source.size > size:
            self.odd("limit", path, "a pickle longer than any real one", f"{source.size} bytes")
        return True

    def npy(self, source: Source, path: Path) -> None:
        """An array; one of objects carries a pickle behind its header."""
        try:
            self.report.tensors += len(npy.single.read(source, path).tensors)
        except MalformedError as problem:
            found = lenient.program_in_npy(source, path)
            if found is None:
                raise
            start, seen = found
            self.uses(seen.uses, path, "object array")
            self.report.findings.append(
                warning("npy-objects", path.name, "an array of Python objects: it is stored as a pickle and never read", f"byte {start}")
            )
            if seen.problem is not None:
                self.broken(problem, path)

    def packed(self, source: Source, path: Path, wrapping: tuple[str, ...]) -> None:
        """gz, bz2, xz, zlib, lzma."""
        if len(wrapping) >= MAX_ARCHIVE_NESTING:
            raise LimitError("archives nested deeper than any real download", file=path, expected=f"<= {MAX_ARCHIVE_NESTING}")
        contents = archive.contents(source, path)
        self.named(contents.kind)
        self.report.findings += contents.findings
        for name, member in contents.members:
            self.at(member, path / name, (*wrapping, contents.kind))

    def tar(self, source: Source, path: Path, wrapping: tuple[str, ...]) -> None:
        """A torch tar file, or any other: every member is looked at."""
        head = head_of(source, path)
        if torchfile.tarred.sniff(head):
            self.named(torchfile.tarred.name)
            try:
                seen, findings = torchfile.tarred.take_apart(source, path)
            except UpparamError:
                self.members([(member.name, member.source) for member in tars.read_archive(source, path).members], path, wrapping, "tar")
                raise
            self.report.findings += findings
            self.examined(seen, path, "pickle")
            return
        self.named("tar")
        contents = tars.read_archive(source, path)
        self.report.findings += [_graver(finding, source.size) for finding in contents.findings]
        self.members([(member.name, member.source) for member in contents.members], path, wrapping, "tar")

    def members(self, members: list[tuple[str, Source]], path: Path, wrapping: tuple[str, ...], kind: str) -> None:
        """Look into members. Ones upparam does not know say nothing about the archive."""
        if len(wrapping) >= MAX_ARCHIVE_NESTING:
            raise LimitError("archives nested deeper than any real download", file=path, expected=f"<= {MAX_ARCHIVE_NESTING}")
        for name, member in members:
            self.at(member, path / clean(name, 200), (*wrapping, kind))

    def zip(self, source: Source, path: Path, wrapping: tuple[str, ...]) -> None:
        """A torch zip file, npz, Keras or plain zip: the main pickle first, then every other member that is no storage."""
        try:
            contents = zips.read_archive(source, path)
        except UpparamError as problem:
            self.broken(problem, path)
            self.headers(source, path)
            return
        names = [member.name for member in contents.members]
        root = torchfile.zipped.root_of(contents)
        if root is not None:
            self.named(torchfile.zipped.name)
            try:
                opened = torchfile.zipped.take_apart(source, path, contents)
                self.report.findings += opened.findings
                self.examined(opened.seen, path, opened.root + torchfile.zipped.MAIN)
                if not opened.records[opened.root + torchfile.zipped.MAIN].check_crc():
                    self.odd("zip-crc", path, "the main pickle's checksum is wrong", opened.root + torchfile.zipped.MAIN)
            except UpparamError as problem:
                self.broken(problem, path)
                self.report.findings += contents.findings
                self.headers(source, path)
        else:
            self.named("npz" if names and all(name.endswith(".npy") for name in names) else "zip")
            self.report.findings += contents.findings
        if any(finding.code in _DISTRUSTED for finding in contents.findings):
            self.headers(source, path)
        self.keras(contents, path)
        storage = (
            re.compile(re.escape(root) + r"(data/\d+|byteorder|version|\.data/serialization_id|\.format_version|\.storage_alignment)")
            if root
            else None
        )
        for member in contents.members:
            if storage is not None and (storage.fullmatch(member.name) or member.name == f"{root}{torchfile.zipped.MAIN}"):
                continue
            self.member(member, path, wrapping)

    def member(self, member: zips.ZipMember, path: Path, wrapping: tuple[str, ...]) -> None:
        """One member of a zip; its CRC is checked where it is small or holds a program."""
        place = path / clean(member.name, 200)
        try:
            source = member.source
            if len(wrapping) >= MAX_ARCHIVE_NESTING:
                raise LimitError("archives nested deeper than any real download", file=place, expected=f"<= {MAX_ARCHIVE_NESTING}")
            if member.size <= 1 << 20 and not member.check_crc():
                self.odd("zip-crc", path, "a member's checksum is wrong", clean(member.name))
            self.at(source, place, (*wrapping, "zip"))
        except UpparamError as problem:
            self.broken(problem, place)

    def headers(self, source: Source, path: Path) -> None:
        """The pickles of a zip whose directory cannot be trusted: lenient loaders may still run them."""
        for member, seen in lenient.programs_by_headers(source, path):
            self.named("zip")
            self.uses(seen.uses, path, clean(member))

    def keras(self, contents: zips.ZipArchive, path: Path) -> None:
        """A Keras archive's Lambda layer holds marshalled Python code; a class of a foreign module is imported."""
        for member in contents.members:
            if member.name.split("/")[-1] == "config.json" and member.size <= 64 << 20:
                try:
                    found = lenient.keras_code(member.source.read(0, member.size))
                except UpparamError:
                    continue
                if found is not None:
                    self.odd(
                        "keras-code", path, f"a Keras model that builds {clean(found, 80)}: code of the file's choice", clean(member.name)
                    )

    def unknown(self, head: Head, source: Source, path: Path, wrapping: tuple[str, ...]) -> None:
        """No format upparam reads: say what it is, and still look for a pickle's calls and Keras code in HDF5."""
        if head.data[:4] == b"\x89HDF" and lenient.keras_code_in_hdf5(source):
            self.odd("keras-code", path, "a Keras model with a Lambda layer, which is stored as Python code", "HDF5 attribute model_config")
        if wrapping or self.report.formats:
            return
        look = lookalikes.recognise(head)
        self.report.formats.append(look.kind)
        claimed = _NAMED.get(path.suffix.lower())
        if look.kind.startswith(("truncated", "broken")):
            self.odd("malformed", path, look.message, *look.evidence)
        elif claimed and look.kind == "unknown":
            self.odd("malformed", path, f"named as {claimed}, which it is not", *look.evidence)
        else:
            self.report.findings.append(info("kind", path.name, look.message, *look.evidence))

    def started(self, head: Head, path: Path) -> None:
        """A pickle without its mark, or in a file of another format, that calls something before it breaks."""
        seen = lenient.program_at_start(head, path.name, self.report.read)
        if seen is not None:
            if self.report.read:
                self.odd("polyglot", path, "its first bytes are a pickle too: loaders differ in what they read")
            self.named(pickles.name)
            self.uses(lenient.called(seen.uses), path)
            if seen.problem is not None:
                self.broken(seen.problem, path)

    def polyglot(self, head: Head, source: Source, path: Path, wrapping: tuple[str, ...]) -> None:
        """A zip archive at the end of something that is none: zip readers and the loader of the first bytes see different files."""
        if head.data[:4] in (b"PK\x03\x04", b"PK\x05\x06") or source.size < 22 or (archive.sniff(head) and not tars.sniff(head)):
            return
        contents = lenient.zip_at_end(head, source, path)
        if contents is None:
            return
        self.odd(
            "polyglot",
            path,
            "a zip archive hides at its end: loaders differ in what they read",
            ", ".join(clean(member.name, 60) for member in contents.members[:4]) or "its directory is broken",
        )
        self.zip(source, path, (*wrapping, "zip"))


def _graver(finding: Finding, size: int) -> Finding:
    """A tar's oddities as scan sees them: links that lead out of the archive, devices, and an end within a block are errors."""
    target = finding.evidence[0].partition(" -> ")[2] if finding.evidence else ""
    leads_out = finding.code == "tar-special-member" and (
        tars.unsafe(target) or any(word in finding.message for word in ("device", "FIFO"))
    )
    if leads_out or (finding.code == "tar-no-end" and size % tars.BLOCK):
        return error(finding.code, finding.subject, finding.message, *finding.evidence)
    return finding
