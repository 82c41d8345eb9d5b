"""upparam scan PATH... [--recursive] [--sarif FILE] [--strict]."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from upparam.cli.common import add_common, emit, progress_for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """PATH..., --recursive, --sarif, --strict, --jobs, --json."""
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="files and folders")
    parser.add_argument("--recursive", "-r", action="store_true", help="look into folders below folders too")
    parser.add_argument("--sarif", type=Path, metavar="FILE", help="write the findings as SARIF 2.1.0 too; an existing FILE is replaced")
    parser.add_argument("--strict", action="store_true", help="exit 1 for unknown files too")
    parser.add_argument("--jobs", type=int, metavar="N", help="processes for many files (default: one per CPU)")
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    """Scan; exit code 1 for a file that carries code or is malformed, 3 for one that cannot be opened and for a folder of which nothing was looked at, 0 when all are clean or unknown."""
    from upparam.operations.scan import Verdict, scan

    reports, worst = [], 0
    for report in scan(args.paths, recursive=args.recursive, jobs=args.jobs, progress=progress_for(args)):
        unknown = args.strict and report.verdict is Verdict.UNKNOWN and not report.unreadable
        worst = _worse(worst, 1 if unknown else report.exit_code)
        reports.append(report)
        if not args.json:
            from upparam.report.scanning import scan_lines
            from upparam.report.text import fitted

            lines = scan_lines(report, args.quiet)
            print(fitted("\n".join(lines)), end="\n" if lines else "")
    if args.json:
        emit(args, [report.facts() for report in reports], str)
    elif not args.quiet and len(reports) > 1:
        from upparam.wording import counted

        files = [report for report in reports if not report.passed_over]
        counts = {verdict.value: sum(report.verdict is verdict for report in files) for verdict in Verdict}
        counts["folders not looked into"] = len(reports) - len(files)
        print(f"{counted(len(files), 'file')}: " + ", ".join(f"{count} {what}" for what, count in counts.items() if count))
    if args.sarif:
        from upparam.atomic import atomic_file
        from upparam.report.sarif import sarif

        with atomic_file(args.sarif, force=True) as out:
            out.write_text(json.dumps(sarif(reports), indent=2), encoding="utf-8")
    return worst


def _worse(one: int, other: int) -> int:
    order = (0, 3, 1)
    return max(one, other, key=order.index)
