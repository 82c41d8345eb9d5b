"""upparam split ADAPTER -o FOLDER [--format torch|npy|raw]."""

from __future__ import annotations

import argparse
from pathlib import Path

from upparam.cli.common import add_adapter, add_common, add_drop, add_output, add_reading, emit_receipt, reading


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """ADAPTER, -o, --format, what only the user knows, --json."""
    parser.add_argument("path", type=Path, metavar="ADAPTER", help="an adapter file or folder")
    parser.add_argument(
        "--format", choices=("torch", "npy", "raw"), default="torch", help="torch files (.bin), numpy archives (.npz), or headerless (.raw)"
    )
    add_drop(parser)
    add_output(parser, "folder")
    add_reading(parser)
    add_adapter(parser)
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    """Split and print the receipt."""
    from upparam.operations.convert import convert

    receipt = convert(
        args.path,
        args.out,
        "triad",
        read=reading(args),
        force=args.force,
        verify=args.verify,
        drop=args.drop,
        options={"format": args.format},
    )
    return emit_receipt(args, receipt)
