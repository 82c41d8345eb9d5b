"""upparam unmerge MERGED ADAPTER[@SCALE]... -o OUT."""

from __future__ import annotations

import argparse
from pathlib import Path

from upparam.cli.common import add_common, add_output, emit_receipt, progress_for
from upparam.cli.merge import add_merging, block_weight, scaled


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MERGED, ADAPTER[@SCALE]..., -o."""
    parser.add_argument("merged", type=Path, metavar="MERGED", help="a weight file or model folder the adapters were merged into")
    add_merging(parser)
    add_output(parser, "model")
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    """Unmerge and print the receipt."""
    from upparam.operations.unmerge import unmerge

    receipt = unmerge(
        args.merged, [scaled(text) for text in args.adapters], args.out, force=args.force, verify=args.verify, exact=args.exact,
        only=args.only, skip=args.skip, drop=args.drop, block_weight=block_weight(args.block_weights), threads=args.threads, device=args.device, progress=progress_for(args),
    )  # fmt: skip
    return emit_receipt(args, receipt)
