"""What a merge will do, decided from headers alone: which delta changes which base tensor, how it lies there, and what does not fit."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from upparam.adapter import Adapter, Extra, ExtraKind, Target
from upparam.algorithms.base import Delta, fits_weight
from upparam.algorithms.experts import ExpertLoRA
from upparam.bases.versions import Older
from upparam.checkpoint import Checkpoint
from upparam.dtypes import DType
from upparam.errors import AmbiguousError, MalformedError, RefusedError
from upparam.findings import Finding, info, warning
from upparam.operations.merge import matching, misfits
from upparam.operations.merge.misfits import Misfit
from upparam.operations.merge.packing import PACKINGS
from upparam.operations.merge.planned import Ingredient, Piece, Plan, Work
from upparam.operations.merge.remarks import (
    idle_blocks,
    idle_globs,
    order_matters,
    other_weights,
    replaced_and_changed,
    stated_dtypes,
    tied_apart,
)
from upparam.operations.merge.rounding import MERGEABLE
from upparam.tensors import Tensor
from upparam.wording import counted

_SCALES = ("scale_weight", "weight_scale_inv", "weight_scale")
"""Names of the tensor beside an fp8 weight that its stored values are multiplied by."""


def make_plan(
    checkpoint: Checkpoint,
    ingredients: Sequence[Ingredient],
    *,
    dtype: DType | None = None,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
) -> Plan:
    """Match every delta and extra to the base.

    `only` and `skip` are globs over target module paths.
    Raises MismatchError listing every target that the base lacks or whose shape differs, RefusedError for extras no merge can place,
    for quantised base weights, for scales that are unknown and for a merge that touches nothing, AmbiguousError for an orientation
    or a prefix that nothing decides.
    """
    plan = Plan(checkpoint, list(ingredients), {}, {}, dtype, [], [])
    problems: list[Misfit] = []
    if dtype is not None:
        _refuse_other_dtype(checkpoint)
    for index, ingredient in enumerate(plan.ingredients):
        _refuse_unplaceable(ingredient.adapter)
        plan.findings += _idle_aids(ingredient)
        _place_deltas(plan, index, ingredient, only, skip, problems)
        _place_extras(plan, ingredient, only, skip, problems)
    misfits.refuse(problems, checkpoint)
    if not plan.works and not plan.added:
        raise RefusedError(
            "the merge would change nothing",
            file=checkpoint.path,
            found=f"{counted(len(plan.skipped), 'target')}, all left out (scale 0, block weight 0, --only or --skip)"
            if plan.skipped
            else "no deltas",
        )
    plan.findings += [*other_weights(plan), *idle_blocks(plan), *idle_globs(plan, only, skip)]
    plan.findings += [*order_matters(plan), *replaced_and_changed(plan), *tied_apart(plan), *stated_dtypes(plan)]
    order = {name: place for place, name in enumerate(checkpoint.tensors)}
    plan.works = dict(sorted(plan.works.items(), key=lambda item: order[item[0]]))
    return plan


def _refuse_unplaceable(adapter: Adapter) -> None:
    extras = [extra for extra in adapter.extras if not _placeable(extra) and extra.kind is not ExtraKind.TRAINING_AID]
    lost = [f"{extra.kind.value} {extra.name}" for extra in extras]
    lost += [f"leftover {name}" for name in adapter.leftovers]
    lost += adapter.conditions
    kinds = list(dict.fromkeys(extra.kind.value for extra in extras))
    kinds += [kind for kind, held in (("leftovers", adapter.leftovers), ("conditions", adapter.conditions)) if held]
    if lost:
        raise RefusedError(
            f"{len(lost)} part{'s' if len(lost) > 1 else ''} of the adapter cannot be merged into weights",
            file=adapter.files[0] if adapter.files else None,
            found=", ".join(lost[:5]) + (" ..." if len(lost) > 5 else ""),
            remedy=f"give {'them' if len(lost) > 1 else 'it'} up with --drop {' --drop '.join(kinds)}",
        )


def _idle_aids(ingredient: Ingredient) -> list[Finding]:
    aids = [extra.name for extra in ingredient.adapter.extras if extra.kind is ExtraKind.TRAINING_AID]
    said = f"{counted(len(aids), 'tensor')} that only training uses: the merge does not depend on them"
    return [info("training-aids", str(ingredient.path), said, aids[0])] if aids else []


def _placeable(extra: Extra) -> bool:
    return extra.kind in (ExtraKind.SAVED_MODULE, ExtraKind.BIAS)


def wanted(name: str, only: Sequence[str], skip: Sequence[str]) -> bool:
    """True when a target passes `--only` and `--skip` globs."""
    return (not only or any(fnmatchcase(name, glob) for glob in only)) and not any(fnmatchcase(name, glob) for glob in skip)


def _place_deltas(plan: Plan, index: int, ingredient: Ingredient, only: Sequence[str], skip: Sequence[str], problems: list[Misfit]) -> None:
    chosen: dict[Target, float] = {}
    for target in ingredient.adapter.deltas:
        weight = ingredient.multiplier * (ingredient.block_weight(target) if ingredient.block_weight else 1.0)
        if weight and wanted(target.module, only, skip):
            chosen[target] = weight
        else:
            plan.skipped.append(str(target))
    adapter = ingredient.adapter
    plan.taken[index] = len(chosen)
    deltas = {target: adapter.deltas[target] for target in chosen}
    spots, missing = matching.place(deltas, plan.checkpoint.shapes, ingredient.base)
    problems += [
        misfits.not_there(plan.checkpoint, target, target.parameter == "bias" and target._replace(parameter="weight") not in missing)
        for target in missing
    ]
    conv1d = _conv1d(plan.checkpoint)
    spots = _experts_settled(plan, spots)
    agreed = _agreed_orientation(plan, spots)
    for spot in spots:
        file, tensor = plan.checkpoint.tensors[spot.name]
        shape = plan.checkpoint.shapes[spot.name]
        transposed = _orientation(ingredient, spot, shape, conv1d, agreed, plan)
        if transposed is None:
            rows = f" rows {spot.place.rows[0]}:{spot.place.rows[1]} of" if spot.place.rows else ""
            said = f"{spot.targets[0]}: shape {spot.delta.shape} against{rows} {spot.name} {shape}"
            problems.append(misfits.other_shape(str(spot.targets[0]), spot.delta.shape, spot.name, shape, said))
            continue
        packing = file.quantised[spot.name].type if spot.name in file.quantised else None
        if packing not in PACKINGS if packing else tensor.dtype.name not in MERGEABLE:
            raise RefusedError(
                "the base weight is quantised or not a float; a merge would have to invent its rounding",
                file=file.path, tensor=spot.name, expected="one of " + ", ".join((*sorted(MERGEABLE), *PACKINGS)), found=packing or tensor.dtype,
                remedy="merge into the unquantised base and quantise the result",
            )  # fmt: skip
        try:
            delta = spot.delta.for_weight(tuple(reversed(shape)) if transposed else shape)
        except MalformedError as problem:
            problems.append(Misfit(f"{spot.targets[0]}: {problem.message} ({problem.found} for {spot.name} {shape})"))
            continue
        delta.known_scale()
        weights = {chosen[target] for target in spot.targets}
        if len(weights) > 1:
            problems.append(Misfit(f"{spot.targets[0]}: parts of one {spot.delta.algorithm} delta with different block weights"))
            continue
        scale = _scale_of(plan, spot.name, tensor)
        work = plan.works.setdefault(spot.name, Work(spot.name, file, tensor, plan.out_dtype(tensor), scale=scale, packing=packing))
        weight = weights.pop()
        work.pieces.append(Piece(delta, spot.place, weight, transposed, index))
        _note_tied(plan, spot.name)
        _place_beside(plan, spot, weight, index, problems)


def _place_beside(plan: Plan, spot: matching.Spot, weight: float, index: int, problems: list[Misfit]) -> None:
    """What a delta brings for other parameters of its module, where the base has them."""
    for parameter, delta in spot.delta.beside().items():
        place = spot.place._replace(parameter=parameter)
        name = f"{place.module}.{parameter}"
        if name not in plan.checkpoint.tensors:
            continue
        file, tensor = plan.checkpoint.tensors[name]
        if not weight_shape(delta, plan.checkpoint.shapes[name], place.rows, False) or tensor.dtype.name not in MERGEABLE:
            problems.append(Misfit(f"{spot.targets[0]}: shape {delta.shape} against {name} {plan.checkpoint.shapes[name]} {tensor.dtype}"))
            continue
        work = plan.works.setdefault(name, Work(name, file, tensor, plan.out_dtype(tensor)))
        work.pieces.append(Piece(delta, place, weight, False, index))


def _scale_of(plan: Plan, name: str, tensor: Tensor) -> Tensor | None:
    """The scale of an fp8 weight. Raises RefusedError for one that is neither a number nor a grid."""
    there = _scale_name(plan.checkpoint, name, tensor)
    if there is None:
        return None
    scale = plan.checkpoint.tensors[there][1]
    if len(scale.shape) > 2 or not scale.dtype.is_float:
        raise RefusedError("a scale of no known form", file=plan.checkpoint.path, tensor=there, found=scale.shape)
    return scale


def _scale_name(checkpoint: Checkpoint, name: str, tensor: Tensor) -> str | None:
    """What a weight's stored values are multiplied by: ComfyUI's `scale_weight`, compressed-tensors' `weight_scale`, DeepSeek's `weight_scale_inv` (per block).

    Sources: comfyanonymous/ComfyUI comfy/ops.py; vllm-project/compressed-tensors quantization/lifecycle/forward.py dequantize;
    deepseek-ai/DeepSeek-V3 inference/kernel.py weight_dequant.
    """
    if not tensor.dtype.name.startswith("float8") or not name.endswith(".weight"):
        return None
    module = name.removesuffix("weight")
    return next((there for ending in _SCALES if (there := module + ending) in checkpoint.tensors), None)


def _refuse_other_dtype(checkpoint: Checkpoint) -> None:
    """Raise RefusedError where a weight is stored with a scale: both would be converted, each by itself, whether the adapter changes the weight or not."""
    for name, (file, tensor) in checkpoint.tensors.items():
        if _scale_name(checkpoint, name, tensor) is not None:
            raise RefusedError(
                "a scaled fp8 weight keeps its dtype: its scale tensor would no longer mean anything",
                file=file.path, tensor=name, remedy="merge without --dtype",
            )  # fmt: skip


def _note_tied(plan: Plan, name: str) -> None:
    if not name.endswith(misfits.EMBEDDINGS):
        return
    head = any(key.endswith(misfits.HEADS) for key in plan.checkpoint.tensors)
    if not head and (misfits.ties_head(plan.checkpoint) or plan.checkpoint.config is None):
        finding = warning(
            "tied-weight", name, "the base ties its output head to this embedding: merging the delta changes both", "no lm_head.weight"
        )
        if finding not in plan.findings:
            plan.findings.append(finding)


def _conv1d(checkpoint: Checkpoint) -> str | None:
    model_type = (checkpoint.config or {}).get("model_type")
    return matching.conv1d_evidence(checkpoint.shapes, model_type if isinstance(model_type, str) else None)


def weight_shape(delta: Delta, shape: tuple[int, ...], rows: tuple[int, int] | None, transposed: bool) -> bool:
    """True when the delta fits a weight of this shape in this orientation (see `fits_weight`)."""
    have = list(shape)
    if transposed:
        if len(have) != 2:
            return False
        have.reverse()
    if rows is not None:
        if rows[1] > have[0]:
            return False
        have[0] = rows[1] - rows[0]
    return fits_weight(delta.shape, tuple(have))


def _agreed_orientation(plan: Plan, spots: Sequence[matching.Spot]) -> bool | None:
    """How the deltas that are not square lie, when they all lie the same way."""
    seen = set()
    for spot in spots:
        fits = _ways(spot, plan.checkpoint.shapes[spot.name])
        if len(fits) == 1:
            seen.add(fits[0])
    return seen.pop() if len(seen) == 1 else None


def _experts_settled(plan: Plan, spots: Sequence[matching.Spot]) -> list[matching.Spot]:
    """Deltas of stacked experts turned the way the base stores them, (experts, out, in) or (experts, in, out).

    Weights that are square are taken to lie as the others of their module do. Raises AmbiguousError when those do not tell.
    """
    ways: dict[str, set[bool]] = {}
    fits: dict[Target, list[ExpertLoRA]] = {}
    for spot in spots:
        if isinstance(spot.delta, ExpertLoRA):
            fits[spot.place] = [delta for delta in (spot.delta, spot.delta.other_way()) if delta.shape == plan.checkpoint.shapes[spot.name]]
            if len(fits[spot.place]) == 1:
                ways.setdefault(spot.place.module, set()).add(fits[spot.place][0].swapped)
    settled: list[matching.Spot] = []
    for spot in spots:
        choices = fits.get(spot.place, [])
        if len(choices) == 2:
            known = ways.get(spot.place.module, set())
            if len(known) != 1:
                raise AmbiguousError(
                    "the experts' weights are square and nothing says whether the base stores them as (out, in) or (in, out)",
                    file=plan.checkpoint.path, tensor=str(spot.targets[0]), found=plan.checkpoint.shapes[spot.name],
                    remedy="leave it out with --skip",
                )  # fmt: skip
            choices = [delta for delta in choices if delta.swapped in known]
        settled.append(spot._replace(delta=choices[0]) if choices else spot)
    return settled


def _ways(spot: matching.Spot, shape: tuple[int, ...]) -> list[bool]:
    return [way for way in (False, True) if weight_shape(spot.delta, shape, spot.place.rows, way)]


def _orientation(
    ingredient: Ingredient, spot: matching.Spot, shape: tuple[int, ...], conv1d: str | None, agreed: bool | None, plan: Plan
) -> bool | None:
    """Whether the base stores this weight as (in, out); None when the delta fits neither way. Raises AmbiguousError when nothing decides."""
    adapter = ingredient.adapter
    fits = _ways(spot, shape)
    if len(fits) < 2:
        return fits[0] if fits else None
    if spot.transposed is not None:
        return spot.transposed
    if len(spot.delta.shape) != 2 or spot.targets[0].parameter != "weight" or getattr(spot.delta, "embedding", False):
        return False
    known = ingredient.base.by_path.get(spot.targets[0].module) if ingredient.base is not None else None
    if known is not None and known.kind:
        return known.kind == "Conv1D"
    conv1d_name = matching.is_conv1d_name(spot.place.module)
    if conv1d is not None and conv1d_name:
        return True
    if conv1d is not None or plan.checkpoint.configs or (adapter.transposed_base is False and not conv1d_name):
        return False
    if adapter.transposed_base is not None:
        return adapter.transposed_base
    if agreed is not None:
        return agreed
    if adapter.layout == "reference" and adapter.base is not None and adapter.base.confidence >= 0.9:
        return False
    raise AmbiguousError(
        "the weight is square and nothing says whether the base stores it as (out, in) or (in, out)",
        file=plan.checkpoint.path, tensor=str(spot.targets[0]), found=shape,
        remedy="put the base's config.json beside it, or name the base folder",
    )  # fmt: skip


def _place_extras(plan: Plan, ingredient: Ingredient, only: Sequence[str], skip: Sequence[str], problems: list[Misfit]) -> None:
    extras = [extra for extra in ingredient.adapter.extras if _placeable(extra)]
    if not ingredient.multiplier:
        return
    chosen = [extra for extra in extras if wanted(extra.name.rpartition(".")[0], only, skip)]
    plan.skipped += [extra.name for extra in extras if extra not in chosen]
    if not chosen:
        return
    if ingredient.multiplier != 1.0:
        plan.findings.append(
            warning(
                "whole-replacement", chosen[0].name, f"{counted(len(chosen), 'saved tensor', 'replaces', 'replace')} the base's whole, whatever the scale given",
                f"scale {ingredient.multiplier:g}",
            )
        )  # fmt: skip
    parts = {extra: Target(*_split(extra.name)) for extra in chosen}
    anchors = [*ingredient.adapter.deltas, *parts.values()]
    older = Older(plan.checkpoint.shapes)
    for component, targets in matching.by_component(parts.values()).items():
        known = [target for target in anchors if target in targets or target.module.partition(".")[0] == component or not component]
        change = matching.renaming(known, plan.checkpoint.shapes, component)
        for extra, target in parts.items():
            if target not in targets:
                continue
            path = change(target.module)
            there = None if path is None else target._replace(module=path)
            found = there if there is not None and there.name in plan.checkpoint.tensors else older(extra.name)
            if found is None:
                _add(plan, target, extra, problems)
            elif found.rows is not None:
                problems.append(Misfit(f"{extra.name}: {found} in the base, where only a whole weight is replaced", "have PEFT merge it"))
            else:
                _replace(plan, found.name, extra, problems)


def _split(name: str) -> tuple[str, None, str]:
    module, _, parameter = name.rpartition(".")
    return module, None, parameter


def _add(plan: Plan, target: Target, extra: Extra, problems: list[Misfit]) -> None:
    """A saved module that the base does not have (a classifier head) becomes a new tensor; a bias of an unknown module is a mismatch."""
    if extra.kind is ExtraKind.BIAS:
        problems.append(Misfit(f"{extra.name}: not in the base"))
    elif target.module.rpartition(".")[2] in ("lm_head", "embed_out") and misfits.ties_head(plan.checkpoint):
        problems.append(misfits.not_there(plan.checkpoint, target))
    elif not any(file.holds(extra.name) for file in plan.checkpoint.files):
        problems.append(Misfit(f"{extra.name}: not in the base, which has no component of this name"))
    elif any(name.endswith("." + extra.name) for name in plan.checkpoint.tensors):
        problems.append(Misfit(f"{extra.name}: several places in the base bear this name"))
    else:
        plan.added[extra.name] = extra.tensor
        dtype = plan.out_dtype(extra.tensor)
        said = "a saved module that the base does not have is written as a new tensor, in " + (
            "its own dtype" if dtype == extra.tensor.dtype else "the dtype asked for"
        )
        plan.findings.append(warning("added-tensor", extra.name, said, f"{extra.tensor.shape} {dtype}"))


def _replace(plan: Plan, name: str, extra: Extra, problems: list[Misfit]) -> None:
    file, tensor = plan.checkpoint.tensors[name]
    if plan.checkpoint.shapes[name] != extra.tensor.shape:
        shape = plan.checkpoint.shapes[name]
        said = f"{extra.name}: saved as {extra.tensor.shape}, the base has {shape}"
        problems.append(misfits.other_shape(extra.name, extra.tensor.shape, name, shape, said))
        return
    if name in file.quantised or (tensor.dtype.name not in MERGEABLE and tensor.dtype != extra.tensor.dtype):
        raise RefusedError(
            "the base holds a saved tensor quantised or in another kind of number", file=file.path, tensor=name,
            expected=extra.tensor.dtype, found=file.quantised[name].type if name in file.quantised else tensor.dtype,
            remedy="merge into the unquantised base and quantise the result, or give it up with --drop " + extra.kind.value,
        )  # fmt: skip
    work = plan.works.setdefault(name, Work(name, file, tensor, plan.out_dtype(tensor)))
    if work.replacement is not None or work.scale is not None:
        twice = work.replacement is not None
        why = "replaced by two adapters" if twice else "the base holds it as scaled fp8"
        cure = "merge one adapter after the other: what the last one brings stays" if twice else None
        problems.append(Misfit(f"{extra.name}: {why}", cure))
        return
    work.replacement = extra.tensor
    _note_tied(plan, name)
