"""Documented limits for reading untrusted files. Each is far above what real adapters and checkpoints need."""

from __future__ import annotations

MIB = 1 << 20

MAX_SAFETENSORS_HEADER = 100 * MIB
"""Bytes of JSON header; the reference implementation uses the same bound."""
MAX_TENSORS = 2_000_000
"""Named tensors in one file."""
MAX_DIMS = 32
"""Dimensions of one tensor."""
MAX_JSON_DEPTH = 64
"""Nesting of a side file's JSON."""
MAX_SIDE_FILE = 64 * MIB
"""Bytes of a JSON or text side file."""
MAX_PICKLE_BYTES = 512 * MIB
"""Bytes of pickle program (tensor data in archives lives outside it)."""
MAX_PICKLE_OPCODES = 20_000_000
MAX_PICKLE_OBJECTS = 5_000_000
MAX_PICKLE_MEMO = 5_000_000
MAX_PICKLE_DEPTH = 1_000
"""Nesting of the object a pickle builds."""
MAX_ARCHIVE_MEMBERS = 200_000
MAX_ARCHIVE_NESTING = 3
"""Archives inside archives (zip in tar in gz, ...)."""
MAX_INFLATED = 64 << 30
"""Bytes one compressed member may declare."""
MAX_INFLATE_RATIO = 1100
"""Deflate cannot honestly exceed about 1032:1."""
SNIFF_BYTES = 64 * 1024
"""Bytes of a file looked at to tell its container."""
