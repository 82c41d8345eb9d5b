"""Odd files that honest programs write. Scan must call every one clean data (or unknown, for what upparam does not open)."""

from __future__ import annotations

import argparse
import collections
import datetime
import io
import pathlib
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Iterator

import numpy as np
import torch

from .asm import CLEAN, UNKNOWN, Case, g, i, legacy, legacy_storage, mapping, npy, prog, s, sft, tarred, tensor, torch_zip, tup, zipped


def benign() -> list[Case]:
    """Every benign file."""
    return [*_torch(), *_pickles(), *_others()]


def _saved(value, **more) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, **more)
    return stream.getvalue()


def _torch() -> Iterator[Case]:
    base = torch.arange(80.0).reshape(8, 10)
    for protocol in (2, 3, 4, 5):
        yield Case(f"protocol-{protocol}.pt", "protocols", _saved({"w": base}, pickle_protocol=protocol), CLEAN)
        yield Case(
            f"legacy-protocol-{protocol}.pt",
            "protocols",
            _saved({"w": base}, pickle_protocol=protocol, _use_new_zipfile_serialization=False),
            CLEAN,
        )
    views = {
        "transposed": base.T,
        "expanded": base[:1].expand(6, -1),
        "overlapping": base.reshape(-1).unfold(0, 5, 2),
        "empty": base[:0],
        "scalar": torch.tensor(1.0),
        "slice": base[2:4, 3:],
    }
    for name, view in views.items():
        yield Case(f"view-{name}.pt", "strides inside bounds", _saved({"base": base, "view": view}), CLEAN)
        yield Case(
            f"legacy-view-{name}.pt",
            "strides inside bounds",
            _saved({"base": base, "view": view}, _use_new_zipfile_serialization=False),
            CLEAN,
        )
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    state = np.random.default_rng(1)
    values = {
        "tied.bin": {"a": base, "b": base, "c": base[1]}, "parameter.bin": {"p": model.weight}, "ordered.bin": model.state_dict(), "optimizer.pt": optimizer.state_dict(),
        "scheduler.pt": scheduler.state_dict(), "rng_state.pth": {"python": __import__("random").getstate(), "numpy": np.random.get_state(), "cpu": torch.random.get_rng_state()},
        "bf16.bin": {"w": base.to(torch.bfloat16)}, "fp8.bin": {"w": base.to(torch.float8_e4m3fn)}, "bool.bin": {"w": base > 3}, "complex.bin": {"w": base.to(torch.complex64)},
        "unicode.bin": {"ключ": base, "键": base, "\U0001f600": base}, "numpy-inside.bin": {"a": np.arange(6).reshape(2, 3), "f": np.asfortranarray(np.ones((2, 3))), "s": np.float32(1.5), "i": np.int64(3)},
        "namespace.ckpt": {"args": argparse.Namespace(lr=1, path=pathlib.PurePosixPath("a/b"), when=datetime.datetime(2024, 1, 2)), "w": base},
        "collections.bin": {"d": collections.defaultdict(list, {"a": [1]}), "c": collections.Counter("aab"), "q": collections.deque([1, 2]), "s": {1, 2}, "f": frozenset("x")},
        "attributes.bin": {"size": torch.Size([1, 2]), "dtype": torch.float16, "device": torch.device("cpu"), "none": None, "raw": b"\x80\x02cos\nsystem\n"},
        "list.bin": [base, [base, (base,)]], "lone.bin": base, "nothing.bin": {}, "buffer.bin": {"b": torch.nn.Buffer(base)}, "numbers.bin": {"n": [1e300, -0.0, float("nan"), 2**70, -(2**70)]},
        "textual-inversion.pt": {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": {"*": base}, "name": "x", "step": 1}, "generator.bin": {"state": state.bit_generator.state},
    }  # fmt: skip
    for name, value in values.items():
        yield Case(name, "training leftovers and odd values", _saved(value), CLEAN)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield Case("sparse.bin", "forms refused clearly", _saved({"ok": base, "s": torch.eye(3).to_sparse()}), CLEAN)
        yield Case(
            "quantised.bin", "forms refused clearly", _saved({"ok": base, "q": torch.quantize_per_tensor(base, 0.1, 0, torch.qint8)}), CLEAN
        )
        yield Case("meta.bin", "forms refused clearly", _saved({"ok": base, "m": torch.empty(2, device="meta")}), CLEAN)
    yield Case("deflated.pt", "packed by hand", torch_zip(prog(mapping(w=tensor())), method=zipfile.ZIP_DEFLATED), CLEAN)
    yield Case(
        "no-byteorder.pt",
        "old zip layout",
        zipped({"archive/data.pkl": prog(mapping(w=tensor())), "archive/data/0": bytes(16), "archive/version": b"3\n"}),
        CLEAN,
    )
    yield Case("other-root.pt", "old zip layout", torch_zip(prog(mapping(w=tensor())), root="my model (1)"), CLEAN)
    yield Case("legacy-by-hand.pt", "old layouts", legacy(prog(mapping(w=tensor(store=legacy_storage())))), CLEAN)
    entry = prog(tup(i(1), s("cpu"), g("torch", "FloatStorage")))
    members = {
        "sys_info": prog(mapping(protocol_version=i(1000))), "pickle": prog(mapping(w=b"P5\n")),
        "tensors": prog(b"K\x01") + prog(tup(i(5), i(1), g("torch", "FloatTensor"))) + struct.pack("<iiqqqqq", 2, 0, 2, 2, 2, 1, 0),
        "storages": prog(b"K\x01") + entry + struct.pack("<q4f", 4, 1, 2, 3, 4) + prog(b"]"),
    }  # fmt: skip
    yield Case("tar-era.pt", "old layouts", tarred(members), CLEAN)


def _pickles() -> Iterator[Case]:
    value = {"a": np.arange(6, dtype=np.float32), "b": [1, "x", None, True, 2.5, b"\xff" * 300], "c": (1, 2)}
    for protocol in range(6):
        yield Case(f"bare-{protocol}.pkl", "protocols", pickle.dumps(value, protocol), CLEAN)
    yield Case("python2.pkl", "Python 2", b"(dp0\nS'a'\np1\nI1\nsS'b'\np2\nS'caf\\xc3\\xa9'\np3\ns.", CLEAN)
    shared = [1]
    yield Case("shared.pkl", "shared parts and cycles", pickle.dumps([shared] * 50), CLEAN)
    shared.append(shared)
    yield Case("cycle.pkl", "shared parts and cycles", pickle.dumps(shared), CLEAN)
    yield Case("two.pkl", "several pickles", pickle.dumps(1) + pickle.dumps({"a": 2}), CLEAN)
    yield Case(
        "strings-that-look-bad.pkl",
        "words of code as data",
        pickle.dumps({"os.system": "rm -rf /", "eval": "exec(open('x'))", "cos\nsystem": b"cos\nsystem\n(S'x'\ntR."}),
        CLEAN,
    )
    yield Case(
        "dates.pkl",
        "plain classes",
        pickle.dumps({"d": datetime.date(2024, 1, 1), "p": pathlib.PurePosixPath("a"), "s": slice(1, 2), "r": range(3), "z": 1 + 2j}),
        CLEAN,
    )


def _others() -> Iterator[Case]:
    yield Case("big-endian.npy", "npy", npy("'>f4'", "(2,)", struct.pack(">2f", 1, 2)), CLEAN)
    yield Case("fortran.npy", "npy", npy("'<f4'", "(2, 2)", bytes(16), "True"), CLEAN)
    yield Case("zero-d.npy", "npy", npy("'<f8'", "()", bytes(8)), CLEAN)
    yield Case("empty.npy", "npy", npy("'<f4'", "(0, 3)", b""), CLEAN)
    stream = io.BytesIO()
    np.savez_compressed(stream, a=np.ones(3), b=np.zeros((2, 2), np.float16))
    yield Case("packed.npz", "npz", stream.getvalue(), CLEAN)
    one = b'{"__metadata__":{"format":"pt","a":"\\u00fc \\"q\\""},"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},"b":{"dtype":"BF16","shape":[0,4],"data_offsets":[4,4]}}'
    yield Case("metadata.safetensors", "safetensors", sft(one, bytes(4)), CLEAN)
    yield Case("padded.safetensors", "safetensors", sft(b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}   ', bytes(2)), CLEAN)
    yield Case("empty.safetensors", "safetensors", sft(b"{}"), CLEAN)
    yield Case(
        "unsorted.safetensors",
        "safetensors",
        sft(b'{"b":{"dtype":"U8","shape":[2],"data_offsets":[2,4]},"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}', bytes(4)),
        CLEAN,
    )
    yield Case(
        "names.safetensors", "safetensors", sft('{"ä\\n":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'.encode(), bytes(1)), CLEAN
    )
    yield Case("folder.tar", "archives", tarred({"a.npy": npy("'<f4'", "(1,)", bytes(4)), "notes.txt": b"hello"}), CLEAN)
    link = tarfile.TarInfo("latest.npy")
    link.type, link.linkname = tarfile.SYMTYPE, "a.npy"
    yield Case("linked.tar", "archives", tarred({"a.npy": npy("'<f4'", "(1,)", bytes(4)), "latest.npy": link}), CLEAN)
    yield Case("readme.md", "text", b"import os\nos.system('x')\n", UNKNOWN)
    yield Case("class.txt", "text", b"class system:\n    os\n\n# cos\n", UNKNOWN)
    yield Case("could.txt", "text", b"could\nbe\n(anything)R.", UNKNOWN)
    yield Case("config.json", "text", b'{"class_name": "Lambda"}', UNKNOWN)
    yield Case("noise.bin", "noise", np.random.default_rng(5).normal(size=5000).astype(np.float32).tobytes(), UNKNOWN)
    yield Case("empty.bin", "nothing", b"", UNKNOWN)
