"""upparam resize ADAPTER --rank R | --energy E | --error E | --fro F -o OUT."""

from __future__ import annotations

import argparse
from pathlib import Path

from upparam.cli.common import add_common, add_drop, add_output, add_threads, emit_receipt, progress_for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """ADAPTER, the rank rule, --alpha, -o, --to."""
    parser.add_argument("path", type=Path, metavar="ADAPTER", help="an adapter file or folder")
    add_rank_rule(parser)
    parser.add_argument(
        "--alpha", choices=("scale", "keep", "rank"), default="scale",
        help="alpha of a resized module: 'scale' keeps alpha/rank (default), 'keep' the number, 'rank' makes it the rank; the effect is the same",
    )  # fmt: skip
    add_output(parser, "file or folder")
    parser.add_argument("--to", metavar="DIALECT", help="the dialect to write (default: that of its files)")
    parser.add_argument("--base", metavar="BASE", help="the base model: a checkpoint file or folder, or a name 'upparam bases' lists")
    parser.add_argument("--scale", type=float, help="the effective multiplier, where the files do not store it")
    add_drop(parser)
    add_threads(parser)
    add_common(parser)


def add_rank_rule(parser: argparse.ArgumentParser) -> None:
    """--rank, --conv-rank, --energy, --error, --fro: see `upparam.algorithms.lowrank.RankRule`."""
    parser.add_argument("--rank", type=int, metavar="R", help="the largest rank a module may have")
    parser.add_argument("--conv-rank", type=int, metavar="R", help="the same for kernels larger than 1x1 (default: --rank)")
    parser.add_argument("--energy", type=float, metavar="E", help="keep this share of each module's ||dW||^2, such as 0.99")
    parser.add_argument("--error", type=float, metavar="E", help="allow this relative error ||dW - dW'|| / ||dW||, such as 0.05")
    parser.add_argument("--fro", type=float, metavar="F", help="keep this share of each module's ||dW|| (sd-scripts' sv_fro)")


def run(args: argparse.Namespace) -> int:
    """Resize and print the receipt."""
    from upparam.algorithms.lowrank import RankRule
    from upparam.bases.find import find_base
    from upparam.dialects.base import ReadOptions
    from upparam.operations.resize import resize

    rule = RankRule(args.rank, args.energy, args.error, args.fro, args.conv_rank)
    read = ReadOptions(base=None if args.base is None else find_base(args.base), scale=args.scale)
    receipt = resize(
        args.path, args.out, rule, to=args.to, alpha=args.alpha, read=read, force=args.force, verify=args.verify, drop=args.drop,
        threads=args.threads, progress=progress_for(args),
    )  # fmt: skip
    return emit_receipt(args, receipt)
