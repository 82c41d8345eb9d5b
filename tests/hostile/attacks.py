"""The second hostile corpus: attacks on our own reader, each at a place where two readers disagree or one of them stops looking."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator

from .asm import (
    CLEAN,
    CODE,
    MALFORMED,
    Case,
    by,
    call,
    g,
    i,
    mapping,
    npy,
    prog,
    s,
    sft,
    sg,
    shell,
    tarred,
    tensor,
    torch_zip,
    tup,
    zipped,
)

LOCAL, CENTRAL, END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"


def attacks(canary: str) -> list[Case]:
    """Every case of this file."""
    makers = (_names, _directories, _streams, _machine, _states, _tars, _packings, _arrays, _keras, _polyglots, _safetensors, _gguf)
    return [case for maker in makers for case in maker(canary)]


def _evil(canary: str) -> bytes:
    return prog(call(g("os", "system"), shell(canary)))


def _written(members: list[tuple[zipfile.ZipInfo, bytes]], method: int = zipfile.ZIP_STORED, comment: bytes = b"") -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        archive.comment = comment
        for info, data in members:
            archive.writestr(info, data, method)
    return stream.getvalue()


def _at(data: bytes, where: int, raw: bytes) -> bytes:
    return data[:where] + raw + data[where + len(raw) :]


def _nth(data: bytes, mark: bytes, count: int) -> int:
    at = -1
    for _ in range(count):
        at = data.index(mark, at + 1)
    return at


def _names(canary: str) -> Iterator[Case]:
    """Members that are one to some reader and two to another."""
    good, evil = prog(mapping(w=tensor())), _evil(canary)
    other = zipfile.ZipInfo("archive/notes.txt")
    path = b"archive/data.pkl"
    other.extra = struct.pack("<HHBL", 0x7075, 5 + len(path), 1, zlib.crc32(b"archive/notes.txt")) + path
    main = zipfile.ZipInfo("archive/data.pkl")
    yield Case("unicode-path.pt", "another name in an extra field", _written([(main, good), (other, b"hello")]), MALFORMED)
    yield Case("evil-unicode-path.pt", "another name in an extra field", _written([(main, good), (other, evil)]), CODE)
    whole = _written([(main, good), (other, b"hello")])
    yield Case("unicode-path-local.pt", "another name in an extra field", _at(whole, whole.rindex(b"\x75\x70"), b"\x99\x99"), MALFORMED)
    for name, twin in (("backslash", "archive\\data.pkl"), ("case", "archive/DATA.PKL"), ("root-case", "Archive/data.pkl")):
        yield Case(f"twin-{name}.pt", "names that are one to some reader", torch_zip(good, {twin: prog(b"N")}), MALFORMED)
        yield Case(f"evil-twin-{name}.pt", "names that are one to some reader", torch_zip(good, {twin: evil}), CODE)
    nul = torch_zip(good, {"archive/data.pkl_x": prog(b"N")}).replace(b"archive/data.pkl_x", b"archive/data.pkl\0x")
    yield Case("twin-nul.pt", "names that are one to some reader", nul, MALFORMED)
    escapes = "archive/\x1b]0;owned\x07\x1b[2J\r\u202e.txt"
    yield Case("escapes-in-member-name.pt", "terminal escapes", torch_zip(good, {escapes: evil}), CODE)
    yield Case(
        "escapes-in-global.pkl", "terminal escapes", prog(call(sg("os\x1b[2J\x9b1m", "system\u202e\nclean data"), s("x")), proto=4), CODE
    )
    yield Case(
        "escapes-in-key.bin",
        "terminal escapes",
        torch_zip(prog(mapping(**{"\x1b[2J\x07\nok: clean data": tensor((9, 9), (9, 1))}))),
        MALFORMED,
    )


def _directories(canary: str) -> Iterator[Case]:
    """Two directories, two ends, 64-bit fields that lie."""
    good, evil = torch_zip(prog(mapping(w=tensor()))), torch_zip(prog(mapping(w=call(g("os", "system"), shell(canary)))))
    yield Case("evil-in-comment.zip", "an archive in the comment", _written([(zipfile.ZipInfo("a.txt"), b"x")], comment=evil), CODE)
    yield Case(
        "evil-with-good-comment.pt", "an archive in the comment", _at(evil, len(evil) - 2, struct.pack("<H", len(good))) + good, CODE
    )
    yield Case("end-behind-the-end.pt", "two end records", good + END + bytes(10), MALFORMED)
    end = good.rindex(END)
    count, size, offset = struct.unpack_from("<HLL", good, end + 10)
    wide = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, offset)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, end, 1)
    yield Case("zip64-honest.pt", "zip64 by hand", good[:end] + wide + locator + good[end:], CLEAN)
    lying = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count - 1, count - 1, size, offset)
    yield Case("zip64-count-lies.pt", "zip64 record lies", good[:end] + lying + locator + good[end:], MALFORMED)
    wild = struct.pack("<4sLQL", b"PK\x06\x07", 0, 1 << 60, 1)
    yield Case("zip64-locator-wild.pt", "zip64 record lies", good[:end] + wild + good[end:], MALFORMED)
    first = good.index(CENTRAL)
    yield Case("zip64-fields-missing.pt", "zip64 record lies", _at(good, first + 20, b"\xff" * 8), MALFORMED)
    huge = struct.pack("<HHQQ", 1, 16, 1 << 62, 1 << 62)
    info = zipfile.ZipInfo("archive/data.pkl")
    info.extra = huge
    raw = _written([(info, prog(b"N"))])
    yield Case("zip64-size-huge.pt", "zip64 record lies", _at(raw, raw.index(CENTRAL) + 20, b"\xff" * 8), MALFORMED)
    packed = torch_zip(prog(call(g("os", "system"), shell(canary))), method=zipfile.ZIP_DEFLATED)
    flagged = _at(_at(packed, 6, b"\x01\x00"), packed.index(CENTRAL) + 8, b"\x01\x00")
    yield Case("evil-deflated-encrypted-flag.pt", "encryption flag", flagged, CODE)
    yield Case("evil-deflated-no-directory.pt", "broken directory", packed[: packed.index(CENTRAL)], CODE)
    yield Case("newer-version.pt", "odd flags", _at(good, first + 6, b"\xff\x00"), MALFORMED)
    yield Case("patched-data-flag.pt", "odd flags", _at(good, first + 8, b"\x20\x00"), MALFORMED)


def _streams(canary: str) -> Iterator[Case]:
    """Data descriptors and deflate streams that say something else than the directory."""
    body = prog(mapping(w=tensor()))
    stream = io.BytesIO()

    class Forward(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def write(self, data) -> int:
            return stream.write(data)

    with zipfile.ZipFile(Forward(), "w") as archive:
        for name, data in (("archive/data.pkl", body), ("archive/data/0", bytes(16)), ("archive/version", b"3\n")):
            archive.writestr(zipfile.ZipInfo(name), data)
    streamed = stream.getvalue()
    yield Case("descriptors.pt", "sizes behind the data", streamed, CLEAN)
    at = streamed.index(b"PK\x07\x08")
    yield Case("descriptor-crc-lies.pt", "data descriptor lies", _at(streamed, at + 4, b"\1\2\3\4"), MALFORMED)
    yield Case("descriptor-size-lies.pt", "data descriptor lies", _at(streamed, at + 8, b"\1\0\0\0"), MALFORMED)
    engine = zlib.compressobj(9, zlib.DEFLATED, -15)
    longer = engine.compress(body + _evil(canary)) + engine.flush()
    whole = zipped({"archive/data.pkl": longer, "archive/data/0": bytes(16)})
    facts = struct.pack("<HHHLLL", 8, 0, 0x21, zlib.crc32(body), len(longer), len(body))
    both = _at(_at(whole, 8, facts), whole.index(CENTRAL) + 10, facts)
    yield Case("deflate-goes-on.pt", "more data than declared", both, MALFORMED)


def _machine(canary: str) -> Iterator[Case]:
    """Programs that our machine might stop reading before Python does."""
    sh = shell(canary)
    evil = call(g("os", "system"), sh)
    text = b"X" + struct.pack("<I", 3 << 20) + b"a" * (3 << 20)
    yield Case("long-text-first.bin", "a long text before the call", text + b"0" + evil + b".", CODE)
    yield Case("long-line-first.bin", "a long text before the call", b"V" + b"a" * (2 << 20) + b"\n0" + evil + b".", CODE)
    yield Case("hex-int-first.pkl", "number forms", prog(b"I0x10\n0", evil), CODE)
    yield Case("hex-long-first.pkl", "number forms", prog(b"L0b101L\n0", evil), CODE)
    yield Case("underscore-int.pkl", "number forms", prog(b"I1_000\n0", evil), CODE)
    yield Case("ten-thousand-pickles.pkl", "many pickles", b"\x80\x02N." * 10_001 + prog(evil), MALFORMED)
    yield Case(
        "memo-replaced.pkl",
        "memo",
        prog(g("collections", "OrderedDict"), b"q\x000", g("os", "system"), b"q\x000h\x00", tup(sh), b"R"),
        CODE,
    )
    yield Case("memo-by-text.pkl", "memo", prog(g("os", "system"), b"p7\n0g7\n", tup(sh), b"R"), CODE)
    yield Case("memo-gap.pkl", "memo", prog(g("os", "system"), b"r\xff\xff\xff\xff0j\xff\xff\xff\xff", tup(sh), b"R"), CODE)
    yield Case("buffer-then-call.pkl", "out-of-band buffers", b"\x80\x05\x970" + evil + b".", CODE)
    yield Case("buffer-readonly.pkl", "out-of-band buffers", b"\x80\x05}" + s("a") + b"\x97\x98s.", MALFORMED)
    yield Case("persistent-call.pkl", "odd persistent id", prog(evil, b"Q"), CODE)
    yield Case("persistent-line.pkl", "odd persistent id", prog(b"Pwhatever\n0", evil), CODE)
    long_names = b"c" + b"a" * 3000 + b"\n" + b"b" * 3000 + b"\n"
    yield Case("two-long-names.pkl", "huge name", prog(long_names, evil), MALFORMED)
    yield Case("marks-and-pops.pkl", "stack tricks", prog(b"((((1", g("os", "system"), b"(" + sh + b"t1", sh, b"\x85R"), CODE)
    yield Case("dup-call.pkl", "stack tricks", prog(g("os", "system"), b"2", tup(sh), b"R"), CODE)
    yield Case("extension-then-build.pkl", "copyreg extension", prog(b"\x82\x01)R", mapping(a=i(1)), b"b"), CODE)
    yield Case(
        "colliding-keys.pkl",
        "keys that hash alike",
        prog(b"}(" + b"".join(i(n * ((1 << 61) - 1)) + b"N" for n in range(20_000)) + b"u"),
        CLEAN,
    )
    pairs = b"".join(tup(*[i(n)] * 8) + b"N" for n in range(5000))
    yield Case("tuple-keys.pkl", "keys that hash alike", prog(b"}(" + pairs + b"u"), CLEAN)
    yield Case("deep-key.pkl", "keys that hash alike", prog(b"}" + b"N" + b"\x85" * 20_000 + b"Ns"), MALFORMED)
    yield Case(
        "long-integer-key.pkl", "keys that hash alike", prog(b"}" + b"\x8b" + struct.pack("<i", 4000) + b"\x7f" * 4000 + b"Ns"), CLEAN
    )
    yield Case("inner-frames.pkl", "lying frame", b"\x80\x04" + b"\x95" + bytes(8) + b"\x95" + b"\xff" * 8 + evil + b".", CODE)


def _states(canary: str) -> Iterator[Case]:
    """Allowed functions and classes with arguments and states no data needs."""
    sh = shell(canary)
    ordered, system = g("collections", "OrderedDict"), g("os", "system")
    yield Case(
        "slots-on-known-class.pkl",
        "BUILD",
        prog(g("argparse", "Namespace") + b")\x81" + tup(b"N", mapping(__class__=ordered)) + b"b"),
        CODE,
    )
    yield Case("state-with-function.pkl", "BUILD", prog(g("argparse", "Namespace") + b")\x81" + mapping(a=system) + b"b"), CODE)
    yield Case("build-on-type.pkl", "BUILD", prog(g("argparse", "Namespace") + mapping(__init__=ordered) + b"b"), CODE)
    yield Case("counter-of-call.pkl", "trusted function, odd arguments", prog(call(g("collections", "Counter"), call(system, sh))), CODE)
    yield Case(
        "generator-ctor.pkl",
        "callable given to a trusted function",
        prog(call(g("numpy.random._pickle", "__generator_ctor"), sh, system)),
        CODE,
    )
    subtype = call(g("numpy.core.multiarray", "_reconstruct"), g("evil", "Array"), tup(i(0)), by(b"b"))
    yield Case("array-subtype.pkl", "callable given to a trusted function", prog(subtype), CODE)
    yield Case("dtype-of-code.pkl", "callable given to a trusted function", prog(call(g("numpy", "dtype"), g("os", "system"))), CODE)
    yield Case(
        "wrapper-subclass.pkl",
        "callable given to a trusted function",
        prog(call(g("torch._utils", "_rebuild_wrapper_subclass"), g("evil", "T"))),
        CODE,
    )
    yield Case(
        "parameter-of-call.pt",
        "trusted function, odd arguments",
        torch_zip(prog(mapping(w=call(g("torch._utils", "_rebuild_parameter"), call(system, sh), b"\x89", b"N")))),
        CODE,
    )
    yield Case("encode-odd-codec.pkl", "trusted function, odd arguments", prog(call(g("_codecs", "encode"), s("x"), s("../../x"))), CODE)
    yield Case("dotted-attribute.pkl", "STACK_GLOBAL", prog(call(sg("collections", "OrderedDict.fromkeys"), s("ab")), proto=4), CODE)
    yield Case(
        "dunder-walk.pkl", "STACK_GLOBAL", prog(call(sg("collections", "OrderedDict.__init__.__globals__.get"), s("x")), proto=4), CODE
    )
    yield Case("lookalike-module.pkl", "look-alike names", prog(call(sg("torch._utіls", "_rebuild_tensor_v2"), s("x")), proto=4), CODE)
    yield Case("spaced-module.pkl", "look-alike names", prog(call(g("collections ", "OrderedDict"))), CODE)
    yield Case("empty-name.pkl", "look-alike names", prog(call(sg("", ""), s("x")), proto=4), CODE)


def _member(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, size: int | None = None, **fields: bytes) -> bytes:
    """One tar header with its data, every field ours to choose."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(data) if size is None else size
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT)[-512:])
    for field, raw in fields.items():
        at = {"mtime": 136, "mode": 100, "link": 157}[field]
        header[at : at + len(raw)] = raw
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data + bytes(-len(data) % 512)


def _pax(**records: str) -> bytes:
    out = b""
    for key, value in records.items():
        line = f" {key}={value}\n".encode()
        size = len(line) + 1
        while len(str(size)) + len(line) != size:
            size = len(str(size)) + len(line)
        out += str(size).encode() + line
    return out


def _tars(canary: str) -> Iterator[Case]:
    """Headers that tar tools read differently."""
    evil, array, stop = _evil(canary), npy("'<f4'", "(1,)", bytes(4)), bytes(1024)
    plain = _member("a.npy", array)
    glob = _member("pax", _pax(path="b.npy"), b"g")
    yield Case("pax-global-path.tar", "tar records that disagree", glob + plain + stop, MALFORMED)
    yield Case("pax-global-size.tar", "tar records that disagree", _member("pax", _pax(size="3"), b"g") + plain + stop, MALFORMED)
    yield Case("pax-global-comment.tar", "tar odd but whole", _member("pax", _pax(comment="made by git"), b"g") + plain + stop, CLEAN)
    two = _member("././@LongLink", b"first.npy\0", b"L") + _member("././@LongLink", b"second.npy\0", b"L")
    yield Case("two-long-names.tar", "tar records that disagree", two + plain + stop, MALFORMED)
    mixed = _member("././@LongLink", b"first.npy\0", b"L") + _member("pax", _pax(path="second.npy"), b"x")
    yield Case("long-name-and-pax.tar", "tar records that disagree", mixed + plain + stop, MALFORMED)
    yield Case("long-name-bomb.tar", "tar name bomb", _member("././@LongLink", b"a" * (2 << 20), b"L") + plain + stop, MALFORMED)
    yield Case("long-name-claims.tar", "tar name bomb", _member("././@LongLink", b"a", b"L", size=8 << 30) + plain + stop, MALFORMED)
    yield Case("pax-length-lies.tar", "broken pax record", _member("pax", b"999999 path=x\n", b"x") + plain + stop, MALFORMED)
    yield Case("pax-size-huge.tar", "broken pax record", _member("pax", _pax(size="9" * 18), b"x") + plain + stop, MALFORMED)
    yield Case("sparse.tar", "sparse file in a tar", _member("model.bin", evil, b"S") + stop, MALFORMED)
    yield Case(
        "sparse-pax.tar",
        "sparse file in a tar",
        _member("pax", _pax(**{"GNU.sparse.major": "1"}), b"x") + _member("m.bin", evil) + stop,
        MALFORMED,
    )
    yield Case("unknown-type.tar", "tar member of a strange type", _member("model.bin", evil, b"Z") + stop, MALFORMED)
    yield Case("folder-with-bytes.tar", "tar member of a strange type", _member("models/", _member("m.bin", evil), b"5") + stop, MALFORMED)
    yield Case("file-named-as-folder.tar", "tar member of a strange type", _member("models/", evil) + stop, CODE)
    yield Case("time-no-number.tar", "tar records that disagree", plain + _member("b.npy", array, mtime=b"0000zzzz") + stop, MALFORMED)
    yield Case(
        "hardlink-out.tar",
        "names outside the archive",
        plain + _member("b", b"", tarfile.LNKTYPE, link=b"../../etc/passwd") + stop,
        MALFORMED,
    )
    yield Case("escapes-in-tar-name.tar", "terminal escapes", _member("../\x1b[2J\x9bm.bin", evil) + stop, CODE)


def _packings(canary: str) -> Iterator[Case]:
    """What joblib and others compress with."""
    evil = _evil(canary)
    yield Case("two-members.pkl.gz", "packed pickle", gzip.compress(prog(b"N"), mtime=0) + gzip.compress(evil, mtime=0), CODE)
    yield Case("split-over-members.pkl.gz", "packed pickle", gzip.compress(evil[:9], mtime=0) + gzip.compress(evil[9:], mtime=0), CODE)
    yield Case("gz-and-junk.pkl.gz", "two formats in one", gzip.compress(prog(b"N"), mtime=0) + evil, MALFORMED)
    yield Case("zlib.joblib", "packed joblib", zlib.compress(evil), CODE)
    yield Case("lzma.joblib", "packed joblib", lzma.compress(evil, lzma.FORMAT_ALONE), CODE)
    yield Case("zfile.joblib", "packed joblib", b"ZF" + hex(len(evil)).ljust(20).encode() + zlib.compress(evil), CODE)
    yield Case("zlib-cut.joblib", "truncated packing", zlib.compress(bytes(range(256)) * 500)[:-9], MALFORMED)
    bomb = zlib.compressobj(9, zlib.DEFLATED, 31)
    yield Case(
        "bomb-in-bomb.gz",
        "zip bomb",
        gzip.compress(gzip.compress(bomb.compress(bytes(40 << 20)) + bomb.flush(), mtime=0) * 40, mtime=0),
        MALFORMED,
    )


def _arrays(canary: str) -> Iterator[Case]:
    """Object arrays under headers numpy reads and a pattern does not."""
    evil = _evil(canary)

    def headed(text: str) -> bytes:
        raw = text.encode() + b" " * (-(10 + len(text) + 1) % 64) + b"\n"
        return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(raw)) + raw + evil

    yield Case("objects-double-quotes.npy", "npy object array", headed('{"descr": "|O", "fortran_order": False, "shape": (1,)}'), CODE)
    yield Case("objects-no-order.npy", "npy object array", headed("{'shape': (1,), 'descr': 'O', 'fortran_order': False}"), CODE)
    yield Case("objects-escaped.npy", "npy object array", headed("{'descr': '\\x7cO', 'fortran_order': False, 'shape': (1,)}"), CODE)
    yield Case("objects-in-record.npy", "npy object array", headed("{'descr': [('a', '|O')], 'fortran_order': False, 'shape': (1,)}"), CODE)
    yield Case("objects-behind-numbers.npy", "npy object array", npy("'<f4'", "(1,)", bytes(4)) + npy("'|O'", "(1,)", evil), CODE)
    yield Case("leading-zero.npy", "npy header", npy("'<f4'", "(01,)", bytes(4)), MALFORMED)
    yield Case("long-number.npy", "npy header", npy("'<f4'", "(" + "9" * 5000 + ",)", bytes(4)), MALFORMED)
    yield Case("long-header.npy", "npy header", b"\x93NUMPY\x02\x00" + struct.pack("<I", 1 << 31) + b"{" * 100, MALFORMED)
    wrapper = g("joblib.numpy_pickle", "NumpyArrayWrapper") + b")\x81"
    kind = call(g("numpy", "dtype"), s("f8"), b"\x89", b"\x88")
    state = mapping(subclass=g("numpy", "ndarray"), shape=tup(i(-1)), order=s("C"), dtype=kind, allow_mmap=b"\x88")
    yield Case("joblib-negative.joblib", "joblib", prog(wrapper + state + b"b"), MALFORMED)
    hidden = mapping(subclass=g("os", "system"), shape=tup(i(0)), order=s("C"), dtype=kind, allow_mmap=b"\x88")
    yield Case("joblib-subclass.joblib", "joblib", prog(wrapper + hidden + b"b"), CODE)


def _keras(canary: str) -> Iterator[Case]:
    """Code in configurations, written so that a search for the plain words misses it."""

    def model(layer: dict, escape: bool = False) -> bytes:
        text = json.dumps({"class_name": "Functional", "config": {"layers": [layer]}})
        return (text.replace("Lambda", "L\\u0061mbda") if escape else text).encode()

    layer = {"class_name": "Lambda", "config": {"function": "code"}}
    activation = {"class_name": "Dense", "config": {"activation": {"class_name": "__lambda__", "config": {"value": "4wE="}}}}
    foreign = {"module": "subprocess", "class_name": "run", "config": {"args": ["touch", canary]}}
    for name, config in (("escaped", model(layer, True)), ("activation", model(activation)), ("foreign-module", model(foreign))):
        yield Case(f"{name}.keras", "Keras code", zipped({"config.json": config, "metadata.json": b"{}"}), CODE)
    yield Case("below.keras", "Keras code", zipped({"model/config.json": model(layer), "model/metadata.json": b"{}"}), CODE)
    yield Case("escaped.h5", "Keras code", b"\x89HDF\r\n\x1a\n" + bytes(200) + model(layer, True), CODE)
    yield Case("far.h5", "Keras code", b"\x89HDF\r\n\x1a\n" + bytes((1 << 20) - 30) + model(layer), CODE)
    plain = {"module": "keras.layers", "class_name": "Dense", "config": {"units": 3, "name": "Lambda"}}
    yield Case("dense.keras", "Keras without code", zipped({"config.json": model(plain), "metadata.json": b"{}"}), CLEAN)


def _polyglots(canary: str) -> Iterator[Case]:
    """One file, two formats."""
    evil, array = torch_zip(_evil(canary)), npy("'<f4'", "(1,)", bytes(4))
    text = _evil_text(canary)
    header = b'{"a":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]}}' % (len(text), len(text))
    yield Case("safetensors-and-pickle.safetensors", "polyglot", sft(header.ljust(0x156), text), CODE)
    yield Case("tar-then-zip.tar", "polyglot", tarred({"a.npy": array}) + evil, CODE)
    small = zipped({"a/data.pkl": _evil(canary)})
    whole = bytearray(tarred({"a.npy": array[:-100]})[:1024])
    yield Case("zip-in-tar-padding.tar", "polyglot", bytes(whole[: 1024 - len(small)]) + small + bytes(1024), CODE)
    yield Case("zip-in-tar.tar", "archives", tarred({"a.npy": array, "m.pt": torch_zip(prog(mapping(w=tensor())))}), CLEAN)
    broken = _at(evil, evil.rindex(END) + 16, b"\x00\x00\x00\x70")
    yield Case("safetensors-and-broken-zip.safetensors", "polyglot", sft(b"{}") + broken, CODE)
    big = sft(b'{"a":{"dtype":"U8","shape":[2097152],"data_offsets":[0,2097152]}}', bytes((2 << 20) - len(evil)) + evil)
    yield Case("polyglot-in-zip.zip", "polyglot", zipped({"big.safetensors": big}), CODE)


def _evil_text(canary: str) -> bytes:
    return f"\n0cos\nsystem\n(S\"touch '{canary}'\"\ntR.".encode()


def _safetensors(canary: str) -> Iterator[Case]:
    one, four = b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}', bytes(4)
    files = {
        "escaped-twin": sft(b"{" + one + b"," + one.replace(b'"a"', b'"\\u0061"') + b"}", four),
        "entry-key-twice": sft(b'{"a":{"dtype":"F32","dtype":"U8","shape":[1],"data_offsets":[0,4]}}', four),
        "long-number": sft(b'{"a":{"dtype":"F32","shape":[' + b"9" * 6000 + b'],"data_offsets":[0,4]}}', four),
        "exponent": sft(b'{"a":{"dtype":"F32","shape":[1e0],"data_offsets":[0,4]}}', four),
        "truth": sft(b'{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}', four),
        "deep-metadata": sft(b'{"__metadata__":' + b"[" * 20_000 + b"]" * 20_000 + b"," + one + b"}", four),
        "three-offsets": sft(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4,4]}}', four),
        "bom": sft(b"{\xef\xbb\xbf" + one + b"}", four), "utf-16": sft(("{" + one.decode() + "}").encode("utf-16"), four),
        "control": sft(b'{"a\n":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', four), "trailing": sft(b"{" + one + b"}{}", four),
        "zero-times-huge": sft(b'{"a":{"dtype":"F32","shape":[0,18446744073709551616],"data_offsets":[0,0]}}', b""),
        "second-gap": sft(b"{" + one + b',"b":{"dtype":"U8","shape":[1],"data_offsets":[5,6]}}', bytes(6)),
        "bytes-behind": sft(b"{" + one + b"}", bytes(400)),
    }  # fmt: skip
    for name, data in files.items():
        yield Case(f"safetensors-attack-{name}.safetensors", "safetensors entry", data, MALFORMED)
    many = ",".join(f'"t{n}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for n in range(20_000))
    yield Case("safetensors-many-empty.safetensors", "many empty tensors", sft(("{" + many + "}").encode()), CLEAN)


def _gguf(canary: str) -> Iterator[Case]:
    def file(keys: bytes = b"", key_count: int = 0, infos: bytes = b"", count: int = 0, data: bytes = bytes(64)) -> bytes:
        head = b"GGUF" + struct.pack("<IQQ", 3, count, key_count) + keys + infos
        return head + bytes(-len(head) % 32) + data

    def text(raw: bytes) -> bytes:
        return struct.pack("<Q", len(raw)) + raw

    def info(name: bytes, dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
        return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)

    def alignment(value: int) -> bytes:
        return text(b"general.alignment") + struct.pack("<II", 4, value)

    files = {
        "dims-overflow": file(infos=info(b"t", (1 << 33, 1 << 33)), count=1), "dims-many": file(infos=text(b"t") + struct.pack("<I", 1 << 31), count=1),
        "offset-wild": file(infos=info(b"t", (1,), 0, 1 << 63), count=1),
        "name-twice": file(infos=info(b"t", (1,)) + info(b"t", (1,), 0, 32), count=2), "tensors-overlap": file(infos=info(b"t", (8,)) + info(b"u", (8,)), count=2),
        "alignment-zero": file(alignment(0), 1, info(b"t", (1,)), 1), "alignment-huge": file(alignment(1 << 31), 1, info(b"t", (1,)), 1),
        "key-type-unknown": file(text(b"k") + struct.pack("<I", 77), 1), "array-huge": file(text(b"k") + struct.pack("<IIQ", 9, 4, 1 << 61), 1),
        "array-of-text-huge": file(text(b"k") + struct.pack("<IIQ", 9, 8, 1 << 40), 1), "key-twice": file((text(b"k") + struct.pack("<II", 4, 1)) * 2, 2),
        "version-99": b"GGUF" + struct.pack("<IQQ", 99, 0, 0),
    }  # fmt: skip
    for name, data in files.items():
        yield Case(f"gguf-attack-{name}.gguf", "gguf attacks", data, MALFORMED)
    yield Case("gguf-newer-type.gguf", "forms refused clearly", file(infos=info(b"t", (1,), 999), count=1), CLEAN)
    yield Case(
        "ggla-wild.bin",
        "ggla attacks",
        b"algg" + struct.pack("<Iii", 1, -4, 1 << 30) + struct.pack("<iii", 2, 1 << 30, 0) + bytes(64),
        MALFORMED,
    )
