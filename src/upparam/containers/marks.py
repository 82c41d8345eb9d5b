"""How files of a container begin: what must be so before its module is worth importing. The container's own `sniff` has the last word."""

from __future__ import annotations

from collections.abc import Callable

from upparam.containers.base import Head

Mark = Callable[[Head], bool]
"""False only for files that the container's `sniff` would not take either."""


def anything(_: Head) -> bool:
    """No mark: the container is asked about every file."""
    return True


def begins(*marks: bytes) -> Mark:
    """One of these bytes at the very start."""
    return lambda head: head.data.startswith(marks)


def torch_stream(head: Head) -> bool:
    """The magic number of torch's pickle stream, 0x1950A86A20F9469CFC6C, as a long or in digits within the first bytes."""
    return b"\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19" in head.data[:40] or b"119547037146038801333356" in head.data[:40]


def tar(head: Head) -> bool:
    """A header's length, a name, and digits where its checksum stands."""
    return len(head.data) >= 512 and head.data[0] != 0 and head.data[148:156].strip(b"\0 ").isdigit()


def pickle(head: Head) -> bool:
    """A protocol mark, or an operation that a pickle of the old protocols may begin with."""
    return bool(head.data) and head.data[0] in b"\x80(]}cI)lditFNSVULJKMGXTBq."
