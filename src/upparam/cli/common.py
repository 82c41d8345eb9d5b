"""What commands share: the options every one takes and how facts reach the screen."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from math import isfinite, isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upparam.progress import Progress, silent

if TYPE_CHECKING:
    from upparam.dialects.base import ReadOptions
    from upparam.findings import Finding
    from upparam.operations.receipt import Receipt


def add_common(parser: argparse.ArgumentParser) -> None:
    """--json and --quiet."""
    parser.add_argument("--json", action="store_true", help="print the same facts as JSON")
    parser.add_argument("--quiet", "-q", action="store_true", help="no progress bar, no receipt")


def add_output(parser: argparse.ArgumentParser, what: str) -> None:
    """-o OUT, --force and --no-verify."""
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="OUT", help=f"{what} to write; it appears whole or not at all")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    parser.add_argument("--no-verify", dest="verify", action="store_false", help="do not re-open and prove what was written")


def add_drop(parser: argparse.ArgumentParser, what: str = "what the dialect cannot hold") -> None:
    """--drop, for what is to be given up."""
    from upparam.adapter import DROPPABLE

    parser.add_argument(
        "--drop", action="append", default=[], choices=DROPPABLE, metavar="KIND", help=f"give up {what}, by kind: {', '.join(DROPPABLE)} (repeat)"
    )  # fmt: skip


def add_dtype(parser: argparse.ArgumentParser, what: str, among: Sequence[str] | None = None) -> None:
    """--dtype: `what` gets which dtype, one of FLOATS when `among` does not say."""
    from upparam.operations.dtypes import FLOATS, listed

    parser.add_argument("--dtype", metavar="DTYPE", help=f"{what}: {listed(among or FLOATS)}")


def add_threads(parser: argparse.ArgumentParser) -> None:
    """--threads."""
    parser.add_argument("--threads", type=_count, metavar="N", help="threads (default: the cores, at most 8)")


def _count(text: str) -> int:
    """A whole number of at least 1. Raises what argparse makes a usage error."""
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return number


def add_reading(parser: argparse.ArgumentParser) -> None:
    """What only the user may know about an adapter: --base, --target, --alpha, --scale, --rank."""
    parser.add_argument("--base", metavar="BASE", help="the base model: a checkpoint file or folder, or a name 'upparam bases' lists")
    parser.add_argument(
        "--target", action="append", metavar="NAME", help="module a nameless factor belongs to, in order (repeat; globs over the base)"
    )
    parser.add_argument("--alpha", type=float, help="alpha, where the files do not store it")
    parser.add_argument("--scale", type=float, help="the effective multiplier, where the files do not store it")
    parser.add_argument("--rank", type=int, help="rank, where headerless factors leave it open")


def add_adapter(parser: argparse.ArgumentParser) -> None:
    """--adapter."""
    parser.add_argument(
        "--adapter", metavar="NAME", help="of several adapters in one file the one of this name; 'upparam inspect' lists them"
    )


def reading(args: argparse.Namespace) -> ReadOptions:
    """The ReadOptions that the arguments of `add_reading` and `add_adapter` say."""
    from upparam.dialects.base import ReadOptions

    base = None
    if args.base is not None:
        from upparam.bases.find import find_base

        base = find_base(args.base)
    targets = tuple(args.target) if args.target else None
    return ReadOptions(
        base=base, targets=targets, alpha=args.alpha, scale=args.scale, rank=args.rank, adapter=getattr(args, "adapter", None)
    )


def emit(args: argparse.Namespace, facts: Any, render: Callable[[], str]) -> None:
    """Print facts as JSON when asked, else the rendered text, as wide as the terminal."""
    from upparam.report.text import fitted

    print(as_json(facts) if args.json else fitted(render()))


def as_json(facts: Any, indent: int | None = 2) -> str:
    """Strict JSON: numbers that are not finite as the strings NaN, Infinity and -Infinity."""
    try:
        return json.dumps(facts, indent=indent, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(facts), indent=indent, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if isfinite(value) else "NaN" if isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def emit_receipt(args: argparse.Namespace, receipt: Receipt) -> int:
    """Print a receipt (JSON, or its findings and lines) and return the exit code."""
    from upparam.findings import exit_code
    from upparam.report.text import finding_lines, one_line

    receipt.findings = in_its_options(args, receipt.findings)
    if args.json or not args.quiet:
        emit(args, receipt.facts(), lambda: "\n".join(map(one_line, [*finding_lines(receipt.findings), *receipt.lines()])))
    return exit_code(receipt.findings)


def in_its_options(args: argparse.Namespace, findings: list[Finding]) -> list[Finding]:
    """The findings, with what they advise said in options that the command has."""
    if not any("--" in told for finding in findings for told in (finding.message, *finding.evidence)):
        return findings
    from upparam.cli.offering import findings_in_its_options

    return findings_in_its_options(findings, args.command)


def progress_for(args: argparse.Namespace) -> Progress:
    """A bar on stderr when a person is watching, else silence."""
    if args.json or args.quiet or not sys.stderr.isatty():
        return silent
    from upparam.report.bar import Bar

    return Bar()
