"""upparam dialects."""

from __future__ import annotations

import argparse

from upparam.cli.common import add_common, emit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--json."""
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    """List the dialects upparam reads and writes, and the algorithms each of them holds."""
    from upparam.dialects import get, names
    from upparam.report.dialects import dialect_facts, dialect_text

    facts = [dialect_facts(get(name)) for name in names()]
    emit(args, facts, lambda: dialect_text(facts))
    return 0
