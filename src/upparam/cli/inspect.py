"""upparam inspect PATH [--module GLOB] [--hash]."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from upparam.cli.common import add_common, add_reading, emit, progress_for, reading


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """PATH, --module GLOB, --hash, what only the user knows, --json."""
    parser.add_argument("path", type=Path, metavar="PATH", help="an adapter file or folder")
    parser.add_argument("--module", metavar="GLOB", help="only targets whose name matches this shell pattern")
    parser.add_argument("--hash", action="store_true", help="sha256 of the files and kohya's AutoV3 and legacy hashes")
    add_reading(parser)
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    """Show the modules, totals, metadata and hashes."""
    from upparam.operations.inspect import inspect_file
    from upparam.report.inspection import inspection_text

    facts: dict[str, Any] = inspect_file(
        args.path, args.module, hashes=args.hash, options=reading(args), progress=progress_for(args)
    ).facts()
    emit(args, facts, lambda: inspection_text(facts))
    return 0
