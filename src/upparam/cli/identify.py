"""upparam identify PATH..."""

from __future__ import annotations

import argparse
from pathlib import Path

from upparam.cli.common import add_common, emit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """PATH..., --json."""
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="files or folders")
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    """Identify each path; the exit code is the worst of them."""
    from upparam.operations.identify import identify
    from upparam.report.identity import identity_text

    found = [identify(path) for path in args.paths]
    emit(args, [identity.facts() for identity in found], lambda: "\n\n".join(identity_text(identity) for identity in found))
    return max(identity.exit_code for identity in found)
