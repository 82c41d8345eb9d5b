"""What a file is when it holds no tensors we can read: said by name, with what gave it away and what to do about it.

Only the head and a few small reads are looked at. Magic numbers are those of the formats' public specifications.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from math import log2
from pathlib import Path

from upparam.containers import archive, tars
from upparam.containers.base import Head
from upparam.containers.zips import find_end, read_archive
from upparam.errors import UpparamError
from upparam.limits import MAX_SAFETENSORS_HEADER

_HEADER_READ = 4 << 20
"""Bytes of a safetensors header looked at for where its data should end."""


@dataclass(frozen=True)
class LookAlike:
    """What the bytes are: a stable kebab-case `kind`, one sentence for people, and the evidence for it."""

    kind: str
    message: str
    evidence: tuple[str, ...] = ()


def recognise(head: Head) -> LookAlike:
    """The best name for a file that is no tensor file upparam reads; 'unknown' with what was looked at when nothing fits."""
    for test in _TESTS:
        found = test(head)
        if found is not None:
            return found
    return _unknown(head)


def _empty(head: Head) -> LookAlike | None:
    if head.size == 0:
        return LookAlike("empty", "an empty file: the download or the copy failed; fetch it again", ("0 bytes",))
    return None


def _zeros(head: Head) -> LookAlike | None:
    if head.data.strip(b"\0"):
        return None
    places = [head.size * part // 8 for part in range(1, 8)] + [max(0, head.size - 4096)]
    if any(head.source.read(at, min(4096, head.size - at)).strip(b"\0") for at in places):
        return LookAlike(
            "zeros-at-start", "it starts with nothing but zeros: a damaged download, or headerless data", (f"first {len(head.data)} bytes",)
        )
    return LookAlike(
        "zeros", "nothing but zeros: a download that reserved its space and never filled it; fetch it again",
        (f"first {len(head.data)} bytes and {len(places)} samples of {head.size} bytes",),
    )  # fmt: skip


def _lfs(head: Head) -> LookAlike | None:
    if not head.data.startswith((b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/")):
        return None
    text = head.data[:1024].decode("utf-8", "replace")
    oid = re.search(r"^oid (\w+:[0-9a-f]+)$", text, re.M)
    size = re.search(r"^size (\d+)$", text, re.M)
    evidence = tuple(match[0] for match in (oid, size) if match)
    real = f" ({int(size[1]):,} bytes)" if size and len(size[1]) < 20 else ""
    return LookAlike(
        "git-lfs-pointer", f"a git-lfs pointer, not the file itself{real}; fetch the real one with 'git lfs pull', or download it again", evidence
    )  # fmt: skip


def _safetensors(head: Head) -> LookAlike | None:
    if len(head.data) < 9 or head.data[8:9] != b"{" or not re.match(rb'\{\s*"', head.data[8:40]):
        return None
    length = int.from_bytes(head.data[:8], "little")
    if length > MAX_SAFETENSORS_HEADER:
        claim = f"its first 8 bytes claim a header of {length:,} bytes, more than any real file has"
        return LookAlike("broken-safetensors", f"no sound safetensors file: {claim}", (f"file of {head.size} bytes",))
    if 8 + length > head.size:
        return _truncated("a safetensors file that ends inside its header", f"header of {length} bytes stated", head)
    header = head.source.read(8, min(length, _HEADER_READ))
    ends = [int(stop) for stop in re.findall(rb'"data_offsets":\s*\[\s*\d{1,19}\s*,\s*(\d{1,19})', header)]
    if ends and 8 + length + max(ends) > head.size:
        return _truncated("a safetensors file that ends before its data does", f"{8 + length + max(ends)} bytes stated", head)
    return None


def _truncated(what: str, stated: str, head: Head) -> LookAlike:
    message = f"{what}: the download is truncated; fetch it again"
    return LookAlike("truncated-safetensors", message, (stated, f"file of {head.size} bytes"))


_MAGIC: tuple[tuple[bytes, int, str, str], ...] = (
    (b"\x89PNG\r\n\x1a\n", 0, "png", "a PNG picture"),
    (b"\xff\xd8\xff", 0, "jpeg", "a JPEG picture"),
    (b"GIF8", 0, "gif", "a GIF picture"),
    (b"WEBP", 8, "webp", "a WebP picture"),
    (b"%PDF-", 0, "pdf", "a PDF document"),
    (b"\x7fELF", 0, "elf", "an ELF program or library"),
    (b"\xcf\xfa\xed\xfe", 0, "mach-o", "a Mach-O program or library"),
    (b"\xca\xfe\xba\xbe", 0, "mach-o", "a Mach-O program or Java class"),
    (b"7z\xbc\xaf\x27\x1c", 0, "7z", "a 7-Zip archive; unpack it first"),
    (b"Rar!\x1a\x07", 0, "rar", "a RAR archive; unpack it first"),
    (b"\x28\xb5\x2f\xfd", 0, "zstd", "Zstandard-packed data; unpack it with 'zstd -d' first"),
    (b"\x04\x22\x4d\x18", 0, "lz4", "LZ4-packed data; unpack it with 'lz4 -d' first"),
    (b"lmgg", 0, "ggml", "an old GGML model (before GGUF); convert it with llama.cpp"),
    (b"fmgg", 0, "ggml", "an old GGMF model (before GGUF); convert it with llama.cpp"),
    (b"tjgg", 0, "ggml", "an old GGJT model (before GGUF); convert it with llama.cpp"),
    (b"algg", 0, "ggla", "a llama.cpp LoRA from before GGUF, of a version upparam does not read"),
    (b"\x89HDF\r\n\x1a\n", 0, "hdf5", "an HDF5 file (Keras weights are stored so); export it as safetensors or npz"),
    (b"TFL3", 4, "tflite", "a TensorFlow Lite model"),
    (
        b"TORT",
        4,
        "onnx-adapter",
        "an ONNX Runtime adapter: LoRA factors as inputs of one ONNX graph; take the PEFT adapter it was exported from",
    ),
    (b"ARROW1\0\0", 0, "arrow", "an Arrow file"),
    (b"PAR1", 0, "parquet", "a Parquet table"),
    (b"SQLite format 3\0", 0, "sqlite", "an SQLite database"),
    (b"OggS", 0, "audio", "an Ogg sound file"),
    (b"ID3", 0, "audio", "an MP3 sound file"),
    (b"ftyp", 4, "video", "an MP4 or similar media file"),
    (b"!<arch>\n", 0, "ar", "a static library or Debian package"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", 0, "ole", "an old Office document"),
    (b"MATLAB 5.0 MAT-file", 0, "matlab", "a MATLAB file; save the arrays as npz"),
)


def _magic(head: Head) -> LookAlike | None:
    for magic, at, kind, message in _MAGIC:
        if head.data[at : at + len(magic)] == magic and (kind != "webp" or head.data[:4] == b"RIFF"):
            if kind == "lz4" and re.search(_FIRMWARE, head.name):
                return LookAlike("firmware", "packed Samsung firmware (up_param); nothing to do with model parameters", (head.name,))
            return LookAlike(kind, message, (f"magic {magic!r} at byte {at}",))
    if head.data[:2] == b"MZ" and len(head.data) >= 64:
        at = int.from_bytes(head.data[60:64], "little")
        if head.data[at : at + 4] == b"PE\0\0":
            return LookAlike("pe", "a Windows program or library", (f"PE signature at byte {at}",))
    return None


def _tensorflow(head: Head) -> LookAlike | None:
    if head.size >= 48 and head.source.read(head.size - 8, 8) == b"\x57\xfb\x80\x8b\x24\x75\x47\xdb":
        return LookAlike(
            "tensorflow-index", "the index of a TensorFlow checkpoint; the weights are in the .data files beside it; export them as safetensors",
            ("table magic in the last 8 bytes",),
        )  # fmt: skip
    if re.search(r"\.data-\d{5}-of-\d{5}$", head.name):
        return LookAlike(
            "tensorflow-data", "a TensorFlow checkpoint's data; it is read through its .index file; export it as safetensors", (head.name,)
        )
    if (head.data[:1] in (b"\x08", b"\x12") and b"saved_model" in head.name.encode()) or (
        b"serve" in head.data[:4096] and b"StatefulPartitionedCall" in head.data
    ):
        return LookAlike("tensorflow-saved-model", "a TensorFlow SavedModel; export its weights as safetensors", ("SavedModel fields",))
    return None


_ONNX_PRODUCERS = (b"pytorch", b"onnx", b"tf2onnx", b"keras2onnx", b"skl2onnx", b"paddle", b"cntk", b"mxnet", b"caffe2")


def _onnx(head: Head) -> LookAlike | None:
    # ModelProto: field 1 (ir_version) as a varint, then field 2 (producer_name) or 8 (opset_import) or 7 (graph).
    if len(head.data) < 8 or head.data[0] != 0x08 or not 1 <= head.data[1] <= 20:
        return None
    if head.data[2] == 0x12 and head.data[3] < 64:
        producer = head.data[4 : 4 + head.data[3]]
        if producer.isascii() and (producer.lower().startswith(_ONNX_PRODUCERS) or head.name.endswith(".onnx")):
            return LookAlike(
                "onnx", "an ONNX model; upparam reads no ONNX", (f"ir_version {head.data[1]}", f"producer {producer.decode()!r}")
            )
    if head.name.endswith(".onnx") and head.data[2] in (0x12, 0x1A, 0x3A, 0x42):
        return LookAlike("onnx", "an ONNX model; upparam reads no ONNX", (f"ir_version {head.data[1]}",))
    return None


_FIRMWARE = r"(?i)up_param"
_BOOT_PICTURE = r"(svb_\w+|booting_warning\w*|logo|letter|warning|download\w*|charging\w*)\.(jpg|png)$"
_MODEL_PARTS = (".ckpt", ".distcp", ".index")


def _archive(head: Head) -> LookAlike | None:
    if not archive.sniff(head):
        return None
    if head.data[:2] != b"PK" and not tars.sniff(head):
        return LookAlike("archive", "packed data that holds no tensor file", (f"magic {head.data[:4].hex()}",))
    kind = "zip" if head.data[:2] == b"PK" else "tar"
    if kind == "zip" and find_end(head.source) is None:
        message = "a zip archive (torch's .pt and .bin files are zips too) that is cut short; fetch it again"
        return LookAlike("truncated-zip", message, ("no directory at its end", f"file of {head.size} bytes"))
    try:
        names = _names(head, kind)
    except UpparamError as problem:
        return LookAlike(f"broken-{kind}", f"a broken or truncated {kind} archive: {problem.message}", (problem.line(),))
    shown = tuple(names[:6])
    if not names:
        return LookAlike("empty-archive", f"an empty {kind} archive", ("no members",))
    lower = [name.lower().removeprefix("./") for name in names]
    pictures = [name for name in lower if name.endswith((".jpg", ".jpeg", ".png", ".bmp"))]
    if (
        kind == "tar"
        and len(pictures) * 2 > len(names)
        and (re.search(_FIRMWARE, head.name) or any(re.match(_BOOT_PICTURE, name) for name in pictures))
    ):
        return LookAlike("firmware", "Samsung firmware (up_param: the pictures shown at boot); nothing to do with model parameters", shown)
    if "model_config.yaml" in lower and any(
        name.endswith((".ckpt", ".distcp", ".index")) or name.startswith("model_weights") for name in lower
    ):
        return LookAlike("nemo", "a NeMo model archive (.nemo)", shown)
    if "config.json" in lower and "metadata.json" in lower and "model.weights.h5" in lower:
        return LookAlike("keras", "a Keras model (.keras); export its weights as safetensors or npz", shown)
    if any(name.startswith("meta-inf/") for name in lower):
        return LookAlike("jar", "a Java or Android archive", shown)
    if "[content_types].xml" in lower:
        return LookAlike("office", "an Office document", shown)
    return LookAlike("archive", f"a {kind} archive that holds no tensor file", shown)


def _names(head: Head, kind: str) -> list[str]:
    if kind == "zip":
        return [member.name for member in read_archive(head.source, Path(head.name)).members]
    return [member.name for member in tars.read_archive(head.source, Path(head.name)).members]


def _text(head: Head) -> LookAlike | None:
    text = _as_text(head.data)
    if text is None:
        return None
    start = text.lstrip("\ufeff \t\r\n")
    lower = start[:4096].lower()
    if lower.startswith(("<!doctype html", "<html")) or ("<head" in lower and "<body" in lower):
        found = re.search(r"<title[^>]*>(.*?)</title>", start[:16384], re.S | re.I)
        called = " ".join(found[1].split())[:80] if found else ""
        words = f" titled '{called}'" if called else ""
        return LookAlike(
            "html", f"a web page{words}, saved in place of the file: a login, licence or error page; download it again (with a token if it is gated)",
            (start[:60].strip(),),
        )  # fmt: skip
    if start.startswith("<?xml") or (re.match(r"<[A-Za-z][\w:.-]*[^<>]*>", start) and start.rstrip().endswith(">")):
        code = re.search(r"<Code>(\w+)</Code>", start[:4096])
        said = f": the server answered '{code[1]}' instead of the file" if code else ""
        return LookAlike("xml", f"XML text{said}", (start[:60].strip(),))
    if start[:1] in ("{", "["):
        found_json = _json(head, start)
        if found_json is not None:
            return found_json
    if re.match(
        r"(entry not found|not found|invalid username or password|access to model|repository not found|unauthorized|forbidden)", lower
    ):
        return LookAlike("error-text", "a server's error message saved in place of the file; download it again", (start[:100].strip(),))
    return LookAlike("text", "plain text, no tensors", (start[:60].strip().replace("\n", " "),))


def _json(head: Head, start: str) -> LookAlike | None:
    if head.size > len(head.data):
        keyed = re.match(r'[{\[]\s*("|[{\[]|-?\d|\]|\})', start)
        return LookAlike("json", "JSON text, no tensors", (start[:60].strip(),)) if keyed else None
    try:
        value = json.loads(start)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, dict):
        said = value.get("error") or value.get("message")
        if said and len(value) <= 4:
            return LookAlike("json-error", "a server's error message saved in place of the file; download it again", (str(said)[:120],))
        keys = tuple(str(key) for key in list(value)[:5])
        what = next((what for key, what in _CONFIGS.items() if key in value), "JSON text, no tensors")
        return LookAlike("json", what, keys)
    return LookAlike("json", "JSON text, no tensors", (start[:60].strip(),))


_CONFIGS = {
    "peft_type": "a PEFT adapter config: what the weights are, not the weights", "lora_parameters": "an MLX adapter config",
    "weight_map": "the index of a sharded checkpoint; the weights are in the files it names", "log_history": "a Trainer's state",
    "_class_name": "a diffusers config", "architectures": "a model's config", "model_type": "a model's config",
    "tokenizer_class": "a tokenizer's config",
}  # fmt: skip
"""A key that gives a JSON object away, and what it is."""


def _tokenizer(head: Head) -> LookAlike | None:
    """SentencePiece's model is a protobuf whose first field holds the pieces."""
    if head.data[:1] == b"\x0a" and re.search(r"(tokenizer|spiece|sentencepiece)[\w.]*\.model$", head.name):
        return LookAlike("tokenizer", "a SentencePiece tokenizer", (f"named {head.name}", "starts with a protobuf field"))
    return None


def _as_text(data: bytes) -> str | None:
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        text = data[: len(data) // 2 * 2].decode("utf-16", "replace")
        return text if _printable(text) > 0.98 else None
    for cut in range(4):
        try:
            text = data[: len(data) - cut].decode("utf-8")
        except UnicodeDecodeError:
            continue
        return text if _printable(text) > 0.98 else None
    return None


def _printable(text: str) -> float:
    sample = text[:8192]
    return sum(letter.isprintable() or letter in "\r\n\t\f\ufeff" for letter in sample) / max(1, len(sample))


def _pickle(head: Head) -> LookAlike | None:
    if head.data[:1] == b"\x80" and len(head.data) > 1 and head.data[1] <= 5:
        return LookAlike("pickle", "a pickle that holds no tensors", (f"protocol {head.data[1]}",))
    return None


_TESTS: tuple[Callable[[Head], LookAlike | None], ...] = (
    _empty,
    _zeros,
    _lfs,
    _safetensors,
    _magic,
    _archive,
    _onnx,
    _tokenizer,
    _tensorflow,
    _text,
    _pickle,
)


def _unknown(head: Head) -> LookAlike:
    entropy = _entropy(head.data)
    looks = "packed, encrypted or random" if entropy > 7.9 and len(head.data) >= 4096 else "maybe headerless tensor data (ndarray.tofile)"
    return LookAlike(
        "unknown",
        f"no format upparam knows: {looks}",
        (f"{head.size} bytes", f"first bytes {head.data[:8].hex(' ')}", f"entropy {entropy:.2f} bits per byte over {len(head.data)} bytes"),
    )


def _entropy(data: bytes) -> float:
    """Shannon entropy in bits per byte."""
    counts = [data.count(value) for value in range(256)]
    return -sum(count / len(data) * log2(count / len(data)) for count in counts if count) if data else 0.0
