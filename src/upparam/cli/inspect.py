"""upparam inspect PATH [--module GLOB] [--hash] [--salvage OUT]."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upparam.cli.common import add_adapter, add_common, add_reading, emit, emit_receipt, progress_for, reading

if TYPE_CHECKING:
    from upparam.errors import MalformedError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """PATH, --module GLOB, --hash, what only the user knows, --json."""
    parser.add_argument("path", type=Path, metavar="PATH", help="an adapter file or folder")
    parser.add_argument("--module", metavar="GLOB", help="only targets whose name matches this shell pattern")
    parser.add_argument("--hash", action="store_true", help="sha256 of the files and kohya's AutoV3 and legacy hashes")
    parser.add_argument(
        "--salvage", type=Path, metavar="OUT", help="write every tensor of a damaged file that is still whole to OUT (safetensors)"
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    add_reading(parser)
    add_adapter(parser)
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    """Show the modules, totals, metadata and hashes; for a damaged file, what can still be recovered (exit code 3).

    Of a file that holds several adapters, show which, unless one is named.
    """

    from upparam.errors import MalformedError, SeveralAdaptersError
    from upparam.operations.inspect import inspect_file
    from upparam.report.inspection import inspection_text

    if args.salvage:
        return _salvage(args)
    try:
        facts: dict[str, Any] = inspect_file(
            args.path, args.module, hashes=args.hash, options=reading(args), progress=progress_for(args)
        ).facts()
    except MalformedError as problem:
        return _recoverable(args, problem)
    except SeveralAdaptersError as problem:
        return _several(args, problem.names)
    emit(args, facts, lambda: inspection_text(facts))
    return 0


def _salvage(args: argparse.Namespace) -> int:
    from upparam.operations.salvage import salvage, write_salvage

    return emit_receipt(args, write_salvage(salvage(args.path), args.salvage, force=args.force))


def _several(args: argparse.Namespace, names: Sequence[str]) -> int:
    from upparam.operations.inspect import choices
    from upparam.report.inspection import choices_text

    facts = choices(args.path, names, reading(args))
    emit(args, facts, lambda: choices_text(facts))
    return 0


def _recoverable(args: argparse.Namespace, problem: MalformedError) -> int:
    from upparam.operations.salvage import salvage
    from upparam.report.salvaging import salvage_text

    if args.path.is_dir():
        raise problem
    found = salvage(args.path)
    emit(args, found.facts(), lambda: salvage_text(found))
    return problem.exit_code
