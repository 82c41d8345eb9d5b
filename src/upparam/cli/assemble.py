"""upparam assemble PATH [--to DIALECT] -o OUT."""

from __future__ import annotations

import argparse
from pathlib import Path

from upparam.cli.common import add_adapter, add_common, add_drop, add_output, add_reading, emit_receipt, reading


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """PATH, --to, -o, what only the user knows, --drop, --json."""
    parser.add_argument(
        "path", type=Path, metavar="PATH", help="factors and what belongs to them, an adapter without its config, or a training checkpoint"
    )
    parser.add_argument("--to", default="peft", metavar="DIALECT", help="the dialect to write (default: peft)")
    add_drop(parser)
    add_output(parser, "file or folder")
    add_reading(parser)
    add_adapter(parser)
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    """Assemble and print the receipt."""
    from upparam.operations.convert import convert

    receipt = convert(args.path, args.out, args.to, read=reading(args), force=args.force, verify=args.verify, drop=args.drop)
    return emit_receipt(args, receipt)
