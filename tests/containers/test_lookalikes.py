"""Look-alikes: each is named, never taken for tensors; and tensors are never taken for a look-alike."""

from __future__ import annotations

import io
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from upparam.containers import head_of, open_all, open_file, sniffed
from upparam.containers.lookalikes import LookAlike, recognise
from upparam.errors import MalformedError, UnreadableError
from upparam.sources import MemorySource

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4a" * 32 + b"\nsize 167832240\n"


def random_bytes(size: int) -> bytes:
    return np.random.default_rng(size).bytes(size)


def look(data: bytes, name: str = "up-param.bin") -> LookAlike:
    return recognise(head_of(MemorySource(data, name), Path(name)))


def tarred(*names: str) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as out:
        for name in names:
            entry = tarfile.TarInfo(name)
            entry.size = 4
            out.addfile(entry, io.BytesIO(b"data"))
    return stream.getvalue()


def zipped(*names: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as out:
        for name in names:
            out.writestr(name, b"data")
    return stream.getvalue()


def picture(kind: str) -> bytes:
    image = pytest.importorskip("PIL.Image")
    stream = io.BytesIO()
    image.new("RGB", (4, 4)).save(stream, kind)
    return stream.getvalue()


HEADER = b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'
CASES: dict[str, tuple[bytes, str, str]] = {
    "empty": (b"", "empty", "fetch it again"),
    "zeros": (bytes(300_000), "zeros", "fetch it again"),
    "zeros at the start": (bytes(100_000) + b"x" * 200_000, "zeros-at-start", "starts with nothing"),
    "lfs": (LFS, "git-lfs-pointer", "git lfs pull"),
    "html": (b"\n\n<!DOCTYPE html>\n<html><head><title>Sign  in\n- Hub</title></head><body>x</body></html>", "html", "titled 'Sign in - Hub'"),
    "html without a doctype": (b"<html lang='en'><body>404</body></html>", "html", "web page"),
    "html late": (b"<!-- saved -->\n<div><head></head><body></body></div>", "html", "web page"),
    "xml": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "xml", "AccessDenied"),
    "json error": (b'{"error": "Repository not found"}', "json-error", "download it again"),
    "json config": (b'{"r": 8, "lora_alpha": 16, "peft_type": "LORA"}', "json", "PEFT adapter config"),
    "json index": (b'{"metadata": {}, "weight_map": {"a": "b"}}', "json", "sharded"),
    "json list": (b"[1, 2, 3]", "json", "JSON text"),
    "long json": (b'{"a": [' + b"1, " * 40_000 + b"1]}", "json", "JSON text"),
    "broken json": (b'{"a": ', "text", "plain text"),
    "deep json": (b"[" * 50_000, "text", "plain text"),
    "error text": (b"Entry not found", "error-text", "error message"),
    "text": ("Grüße, Welt\n".encode() * 9000, "text", "plain text"),
    "utf-16 text": ("Grüße".encode("utf-16"), "text", "plain text"),
    "header cut": (len(HEADER).to_bytes(8, "little") + HEADER[:30], "truncated-safetensors", "inside its header"),
    "data cut": (len(HEADER).to_bytes(8, "little") + HEADER + bytes(15), "truncated-safetensors", "before its data"),
    "firmware": (tarred("logo.jpg", "letter.jpg", "svb_orange.jpg", "lcd_density.txt"), "firmware", "Samsung"),
    "holiday pictures": (tarred("dsc1.jpg", "dsc2.jpg"), "archive", "no tensor file"),
    "tar of text": (tarred("a.txt"), "archive", "no tensor file"),
    "nemo": (tarred("./model_config.yaml", "./model_weights.ckpt"), "nemo", "NeMo"),
    "keras": (zipped("metadata.json", "config.json", "model.weights.h5"), "keras", "Keras"),
    "jar": (zipped("META-INF/MANIFEST.MF", "a.class"), "jar", "Java"),
    "office": (zipped("[Content_Types].xml", "word/document.xml"), "office", "Office"),
    "zip": (zipped("a.txt"), "archive", "no tensor file"),
    "empty zip": (zipped(), "empty-archive", "empty zip"),
    "zip cut short": (zipped("a.txt" * 30, "b.txt" * 30)[:-80], "truncated-zip", "cut short"),
    "tar cut short": (tarred("a.bin")[:600], "archive", "no tensor file"),
    "gz": (b"\x1f\x8b\x08" + bytes(20), "archive", "packed data"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(90), "7z", "unpack"),
    "rar": (b"Rar!\x1a\x07\x01\x00" + bytes(90), "rar", "unpack"),
    "zstd": (b"\x28\xb5\x2f\xfd" + random_bytes(90), "zstd", "zstd -d"),
    "lz4": (b"\x04\x22\x4d\x18" + random_bytes(90), "lz4", "lz4 -d"),
    "pdf": (b"%PDF-1.7\n%\xe2\xe3", "pdf", "PDF"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(90), "hdf5", "HDF5"),
    "ggml": (b"lmgg" + bytes(90), "ggml", "GGUF"),
    "ggjt": (b"tjgg\x03\0\0\0" + bytes(90), "ggml", "GGUF"),
    "another ggla": (b"algg\x02\0\0\0" + bytes(90), "ggla", "LoRA"),
    "tflite": (b"\x1c\0\0\0TFL3" + bytes(90), "tflite", "Lite"),
    "pe": (b"MZ" + bytes(58) + (64).to_bytes(4, "little") + b"PE\0\0" + bytes(90), "pe", "Windows"),
    "onnx": (b"\x08\x08\x12\x07pytorch\x1a\x052.1.0" + random_bytes(40), "onnx", "ONNX"),
    "tensorflow index": (random_bytes(60) + b"\x57\xfb\x80\x8b\x24\x75\x47\xdb", "tensorflow-index", ".data files"),
    "pickle": (b"\x80\x04}\x94.", "pickle", "no tensors"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_each_is_named(case: str) -> None:
    data, kind, words = CASES[case]
    found = look(data)
    assert (found.kind, words in found.message) == (kind, True), found
    assert found.message.isprintable() and found.evidence and all(isinstance(text, str) for text in found.evidence)


@pytest.mark.parametrize(("kind", "name"), [("PNG", "png"), ("JPEG", "jpeg"), ("GIF", "gif"), ("WEBP", "webp")])
def test_pictures(kind: str, name: str) -> None:
    assert look(picture(kind)).kind == name


def test_names_decide_only_where_bytes_cannot() -> None:
    assert look(tarred("boot1.jpg"), "up_param.bin").kind == "firmware"
    assert look(b"\x04\x22\x4d\x18" + bytes(9), "up_param.bin.lz4").kind == "firmware"
    assert look(b"\x08\x08\x3a\xff\xff\x01" + random_bytes(9), "model.onnx").kind == "onnx"
    assert look(random_bytes(999), "variables.data-00000-of-00001").kind == "tensorflow-data"
    assert look(b"\x08\x01\x12\xff\xfe" + random_bytes(90), "saved_model.pb").kind == "tensorflow-saved-model"


def test_the_program_running_this_is_a_program() -> None:
    executable = Path(sys.executable).resolve()
    found = recognise(head_of(MemorySource(executable.read_bytes()[:100_000]), executable))
    assert found.kind in ("elf", "mach-o", "pe")


def test_the_pointer_says_what_it_points_to(corpus: Path) -> None:
    path = corpus / "lfs-pointer" / "adapter_model.safetensors"
    assert open_all(path) == []
    with pytest.raises(UnreadableError, match="git lfs pull") as caught:
        open_file(path)
    assert caught.value.found == "git-lfs-pointer"
    found = look(path.read_bytes())
    assert "167,832,240 bytes" in found.message
    assert any("486733ec2620ad99fa721a531e159c327233cf74abddb1fcbeb342bd183afadb" in text for text in found.evidence)


def test_no_tensor_data_is_taken_for_something_else() -> None:
    rng = np.random.default_rng(0)
    for dtype in (np.float32, np.float16, np.int8):
        for shape in ((320, 4), (4, 4096)):
            found = look((rng.standard_normal(shape) * 20).astype(dtype).tobytes())
            assert found.kind == "unknown" and "headerless" in found.message, found
    assert "random" in look(random_bytes(60_000)).message


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=700), st.sampled_from(sorted(CASES)))
def test_nothing_ever_raises(tail: bytes, case: str) -> None:
    start = CASES[case][0][:600]
    for data in (tail, start[: len(tail)] + tail, start + tail):
        found = look(data)
        assert found.kind and found.message


@pytest.mark.parametrize("case", sorted(set(CASES) - {"pickle", "header cut", "data cut", "zip cut short", "tar cut short", "gz"}))
def test_no_container_takes_them(case: str) -> None:
    head = head_of(MemorySource(CASES[case][0]), Path("up-param.bin"))
    assert sniffed(head) is None


def test_open_file_says_what_it_is(tmp_path: Path) -> None:
    for case in ("html", "zeros", "firmware", "text"):
        path = tmp_path / "up-param.bin"
        path.write_bytes(CASES[case][0])
        with pytest.raises(UnreadableError) as caught:
            open_file(path)
        assert caught.value.found == CASES[case][1] and not isinstance(caught.value, MalformedError)
