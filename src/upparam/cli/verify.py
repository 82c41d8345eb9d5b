"""upparam verify ADAPTER [--base BASE]."""

from __future__ import annotations

import argparse
from pathlib import Path

from upparam.cli.common import add_adapter, add_common, add_reading, emit, progress_for, reading


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """ADAPTER, what only the user knows, --json."""
    parser.add_argument("path", type=Path, metavar="ADAPTER", help="an adapter file or folder")
    add_reading(parser)
    add_adapter(parser)
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    """Verify; exit code 1 when any finding is an error."""
    from upparam.operations.verify import verify
    from upparam.report.text import finding_lines, one_line
    from upparam.wording import counted

    on_disk = args.base if args.base and Path(args.base).exists() else None
    verdict = verify(args.path, base=on_disk, options=reading(args), progress=progress_for(args))
    word = "sound" if verdict.sound else "NOT sound"
    emit(
        args,
        verdict.facts(),
        lambda: "\n".join(
            [
                one_line(f"{verdict.path}: {word} ({verdict.dialect}, {counted(verdict.targets, 'target')})"),
                *(one_line("  " + text) for text in finding_lines(verdict.findings, within=verdict.path.name)),
            ]
        ),
    )
    return verdict.exit_code
