"""upparam extract TUNED BASE -o OUT --to DIALECT."""

from __future__ import annotations

import argparse
from pathlib import Path

from upparam.cli.common import add_common, add_drop, add_dtype, add_output, add_threads, emit_receipt, progress_for
from upparam.cli.resize import add_rank_rule


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """TUNED, BASE, --to, the rank rule, --auto, --only, --skip, -o."""
    from upparam.operations.dtypes import FACTORS

    parser.add_argument("tuned", type=Path, metavar="TUNED", help="the fine-tuned model: a weight file or a model folder")
    parser.add_argument("base", type=Path, metavar="BASE", help="the model it was trained from")
    parser.add_argument("--to", required=True, metavar="DIALECT", help="the dialect to write; 'upparam dialects' lists them")
    parser.add_argument("--auto", action="store_true", help="keep what lies above the rounding noise of the stored dtypes")
    add_rank_rule(parser)
    parser.add_argument("--only", action="append", default=[], metavar="GLOB", help="extract only modules that match (repeat)")
    parser.add_argument("--skip", action="append", default=[], metavar="GLOB", help="leave out modules that match (repeat)")
    add_dtype(parser, "dtype of the factors (default: the tuned weight's)", FACTORS)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the random start (default 0)")
    add_drop(parser)
    add_threads(parser)
    add_output(parser, "file or folder")
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    """Extract and print the receipt."""
    from upparam.algorithms.lowrank import RankRule
    from upparam.operations.extract import extract

    given = (args.rank, args.energy, args.error, args.fro, args.conv_rank)
    rule = None if args.auto and not any(value is not None for value in given) else RankRule(*given)
    receipt = extract(
        args.tuned, args.base, args.out, args.to, rule, auto=args.auto, only=args.only, skip=args.skip, dtype=args.dtype, seed=args.seed,
        force=args.force, verify=args.verify, drop=args.drop, threads=args.threads, progress=progress_for(args),
    )  # fmt: skip
    return emit_receipt(args, receipt)
