"""upparam compare FIRST SECOND."""

from __future__ import annotations

import argparse
from pathlib import Path

from upparam.cli.common import add_common, add_reading, add_threads, emit, progress_for, reading

DESCRIPTION = (
    "Say what the second is to the first, and on what that rests. Adapters are compared through their factors, in whatever dialects they are: "
    "bit-equal (same factors and scales); equal (the same dW as far as the stored dtypes tell: another dtype, other factors of it, a scale put "
    "into them); scaled; resized; near-duplicate (cosine of dW 0.995 or more); partly-shared (some modules are the same); related; unrelated; "
    "not-comparable. A model against its base is: bit-equal; equal; within-rounding; low-rank-change; changed; not-comparable. "
    "The exit code is 0 when the verdict is one of --accept, by default bit-equal and equal, and 1 when it is another."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """FIRST, SECOND, --accept, --all, what only the user knows, --json."""
    parser.description = DESCRIPTION
    parser.add_argument("first", type=Path, metavar="FIRST", help="an adapter, or a model that may have been changed")
    parser.add_argument("second", type=Path, metavar="SECOND", help="another adapter, in any dialect; for a model the base it is of")
    parser.add_argument(
        "--accept", action="append", metavar="VERDICT",
        help="a verdict that makes the exit code 0 (repeat; default: bit-equal and equal)",
    )  # fmt: skip
    parser.add_argument("--all", action="store_true", help="show every module, not only those furthest apart")
    add_threads(parser)
    add_reading(parser)
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    """Compare and print; the exit code says whether the verdict is an accepted one. Quiet: the verdict alone."""
    from upparam.operations.compare import compare
    from upparam.operations.compare.verdict import ACCEPTED
    from upparam.report.comparison import comparison_text

    result = compare(
        args.first, args.second, read=reading(args), accept=args.accept or ACCEPTED, angles=args.json or not args.quiet, threads=args.threads,
        progress=progress_for(args),
    )  # fmt: skip
    brief = f"{result.verdict.value}: {result.summary}"
    emit(args, result.facts(), lambda: brief if args.quiet else comparison_text(result, args.all))
    return result.exit_code
