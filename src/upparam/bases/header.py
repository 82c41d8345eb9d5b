"""A base from the user's own files: tensor names and shapes of a checkpoint, or a config.json alone. No tensor data is read.

A file's order is not the order in which the model's code walks its modules (safetensors sorts by size or name). Where every module of
the file is one of a shipped inventory, that inventory's order, names and classes are used; else the names are sorted naturally and the
evidence says that traversal order is unknown.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upparam.bases import inventory
from upparam.bases.base import Base, Module, with_text_model
from upparam.bases.recognise import recognise
from upparam.errors import AmbiguousError, UnreadableError
from upparam.patterns import regex
from upparam.wording import counted

if TYPE_CHECKING:
    from upparam.bases.layouts import LayoutMap

_TRANSPOSED_TYPES = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"}
"""model_type values whose attention and mlp weights are Conv1D, stored as (in, out)."""
_CONV1D = regex(r"(^|\.)(c_attn|c_proj|c_fc|q_attn)$")
_TIED = regex(
    r"lm_head|lm_head\.decoder|embed_out|proj_out|vocab_projector|(cls\.)?predictions\.decoder|(text_encoder(_[23])?\.)?(encoder|decoder)\.embed_tokens"
)
"""Modules whose weight files may leave out because it is another module's."""
VOCABULARY = regex(r"(^|\.)(lm_head|embed_tokens|wte|word_embeddings|embed_in|embed_out|shared|decoder|vocab_projector|proj_out)$")
"""Modules with one row per token: fine-tuning adds some."""
_COMPONENT = regex(r"(unet|transformer|text_encoder(_[23])?)\.")

_DENOISERS = ("model.diffusion_model.", "diffusion_model.")
"""What ComfyUI puts in front of a denoiser's names, beside text encoders and a VAE: the authors' names of Flux, SDXL ... follow."""
_PIPELINE = regex(r"(vae|vqvae|movq|safety_checker|image_encoder|text_encoder(_[2-4])?|transformer_2|prior|connectors)\.")
"""Components of pipelines that an inventory may not list: adapters do not change them, or their model is a base of its own."""


def base_from_path(path: Path | str) -> Base:
    """The base at `path`: a weight file, a (sharded) model folder, a folder of components, or a config.json without weights.

    Raises UnreadableError when there is neither weights nor a config that a shipped inventory matches, and what opening raises.
    """
    path = Path(path)
    config_only = _config_only(path)
    if config_only is not None:
        return _from_configs(config_only, path)
    from upparam.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(path)
    config = checkpoint.config or {}
    return base_from_shapes(checkpoint.shapes, config=config, name=str(path))


def base_from_shapes(shapes: Mapping[str, tuple[int, ...]], *, config: Mapping[str, Any] | None = None, name: str = "") -> Base:
    """The base whose tensors have these names and shapes (components in front, as in `unet.conv_in.weight`)."""
    config = config or {}
    packed = {tensor.rsplit(".weight.", 1)[0] for tensor in shapes if tensor.endswith((".weight.absmax", ".weight.SCB"))}
    found = [
        Module(path, "", shape, f"{path}.bias" in shapes)
        for tensor, shape in shapes.items()
        if (path := tensor.removesuffix(".weight")) != tensor and path not in packed
    ]
    if not found and not packed:
        raise UnreadableError(
            "no module weights in it", file=name or None, found=counted(len(shapes), "tensor"), expected="names ending in .weight"
        )
    found = _with_conv1d(found, config)
    evidence = [counted(len(found), "weight") + (f" in the header of {name}" if name else "")]
    if packed:
        evidence.append(f"{counted(len(packed), 'weight', 'is', 'are')} stored quantised, so shapes do not show")
    found = [module._replace(path=with_text_model(module.path)) for module in found]
    known = _same_as_inventory(found, packed) or _in_a_layout(shapes, found)
    resized = None if known is not None else _of_other_widths(shapes)
    if resized is not None:
        return Base(name or "unnamed", resized.modules, resized.family, (*evidence, *resized.evidence), dict(config))
    if known is not None:
        return Base(known.name, known.modules, known.family, (*evidence, *known.evidence))
    if packed and not found:
        raise UnreadableError("every weight is quantised and no inventory has these modules", file=name or None)
    found.sort(key=lambda module: _natural(module.path))
    evidence.append("no shipped inventory has exactly these modules: sorted by name, the order in which the model walks them is not known")
    hints = recognise({module.path: module.canonical for module in found if len(module.shape) > 1})
    family = inventory.known()[hints[0].name].family if hints else ""
    return Base(name or "unnamed", tuple(found), family, tuple(evidence), dict(config))


def base_from_config(config: Mapping[str, Any]) -> Base | None:
    """The inventory whose config a config.json matches in every value both hold; None when none does.

    Raises AmbiguousError when several match equally well and their modules differ.
    """
    kind = "_class_name" if "_class_name" in config else "model_type"
    scored: dict[str, tuple[int, int]] = {}
    for name, theirs in inventory.data("_configs.json").items():
        if theirs.get(kind) == config.get(kind) is not None:
            agreed = _agree(theirs, config)
            if agreed:
                scored[name] = agreed, -sum(key not in config for key in theirs)
    if not scored:
        return None
    best = max(scored.values())
    names = [name for name, score in scored.items() if score == best]
    names = [name for name in names if inventory.known()[name].variant_of not in names]
    stated = inventory.resolve(str(config.get("_name_or_path", "")))
    chosen = inventory.load(stated if stated in names else names[0])
    different = [name for name in names if inventory.load(name).modules != chosen.modules]
    if different and stated not in names:
        raise AmbiguousError("the config fits several bases", found=", ".join(names), remedy="name one of them")
    facts = [f"{best[0]} values of the config are those of {chosen.name}"]
    alike = [name for name in names if name != chosen.name and name not in different]
    if alike:
        facts.append(f"{', '.join(alike)} has the same modules")
    return Base(chosen.name, chosen.modules, chosen.family, tuple(facts))


def _agree(theirs: Mapping[str, Any], config: Mapping[str, Any]) -> int:
    """How many values agree; 0 when one contradicts or fewer than three are there to compare."""
    score = 0
    for key, value in theirs.items():
        if key not in config:
            continue
        have = config[key]
        if isinstance(value, dict):
            inner = _agree(value, have) if isinstance(have, Mapping) else 0
            if not inner:
                return 0
            score += inner
        elif have != value:
            return 0
        else:
            score += 1
    return score if score >= min(3, len(theirs)) else 0


def _config_only(path: Path) -> dict[str, Any] | None:
    """The configs at a path that holds no weights, by component; None when there are weights (or nothing at all) to open."""
    from upparam.checkpoint import WEIGHT_SUFFIXES

    if path.is_file():
        return {"": _read(path)} if path.suffix == ".json" and not path.name.endswith(".index.json") else None
    if not path.is_dir() or any(member.suffix in WEIGHT_SUFFIXES for member in path.rglob("*")):
        return None
    folders = {"": path, **{name: path / name for name in ("unet", "transformer")}}
    return {name: _read(folder / "config.json") for name, folder in folders.items() if (folder / "config.json").is_file()} or None


def _from_configs(configs: Mapping[str, Any], path: Path) -> Base:
    for config in configs.values():
        base = base_from_config(config)
        if base is not None:
            return Base(base.name, base.modules, base.family, (f"{path} holds a config and no weights", *base.evidence))
    shown = ", ".join(
        f"{key} {value}" for config in configs.values() for key, value in config.items() if key in ("model_type", "_class_name")
    )
    raise UnreadableError(
        "a config without weights that no shipped inventory matches", file=path, found=shown or "no model type", remedy="name the weights"
    )


def _read(path: Path) -> dict[str, Any]:
    from upparam.containers.side import read_json

    return read_json(path) or {}


def _with_conv1d(modules: Iterable[Module], config: Mapping[str, Any]) -> list[Module]:
    """The modules with Conv1D where the config's model type says so, or a fused qkv three times as wide as tall does."""
    modules = list(modules)
    wide = any(module.path.endswith("attn.c_attn") and module.shape[-1:] == (3 * module.shape[0],) for module in modules)
    if not wide and config.get("model_type") not in _TRANSPOSED_TYPES:
        return modules
    return [module._replace(kind="Conv1D") if _CONV1D.search(module.path) and len(module.shape) == 2 else module for module in modules]


def _same_as_inventory(modules: list[Module], packed: set[str]) -> Base | None:
    """The inventory these modules are, in its order and under its names; None when none is.

    Every module the inventory knows must have its shape; modules it does not know (a task head, a VAE) may be few or lie in components
    it does not list, and follow at the end.
    """
    core = [module for module in modules if module.path.startswith(("unet.", "transformer."))]
    core = core if len(core) > 50 else modules
    best: tuple[int, Base] | None = None
    for hint in recognise({module.path: module.canonical for module in core if len(module.shape) > 1}):
        base = inventory.load(hint.name)
        for prefix in _prefixes(core[0].path, base):
            aligned = _align(base, modules, prefix, packed)
            if aligned is not None and (best is None or aligned[0] < best[0]):
                best = aligned
    return best[1] if best else None


def _in_a_layout(shapes: Mapping[str, tuple[int, ...]], modules: list[Module]) -> Base | None:
    """The inventory whose other naming (`bases.layouts`) these tensors follow, under its reference names."""
    from upparam.bases import layouts

    inside = [module for module in modules if module.path.startswith(_DENOISERS)] or modules
    best: tuple[int, str, Base] | None = None
    hints = recognise({module.path: module.canonical for module in inside if len(module.shape) > 1})
    bare = {name[len(prefix) :]: shape for name, shape in shapes.items() for prefix in _DENOISERS if name.startswith(prefix)}
    for names in (shapes, bare):
        if best is not None:
            break
        for hint in hints:
            for base in (inventory.load(hint.name), *map(inventory.load, hint.lookalikes)):
                for name in layouts.available(base)[1:]:
                    there = _fitting(layouts.layout(base, name), names)
                    if there and (best is None or there > best[0]):
                        best = (there, name, base)
    if best is None:
        return None
    _, name, base = best
    facts = (f"names and shapes are those of {base.name} in layout {name}: its reference names, order and classes are used",)
    return Base(base.name, base.modules, base.family, facts)


def _of_other_widths(shapes: Mapping[str, tuple[int, ...]]) -> Base | None:
    """A Stable Diffusion of other widths in a single file, with the file's shapes: an inventory that names every weight of its UNet and has few more."""
    from upparam.bases import layouts

    denoiser = {name for name in shapes if name.startswith("model.diffusion_model.") and name.endswith(".weight")}
    if not any(name.startswith("model.diffusion_model.input_blocks.") for name in denoiser):
        return None
    best: tuple[int, Base] | None = None
    for known in ("sd1.5", "sd2", "sdxl", "sdxl-refiner"):
        base = inventory.load(known)
        there = layouts.layout(base, "sgm" if known.startswith("sdxl") else "ldm")
        mine: dict[str, tuple[int, ...]] = {}
        for foreign, parts in there.foreign.items():
            shape = shapes.get(there.tensor_name(foreign))
            if shape and shape[0] % len(parts) == 0 and not any(part.transposed for part in parts):
                mine |= {part.module: (shape[0] // len(parts), *shape[1:]) for part in parts}
        wanted = sum(module.path.startswith("unet.") for module in base.modules)
        held = sum(path.startswith("unet.") for path in mine)
        if held == len(denoiser) >= 0.9 * wanted and (best is None or len(mine) > best[0]):
            modules = tuple(module._replace(shape=mine[module.path]) for module in base.modules if module.path in mine)
            fact = f"names are those of {known} in layout {there.name}, shapes are others: its reference names, order and classes are used"
            best = len(mine), Base(known, modules, base.family, (fact,))
    return None if best is None else best[1]


def _fitting(layout: LayoutMap, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """How many weights of a layout are among the tensors with the right number of elements; 0 when one differs or most are missing."""
    found = 0
    for foreign, parts in layout.foreign.items():
        shape = shapes.get(layout.tensor_name(foreign))
        if shape is not None:
            if prod(shape) != sum(prod(part.shape) for part in parts):
                return 0
            found += 1
    return found if found >= 0.3 * len(layout.foreign) else 0


def _align(base: Base, modules: list[Module], prefix: str, packed: set[str]) -> tuple[int, Base] | None:
    """How many modules base and file do not share, and the base as the file has it; None when they contradict.

    A vocabulary of another size is no contradiction: the file's shape then stands.
    """
    mine = {prefix + module.path: module for module in modules}
    quantised = {prefix + path for path in packed}
    components = {module.path.split(".", 1)[0] for module in base.modules}
    strangers = [path for path in mine if path not in base.by_path]
    unexplained = [path for path in strangers if path.split(".", 1)[0] in components or not _PIPELINE.match(path)]
    resized = {path: module.shape for path, module in mine.items() if path in base.by_path and base.by_path[path].shape != module.shape}
    grown = all(VOCABULARY.search(path) and shape[1:] == base.by_path[path].shape[1:] for path, shape in resized.items())
    if not grown or len(unexplained) > 0.05 * len(mine):
        return None
    roots = {path.split(".", 1)[0] for path in (*mine, *quantised)}
    inside = [module for module in base.modules if module.path.split(".", 1)[0] in roots or not _COMPONENT.match(module.path)]
    lacking = [
        module.path for module in inside if module.path not in mine and module.path not in quantised and not _TIED.fullmatch(module.path)
    ]
    if len(lacking) > 0.4 * len(inside):
        return None
    absent = set(lacking)
    kept = [module._replace(shape=resized.get(module.path, module.shape)) for module in inside if module.path not in absent]
    kept += sorted((mine[path]._replace(path=path) for path in strangers), key=lambda module: _natural(module.path))
    facts = [f"names and shapes are those of {base.name}: its order and classes are used"]
    if prefix:
        facts.append(f"names there have '{prefix}' in front")
    if resized:
        facts.append(f"another vocabulary: {next(iter(resized))} has {next(iter(resized.values()))[0]} rows")
    if lacking:
        facts.append(f"{counted(len(lacking), 'module', 'of it is', 'of it are')} not in the file, such as {lacking[0]}")
    if strangers:
        facts.append(
            f"{counted(len(strangers), 'module', 'it does not have follows', 'it does not have follow')} in order of names, such as {strangers[0]}"
        )
    return len(lacking) + len(strangers) + len(resized), Base(base.name, tuple(kept), base.family, tuple(facts))


def _prefixes(path: str, base: Base) -> list[str]:
    """What may stand in front of a file's name in the base's: nothing, or what a module ending in it has before."""
    found = [""]
    for module in base.modules:
        if module.path.endswith("." + path):
            found.append(module.path[: -len(path)])
    return found


def _natural(path: str) -> list[tuple[int, str]]:
    return [(int(word), "") if word.isdigit() else (-1, word) for word in path.split(".")]
