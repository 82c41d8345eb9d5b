"""Small files beside tensors: JSON configs and indices, on disk or in an archive."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from upparam.containers import member_source
from upparam.errors import MalformedError
from upparam.limits import MAX_SIDE_FILE


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file or in an archive's member, None when there is none. Raises MalformedError for anything else."""
    source = member_source(path)
    if source is None:
        return None
    if source.size > MAX_SIDE_FILE:
        raise MalformedError("a side file this large is not a config", file=path, expected=f"<= {MAX_SIDE_FILE} bytes", found=source.size)
    try:
        value = json.loads(source.read(0, source.size).decode("utf-8-sig"))
    except (ValueError, RecursionError) as problem:
        what = f"not valid JSON: {problem}" if source.size else "an empty file where a config should be"
        raise MalformedError(what, file=path, remedy=_MENDING.get(path.name)) from problem
    if not isinstance(value, dict):
        raise MalformedError("not a JSON object", file=path, found=type(value).__name__, remedy=_MENDING.get(path.name))
    return value


_MENDING = {"adapter_config.json": "fetch it again, or move it away and 'upparam assemble' makes a new one from the weights"}
"""What to do about a config that cannot be read."""
