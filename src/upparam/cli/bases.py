"""upparam bases."""

from __future__ import annotations

import argparse

from upparam.cli.common import add_common, emit
from upparam.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """NAME, --modules, --json."""
    parser.add_argument("name", nargs="?", metavar="BASE", help="a name, a model id, or a checkpoint's path: show that base only")
    parser.add_argument("--modules", action="store_true", help="list the base's modules in traversal order")
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    """List the bases upparam knows, or tell about one."""
    if args.name is None:
        if args.modules:
            raise UsageError("--modules lists the modules of one base", remedy="name it: upparam bases NAME --modules")
        return _list(args)
    from upparam.bases.find import find_base
    from upparam.report.bases import base_facts, base_text

    facts = base_facts(find_base(args.name), modules=args.modules)
    emit(args, facts, lambda: base_text(facts))
    return 0


def _list(args: argparse.Namespace) -> int:
    from upparam.bases.inventory import known
    from upparam.report.bases import listing

    facts = [
        {"name": name, "family": fact.family, "title": fact.title, "modules": fact.modules, "ids": list(fact.ids)}
        for name, fact in known().items()
    ]
    emit(args, facts, lambda: listing(facts))
    return 0
