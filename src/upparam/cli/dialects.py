"""upparam dialects."""

from __future__ import annotations

import argparse

from upparam.cli.common import add_common, emit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--json."""
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    """List the dialects upparam reads and writes."""
    from upparam.dialects import get, names

    members = [get(name) for name in names()]
    facts = [{"name": member.name, "title": member.title, "reads": True, "writes": member.writable} for member in members]
    width = max(len(member.name) for member in members)
    emit(
        args,
        facts,
        lambda: "\n".join(
            f"{member.name:{width}}  {'reads, writes' if member.writable else 'reads only   '}  {member.title}" for member in members
        ),
    )
    return 0
