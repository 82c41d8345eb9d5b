"""The command line: a table of commands, each a file of this package. Only the command that is called is imported."""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn

from upparam._version import __version__

if TYPE_CHECKING:
    from upparam.errors import UpparamError

COMMANDS: dict[str, str] = {
    "identify": "say what files are, with the evidence",
    "scan": "say whether loading a file would run something, without running it",
    "inspect": "show what is inside an adapter, module by module",
    "verify": "prove an adapter sound, or say what is wrong",
    "assemble": "put factors and config together into a working adapter",
    "split": "take an adapter apart into up, down and config",
    "convert": "write an adapter in another dialect",
    "dialects": "list the dialects upparam reads and writes",
    "bases": "list the base models upparam knows, or tell about one",
    "merge": "bake adapters into a base model",
    "unmerge": "take a merged adapter out of a model again",
    "undo": "take an in-place merge back, bit for bit",
    "extract": "make an adapter from the difference of two models",
    "combine": "several adapters as one: the weighted sum, exact or cut to a rank",
    "resize": "make an adapter of smaller rank, with known error",
    "edit": "change metadata, dtype, alpha, scale or modules, and nothing else",
    "compare": "are two adapters the same, and if not, how do they differ; also a model and its base",
}
"""Name and one-line help of every command; `upparam.cli.NAME` (dashes as underscores) holds add_arguments(parser) and run(args) -> exit code."""

EPILOG = (
    """exit codes: 0 fine; 1 findings of error severity; 2 usage; 3 unreadable or malformed; 4 refused because something would be lost"""
)


class _Misuse(Exception):
    """A command line that the parser does not take."""


class _Parser(argparse.ArgumentParser):
    """argparse's own, whose refusals can be told as JSON too."""

    def error(self, message: str) -> NoReturn:
        """Raise _Misuse(message, this parser)."""
        raise _Misuse(message, self)


class _Help(argparse.HelpFormatter):
    """argparse's own, told the width: to find it out itself it imports shutil, which costs more than all the parsing."""

    def __init__(self, prog: str) -> None:
        told = os.environ.get("COLUMNS", "")
        columns = int(told) if told.isdecimal() else 0
        with suppress(AttributeError, ValueError, OSError):
            columns = columns or os.get_terminal_size(sys.__stdout__.fileno()).columns  # type: ignore[union-attr]
        super().__init__(prog, width=(columns or 80) - 2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code; every expected failure is one line on stderr (or a JSON object on stdout with --json)."""
    if argv is not None:
        return _interruptible(list(argv))
    _open_what_is_closed()
    _clean_up_when_stopped()
    # The process is ours and short: of its many small objects few are garbage, and looking for it would take a tenth of a small command,
    # half of that at the very end.
    gc.set_threshold(100_000)
    from upparam.operations.threads import own_process

    own_process()  # before any module of a command, which may import numpy: later it changes nothing
    try:
        return _interruptible(sys.argv[1:])
    finally:
        gc.freeze()


def _open_what_is_closed() -> None:
    """Put the null device where a standard stream was closed (`>&-`): its number would go to the next file opened, and Python has None for it."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115


def _clean_up_when_stopped() -> None:
    """Let the first Ctrl-C, SIGTERM or SIGHUP stop the work, so that what is half-written is removed; not where it is ignored (nohup).

    Those that follow do not stop the cleaning up: two are often sent at once, to a process and to its group.
    """
    import signal

    stopped = False

    def stop(number: int, frame: object) -> None:
        nonlocal stopped
        if not stopped:
            stopped = True
            raise KeyboardInterrupt(number)
        with suppress(OSError):
            os.write(2, b"upparam: what was half-written is being removed; this takes a moment\n")

    for name, usual in (("SIGINT", signal.default_int_handler), ("SIGTERM", signal.SIG_DFL), ("SIGHUP", signal.SIG_DFL)):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is usual:
            signal.signal(number, stop)


def _interruptible(argv: list[str]) -> int:
    try:
        return _command(argv)
    except KeyboardInterrupt as stop:
        print("upparam: interrupted; nothing was left half-written", file=sys.stderr)
        return 128 + (stop.args[0] if stop.args else 2)


def _command(argv: list[str]) -> int:
    parser = _Parser(
        prog="upparam",
        description="The truth about low-rank adapter files. Nothing in a file is ever executed.",
        epilog=EPILOG,
        formatter_class=_Help,
    )
    parser.add_argument("--version", action="version", version=f"upparam {__version__}")
    # Told its name it need not work it out, which costs an import or two; a parser costs a quarter of a millisecond.
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, prog="upparam")
    wanted = next((word for word in argv if not word.startswith("-")), None)
    commands = {argv[0]: COMMANDS[argv[0]]} if argv and argv[0] in COMMANDS else COMMANDS
    for name, text in commands.items():
        subparser = subparsers.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".", epilog=EPILOG, formatter_class=_Help
        )
        if name == wanted:
            command = importlib.import_module(f"upparam.cli.{name.replace('-', '_')}")
            command.add_arguments(subparser)
            subparser.set_defaults(run=command.run)
    if not argv:
        parser.print_help()
        return 2
    try:
        args = parser.parse_args(argv)
    except _Misuse as misuse:
        message, refusing = misuse.args
        if "--json" not in argv:
            argparse.ArgumentParser.error(refusing, message)
        from upparam.errors import UsageError

        return _told(argparse.Namespace(json=True), UsageError(message))
    from upparam.cli.screen import screened

    with screened() as out:
        code = _run(args)
        out.flush()
        if out.lost is None or isinstance(out.lost, BrokenPipeError):  # whoever read has enough
            return code
        from upparam.errors import UnreadableError

        return code or _told(argparse.Namespace(), UnreadableError(f"what was to be said could not be written: {out.lost.strerror}"))


def _run(args: argparse.Namespace) -> int:
    from upparam.errors import UnreadableError, UpparamError

    try:
        code: int = args.run(args)
        return code
    except UpparamError as problem:
        return _told(args, problem)
    except OSError as problem:
        return _told(args, UnreadableError(problem.strerror or str(problem), file=problem.filename))


def _told(args: argparse.Namespace, problem: UpparamError) -> int:
    """Tell a failure in the form asked for; returns its exit code."""
    if problem.remedy is not None and getattr(args, "command", None) in COMMANDS:
        from upparam.cli.offering import in_its_options

        problem.remedy = in_its_options(problem.remedy, args.command)
    if getattr(args, "json", False):
        import json

        print(json.dumps(problem.facts(), ensure_ascii=False))
    else:
        from upparam.report.text import one_line

        print(one_line(f"upparam: {problem.line()}"), file=sys.stderr)
    return problem.exit_code
