"""Generate src/upparam/bases/data and docs/bases.md from config values: no weights, no network.

    python tools/make_inventories.py            # rebuild everything (about two minutes)
    python tools/make_inventories.py --only sdxl --check

Every model is built on torch's meta device; its weighted modules are listed in named_modules() order and written as a small program
in which repeated layers are one block with a range. `--check` compares instead of writing. The classes come from transformers and
diffusers; where transformers 5 renames modules, tools/inventories puts back the names of the public files.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "src")]

from inventories import Entry, Row, entries  # noqa: E402
from upparam.bases.base import Base, Module  # noqa: E402
from upparam.bases.inventory import load  # noqa: E402
from upparam.bases.layouts import find  # noqa: E402

DATA = ROOT / "src" / "upparam" / "bases" / "data"


def pack(rows: Sequence[Row]) -> list[Any]:
    """Rows as a program: a leaf is [path, kind, shape] (with a 1 when there is a bias), a block [prefix, start, stop, program]."""
    program: list[Any] = []
    at = 0
    while at < len(rows):
        numbered = _numbered(rows[at].path)
        if numbered is None:
            path, kind, shape, bias = rows[at]
            program.append([path, kind, list(shape), *([1] if bias else [])])
            at += 1
            continue
        prefix, index = numbered
        start = at
        while at < len(rows) and _numbered(rows[at].path) == (prefix, index):
            at += 1
        head = f"{prefix}{index}."
        body = pack([row._replace(path=row.path.removeprefix(head)) for row in rows[start:at]])
        last = program[-1] if program else None
        if last and len(last) == 4 and isinstance(last[1], int) and last[0] == prefix and last[2] == index and last[3] == body:
            last[2] = index + 1
        else:
            program.append([prefix, index, index + 1, body])
    return program


def _numbered(path: str) -> tuple[str, int] | None:
    """The path up to its first number and that number; None when no segment after a number is left."""
    words = path.split(".")
    for at, word in enumerate(words[:-1]):
        if word.isdigit():
            return "".join(f"{before}." for before in words[:at]), int(word)
    return None


def expanded(entry: Entry) -> list[Module]:
    """The entry's modules."""
    return [Module(*row) for row in entry.rows()]


_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)")


def fingerprints(bases: dict[str, Iterable[tuple[str, tuple[int, ...]]]]) -> dict[str, list[Any]]:
    """What the recogniser looks up: path with numbers as '#' -> [shape as (out, in, *kernel), how many, largest numbers, bases]...

    Bases are positions in `_index.json`. Modules that no adapter changes by a delta (norms) are left out.
    """
    found: dict[str, dict[str, list[Any]]] = {}
    for position, modules in enumerate(bases.values()):
        mine: dict[tuple[str, tuple[int, ...]], list[list[int]]] = {}
        for path, shape in modules:
            if len(shape) > 1:
                mine.setdefault((_NUMBER.sub("#", path), shape), []).append([int(word) for word in _NUMBER.findall(path)])
        for (template, shape), numbers in mine.items():
            key = [list(shape), len(numbers), [max(column) for column in zip(*numbers, strict=True)]]
            found.setdefault(template, {}).setdefault(json.dumps(key), [*key, []])[3].append(position)
    return {template: list(shapes.values()) for template, shapes in found.items()}


def originals(base: Base) -> list[tuple[str, tuple[int, ...]]]:
    """The denoiser's modules under the names its authors gave it (layout `original`), the component in front; only names that differ."""
    layout = find(base, "original")
    if layout is None:
        return []
    component = base.modules[0].path.split(".", 1)[0]
    return [
        (f"{component}.{foreign}", (layout.rows(foreign), *parts[0].shape[1:]))
        for foreign, parts in layout.foreign.items()
        if f"{component}.{foreign}" not in base.by_path
    ]


def main() -> int:
    """Build, then write or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="names of the bases to look at (implies --check)")
    parser.add_argument("--check", action="store_true", help="compare with what is shipped instead of writing")
    args = parser.parse_args()
    chosen = [entry for entry in entries() if args.only is None or entry.name in args.only]
    if args.only is not None:
        wrong = differing(chosen)
        print("\n".join(wrong) or "equal")
        return 1 if wrong else 0
    files = build(chosen)
    if args.check:
        wrong = [str(path) for path, text in files.items() if path.read_text() != text]
        print("\n".join(wrong) or "equal")
        return 1 if wrong else 0
    for path in DATA.iterdir():
        if path not in files:
            path.unlink()
    for path, text in files.items():
        path.write_text(text)
    return 0


def differing(chosen: Sequence[Entry]) -> list[str]:
    """The names whose freshly traced modules differ from the shipped ones."""
    return [entry.name for entry in chosen if expanded(entry) != list(load(entry.name).modules)]


def build(chosen: Sequence[Entry]) -> dict[Path, str]:
    """The text of every generated file."""
    bases = {}
    for entry in chosen:
        print(entry.name, file=sys.stderr, flush=True)
        bases[entry.name] = expanded(entry)
    families: dict[str, dict[str, Any]] = {}
    for entry in chosen:
        members = families.setdefault(entry.family, {})
        members[entry.name] = borrowed(entry.name, list(members), bases) or pack([Row(*module) for module in bases[entry.name]])
    index = {
        entry.name: {"family": entry.family, "title": entry.title, "ids": entry.ids, "modules": len(bases[entry.name])}
        | ({"variant_of": entry.variant_of} if entry.variant_of else {})
        for entry in chosen
    }
    configs = {entry.name: entry.config for entry in chosen if entry.config}
    files = {DATA / f"{family}.json": lines(members) for family, members in families.items()}
    files |= {
        DATA / "_index.json": lines(index),
        DATA / "_configs.json": lines(configs),
        DATA / "_shapes.json": lines(
            fingerprints({name: [(module.path, module.canonical) for module in modules] for name, modules in bases.items()})
        ),
    }
    by_authors = {name: originals(Base(name, tuple(modules))) for name, modules in bases.items()}
    files |= {DATA / "_original.json": lines(fingerprints(by_authors))}
    return files | {ROOT / "docs" / "bases.md": document(chosen, bases, sum(map(len, files.values())))}


def borrowed(name: str, earlier: Sequence[str], bases: dict[str, list[Module]]) -> list[Any] | None:
    """The base as another of its family with a few other shapes; None when it is too different from all."""
    mine = bases[name]
    for other in earlier:
        theirs = bases[other]
        if len(theirs) == len(mine) and all(a._replace(shape=()) == b._replace(shape=()) for a, b in zip(mine, theirs, strict=True)):
            changed = {a.path: list(a.shape) for a, b in zip(mine, theirs, strict=True) if a.shape != b.shape}
            if len(changed) <= 8:
                return ["=", other, changed]
    return None


def document(chosen: Sequence[Entry], bases: dict[str, list[Module]], size: int) -> str:
    """docs/bases.md."""
    text = [
        "# Bases",
        "",
        "Generated by `tools/make_inventories.py`; do not edit. `upparam bases` prints the same list, `upparam bases NAME --modules` every module.",
        "",
        f"upparam knows {len(chosen)} base models as data: every module that holds a weight, in the order in which the model's code walks",
        f"them, with class, shape and whether there is a bias. All of it is {size / 1000:.0f} kB of JSON (repeated layers are one block with a range),",
        "built on torch's meta device from the values of the public models' `config.json`: no weights are needed to make it or to use it.",
        "Any other base is read from the header of your own file with `--base PATH`.",
        "",
        "Names are the *reference layout*: those of the public checkpoint files under the head class people fine-tune, which is what PEFT",
        "shows below `base_model.model.`. So GPT-2 and BLOOM have `transformer.` in front although their files leave it out, Mixtral has",
        "`block_sparse_moe.experts.0.w1`, ViT has `vit.encoder.layer.0.attention.attention.query`: transformers 5 renames or fuses some of",
        "these when it loads them, the files keep these names (and where it renames, an adapter's newer names are found in them, `bases/versions.py`). Pipelines put the component first: `unet.`, `transformer.`, `text_encoder.`,",
        "`text_encoder_2.`, `text_encoder_3.`. The text and vision bases are, module for module, those of transformers 4.57.",
        "",
    ]
    family = None
    for entry in chosen:
        if entry.family != family:
            family = entry.family
            text += ["", f"## {family}", "", "| name | model | modules | also known as |", "|---|---|---|---|"]
        ids = ", ".join(f"`{identifier}`" for identifier in entry.ids)
        text.append(f"| `{entry.name}` | {entry.title} | {len(bases[entry.name])} | {ids} |")
    return "\n".join(text) + "\n"


def lines(members: dict[str, Any]) -> str:
    """A JSON object, one member a line."""
    return (
        "{\n" + ",\n".join(f"{json.dumps(name)}: {json.dumps(value, separators=(',', ':'))}" for name, value in members.items()) + "\n}\n"
    )


if __name__ == "__main__":
    sys.exit(main())
