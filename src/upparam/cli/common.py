"""What commands share: the options every one takes and how facts reach the screen."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from upparam.operations.receipt import Receipt
from upparam.progress import Progress, silent


def add_common(parser: argparse.ArgumentParser) -> None:
    """--json and --quiet."""
    parser.add_argument("--json", action="store_true", help="print the same facts as JSON")
    parser.add_argument("--quiet", "-q", action="store_true", help="no progress bar, no receipt")


def add_output(parser: argparse.ArgumentParser, what: str) -> None:
    """-o OUT, --force and --no-verify."""
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="OUT", help=f"{what} to write; it appears whole or not at all")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    parser.add_argument("--no-verify", dest="verify", action="store_false", help="do not re-open and prove what was written")


def emit(args: argparse.Namespace, facts: Any, render: Callable[[], str]) -> None:
    """Print facts as JSON when asked, else the rendered text."""
    if args.json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        print(render())


def emit_receipt(args: argparse.Namespace, receipt: Receipt) -> int:
    """Print a receipt (JSON or the line and its findings) and return the exit code."""
    from upparam.findings import exit_code
    from upparam.report.text import finding_lines

    if args.json:
        print(json.dumps(receipt.facts(), indent=2, ensure_ascii=False))
    elif not args.quiet:
        print("\n".join([*finding_lines(receipt.findings), receipt.line()]))
    return exit_code(receipt.findings)


def progress_for(args: argparse.Namespace) -> Progress:
    """A bar on stderr when a person is watching, else silence."""
    if args.json or args.quiet or not sys.stderr.isatty():
        return silent
    from upparam.report.bar import Bar

    return Bar()
