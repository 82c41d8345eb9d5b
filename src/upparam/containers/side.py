"""Small files beside tensors: JSON configs and indices, plain YAML, on disk or in an archive."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from upparam.containers import member_source
from upparam.errors import MalformedError
from upparam.limits import MAX_SIDE_FILE
from upparam.patterns import regex


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file or in an archive's member, None when there is none. Raises MalformedError for anything else."""
    data = _bytes(path)
    if data is None:
        return None
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as problem:
        what = f"not valid JSON: {problem}" if data else "an empty file where a config should be"
        raise MalformedError(what, file=path, remedy=_MENDING.get(path.name)) from problem
    if not isinstance(value, dict):
        raise MalformedError("not a JSON object", file=path, found=type(value).__name__, remedy=_MENDING.get(path.name))
    return value


_MENDING = {"adapter_config.json": "fetch it again, or move it away and 'upparam assemble' makes a new one from the weights"}
"""What to do about a config that cannot be read."""


_LINE = regex(r"(?P<indent> *)(?P<key>[A-Za-z_]\w*):(?: +(?P<value>.*?))? *")
_WORDS: dict[str, bool | None] = {"true": True, "false": False, "null": None, "~": None, "": None}


def read_yaml(path: Path) -> dict[str, Any] | None:
    """The lines `key: value` of a YAML file and of the mappings right below it, None when there is no file.

    Values are numbers, text, booleans or None. What else YAML has (lists, deeper levels, text over several lines) is left out. Raises
    MalformedError for a file that is no text.
    """
    data = _bytes(path)
    if data is None:
        return None
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except ValueError as problem:
        raise MalformedError(f"not text: {problem}", file=path) from problem
    found: dict[str, Any] = {}
    inside: dict[str, Any] | None = None
    depth = 0
    for line in lines:
        match = _LINE.fullmatch(line)
        if match is None:
            continue
        key, value, indent = match["key"], match["value"], len(match["indent"])
        if not indent:
            inside = {} if not value else None
            found[key] = _scalar(value or "") if inside is None else inside
            depth = 0
        elif inside is not None and indent == (depth := depth or indent):
            inside[key] = _scalar(value or "")
    return {key: value if value != {} else None for key, value in found.items()}


def _scalar(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _bytes(path: Path) -> bytes | None:
    """The whole of a small file, None where there is none. Raises MalformedError where it is no small one."""
    source = member_source(path)
    if source is None:
        return None
    if source.size > MAX_SIDE_FILE:
        raise MalformedError("a side file this large is not a config", file=path, expected=f"<= {MAX_SIDE_FILE} bytes", found=source.size)
    return bytes(source.read(0, source.size))
