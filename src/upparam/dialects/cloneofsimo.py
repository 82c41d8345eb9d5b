"""cloneofsimo: numbers instead of names. `unet:17:up`, `text_encoder:3:down`, textual inversions as `<s1>`, scale baked in.

Source: cloneofsimo/lora lora_diffusion/lora.py (save_safeloras_with_embeds, parse_safeloras, save_all). The number is the module's place
in a walk through the model, so only the base says which module is meant (`upparam.bases.traversal`). Metadata holds the class names the
walk looked for as a JSON list, `unet:17:rank`, and `<embed>` for tokens. The older form is a torch list [up0, down0, up1, down1, ...] per
model: `x.pt` for the UNet, `x.text_encoder.pt` and `x.ti.pt` beside it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from upparam.adapter import Adapter, BaseHint, Extra, ExtraKind, Target
from upparam.algorithms import called
from upparam.algorithms.base import BAKED, Delta
from upparam.algorithms.lora import LoRA
from upparam.bases import inventory, traversal
from upparam.bases.base import Base
from upparam.bases.traversal import Indexed
from upparam.containers.base import TensorFile
from upparam.dialects.base import Bundle, Match, NamedTensors, Package, ReadOptions
from upparam.dialects.carried import carried
from upparam.dialects.placing import alike, base_of
from upparam.dialects.refusing import other_scale, refuse
from upparam.errors import DeadAdapterError, MalformedError, Problem, RefusedError
from upparam.findings import error
from upparam.patterns import regex
from upparam.tensors import Tensor
from upparam.wording import counted

_NAME = regex(r"(unet|text_encoder):(\d+):(up|down)")
_EMBED = "<embed>"
_DEFAULT = {"unet": ("CrossAttention", "Attention", "GEGLU"), "text_encoder": ("CLIPAttention",)}
_EXTENDED = ("ResnetBlock2D", *_DEFAULT["unet"])
_ATTENTION = ("CrossAttention", "Attention")
_RULES = {"unet": ("cloneofsimo-unet", "cloneofsimo-unet-late"), "text_encoder": ("cloneofsimo-text",)}
_BASES = ("sd1.5", "sd2")
"""The pipelines its trainer knew."""

Walk = Sequence[Indexed]


class Numbered(NamedTuple):
    """The factors of one component by number, and the classes the walk looked for."""

    factors: dict[int, dict[str, Tensor]]
    classes: tuple[str, ...]


class Cloneofsimo:
    """The dialect."""

    name = "cloneofsimo"
    title = "cloneofsimo/lora (numbered modules)"
    writable = True
    algorithms: tuple[str, ...] = ("lora",)

    def match(self, file: TensorFile) -> Match | None:
        """Names `unet:<number>:up`, or a torch list of matrices that pair as up and down."""
        hits = sum(1 for name in file.tensors if _NAME.fullmatch(name))
        if hits:
            embeds = sum(1 for value in file.metadata.values() if value == _EMBED)
            evidence = [f"{hits} of {len(file.tensors)} names are <unet|text_encoder>:<number>:<up|down>"]
            if embeds:
                evidence.append(f"{embeds} tokens marked {_EMBED} in the metadata")
            return Match(self.name, round(0.99 * min(1.0, (hits + embeds) / len(file.tensors)), 3), tuple(evidence))
        pairs = _listed(file)
        if pairs:
            return Match(self.name, 0.85, (f"a list of {2 * len(pairs)} matrices that pair as up (out, r) and down (r, in)",))
        return None

    def gather(self, file: TensorFile, siblings: Sequence[TensorFile]) -> list[TensorFile]:
        """A list file's text encoder and tokens lie beside it."""
        if any(_NAME.fullmatch(name) for name in file.tensors):
            return [file]
        stem = _stem(file.path)
        wanted = {f"{stem}.pt", f"{stem}.text_encoder.pt", f"{stem}.ti.pt"} - {file.name}
        return [file, *(other for other in siblings if other.name in wanted)]

    def read(self, bundle: Bundle, options: ReadOptions) -> Adapter:
        """The adapter; numbers become modules where a base explains every one of them."""
        adapter = Adapter({}, self.name, metadata=dict(bundle.main.metadata), files=tuple(str(file.path) for file in bundle.files))
        found: dict[str, Numbered] = {}
        for file in bundle.files:
            adapter.findings += file.findings
            found |= _numbered(file, adapter)
        for component, numbered in found.items():
            _without_orphans(component, numbered, adapter)
        deltas = {
            component: {
                number: _lora(bundle.main, f"{component}:{number}", factors) for number, factors in sorted(numbered.factors.items())
            }
            for component, numbered in found.items()
        }
        if not any(deltas.values()):
            raise DeadAdapterError("no number has both its up and its down factor", file=bundle.main.path)
        walks = _explain(found, deltas, adapter, options.base)
        adapter.layout = self.name if walks is None else "reference"
        for component, numbers in deltas.items():
            for number, delta in numbers.items():
                module = f"{component}:{number}" if walks is None else walks[component][number].module
                adapter.deltas[Target(module)] = delta
        return adapter

    def write(self, adapter: Adapter, options: Mapping[str, Any]) -> Package:
        """One safetensors file. Raises RefusedError for modules outside its walks, walks with gaps and scales other than 1."""
        problems: list[str | Problem] = [
            f"{extra.kind.value} {extra.name}" for extra in adapter.extras if extra.kind is not ExtraKind.TEXTUAL_INVERSION
        ]
        embeds = {extra.name: extra.tensor for extra in adapter.extras if extra.kind is ExtraKind.TEXTUAL_INVERSION}
        problems += [
            f"textual-inversion {token}: several vectors for one token" for token, vectors in embeds.items() if vectors.shape[0] != 1
        ]
        problems += _unfit(adapter)
        refuse(self.name, problems)
        spelling = adapter.spelling if adapter.dialect == self.name else {}
        numbers = _numbers(adapter, base_of(adapter, options), spelling)
        embeds = {token: vectors.reshape(vectors.shape[1:]) for token, vectors in embeds.items()}
        if spelling.get("form") == "list":
            return _lists(adapter, numbers, embeds)
        tensors: dict[str, Tensor] = dict(embeds)
        metadata = {
            key: value
            for key, value in carried(adapter, self.name).items()
            if not re.match(r"(unet|text_encoder)(:|$)", key) and value != _EMBED
        }
        metadata |= dict.fromkeys(embeds, _EMBED)
        for component, (deltas, classes) in numbers.items():
            metadata[component] = classes
            for number, delta in enumerate(deltas):
                tensors[f"{component}:{number}:up"], tensors[f"{component}:{number}:down"] = delta.up, delta.down
                metadata[f"{component}:{number}:rank"] = str(delta.rank)
        return Package({"lora.safetensors": NamedTensors(tensors, metadata)}, folder=False)


def _stem(path: Path) -> str:
    """`x` of `x.pt`, `x.text_encoder.pt` and `x.ti.pt`."""
    return path.name.removesuffix(".pt").removesuffix(".text_encoder").removesuffix(".ti")


def _listed(file: TensorFile) -> list[tuple[Tensor, Tensor]]:
    """(up, down) pairs of a file that is a list of matrices, [] for any other."""
    values = file.structure
    if not isinstance(values, list) or not values or len(values) % 2 or not all(isinstance(value, Tensor) for value in values):
        return []
    pairs = list(zip(values[::2], values[1::2], strict=True))
    fits = all(len(up.shape) == len(down.shape) in (2, 4) and up.shape[1] == down.shape[0] for up, down in pairs)
    return pairs if fits else []


def _numbered(file: TensorFile, adapter: Adapter) -> dict[str, Numbered]:
    """The components a file holds; tokens and unknown tensors go to the adapter."""
    pairs = _listed(file)
    if pairs:
        adapter.spelling["form"] = "list"
        component = "text_encoder" if file.name.endswith(".text_encoder.pt") else "unet"
        return {component: Numbered({number: {"up": up, "down": down} for number, (up, down) in enumerate(pairs)}, _DEFAULT[component])}
    found: dict[str, Numbered] = {}
    for name, tensor in file.tensors.items():
        match = _NAME.fullmatch(name)
        if match is not None:
            component, number, role = match.groups()
            numbered = found.setdefault(component, Numbered({}, _classes(file, component)))
            numbered.factors.setdefault(int(number), {})[role] = tensor
        elif file.metadata.get(name) == _EMBED or file.name.endswith(".ti.pt"):
            vectors = tensor.reshape((1, *tensor.shape)) if len(tensor.shape) == 1 else tensor
            adapter.extras.append(Extra(ExtraKind.TEXTUAL_INVERSION, name, vectors))
        else:
            adapter.leftovers[name] = tensor
    for component in found:
        if component in file.metadata:
            adapter.spelling[f"classes {component}"] = file.metadata[component]
    return found


def _classes(file: TensorFile, component: str) -> tuple[str, ...]:
    text = file.metadata.get(component)
    if text is None:
        return _DEFAULT[component]
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise MalformedError(f"metadata {component} is not a JSON list: {problem}", file=file.path) from problem
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise MalformedError(f"metadata {component} is not a JSON list of class names", file=file.path, found=text[:80])
    return tuple(value)


def _without_orphans(component: str, numbered: Numbered, adapter: Adapter) -> None:
    for number, factors in list(numbered.factors.items()):
        if len(factors) < 2:
            del numbered.factors[number]
            adapter.leftovers |= {f"{component}:{number}:{role}": tensor for role, tensor in factors.items()}
            adapter.findings.append(error("orphan", f"{component}:{number}", "a factor without its partner: the module cannot be applied"))


def _lora(file: TensorFile, name: str, factors: Mapping[str, Tensor]) -> LoRA:
    try:
        return LoRA(factors["up"], factors["down"], BAKED)
    except MalformedError as problem:
        raise MalformedError(problem.message, file=file.path, tensor=name, expected=problem.expected, found=problem.found) from None


def _explain(
    found: Mapping[str, Numbered], deltas: Mapping[str, Mapping[int, LoRA]], adapter: Adapter, base: Base | None
) -> dict[str, Walk] | None:
    """The walk of each component whose shapes every number agrees with, and the base noted in the adapter; None when no base fits."""
    fits: list[tuple[Base, dict[str, str], dict[str, Walk]]] = []
    for candidate in [base] if base is not None else map(inventory.load, _BASES):
        rules = {component: _rule(candidate, component, numbered.classes, deltas[component]) for component, numbered in found.items()}
        if not all(rules.values()):
            continue
        named = {component: rule for component, rule in rules.items() if rule is not None}
        fits.append((candidate, named, {component: _walk(candidate, rule, found[component].classes) for component, rule in named.items()}))
    if len({entry[0].name for entry in fits}) != 1:
        return None
    chosen, chosen_rules, walks = fits[0]
    count = sum(len(numbers) for numbers in deltas.values())
    whole = all(len(deltas[component]) == len(walk) for component, walk in walks.items())
    facts = [f"all {count} numbers have the shapes of {chosen.name}'s modules in the order {', '.join(chosen_rules.values())}"]
    facts.append("every module of the walk is there" if whole else "the walk has more modules than the file")
    adapter.base = BaseHint(chosen.name, 1.0 if base is not None else 0.95 if whole else 0.6, tuple(facts), stated=base is not None)
    adapter.spelling |= {f"rule {component}": rule for component, rule in chosen_rules.items()}
    return walks


def _rule(base: Base, component: str, classes: tuple[str, ...], deltas: Mapping[int, LoRA]) -> str | None:
    """The first walk that gives every number a module of its shape."""
    for rule in _RULES[component]:
        walk = _walk(base, rule, classes)
        if all(number < len(walk) and alike(delta.shape, walk[number].shape) for number, delta in deltas.items()):
            return rule
    return None


def _walk(base: Base, rule: str, classes: tuple[str, ...]) -> Walk:
    order: Any = traversal.RULES[rule]
    walk: Walk = order(base, classes)
    return walk


def _unfit(adapter: Adapter) -> list[str | Problem]:
    problems: list[str | Problem] = []
    for target, delta in adapter.deltas.items():
        if type(delta) is not LoRA or delta.embedding or delta.mid is not None or target.rows or target.parameter != "weight":
            problems.append(f"{target}: {_what(target, delta)}, which has no form here")
        elif delta.known_scale() != 1.0:
            problems.append(other_scale(str(target), delta))
    return problems


def _what(target: Target, delta: Delta) -> str:
    """What kind of delta it is, for a person to read."""
    if target.parameter != "weight":
        return f"a delta of the {target.parameter}"
    if type(delta) is not LoRA:
        return f"{called(delta.algorithm)} delta"
    return "a Tucker core" if delta.mid is not None else "an embedding" if delta.embedding else "a part of a fused weight"


def _numbers(adapter: Adapter, base: Base | None, spelling: Mapping[str, str]) -> dict[str, tuple[list[LoRA], str]]:
    """Component -> (deltas by number, class list as JSON). Raises RefusedError when the modules are not exactly those of a walk."""
    if adapter.layout == "cloneofsimo":
        return _as_numbered(adapter, spelling)
    if adapter.layout != "reference" or base is None:
        raise RefusedError(
            "numbers follow from the base, and which base this adapter is for is not known",
            file=adapter.files[0] if adapter.files else None, remedy="name it with --base",
        )  # fmt: skip
    found: dict[str, tuple[list[LoRA], str]] = {}
    left = {target.module: delta for target, delta in adapter.deltas.items()}
    for component, rules in _RULES.items():
        own = [module for module in left if module.startswith(component + ".")]
        if not own:
            continue
        said = spelling.get(f"classes {component}")
        options = (
            [tuple(json.loads(said))]
            if said
            else [_ATTENTION, _DEFAULT["unet"], _EXTENDED]
            if component == "unet"
            else [_DEFAULT[component]]
        )
        walks = [(classes, _walk(base, spelling.get(f"rule {component}", rules[0]), classes)) for classes in options]
        # The smallest walk that reaches every module.
        classes, walk = next(((names, walk) for names, walk in walks if {item.module for item in walk} >= set(own)), walks[-1])
        outside = [module for module in own if module not in {item.module for item in walk}]
        missing = [item.module for item in walk if item.module not in left]
        if outside or missing:
            what = (
                counted(len(outside), "module", "is", "are") + " outside every walk this dialect knows"
                if outside
                else counted(len(missing), "module", "of the walk is", "of the walk are") + " not changed, and a number cannot be left out"
            )
            shown = outside or missing
            raise RefusedError(what, tensor=shown[0], found=", ".join(shown[:5]) + (" ..." if len(shown) > 5 else ""))
        found[component] = ([_as_lora(left.pop(item.module)) for item in walk], said or json.dumps(list(classes)))
    if left:
        raise RefusedError(
            f"{counted(len(left), 'module', 'belongs', 'belong')} to a component this dialect does not know",
            found=", ".join(list(left)[:5]),
        )
    return found


def _as_numbered(adapter: Adapter, spelling: Mapping[str, str]) -> dict[str, tuple[list[LoRA], str]]:
    found: dict[str, tuple[list[LoRA], str]] = {}
    for component, classes in _DEFAULT.items():
        own = {
            int(target.module.split(":")[1]): delta for target, delta in adapter.deltas.items() if target.module.startswith(component + ":")
        }
        if sorted(own) != list(range(len(own))):
            raise RefusedError(
                "a number cannot be left out", tensor=component, expected=f"0 to {max(own)}", found=counted(len(own), "number")
            )
        if own:
            found[component] = (
                [_as_lora(own[number]) for number in sorted(own)],
                spelling.get(f"classes {component}", json.dumps(list(classes))),
            )
    return found


def _as_lora(delta: Delta) -> LoRA:
    assert isinstance(delta, LoRA)  # `_unfit` has refused every other
    return delta


def _lists(adapter: Adapter, numbers: Mapping[str, tuple[list[LoRA], str]], embeds: Mapping[str, Tensor]) -> Package:
    """The older form: a torch list per component, tokens as a dict."""
    stem = _stem(Path(adapter.files[0])) if adapter.files else "lora_weight"
    package = Package()
    for component, (deltas, _) in numbers.items():
        values = [factor for delta in deltas for factor in (delta.up, delta.down)]
        name = f"{stem}.pt" if component == "unet" else f"{stem}.{component}.pt"
        package.files[name] = NamedTensors({str(number): value for number, value in enumerate(values)}, container="torch", structure=values)
    if embeds:
        package.files[f"{stem}.ti.pt"] = NamedTensors(dict(embeds), container="torch")
    return package


dialect = Cloneofsimo()
