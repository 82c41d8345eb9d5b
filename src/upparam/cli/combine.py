"""upparam combine ADAPTER[@SCALE]... -o OUT."""

from __future__ import annotations

import argparse

from upparam.cli.common import add_common, add_output, emit_receipt, progress_for
from upparam.cli.merge import scaled
from upparam.cli.resize import add_rank_rule


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """ADAPTER[@SCALE]..., -o, --to, a rank rule, --base."""
    parser.add_argument(
        "adapters", nargs="+", metavar="ADAPTER[@SCALE]", help="adapters, each with a multiplier on top of its own scale (default 1)"
    )
    add_rank_rule(parser)
    add_output(parser, "file or folder")
    parser.add_argument("--to", metavar="DIALECT", help="the dialect to write (default: that of the first adapter)")
    parser.add_argument("--base", metavar="BASE", help="the base model: a checkpoint file or folder, or a name 'upparam bases' lists")
    parser.add_argument(
        "--drop",
        action="append",
        default=[],
        metavar="KIND",
        help="give up what the dialect cannot hold, by the name the refusal gives (repeat)",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="threads (default: the cores, at most 8)")
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    """Combine and print the receipt: exactly, or cut to the rank asked for."""
    from upparam.operations.merge import pin_blas

    pin_blas()
    from upparam.bases.find import find_base
    from upparam.dialects.base import ReadOptions
    from upparam.operations.combine import combine

    rule = None
    if any(value is not None for value in (args.rank, args.conv_rank, args.energy, args.error, args.fro)):
        from upparam.algorithms.lowrank import RankRule

        rule = RankRule(args.rank, args.energy, args.error, args.fro, args.conv_rank)
    read = None if args.base is None else ReadOptions(base=find_base(args.base))
    receipt = combine(
        [scaled(text) for text in args.adapters], args.out, to=args.to, rule=rule, read=read, force=args.force, verify=args.verify,
        drop=args.drop, threads=args.threads, progress=progress_for(args),
    )  # fmt: skip
    return emit_receipt(args, receipt)
