"""Documented limits for reading untrusted files. Each is far above what real adapters and checkpoints need."""

from __future__ import annotations

MIB = 1 << 20

MAX_SAFETENSORS_HEADER = 100 * MIB
"""Bytes of JSON header; the reference implementation uses the same bound."""
MAX_NPY_HEADER = 64 * 1024
"""Bytes of an npy header; real ones are 54 to 118."""
MAX_GGUF_HEADER = 256 * MIB
"""Bytes of a GGUF header (vocabularies with their merges and scores live in it)."""
MAX_GGUF_KEYS = 65_536
"""Metadata keys of a GGUF file."""
MAX_GGUF_NESTING = 4
"""Arrays inside arrays in GGUF metadata."""
MAX_GGUF_ARRAY_SHOWN = 1024
"""Items up to which a GGUF metadata array is kept whole; longer ones are summarised."""
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
MAX_PICKLE_DEPTH = 250
"""Nesting of the object a pickle builds."""
MAX_PICKLE_INTEGER = 4096
"""Bytes of one integer in a pickle."""
MAX_EXPANDED = 256 * MIB
"""Bytes one tensor may claim beyond what its storage holds (views that repeat elements)."""
MAX_CLAIMED = 4 << 30
"""Bytes all tensors of a file may claim together beyond 64 times its size (shared storages read as separate tensors)."""
MAX_ARCHIVE_MEMBERS = 200_000
MAX_ARCHIVE_NESTING = 3
"""Archives inside archives (zip in tar in gz, ...)."""
MAX_ODDITIES = 256
"""Findings about the structure of one archive; the gravest are kept."""
MAX_TAR_NAME = 1 * MIB
"""Bytes of one extended name record in a tar."""
MAX_INFLATED = 64 << 30
"""Bytes one compressed member may declare."""
MAX_INFLATE_RATIO = 1100
"""Deflate cannot honestly exceed about 1032:1."""
MAX_UNPACKED_IN_MEMORY = 16 * MIB
"""Bytes of unpacked gzip, bzip2 or xz data kept in memory; more goes to an anonymous temporary file."""
SNIFF_BYTES = 64 * 1024
"""Bytes of a file looked at to tell its container."""
