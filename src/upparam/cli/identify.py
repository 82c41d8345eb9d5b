"""upparam identify PATH... [--recursive]"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from upparam.cli.common import add_common, emit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """PATH..., --recursive, --json."""
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="files or folders")
    parser.add_argument("--recursive", "-r", action="store_true", help="identify every folder below a folder too")
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    """Identify each path; the exit code is the worst of them. Of several paths one that cannot be opened does not end the others."""
    from upparam.errors import UpparamError
    from upparam.operations.identify import Identity, folders_below, identify
    from upparam.report.identity import identity_text
    from upparam.report.text import one_line

    parts = [part for path in args.paths for part in (folders_below(path) if args.recursive else [path])]
    found: list[Identity | tuple[Path, UpparamError]] = []
    for part in parts:
        try:
            found.append(identify(part, below=not args.recursive))
        except UpparamError as problem:
            if len(parts) == 1:
                raise
            found.append((part, problem))
    facts = [{"path": str(one[0]), "error": one[1].facts()} if isinstance(one, tuple) else one.facts() for one in found]
    emit(args, facts, lambda: "\n\n".join(identity_text(one) for one in found if not isinstance(one, tuple)))
    problems = [one[1] for one in found if isinstance(one, tuple)]
    if not args.json:
        print("".join(one_line(f"upparam: {one.line()}") + "\n" for one in problems), end="", file=sys.stderr)
    return max([*(one.exit_code for one in found if not isinstance(one, tuple)), *(one.exit_code for one in problems)])
