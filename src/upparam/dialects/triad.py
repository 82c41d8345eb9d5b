"""The triad: `up-param.bin` + `down-param.bin` + a config, in one folder or as keys of one torch file (a seed archive).

Each file holds one tensor, a dict or list of tensors by module, or is one of a numbered row of files; or one file holds both factors of
each module (`triad_pairs.py`). Torch, npy, npz, safetensors or headerless. Whatever the files do not name (modules, alpha, shapes) is taken
from the config, the base or the user, and never guessed in silence. `write` also notes in the config everything else an adapter holds, so that it comes back bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from upparam.adapter import Adapter
from upparam.algorithms import ALGORITHMS
from upparam.algorithms.base import UNKNOWN, ScaleRule, Scaling
from upparam.algorithms.lora import LoRA
from upparam.containers import member_source
from upparam.containers.base import TensorFile
from upparam.containers.side import read_json
from upparam.dialects import triad_whole
from upparam.dialects.base import Bundle, Match, NamedTensors, Package, ReadOptions
from upparam.dialects.triad_files import Found, Label, collect, component, components, half, keyed, label, unworded, whole
from upparam.dialects.triad_naming import name_modules, name_parts
from upparam.dialects.triad_pairs import paired, sureness, thin
from upparam.dtypes import DTYPES
from upparam.errors import AmbiguousError, DeadAdapterError, MalformedError, UpparamError, UsageError
from upparam.findings import info, warning
from upparam.tensors import Tensor
from upparam.wording import counted

CONFIG = "config.json"
"""What `split` writes beside the factors."""
_CONFIGS = (CONFIG, "adapter_config.json", "lora_config.json")
_ALPHA, _RANK, _SCALE = (
    ("lora_alpha", "alpha", "network_alpha"),
    ("r", "rank", "lora_rank", "network_dim", "lora_dim"),
    ("scale", "scaling", "lora_scale"),
)
_LISTED = 8
"""Readings of a headerless file that a refusal lists."""
_CLEAR = 0.8
"""How likely a reading of a headerless file must be to be taken without asking."""
_ALPHA_BYTES = 64
"""Bytes of a file that holds alpha alone."""
_SUFFIX = {"torch": ".bin", "npy": ".npz", "raw": ".raw"}


class Triad:
    """The dialect; see the module's docstring."""

    name = "triad"
    title = "triad: up-param + down-param + config"
    writable = True
    algorithms = tuple(ALGORITHMS)
    verbatim = True
    """It holds whatever an adapter of another dialect holds."""

    def match(self, file: TensorFile) -> Match | None:
        """By keys such as "up-param.bin"; else by the file's name, where the tensors are long and thin as factors are."""
        keys = keyed(file)
        if keys:
            return Match(self.name, 0.97, (f"keys {', '.join(keys)}",))
        halves = paired(file)
        if halves:
            return Match(self.name, *sureness(halves, len(file.tensors)))
        told = label(file.name)
        if told is None or not file.tensors:
            return None
        note = _note(file) if told.param else None
        if note is not None and told.role in note.get("roles", ()):
            return Match(self.name, 1.0, (f"named {file.name}", f"listed in {CONFIG}"))
        if told.role not in ("up", "down"):
            return None
        if file.container == "raw":
            sure = 0.6 if told.param else 0.4
            return Match(self.name, sure, (f"named {file.name}", "bytes without a header"))
        slim = [tensor for tensor in file.tensors.values() if thin(tensor.shape)]
        if len(slim) < len(file.tensors):
            return None
        shown = ", ".join(f"{list(tensor.shape)}" for tensor in list(slim)[:3])
        evidence = (f"named {file.name}", f"{counted(len(slim), 'tensor')} long and thin as factors are: {shown}")
        if told.role in file.name.lower() and half(file.tensors) == told.role:
            # Another dialect's names, but one half of them, as the file's name says: the other half lies in the other file.
            return Match(self.name, 0.98, (*evidence, f"all of them {told.role} factors by their names"))
        return Match(self.name, 0.93 if told.param else 0.75, evidence)

    def gather(self, file: TensorFile, siblings: Sequence[TensorFile]) -> list[TensorFile]:
        """Files of the same folder whose names differ only in role and number; where these are whole, also those of other components."""
        told = label(file.name)
        if told is None:
            return [file]
        own = {key.role for key in keyed(file).values()}
        if {"up", "down"} <= own or paired(file):
            return [file]
        beside = [other for other in siblings if other.path.parent == file.path.parent]
        mates = [other for other in beside if _mates(told, label(other.name))]
        return [file, *mates, *_companions(told, [file, *mates], beside)]

    def read(self, bundle: Bundle, options: ReadOptions) -> Adapter:
        """The adapter. Raises DeadAdapterError naming the missing factor, AmbiguousError listing candidates where nothing decides."""
        found = collect(bundle.files)
        config, config_name = _config(bundle, found)
        note = config.get(triad_whole.KEY)
        if isinstance(note, dict) and "modules" in note:
            adapter = _whole(bundle, found, note, config_name)
            if options.base is not None:
                triad_whole.placed(adapter, options.base)
            return adapter
        adapter = Adapter({}, self.name, config=config, files=tuple(str(file.path) for file in bundle.files))
        adapter.findings = [finding for file in bundle.files for finding in file.findings]
        parts = components(bundle.files)
        if len(parts) == 1:
            name_modules(adapter, self._pairs(adapter, bundle, config, config_name, options), config, bundle, options)
        else:
            bundles = {component: Bundle(files, bundle.folder) for component, files in parts.items()}
            name_parts(
                adapter,
                {component: self._pairs(adapter, part, config, config_name, options) for component, part in bundles.items()},
                config, bundles, options,
            )  # fmt: skip
        if any(delta.scale is None for delta in adapter.deltas.values()):
            adapter.findings.append(
                warning(
                    "scale-missing", bundle.main.name, "factors called A and B, whose multiplier their writers keep in code",
                    "give it with --alpha or --scale",
                )
            )  # fmt: skip
        elif any(delta.alpha is None and delta.scaling.rule is ScaleRule.ALPHA_OVER_RANK for delta in adapter.deltas.values()):
            adapter.findings.append(
                warning(
                    "alpha-missing", bundle.folder.name or bundle.main.name, "no alpha in the files: the scale is taken as 1.0, the triad's rule",
                    "give --alpha if the trainer used another",
                )
            )  # fmt: skip
        return adapter

    def _pairs(
        self, adapter: Adapter, bundle: Bundle, config: Mapping[str, Any], config_name: str, options: ReadOptions
    ) -> dict[str | int | None, LoRA]:
        """The LoRAs of some files by module; what makes none goes to the adapter's leftovers."""
        found = unworded(collect(bundle.files))
        _refuse_lone(bundle, found)
        rank = _rank(config, options, config_name)
        pairs: dict[str | int | None, LoRA] = {}
        for key, roles in found.factors.items():
            if "up" not in roles or "down" not in roles:
                adapter.leftovers |= {f"{key}.{role}": tensor for role, tensor in roles.items()}
                adapter.findings.append(warning("orphan", str(key), "a factor without its partner", ", ".join(roles)))
                continue
            roles = _headed(key, roles, found, rank, options, adapter)
            alpha = roles["alpha"].scalar() if "alpha" in roles else None
            up, down = _turned(key, roles["up"], roles["down"], rank, bundle, adapter)
            try:
                pairs[key] = LoRA(up, down, _scaling(config, alpha, options, config_name, known=not found.unscaled), roles.get("mid"))
            except MalformedError as problem:
                raise MalformedError(
                    problem.message,
                    file=bundle.main.path,
                    tensor=None if key is None else str(key),
                    expected=problem.expected,
                    found=problem.found,
                ) from None
        adapter.leftovers |= found.extras
        return pairs

    def write(self, adapter: Adapter, options: Mapping[str, Any]) -> Package:
        """`up-param`, `down-param`, a file for each further kind of factor, `extras-param`, and `config.json`.

        `options["format"]` is torch, npy or raw; by default that of the files it came in, else torch. Raises RefusedError for deltas
        without factors of their own.
        """
        form = str(options.get("format") or _format_of(adapter))
        if form not in _SUFFIX:
            raise UsageError("no such format", expected=", ".join(_SUFFIX), found=form)
        factors = {target: triad_whole.factors_of(target, delta) for target, delta in adapter.deltas.items()}
        files: dict[str, dict[str, Tensor]] = {}
        for target, roles in factors.items():
            for role, tensor in roles.items():
                files.setdefault(role, {})[str(target)] = tensor
        if adapter.extras:
            files["extras"] = {f"{extra.kind.value}:{extra.name}": extra.tensor for extra in adapter.extras}
        note = triad_whole.described(adapter) | {"roles": list(files)}
        package = Package()
        if form == "raw":
            note["raw"] = {}
            for role, tensors in files.items():
                for number, (name, tensor) in enumerate(tensors.items()):
                    filename = f"{role}-param.{number:04}.raw"
                    note["raw"][filename] = [name, tensor.dtype.name, list(tensor.shape)]
                    package.files[filename] = NamedTensors({name: tensor}, container="raw")
        else:
            for role, tensors in files.items():
                package.files[f"{role}-param{_SUFFIX[form]}"] = NamedTensors(tensors, container="torch" if form == "torch" else "npz")
        alphas = {delta.alpha for delta in adapter.deltas.values()}
        ranks = {delta.rank for delta in adapter.deltas.values()}
        config = {"r": ranks.pop() if len(ranks) == 1 else None, "lora_alpha": alphas.pop() if len(alphas) == 1 else None}
        config = {key: value for key, value in config.items() if value is not None}
        text = json.dumps({**config, triad_whole.KEY: note}, indent=1, ensure_ascii=False) + "\n"
        package.files[CONFIG] = text.encode()
        return package


def _format_of(adapter: Adapter) -> str:
    """That of the files of an adapter that was split; torch for any other."""
    ending = Path(adapter.files[0]).suffix if adapter.found_as == Triad.name and adapter.files else ""
    return next((form for form, suffix in _SUFFIX.items() if suffix == ending), "torch")


def _note(file: TensorFile) -> Mapping[str, Any] | None:
    """What `split` noted in the config beside a file; None where nothing readable of that kind is there."""
    try:
        note = (read_json(file.path.parent / CONFIG) or {}).get(triad_whole.KEY)
    except UpparamError:
        return None
    return note if isinstance(note, dict) and isinstance(note.get("roles", []), list) else None


def _mates(one: Label, other: Label | None) -> bool:
    return other is not None and other.rest == one.rest


def _companions(told: Label, own: Sequence[TensorFile], beside: Sequence[TensorFile]) -> list[TensorFile]:
    """The files of other components of a pipeline, both factors of each, where the names say no other difference (`lora_te_up.pt`)."""
    mine, words = component(told)
    if not mine or not whole(own):
        return []
    others = [other for other in beside if (named := label(other.name)) is not None and component(named)[1] == words]
    found = {name: files for name, files in components(others).items() if name not in ("", mine) and whole(files)}
    return [file for files in found.values() for file in files]


def _config(bundle: Bundle, found: Found) -> tuple[dict[str, Any], str]:
    """The config beside the factors, with what a seed archive itself says; and what to call it in messages."""
    for name in _CONFIGS:
        beside = bundle.side_json(name)
        if beside is not None:
            return {**_alpha_file(bundle), **found.values, **beside}, name
    return {**_alpha_file(bundle), **found.values}, bundle.main.name


def _alpha_file(bundle: Bundle) -> dict[str, Any]:
    """Alpha from a file that holds nothing but the number (`alpha`, `alpha.txt`). Raises MalformedError where it holds something else."""
    for name in ("alpha", "alpha.txt"):
        source = member_source(bundle.folder / name)
        if source is None:
            continue
        text = source.read(0, min(source.size, _ALPHA_BYTES)).decode("utf-8", "replace").strip()
        try:
            return {_ALPHA[0]: float(text)}
        except ValueError:
            raise MalformedError("not a number", file=bundle.folder / name, expected="alpha alone", found=repr(text[:20])) from None
    return {}


def _whole(bundle: Bundle, found: Found, note: Mapping[str, Any], config_name: str) -> Adapter:
    """An adapter that `split` wrote."""
    factors: dict[Any, dict[str, Tensor]] = {str(key): dict(roles) for key, roles in found.factors.items()}
    extras = dict(found.extras)
    shapes = note.get("raw")
    if isinstance(shapes, dict):
        factors, extras = {}, {}
        for file in bundle.files:
            told, how = label(file.name), shapes.get(file.name)
            if told is None or not isinstance(how, list) or len(how) != 3 or how[1] not in DTYPES:
                continue
            source = next(iter(file.tensors.values())).source
            from upparam.containers import raw

            tensor = raw.as_tensor(source, raw.RawGuess(DTYPES[how[1]], tuple(how[2]), 1.0))
            if told.role == "extras":
                extras[how[0]] = tensor
            else:
                factors.setdefault(how[0], {})[told.role] = tensor
    _refuse_missing(bundle, note, factors)
    adapter = triad_whole.restored(note, factors, extras, config_name)
    adapter.files = tuple(str(file.path) for file in bundle.files)
    adapter.findings = [finding for file in bundle.files for finding in file.findings]
    wanted = {str(target) for target in adapter.deltas}
    adapter.leftovers = {f"{key}.{role}": tensor for key, roles in factors.items() if key not in wanted for role, tensor in roles.items()}
    return adapter


def _refuse_missing(bundle: Bundle, note: Mapping[str, Any], factors: Mapping[Any, Mapping[str, Tensor]]) -> None:
    """Raise DeadAdapterError when a whole factor file of a split adapter is gone."""
    have = {role for roles in factors.values() for role in roles}
    listed = note.get("roles", ["up", "down"]) if note.get("modules") else []
    lost = [role for role in listed if isinstance(role, str) and role not in have and role != "extras"] if isinstance(listed, list) else []
    if lost:
        _dead(bundle, lost[0], len(note["modules"]), sorted(have))


def _refuse_lone(bundle: Bundle, found: Found) -> None:
    have = {role for roles in found.factors.values() for role in roles}
    for role, partner in (("up", "down"), ("down", "up")):
        if role in have and partner not in have:
            _dead(bundle, partner, len(found.factors))


def _dead(bundle: Bundle, missing: str, modules: int, here: Sequence[str] = ()) -> None:
    have = {"up": "down", "down": "up"}.get(missing, "other")
    named = bundle.main.name
    partner = named.replace(have, missing) if have in named else f"{missing}-param"
    held = " and ".join(here) or have
    raise DeadAdapterError(
        f"the {held} factor{'s are' if len(here) > 1 else ' is'} here and the {missing} factor is not: the change of the weight cannot be formed",
        file=bundle.main.path, expected=f"{partner} beside it", found=f"{held} factors of {modules} module{'s' if modules != 1 else ''}",
        remedy=f"look for {partner} where this file came from; without it the adapter is dead",
    )  # fmt: skip


def _number(config: Mapping[str, Any], keys: Sequence[str], where: str) -> float | None:
    for key in keys:
        value = config.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise MalformedError(f"{key} is not a number", file=where, found=repr(value))
        return float(value)
    return None


def _rank(config: Mapping[str, Any], options: ReadOptions, where: str) -> int | None:
    told = _number(config, _RANK, where)
    if told is not None and options.rank is not None and told != options.rank:
        raise UsageError("the config says another rank", file=where, expected=f"{told:g}", found=f"--rank {options.rank}")
    return options.rank if told is None else int(told)


def _scaling(config: Mapping[str, Any], stored: float | None, options: ReadOptions, where: str, *, known: bool) -> Scaling:
    """alpha / rank by a stored alpha or the config's, else the config's scale, else what the user says, else scale 1 (alpha absent).

    Where an absent alpha does not mean that (not `known`) the scale is unknown.
    """
    alpha = stored if stored is not None else _number(config, _ALPHA, where)
    scale = _number(config, _SCALE, where)
    rule = ScaleRule.ALPHA_OVER_SQRT_RANK if config.get("use_rslora") is True else ScaleRule.ALPHA_OVER_RANK
    if alpha is not None:
        if options.alpha is not None and options.alpha != alpha:
            raise UsageError("the files say another alpha", file=where, expected=f"{alpha:g}", found=f"--alpha {options.alpha:g}")
        return Scaling(rule, alpha)
    if scale is not None:
        if options.scale is not None and options.scale != scale:
            raise UsageError("the files say another scale", file=where, expected=f"{scale:g}", found=f"--scale {options.scale:g}")
        return Scaling(ScaleRule.EXPLICIT, multiplier=scale)
    if options.scale is not None:
        return Scaling(ScaleRule.EXPLICIT, multiplier=options.scale)
    return Scaling(rule, options.alpha) if known or options.alpha is not None else UNKNOWN


def _headed(
    key: str | int | None, roles: Mapping[str, Tensor], found: Found, rank: int | None, options: ReadOptions, adapter: Adapter
) -> dict[str, Tensor]:
    """The factors with headerless ones given a dtype and a shape."""
    result = dict(roles)
    files = {role: found.headerless[key, role] for role in ("up", "down") if (key, role) in found.headerless}
    if not files:
        return result
    from upparam.containers import raw

    known = next((result[role] for role in ("up", "down") if role not in files), None)
    dims = sorted({size for module in options.base.modules for size in module.canonical[:2]}) if options.base is not None else []
    ranks = [rank] if rank else sorted(set(known.shape[:2])) if known is not None else [None]
    guesses: dict[str, list[raw.RawGuess]] = {}
    for role, file in files.items():
        source = roles[role].source
        guesses[role] = [guess for size in ranks for guess in raw.infer(source, rank=size, dims=dims, name=file.name)]
        if known is not None:
            inner = 0 if role == "down" else 1
            guesses[role] = [
                guess for guess in guesses[role] if guess.shape[inner] in known.shape and guess.dtype == known.dtype
            ] or guesses[role]
    if len(files) == 2:
        pairs = [
            (one.confidence * other.confidence, one, other)
            for one in guesses["up"] for other in guesses["down"] if one.shape[1] == other.shape[0] and one.dtype == other.dtype
        ]  # fmt: skip
        total = sum(score for score, _, _ in pairs)
        ranked = (
            sorted(((score / total, {"up": one, "down": other}) for score, one, other in pairs), key=lambda item: -item[0]) if total else []
        )
    else:
        (role,) = files
        total = sum(guess.confidence for guess in guesses[role])
        ranked = sorted(((guess.confidence / total, {role: guess}) for guess in guesses[role]), key=lambda item: -item[0]) if total else []
    shown = "; ".join(
        f"{', '.join(f'{role} {g.dtype} {g.shape}' for role, g in choice.items())} ({f'{score:.0%}' if score >= 0.005 else '<1%'})"
        for score, choice in ranked[:_LISTED]
    )
    if not ranked or ranked[0][0] < _CLEAR:
        raise AmbiguousError(
            "headerless factors whose dtype and shape nothing decides", file=next(iter(files.values())).path, found=shown or "no reading fits",
            remedy="give the rank of the factors with --rank, or --base for its widths",
        )  # fmt: skip
    for role, guess in ranked[0][1].items():
        result[role] = raw.as_tensor(roles[role].source, guess)
    sure = min(0.97, ranked[0][0])
    evidence = [f"{role}: {text}" for role, guess in ranked[0][1].items() for text in guess.evidence]
    adapter.findings.append(
        info(
            "headerless",
            str(key or (files and next(iter(files.values())).name)),
            f"headerless factors read as {shown.split(';')[0]}",
            *evidence,
            confidence=sure,
        )
    )
    return result


def _share(score: float) -> str:
    return f"{score:.0%}" if score >= 0.005 else "<1%"


def _turned(key: str | int | None, up: Tensor, down: Tensor, rank: int | None, bundle: Bundle, adapter: Adapter) -> tuple[Tensor, Tensor]:
    """up (out, r) and down (r, in), from whichever way each was stored. Raises MalformedError when no way fits, and says which was taken."""
    ways: list[tuple[str, Tensor, Tensor]] = [("as named", up, down)]
    if len(up.shape) == len(down.shape) == 2:
        ways += [("both transposed", up.T, down.T), ("up transposed", up.T, down), ("down transposed", up, down.T)]
    # Only as named may the rank be more than a side of dW: turned so, any two matrices that share a size would fit.
    fitting = [
        way for way in ways
        if way[1].shape[1] == way[2].shape[0] and (way[0] == "as named" or way[2].shape[0] <= min(way[1].shape[0], way[2].shape[1]))
    ]  # fmt: skip
    fitting.sort(key=lambda way: way[2].shape[0] > min(way[1].shape[0], way[2].shape[1]))
    if rank is not None:
        fitting = [way for way in fitting if way[2].shape[0] == rank]
    name = "" if key is None else str(key)
    if not fitting:
        raise MalformedError(
            "up and down do not fit together", file=bundle.main.path, tensor=name or None,
            expected=f"an inner size of {rank}" if rank is not None else "up (out, r) and down (r, in)", found=f"up {up.shape}, down {down.shape}",
        )  # fmt: skip
    how, first, second = fitting[0]
    if how != "as named":
        adapter.findings.append(info("turned", name or bundle.main.name, f"factors are stored {how}", f"up {up.shape}, down {down.shape}"))
    elif rank is None and len({way[2].shape[0] for way in fitting}) > 1 and up.shape[0] == up.shape[1]:
        adapter.findings.append(warning("square", name or bundle.main.name, "square factors fit together in several ways; taken as named"))
    return first, second


dialect = Triad()
