"""upparam undo BASE: take an in-place merge back."""

from __future__ import annotations

import argparse
from pathlib import Path

from upparam.cli.common import add_common, emit_receipt


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """BASE, --discard and --force."""
    parser.add_argument("base", type=Path, metavar="BASE", help="the weight file or model folder that was merged in place")
    parser.add_argument("--discard", action="store_true", help="make the merge final instead: remove the journal")
    parser.add_argument("--force", action="store_true", help="write the old bytes back even over what changed after the merge")
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    """Undo (or discard) and print the receipt."""
    from upparam.operations.merge.journal import undo

    return emit_receipt(args, undo(args.base, discard=args.discard, force=args.force))
