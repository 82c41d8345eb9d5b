"""upparam compare FIRST SECOND."""

from __future__ import annotations

import argparse
from pathlib import Path

from upparam.cli.common import add_common, add_reading, emit, progress_for, reading

EPILOG = (
    "verdicts of adapters: bit-equal (same factors and scales); equal (the same dW up to the rounding of the stored dtypes: another dtype, "
    "another gauge, a scale put into the factors); scaled; resized; near-duplicate (cosine of dW 0.995 or more); partly-shared (some "
    "modules are the same); related; unrelated; not-comparable. Of models: bit-equal; equal; within-rounding; low-rank-change; changed; "
    "not-comparable. exit codes: 0 the verdict is one of --accept, by default bit-equal and equal; 1 it is another; 2 usage; "
    "3 unreadable or malformed; 4 the module names of the two cannot be brought together without --base"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """FIRST, SECOND, --accept, --all, what only the user knows, --json."""
    parser.epilog = EPILOG
    parser.add_argument("first", type=Path, metavar="FIRST", help="an adapter, or a model that may have been changed")
    parser.add_argument("second", type=Path, metavar="SECOND", help="another adapter, in any dialect; for a model the base it is of")
    parser.add_argument(
        "--accept", action="append", metavar="VERDICT",
        help="a verdict that makes the exit code 0 (repeat; default: bit-equal and equal)",
    )  # fmt: skip
    parser.add_argument("--all", action="store_true", help="show every module, not only those furthest apart")
    parser.add_argument("--threads", type=int, metavar="N", help="threads (default: the cores, at most 8)")
    add_reading(parser)
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    """Compare and print; the exit code says whether the verdict is an accepted one. Quiet: the verdict alone."""
    from upparam.operations.merge import pin_blas

    pin_blas()
    from upparam.operations.compare import compare
    from upparam.operations.compare.verdict import ACCEPTED
    from upparam.report.comparison import comparison_text

    result = compare(
        args.first, args.second, read=reading(args), accept=args.accept or ACCEPTED, threads=args.threads, progress=progress_for(args)
    )
    if args.quiet and not args.json:
        print(f"{result.verdict.value}: {result.summary}")
    else:
        emit(args, result.facts(), lambda: comparison_text(result, args.all))
    return result.exit_code
