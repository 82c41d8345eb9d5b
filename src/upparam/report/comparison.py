"""What compare found, for people: the verdict and the sentence first, then numbers, then the modules that tell most."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from upparam.operations.compare.models import MOST, ModelComparison, WeightComparison
from upparam.operations.compare.module import SAME, Alike, Angles, ModuleComparison
from upparam.operations.compare.verdict import Comparison
from upparam.report.text import finding_lines, listed, one_line, paper

SHOWN = 24
"""Modules shown unless all are asked for."""


def comparison_text(result: Comparison | ModelComparison, everything: bool = False) -> str:
    """The report. The modules furthest apart are shown, or all of them with `everything`; width only where a terminal is."""
    console = paper()
    for line in [f"{result.first}", f"{result.second}", f"{result.verdict.value}: {result.summary}"]:
        console.print(one_line(line), soft_wrap=True)
    if isinstance(result, Comparison):
        _adapters(console, result, everything)
    else:
        _models(console, result, everything)
    for line in finding_lines(result.findings):
        console.print(one_line(line), soft_wrap=True)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.rstrip().splitlines())


def _adapters(console: Console, result: Comparison, everything: bool) -> None:
    told = [f"{' and '.join(dict.fromkeys(result.dialects))}"]
    bases = [base for base in dict.fromkeys(result.bases) if base]
    told += [f"base {' and '.join(bases)}"] if bases else []
    told += [f"{count} modules {kind}" for kind, count in result.counts().items()]
    if result.norms is not None:
        told.append(f"||dW|| {result.norms[0]:.5g} and {result.norms[1]:.5g}")
    if result.cosine is not None:
        told.append(f"cosine {result.cosine:.6g}, relative distance {_small(result.distance)}")
    console.print(one_line("  " + " · ".join(told)), soft_wrap=True)
    for part in (_scales(result.modules), _extras(result), _alone(result)):
        if part:
            console.print(one_line("  " + part), soft_wrap=True)
    modules = sorted(result.modules, key=lambda module: (module.alike is not Alike.INCOMPARABLE, -(module.distance or 0.0)))
    chosen = result.modules if everything else [module for module in modules if module.alike not in SAME][:SHOWN]
    if chosen:
        console.print(_modules(chosen))
    _more(console, len(result.modules) - len(chosen), bool(chosen))


def _modules(modules: Sequence[ModuleComparison]) -> Table:
    table = Table(box=None, pad_edge=False, show_edge=False)
    table.add_column("target", overflow="fold")
    table.add_column("", no_wrap=True)
    for name in ("rank", "scale", "||dW||_F", "cosine", "distance", "tolerance", "multiplier", "column angles", "row angles"):
        table.add_column(name, justify="right", no_wrap=True)
    for module in modules:
        table.add_row(
            one_line(module.target), module.alike.value, _both(module.ranks), _both(module.scales), _both(module.norms), _number(module.cosine, ".5f"),
            _small(module.distance), _small(module.tolerance), _number(module.multiplier, ".5g"), _angles(module.columns), _angles(module.rows),
        )  # fmt: skip
        if module.reason:
            table.add_row(one_line("  " + module.reason))
    return table


def _models(console: Console, result: ModelComparison, everything: bool) -> None:
    told = [f"base {result.base}", *(f"{count} weights {kind}" for kind, count in result.counts().items())]
    console.print(one_line("  " + " · ".join(told)), soft_wrap=True)
    for word, names in (("first", result.only_first), ("second", result.only_second)):
        if names:
            console.print(one_line(f"  only in the {word}: {listed(names)}"), soft_wrap=True)
    differing = [weight for weight in result.weights if weight.alike not in (Alike.BITS, Alike.ROUNDED)]
    ranked = sorted(differing, key=lambda weight: -(weight.relative or 0.0))
    chosen = result.weights if everything else ranked[:SHOWN]
    if chosen:
        console.print(_weights(chosen))
    _more(console, len(result.weights) - len(chosen), bool(chosen))


def _weights(weights: Sequence[WeightComparison]) -> Table:
    table = Table(box=None, pad_edge=False, show_edge=False)
    table.add_column("weight", overflow="fold")
    table.add_column("", no_wrap=True)
    for name in ("shape", "dtype", "changed", "relative", "||difference||_F", "rank", "largest", "noise floor"):
        table.add_column(name, justify="right", no_wrap=True)
    for weight in weights:
        elements = 1
        for size in weight.shape:
            elements *= size
        changed = "-" if weight.changed is None else f"{weight.changed / max(elements, 1):.1%}"
        rank = f"> {MOST}" if weight.full else _number(weight.rank, "d")
        table.add_row(
            one_line(weight.name), weight.reason or weight.alike.value, "x".join(map(str, weight.shape)), " ".join(dict.fromkeys(weight.dtypes)), changed,
            _small(weight.relative), _number(weight.norm, ".4g"), rank, _small(weight.largest), _small(weight.floor),
        )  # fmt: skip
    return table


def _scales(modules: Sequence[ModuleComparison]) -> str:
    """What the two say about rank, alpha, scale and dtype where they differ."""
    found = []
    for name in ("algorithms", "ranks", "alphas", "scales", "dtypes"):
        pairs = dict.fromkeys(getattr(module, name) for module in modules)
        differing = [pair for pair in pairs if pair[0] != pair[1]]
        if differing:
            found.append(f"{name} {listed((f'{_plain(one)} against {_plain(other)}' for one, other in differing), 3)}")
    return "differing " + "; ".join(found) if found else ""


def _extras(result: Comparison) -> str:
    shown = []
    for extra in result.extras:
        if extra.only is not None:
            shown.append(f"{extra.name} only in the {('first', 'second')[extra.only]}")
        elif extra.alike is Alike.DIFFERENT:
            shown.append(f"{extra.name} differs" + (f" by {extra.distance:.2g}" if extra.distance is not None else ""))
    return f"saved tensors: {listed(shown)}" if shown else ""


def _alone(result: Comparison) -> str:
    parts = []
    for side, word in ((0, "first"), (1, "second")):
        names = [one.target + (" (zero)" if one.norm == 0.0 else "") for one in result.alone if one.only == side]
        if names:
            parts.append(f"only in the {word}: {listed(names)}")
    return "; ".join(parts)


def _more(console: Console, count: int, some: bool) -> None:
    if count:
        console.print(
            f"... and {count} more, shown with --all" if some else f"(--all shows all {count})",
        )


def _both(pair: tuple[float | None, float | None]) -> str:
    one, other = (_number(value, ".4g") for value in pair)
    return one if one == other else f"{one} | {other}"


def _angles(angles: Angles | None) -> str:
    return "-" if angles is None else f"{angles.smallest:.1f} to {angles.largest:.1f} deg ({angles.overlap:.2f})"


def _small(value: float | None) -> str:
    return _number(value, ".2g")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _plain(value: object) -> str:
    return "unknown" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
