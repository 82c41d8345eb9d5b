"""upparam convert PATH --to DIALECT -o OUT."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from upparam.cli.common import add_adapter, add_common, add_drop, add_output, add_reading, add_threads, emit_receipt, progress_for, reading

if TYPE_CHECKING:
    from upparam.algorithms.lowrank import RankRule


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """PATH, --to, -o, what only the user knows, --drop, --json."""
    parser.add_argument("path", type=Path, metavar="PATH", help="an adapter file or folder")
    parser.add_argument("--to", required=True, metavar="DIALECT", help="the dialect to write; 'upparam dialects' lists them")
    add_drop(parser)
    parser.add_argument(
        "--bake-scale", action="store_true",
        help="where the dialect has no place for a scale, multiply it into a factor (exact for powers of two)",
    )  # fmt: skip
    parser.add_argument(
        "--lowrank", type=_rank, metavar="R",
        help="replace what the dialect has no words for (DoRA, LoHa, LoKr, Tucker cores, ...) by plain LoRA of at most this rank; 'auto': "
        "whatever a relative error of 1%% takes. DoRA and others that depend on the weight need --base PATH. Where all modules must have one rank, "
        "the smaller ones are filled up with zeros",
    )  # fmt: skip
    add_threads(parser)
    parser.add_argument("--initial", type=Path, metavar="PATH", help="the adapter training began as (PiSSA, OLoRA ...), to be subtracted")
    parser.add_argument(
        "--no-sync", dest="sync", action="store_false", help="do not wait for the disk (safe against a kill, not a power cut)"
    )
    add_output(parser, "file or folder")
    add_reading(parser)
    add_adapter(parser)
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    """Convert and print the receipt."""
    from upparam.operations.convert import convert
    from upparam.operations.fitting import Arithmetic

    read = reading(args)
    how = Arithmetic(args.bake_scale, _rule(args.lowrank), _weights(args), threads=args.threads, progress=progress_for(args))
    receipt = convert(
        args.path, args.out, args.to, read=read, force=args.force, verify=args.verify, sync=args.sync, drop=args.drop, arithmetic=how, initial=args.initial
    )  # fmt: skip
    return emit_receipt(args, receipt)


def _rank(text: str) -> int | str:
    """R or `auto`."""
    if text != "auto" and not (text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"expected a rank or 'auto', found {text!r}")
    return text if text == "auto" else int(text)


def _rule(rank: int | str | None) -> RankRule | None:
    if rank is None:
        return None
    from upparam.algorithms.lowrank import RankRule
    from upparam.operations.lowering import AUTO

    return AUTO if isinstance(rank, str) else RankRule(rank)


def _weights(args: argparse.Namespace) -> Path | None:
    """The base model, where --base is a path and not a name."""
    return Path(args.base) if args.base is not None and Path(args.base).exists() else None
