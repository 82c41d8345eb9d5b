"""What compare found, for people: the verdict and the sentence first, then numbers, then the modules that tell most."""

from __future__ import annotations

from collections.abc import Sequence

from upparam.operations.compare.models import MOST, ModelComparison, WeightComparison
from upparam.operations.compare.module import SAME, Alike, Angles, ModuleComparison
from upparam.operations.compare.verdict import Comparison
from upparam.report.table import Column, table
from upparam.report.text import finding_lines, listed, one_line, terminal_width
from upparam.wording import counted

SHOWN = 24
"""Modules shown unless all are asked for."""


def comparison_text(result: Comparison | ModelComparison, everything: bool = False) -> str:
    """The report. The modules furthest apart are shown, or all of them with `everything`; colour and width only where a terminal is."""
    lines = [f"{result.first}", f"{result.second}", f"{result.verdict.value}: {result.summary}"]
    lines += _adapters(result, everything) if isinstance(result, Comparison) else _models(result, everything)
    return "\n".join(one_line(part).rstrip() for part in [*lines, *finding_lines(result.findings)])


def _adapters(result: Comparison, everything: bool) -> list[str]:
    told = [f"{' and '.join(dict.fromkeys(result.dialects))}"]
    bases = [base for base in dict.fromkeys(result.bases) if base]
    told += [f"base {' and '.join(bases)}"] if bases else []
    told += [f"{counted(count, 'module')} {kind}" for kind, count in result.counts().items()]
    if result.norms is not None:
        told.append(f"||dW|| {result.norms[0]:.5g} and {result.norms[1]:.5g}")
    if result.cosine is not None:
        told.append(f"cosine {result.cosine:.6g}, relative distance {_small(result.distance)}")
    lines = ["  " + " · ".join(told)]
    lines += ["  " + part for part in (_scales(result.modules), _extras(result), _alone(result)) if part]
    modules = sorted(result.modules, key=lambda module: (module.alike is not Alike.INCOMPARABLE, -(module.distance or 0.0)))
    chosen = result.modules if everything else [module for module in modules if module.alike not in SAME][:SHOWN]
    return [*lines, *(_modules(chosen) if chosen else ()), *_more(len(result.modules) - len(chosen), bool(chosen))]


_NUMBERS = ("rank", "scale", "||dW||_F", "cosine", "distance", "tolerance", "multiplier", "column angles", "row angles")


def _modules(modules: Sequence[ModuleComparison]) -> list[str]:
    rows = [
        (
            module.target, module.alike.value, _both(module.ranks), _both(module.scales), _both(module.norms), _number(module.cosine, ".5f"),
            _small(module.distance), _small(module.tolerance), _number(module.multiplier, ".5g"), _angles(module.columns), _angles(module.rows),
        )
        for module in modules
    ]  # fmt: skip
    columns = [Column("target", False), Column("", False), *map(Column, _NUMBERS)]
    lines = table(columns, rows, terminal_width())
    return [*lines, *(f"  {module.target}: {module.reason}" for module in modules if module.reason)]


def _models(result: ModelComparison, everything: bool) -> list[str]:
    told = [f"base {result.base}", *(f"{counted(count, 'weight')} {kind}" for kind, count in result.counts().items())]
    lines = ["  " + " · ".join(told)]
    for word, names in (("first", result.only_first), ("second", result.only_second)):
        if names:
            lines.append(f"  only in the {word}: {listed(names)}")
    differing = [weight for weight in result.weights if weight.alike not in (Alike.BITS, Alike.ROUNDED)]
    ranked = sorted(differing, key=lambda weight: -(weight.relative or 0.0))
    chosen = result.weights if everything else ranked[:SHOWN]
    return [*lines, *(_weights(chosen) if chosen else ()), *_more(len(result.weights) - len(chosen), bool(chosen))]


_MEASURES = ("shape", "dtype", "changed", "relative", "||difference||_F", "rank", "largest", "noise floor")


def _weights(weights: Sequence[WeightComparison]) -> list[str]:
    rows = []
    for weight in weights:
        elements = 1
        for size in weight.shape:
            elements *= size
        changed = "-" if weight.changed is None else f"{weight.changed / max(elements, 1):.1%}"
        rank = f"> {MOST}" if weight.full else _number(weight.rank, "d")
        rows.append((
            weight.name, weight.reason or weight.alike.value, "x".join(map(str, weight.shape)), " ".join(dict.fromkeys(weight.dtypes)), changed,
            _small(weight.relative), _number(weight.norm, ".4g"), rank, _small(weight.largest), _small(weight.floor),
        ))  # fmt: skip
    return table([Column("weight", False), Column("", False), *map(Column, _MEASURES)], rows, terminal_width())


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


def _more(count: int, some: bool) -> list[str]:
    return [] if not count else [f"... and {count} more, shown with --all" if some else f"(--all shows all {count})"]


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
