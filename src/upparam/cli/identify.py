"""upparam identify PATH... [--recursive]"""

from __future__ import annotations

import argparse
from pathlib import Path

from upparam.cli.common import add_common, emit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """PATH..., --recursive, --json."""
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="files or folders")
    parser.add_argument("--recursive", "-r", action="store_true", help="identify every folder below a folder too")
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    """Identify each path; the exit code is the worst of them."""
    from upparam.operations.identify import folders_below, identify
    from upparam.report.identity import identity_text

    found = [
        identify(part, below=not args.recursive) for path in args.paths for part in (folders_below(path) if args.recursive else [path])
    ]
    emit(args, [identity.facts() for identity in found], lambda: "\n\n".join(identity_text(identity) for identity in found))
    return max(identity.exit_code for identity in found)
