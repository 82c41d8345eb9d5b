"""upparam combine ADAPTER[@SCALE]... -o OUT."""

from __future__ import annotations

import argparse

from upparam.cli.common import add_common, add_drop, add_output, add_threads, emit_receipt, progress_for
from upparam.cli.merge import block_weight, scaled
from upparam.cli.resize import add_rank_rule


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """ADAPTER[@SCALE]..., --method and what it needs, -o, --to, a rank rule, --base."""
    parser.add_argument(
        "adapters", nargs="+", metavar="ADAPTER[@SCALE]", help="adapters, each with a multiplier on top of its own scale (default 1)"
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = _description()
    parser.add_argument("--method", default="concat", metavar="METHOD", help="how; see above (default: concat)")
    add_rank_rule(parser)
    parser.add_argument("--density", type=float, metavar="D", help="the share of values that a pruning method keeps, such as 0.5")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of random pruning (default 0)")
    parser.add_argument(
        "--block-weights", action="append", default=[], metavar="WEIGHTS",
        help="multipliers by block, on top: a preset (INALL, OUTD ...), 12/17/20/26/61 numbers, IN05-OUT05=0.3, or GLOB=0.5 over modules (repeat)",
    )  # fmt: skip
    add_output(parser, "file or folder")
    parser.add_argument("--to", metavar="DIALECT", help="the dialect to write (default: that of the first adapter's files)")
    parser.add_argument("--base", metavar="BASE", help="the base model: a checkpoint file or folder, or a name 'upparam bases' lists")
    add_drop(parser)
    add_threads(parser)
    add_common(parser)


def _description() -> str:
    from upparam.operations.combine import METHODS

    lines = ["Several adapters as one; dialects and ranks may differ. A rank rule cuts the result of any method. Methods:", ""]
    lines += [f"  {name:20s} {method.does}" for name, method in METHODS.items()]
    return "\n".join(lines)


def run(args: argparse.Namespace) -> int:
    """Combine and print the receipt."""
    from upparam.bases.find import find_base
    from upparam.dialects.base import ReadOptions
    from upparam.operations.combine import combine

    rule = None
    if any(value is not None for value in (args.rank, args.conv_rank, args.energy, args.error, args.fro)):
        from upparam.algorithms.lowrank import RankRule

        rule = RankRule(args.rank, args.energy, args.error, args.fro, args.conv_rank)
    read = None if args.base is None else ReadOptions(base=find_base(args.base))
    receipt = combine(
        [scaled(text) for text in args.adapters], args.out, method=args.method, to=args.to, rule=rule, density=args.density, seed=args.seed,
        block_weight=block_weight(args.block_weights), read=read, force=args.force, verify=args.verify, drop=args.drop,
        threads=args.threads, progress=progress_for(args),
    )  # fmt: skip
    return emit_receipt(args, receipt)
