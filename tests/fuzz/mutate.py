"""A mutator of our own: bit flips, interesting numbers, words of the formats, cuts, copies and splices. Deterministic for a seed."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence

NUMBERS = [0, 1, 2, 3, 4, 7, 8, 15, 16, 31, 32, 63, 64, 127, 128, 255, 256, 511, 512, 1000, 1024, 4096, 32767, 32768, 65535, 65536,
           (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]  # fmt: skip
WORDS = [
    b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07", b"PK\x07\x08", b"\x80\x02", b"\x80\x04\x95", b".", b"(", b"t", b"R",
    b"b", b"\x81", b"\x93", b"}", b"]", b"u", b"e", b"q\x00", b"h\x00", b"\x94", b"0", b"N", b"Q", b"X\x04\x00\x00\x00", b"\x8c\x04", b"\x8a\x04",
    b"cos\nsystem\n", b"ccollections\nOrderedDict\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n", b"cnumpy\ndtype\n",
    b"cnumpy.core.multiarray\n_reconstruct\n", b"cbuiltins\nbytes\n", b"data.pkl", b"archive/data/0", b"byteorder", b"GGUF", b"\x93NUMPY\x01\x00",
    b"'descr': '<f4', ", b"'shape': (2, 3), ", b"'fortran_order': False, ", b"(1,)", b"'|O'", b'"dtype":"F32",', b'"shape":[1],', b'"data_offsets":[0,4]',
    b"{", b"[", b'"__metadata__":{}', b"\\u0041", b"ustar\x0000", b"0000644\x00", b"\x1f\x8b\x08\x00", b"BZh91AY&SY", b"\xfd7zXZ\x00", b"storage", b"\n",
]  # fmt: skip


def mutated(data: bytes, others: Sequence[bytes], chance: random.Random) -> bytes:
    """One to six changes to `data`; `others` give pieces to splice in."""
    out = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 3, 6))):
        at = chance.randrange(len(out) + 1)
        kind = chance.randrange(8)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << chance.randrange(8)
        elif kind == 1 and at < len(out):
            out[at] = chance.randrange(256)
        elif kind == 2:
            layout = chance.choice(("<B", "<H", "<I", "<Q", ">I", ">Q"))
            size = struct.calcsize(layout)
            out[at : at + size] = struct.pack(layout, chance.choice(NUMBERS) & ((1 << 8 * size) - 1))
        elif kind == 3:
            word = chance.choice(WORDS)
            out[at : at + (len(word) if chance.random() < 0.5 else 0)] = word
        elif kind == 4:
            del out[at : at + chance.choice((1, 2, 4, 16, 64, 512))]
        elif kind == 5:
            size = chance.choice((1, 2, 8, 30, 100, 512))
            out[at:at] = out[at : at + size] * chance.choice((1, 1, 2, 20))
        elif kind == 6:
            other = chance.choice(others)
            start = chance.randrange(len(other) + 1)
            out[at : at + chance.choice((0, 0, 64, 1 << 20))] = other[start : start + chance.choice((8, 64, 512, 1 << 20))]
        else:
            digits = str(chance.choice(NUMBERS)).encode()
            out[at : at + chance.choice((0, 1, len(digits)))] = digits
        if len(out) > 1 << 15:
            del out[1 << 15 :]
    return bytes(out)
