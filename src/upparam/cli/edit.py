"""upparam edit ADAPTER [what to change] (-o OUT | --in-place)."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from upparam.cli.common import add_common, add_drop, add_dtype, add_threads, emit, emit_receipt, progress_for

DESCRIPTION = (
    "Change something about an adapter and nothing else: metadata, dtype, alpha and scale, modules out or renamed. It is written in its own "
    "dialect and container, the rest proved to have the same bits under the same names. Lossless, except that --dtype and a scale put "
    "into a factor (--keep-scale, --bake) round each element once; the receipt says how far. Tensors that no rule explains are carried bit for bit. "
    "Torch files stay torch files; -o NAME.safetensors makes them safetensors. Without anything to change the metadata is shown."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """ADAPTER, what to change, -o or --in-place."""
    parser.description = DESCRIPTION
    parser.add_argument("path", type=Path, metavar="ADAPTER", help="an adapter file or folder")
    parser.add_argument("--metadata", action="store_true", help="show the metadata (the default when nothing is to change)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="set a metadata key; config.KEY means the config beside it (repeat)"
    )
    parser.add_argument("--unset", action="append", default=[], metavar="KEY", help="take a metadata key out (repeat)")
    parser.add_argument(
        "--remove",
        action="append",
        default=[],
        metavar="GLOB",
        help="take out modules (and saved or unexplained tensors) that match (repeat)",
    )
    parser.add_argument("--keep", action="append", default=[], metavar="GLOB", help="keep only those that match (repeat)")
    parser.add_argument(
        "--rename", action="append", default=[], metavar="OLD=NEW",
        help="rename modules, by the names 'upparam inspect' shows; each * of NEW is what the * of OLD in that place stands for (repeat)",
    )  # fmt: skip
    add_dtype(parser, "dtype of factors and saved tensors")
    said = parser.add_mutually_exclusive_group()
    said.add_argument("--alpha", type=float, metavar="A", help="state this alpha; the effect changes with it unless --keep-scale is given")
    said.add_argument("--scale", type=float, metavar="S", help="state this effective multiplier; likewise")
    said.add_argument("--bake", action="store_true", help="put the multiplier into a factor and state 1: --scale 1 --keep-scale")
    parser.add_argument(
        "--keep-scale", action="store_true", help="let a factor take over what --alpha or --scale change, so that the effect stays"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("-o", "--out", type=Path, metavar="OUT", help="file or folder to write; it appears whole or not at all")
    where.add_argument("--in-place", action="store_true", help="change ADAPTER itself; the new one takes its place when it is proved")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    parser.add_argument("--no-verify", dest="verify", action="store_false", help="do not re-open and prove what was written")
    parser.add_argument("--base", metavar="BASE", help="the base model: a checkpoint file or folder, or a name 'upparam bases' lists")
    add_drop(parser)
    add_threads(parser)
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    """Edit and print the receipt, or show the metadata."""
    from upparam.bases.find import find_base
    from upparam.dialects.base import ReadOptions
    from upparam.errors import UsageError
    from upparam.operations.edit import edit, metadata_of

    read = None if args.base is None else ReadOptions(base=find_base(args.base))
    wanted = _changes(args)
    if not any(value is not None and value != [] and value != {} and value is not False for value in wanted.values()):
        if args.out is not None or args.in_place:
            raise UsageError("nothing to change", remedy="say what with --set, --remove, --dtype, ...; see 'upparam edit --help'")
        facts = metadata_of(args.path, read=read)
        emit(args, facts, lambda: _text(facts))
        return 0
    if args.metadata:
        raise UsageError("--metadata shows and changes nothing", remedy="leave it out, or what is to change")
    receipt = edit(
        args.path,
        args.out,
        in_place=args.in_place,
        read=read,
        force=args.force,
        verify=args.verify,
        drop=args.drop,
        threads=args.threads,
        progress=progress_for(args),
        **wanted,
    )
    return emit_receipt(args, receipt)


def _changes(args: argparse.Namespace) -> dict[str, Any]:
    metadata: dict[str, str | None] = dict(_pair(text, "KEY=VALUE") for text in args.set)
    metadata |= dict.fromkeys(args.unset)
    return {
        "metadata": metadata, "remove": args.remove, "keep": args.keep, "rename": [_pair(text, "OLD=NEW") for text in args.rename],
        "dtype": args.dtype, "alpha": args.alpha, "scale": 1.0 if args.bake else args.scale, "keep_scale": args.keep_scale or args.bake,
    }  # fmt: skip


def _pair(text: str, form: str) -> tuple[str, str]:
    from upparam.errors import UsageError

    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UsageError("a key and a value were expected", expected=form, found=text)
    return key, value


def _text(facts: dict[str, Any]) -> str:
    import json

    from upparam.report.text import one_line

    lines = [f"{', '.join(facts['files'])}: {facts['dialect']}"]
    lines += [f"  {key} = {value}" for key, value in facts["metadata"].items()]
    lines += [f"  config.{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in facts["config"].items()]
    return "\n".join(map(one_line, lines if len(lines) > 1 else [*lines, "  no metadata"]))
