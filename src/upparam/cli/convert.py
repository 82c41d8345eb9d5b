"""upparam convert PATH --to DIALECT -o OUT."""

from __future__ import annotations

import argparse
from pathlib import Path

from upparam.cli.common import add_common, add_output, add_reading, emit_receipt, reading


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """PATH, --to, -o, what only the user knows, --drop, --json."""
    parser.add_argument("path", type=Path, metavar="PATH", help="an adapter file or folder")
    parser.add_argument("--to", required=True, metavar="DIALECT", help="the dialect to write; 'upparam dialects' lists them")
    parser.add_argument(
        "--drop",
        action="append",
        default=[],
        metavar="KIND",
        help="give up what the dialect cannot hold, by the name the refusal gives (repeat)",
    )
    add_output(parser, "file or folder")
    add_reading(parser)
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    """Convert and print the receipt."""
    from upparam.operations.convert import convert

    receipt = convert(args.path, args.out, args.to, read=reading(args), force=args.force, verify=args.verify, drop=args.drop)
    return emit_receipt(args, receipt)
