"""What inspect found, as a table for people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from upparam.findings import Finding
from upparam.report.table import Column, table
from upparam.report.text import finding_lines, listed, one_line, terminal_width
from upparam.wording import counted

_OF_NOTHING = "e3b0c442"
"""sha256 of no bytes."""
_COLUMNS = (
    Column("target", False), Column("algorithm", False), Column("rank"), Column("alpha"), Column("scale"), Column("factors", False),
    Column("dtype", False), Column("||dW||_F"), Column("||dW||_2"), Column("stable rank"), Column("zeros"), Column("NaN/Inf"),
)  # fmt: skip


def inspection_text(facts: dict[str, Any]) -> str:
    """The report: one row per module, then extras, leftovers, totals, findings, metadata and hashes. As wide as the terminal, if there is one."""
    files = facts["files"]
    beside = "" if list(map(str, files)) == [facts["path"]] else f": {', '.join(files)}"
    lines = [one_line(f"{facts['path']} ({facts['dialect']}{beside})"), *_modules(facts["modules"])]
    for title, rows in (("extras", facts["extras"]), ("leftovers (explained by no rule)", facts["leftovers"])):
        if rows:
            lines.append(f"{title}:")
            lines += [one_line(f"  {row['name']}  {_shape(row['shape'])} {row['dtype']} {row.get('kind', '')}").rstrip() for row in rows]
    totals = facts["totals"]
    ranks = [f"{entry['count']} of rank {entry['rank']}" for entry in totals["ranks"]]
    told = [
        counted(totals["targets"], "target"), listed(totals["algorithms"]), *ranks, counted(totals["parameters"], "parameter"),
        listed(totals["dtypes"]), f"||dW|| {_norm(facts)}", f"{totals['nonfinite']:,} NaN/Inf",
    ]  # fmt: skip
    lines.append("totals: " + ", ".join(part for part in told if part))
    lines += [one_line(text) for text in finding_lines(Finding.from_facts(finding) for finding in facts["findings"])]
    for title in ("metadata", "config"):
        if facts[title]:
            lines.append(f"{title} (verbatim):")
            lines += [one_line(f"  {key}: {_verbatim(value)}") for key, value in facts[title].items()]
    for entry in facts["hashes"]:
        autov3 = f"  AutoV3 {entry['autov3'][:12]} ({entry['autov3']})" if entry["autov3"] else "  AutoV3: only safetensors has one"
        legacy = entry["legacy"] + (
            " (of nothing: the file ends before the 1 MiB at which it begins)" if entry["legacy"] == _OF_NOTHING else ""
        )
        lines += [one_line(entry["path"]), f"  sha256 {entry['sha256']}", autov3, f"  legacy {legacy}"]
    return "\n".join(lines)


def choices_text(facts: dict[str, Any]) -> str:
    """The adapters of a file that holds several, one a line."""
    lines = [one_line(f"{facts['path']}: {len(facts['adapters'])} adapters in one file; --adapter NAME shows one")]
    for one in facts["adapters"]:
        if "problem" in one:
            lines.append(one_line(f"  {one['name']}: {one['problem']}"))
            continue
        ranks = listed(entry["rank"] for entry in one["ranks"])
        told = [
            listed(one["algorithms"]), f"rank {ranks}" if ranks else "", counted(one["targets"], "target"), counted(one["parameters"], "parameter"),
            counted(one["extras"], "extra") if one["extras"] else "", f"scale {listed(one['scales']) or 'unknown'}",
        ]  # fmt: skip
        lines.append(one_line(f"  {one['name']}: {', '.join(part for part in told if part)} ({one['dialect']})"))
    return "\n".join(lines)


def _modules(modules: Sequence[dict[str, Any]]) -> list[str]:
    rows = [
        (
            module["target"], module["algorithm"], _number(module["rank"]), _number(module["alpha"]), _number(module["scale"]),
            " ".join(f"{role} {_shape(shape)}" for role, shape in module["shapes"].items()), listed(dict.fromkeys(module["dtypes"].values())),
            _number(module["frobenius"]), _number(module["spectral"]), _number(module["stable_rank"]), f"{module['zeros']:.1%}",
            str(module["nonfinite"]),
        )
        for module in modules
    ]  # fmt: skip
    return table(_COLUMNS, [[one_line(cell) for cell in row] for row in rows], terminal_width())


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _norm(facts: dict[str, Any]) -> str:
    """The norm of all deltas together, and of how many where some have none."""
    totals, modules = facts["totals"], facts["modules"]
    dependent = sum(module["dependent"] for module in modules)
    why = [f"{dependent} depend on the base's weights and have no dW without them"] if dependent else []
    if totals["frobenius"] is None:
        return "unknown" + "".join(f" ({reason})" for reason in why)
    told = [] if totals["frobenius_of"] == len(modules) else [f"of {totals['frobenius_of']} targets", *why]
    return f"{totals['frobenius']:.6g}" + (f" ({'; '.join(told)})" if told else "")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _verbatim(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
