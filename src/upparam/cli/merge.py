"""upparam merge BASE ADAPTER[@SCALE]... -o OUT."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from upparam.cli.common import add_common, add_drop, add_dtype, add_threads, emit, emit_receipt, in_its_options, progress_for

if TYPE_CHECKING:
    from upparam.operations.merge.planned import BlockWeight


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """BASE, ADAPTER[@SCALE]..., -o or --in-place, what to leave out, --dtype, --dry-run."""
    parser.add_argument("base", type=Path, metavar="BASE", help="a weight file or a model folder")
    add_merging(parser)
    parser.add_argument("--initial", type=Path, metavar="PATH", help="the adapter training began as (PiSSA, OLoRA ...), to be subtracted")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("-o", "--out", type=Path, metavar="OUT", help="the merged model to write; it appears whole or not at all")
    where.add_argument("--in-place", action="store_true", help="change BASE itself, with an undo journal beside it (see 'upparam undo')")
    where.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    parser.add_argument("--no-verify", dest="verify", action="store_false", help="do not re-open and prove what was written")
    parser.add_argument(
        "--no-sync", dest="sync", action="store_false", help="do not wait for the disk (safe against a kill, not a power cut)"
    )
    add_dtype(parser, "write all float weights in this dtype")
    add_common(parser)


def add_merging(parser: argparse.ArgumentParser) -> None:
    """The options that merge and unmerge share."""
    parser.add_argument(
        "adapters", nargs="+", metavar="ADAPTER[@SCALE]", help="adapters, each with a multiplier on top of its own scale (default 1)"
    )
    parser.add_argument("--only", action="append", default=[], metavar="GLOB", help="merge only target modules that match (repeat)")
    parser.add_argument("--skip", action="append", default=[], metavar="GLOB", help="leave out target modules that match (repeat)")
    add_drop(parser, "what cannot be merged")
    parser.add_argument(
        "--block-weights", action="append", default=[], metavar="WEIGHTS",
        help="multipliers by block: a preset (INALL, OUTD ...), 12/17/20/26/61 numbers, IN05-OUT05=0.3, or GLOB=0.5 over modules (repeat)",
    )  # fmt: skip
    add_threads(parser)
    parser.add_argument(
        "--device", default="cpu", metavar="DEVICE", help="where to compute: cpu, cuda or cuda:N (needs torch; the same bytes)"
    )
    parser.add_argument(
        "--no-exact", dest="exact", action="store_false", help="skip the float64 check of near-ties (1 element in 100,000 then 1 ulp off)"
    )


def scaled(text: str) -> tuple[Path, float]:
    """ADAPTER[@SCALE] as a path and a multiplier. A path that exists is taken whole, '@' and all.

    Raises UsageError where what follows the '@' of an adapter that is there is no number.
    """
    path, at, scale = text.rpartition("@")
    if path and at and not Path(text).exists():
        try:
            if "_" not in scale:  # Python's own way to group digits
                return Path(path), float(scale)
        except ValueError:
            pass
        if Path(path).exists():
            from upparam.errors import UsageError

            raise UsageError("what follows '@' is no scale", file=path, expected="a number such as 0.8 or -1e-2", found=scale)
    return Path(text), 1.0


def block_weight(texts: list[str]) -> BlockWeight | None:
    """The multipliers that `--block-weights` asks for; None when it was not given."""
    if not texts:
        return None
    from upparam.operations.merge.blocks import parse

    return parse(texts)


def run(args: argparse.Namespace) -> int:
    """Merge and print the receipt, or print the plan."""
    from upparam.errors import UsageError
    from upparam.operations.merge import merge, prepare

    adapters = [scaled(text) for text in args.adapters]
    choice = {
        "dtype": args.dtype,
        "only": args.only,
        "skip": args.skip,
        "drop": args.drop,
        "block_weight": block_weight(args.block_weights),
        "initial": args.initial,
    }
    if args.dry_run:
        plan = prepare(args.base, adapters, **choice)
        from upparam.findings import exit_code
        from upparam.operations.merge.write import output_bytes
        from upparam.report.merge import plan_text

        size = output_bytes(plan)
        plan.findings = in_its_options(args, plan.findings)
        emit(args, plan.facts(size), lambda: plan_text(plan, size))
        return exit_code(plan.findings)
    if args.out is None and not args.in_place:
        raise UsageError("nowhere to write", remedy="give -o OUT, --in-place or --dry-run")
    receipt = merge(
        args.base, adapters, args.out, in_place=args.in_place, force=args.force, verify=args.verify, sync=args.sync, exact=args.exact,
        threads=args.threads, device=args.device, progress=progress_for(args), **choice,
    )  # fmt: skip
    return emit_receipt(args, receipt)
