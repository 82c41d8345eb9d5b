"""What inspect found, as a table for people."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from upparam.report.text import listed, one_line, paper


def inspection_text(facts: dict[str, Any]) -> str:
    """The report: one row per module, then extras, leftovers, totals, metadata and hashes. Width only where a terminal is."""
    console = paper()
    console.print(one_line(f"{facts['path']} ({facts['dialect']}: {', '.join(facts['files'])})"), soft_wrap=True)
    console.print(_modules(facts["modules"]))
    for title, rows in (("extras", facts["extras"]), ("leftovers (explained by no rule)", facts["leftovers"])):
        if rows:
            console.print(f"{title}:")
            for row in rows:
                console.print(
                    one_line(f"  {row['name']}  {tuple(row['shape'])} {row['dtype']} {row.get('kind', '')}"),
                    soft_wrap=True,
                )
    totals = facts["totals"]
    ranks = ", ".join(f"{entry['count']} of rank {entry['rank']}" for entry in totals["ranks"])
    norm = "unknown" if totals["frobenius"] is None else f"{totals['frobenius']:.6g}"
    console.print(
        f"totals: {totals['targets']} targets, {listed(totals['algorithms'])}, {ranks}, {totals['parameters']:,} parameters, "
        f"{listed(totals['dtypes'])}, ||dW|| {norm}, {totals['nonfinite']} NaN/Inf",
        soft_wrap=True,
    )  # fmt: skip
    for title in ("metadata", "config"):
        if facts[title]:
            console.print(f"{title} (verbatim):")
            for key, value in facts[title].items():
                console.print(one_line(f"  {key}: {value}"), soft_wrap=True)
    for entry in facts["hashes"]:
        autov3 = f"  AutoV3 {entry['autov3'][:12]} ({entry['autov3']})" if entry["autov3"] else "  AutoV3: only safetensors has one"
        console.print(
            f"{one_line(entry['path'])}\n  sha256 {entry['sha256']}\n{autov3}\n  legacy {entry['legacy']}",
            soft_wrap=True,
        )
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text.rstrip()


def _modules(modules: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, show_edge=False)
    table.add_column("target", overflow="fold")
    for name in ("algorithm", "rank", "alpha", "scale", "factors", "dtype", "||dW||_F", "||dW||_2", "stable rank", "zeros", "NaN/Inf"):
        table.add_column(name, justify="right" if name not in ("algorithm", "factors", "dtype") else "left", no_wrap=True)
    for module in modules:
        shapes = " ".join(f"{role} {'x'.join(map(str, shape))}" for role, shape in module["shapes"].items())
        dtypes = listed(dict.fromkeys(module["dtypes"].values()))
        table.add_row(
            one_line(module["target"]), module["algorithm"], _number(module["rank"]), _number(module["alpha"]), _number(module["scale"]), shapes, dtypes,
            _number(module["frobenius"]), _number(module["spectral"]), _number(module["stable_rank"]), f"{module['zeros']:.1%}", str(module["nonfinite"]),
        )  # fmt: skip
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
