"""Where diffusers' loader makes something else of a file that the programs it is written for read as it is meant.

Sources: huggingface/diffusers 0.42 src/diffusers/loaders/lora_conversion_utils.py (_get_alpha_name and the converters of each base),
src/diffusers/utils/peft_utils.py (get_peft_kwargs), src/diffusers/loaders/lora_base.py (_load_lora_into_text_encoder).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from upparam.bases.base import Base
from upparam.containers.safetensors import layout_order
from upparam.findings import Finding, info, warning
from upparam.patterns import regex
from upparam.tensors import Tensor
from upparam.wording import counted

if TYPE_CHECKING:
    from re import Pattern

    from upparam.containers.base import TensorFile

_KOHYA = ("kohya", "lycoris")
_OTHERS = (*_KOHYA, "comfyui")
JUDGED = (*_OTHERS, "diffusers")
"""The dialects of whose files there is something to say."""
_DOWN = (".lora_down.weight", ".lora_A.weight", ".lora.down.weight")
_MAGNITUDE = ".dora_scale"
"""What every pipeline leaves out of a file before it looks at the names."""
_ATTENTION = regex(r".+_attn[12]_to_(q|k|v|out_0)")
_TEXT = ("lora_te_", "lora_te1_", "lora_te2_")
_SECOND = "lora_te2_"
_UNREAD = {
    "flux": (regex(r"(lora_unet_|diffusion_model\.)((time|vector|guidance|img|txt)_in|final_layer).*"), _OTHERS),
    "chroma": (regex(r"(lora_unet_|diffusion_model\.)((img|txt)_in|final_layer).*"), _OTHERS),
    "flux.2": (regex(r"lora_unet_(guidance_in|(double|single)_stream_modulation|final_layer_adaLN).*"), _KOHYA),
    "z-image": (regex(r"(lora_unet_|diffusion_model\.)(final_layer|x_embedder).*"), _OTHERS),
    "ltx": (regex(r"diffusion_model\.(patchify_proj|adaln_single).*"), ("comfyui",)),
}
"""Kind of base -> modules whose names diffusers' converter leaves as no module of its own is called, and the dialects that name them so."""
_UNKNOWN = {
    "sd": ("comfyui",), "sd3": _OTHERS, "lumina2": _KOHYA, "ltx": _KOHYA, "krea": _KOHYA, "auraflow": _KOHYA, "cogvideox": _KOHYA,
    "sana": _KOHYA, "mochi": _KOHYA, "hidream": _KOHYA,
}  # fmt: skip
"""Kind of base -> dialects in whose names diffusers finds no module of it: nothing is changed, or the file refused."""
_WITHOUT_ALPHA = ("flux.2", "krea", "lumina2", "hunyuan-video")
"""Kinds of base whose converters from ComfyUI's names fail over any stored alpha."""
_BLOCKS = {
    ("lumina2", "comfyui"): (
        regex(r"diffusion_model\.(?P<kind>noise_refiner|context_refiner|layers)\.(?P<at>\d+)\.(?P<part>.+)"),
        frozenset(("attention.qkv", "attention.out", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaLN_modulation.1")),
    ),
    ("wan", "kohya"): (
        regex(r"lora_unet_(?P<kind>blocks)_(?P<at>\d+)_(?P<part>.+)"),
        frozenset((*(f"{which}_attn_{part}" for which in ("self", "cross") for part in "qkvo"), "ffn_0", "ffn_2")),
    ),
}  # fmt: skip
"""(kind of base, dialect) -> a module's name and the parts that every block must have, and nothing else may be there."""
_IMAGE = frozenset(("cross_attn_k_img", "cross_attn_v_img"))
"""What Wan's blocks have besides in models that start from an image."""
_OUTSIDE = regex(r"diffusion_model\.(?!blocks\.).*\.alpha")
_COMPONENTS = ("transformer.", "unet.")
"""How names of diffusers' own begin, which ComfyUI reads as well."""
_SWAPPED = "diffusion_model.final_layer.adaLN_modulation.1"
_INSTEAD = "for diffusers convert --to diffusers"


def remarks(dialect: str, base: Base | None, tensors: Mapping[str, Tensor]) -> list[Finding]:
    """What diffusers would make otherwise of these tensors, as they are named in a file of `dialect`; [] where no base is known.

    Of a file for ComfyUI, which is not diffusers', it is by the way; kohya's is what diffusers is mostly given.
    """
    if dialect == "diffusers":
        return _alphas(tensors)
    every, tensors = tensors, {name: tensor for name, tensor in tensors.items() if not name.endswith(_MAGNITUDE)}
    if base is None or not (downs := _downs(tensors)):
        return []
    kind = kind_of(base)
    unmarked = kind == "hunyuan-video" and dialect == "comfyui" and not any("img_attn_qkv" in module for module in downs)
    own = [module for module in downs if module.startswith(_COMPONENTS)]
    unknown = dialect in _UNKNOWN.get(kind, ())
    if not own and (unmarked or unknown):
        does = "changes nothing with this file" if all("lora" in name for name in tensors) else "fails to load this file"
        only = (
            "it takes these names for ComfyUI's only where an img_attn_qkv is"
            if unmarked
            else f"of {base.name} it knows its own names only"
        )
        return [_differs(dialect, dialect, f"diffusers {does}: {only}; {_INSTEAD}")]
    if (why := _failing(base, dialect, tensors, downs)) is not None:
        return [_differs(dialect, dialect, f"diffusers fails to load this file: {why}; {_INSTEAD}")]
    if own and (len(own) < len(downs) or any(f"{module}.alpha" in tensors for module in own)):
        message = (
            f"diffusers does not read all of this file: {counted(len(own), 'module', 'is', 'are')} under its own names, of which it takes no "
            f"stored alpha, and beside ComfyUI's it reads only the one or the other; {_INSTEAD}"
        )
        return [_differs(dialect, own[0], message, *own[1:4])]
    if own and (unmarked or unknown):
        return []
    found = _magnitudes(dialect, every)
    if base.family == "sd" and dialect in _KOHYA:
        found += _scales(dialect, rescaled(layout_order(tensors)))
    if base.family == "ltx" and dialect == "comfyui":
        found += _scales(dialect, _ignored(tensors, downs))
    if kind in ("flux.2", "hunyuan-video") and dialect == "comfyui" and _SWAPPED in downs:
        message = (
            f"diffusers makes another change of this module: it swaps the halves of its down as well, whose rows are ranks; {_INSTEAD}"
        )
        found.append(_differs(dialect, _SWAPPED, message))
    pattern, dialects = _UNREAD.get(kind, (None, ()))
    # Of FLUX.1 it reads one spelling, and of a file in another nothing at all, which it says.
    unread = [
        module for module in downs
        if pattern is not None and dialect in dialects and pattern.fullmatch(module)
        and (kind not in ("flux", "chroma") or f"{module}{_DOWN[0]}" in tensors)
    ]  # fmt: skip
    if unread:
        message = (
            f"diffusers passes over {counted(len(unread), 'module')} outside the blocks, whose names it does not translate; {_INSTEAD}"
        )
        found.append(_differs(dialect, unread[0], message, *unread[1:4]))
    return found


def on_reading(dialect: str, base: Base | None, file: TensorFile) -> list[Finding]:
    """What diffusers makes otherwise of a file of SD in kohya's names, and of one in its own, whoever wrote it.

    Of other bases kohya's names come in more spellings than ours, and `remarks` knows ours.
    """
    if dialect == "diffusers":
        return _alphas(file.tensors)
    if base is None or base.family != "sd" or dialect not in _KOHYA:
        return []
    # Of alphas equally common it takes the first, and it reads the tensors of a safetensors file as they lie.
    laid = file.tensors.items() if file.container != "safetensors" else sorted(file.tensors.items(), key=lambda item: item[1].offset)
    plain = {name: tensor for name, tensor in laid if not name.endswith(_MAGNITUDE)}
    return [*_magnitudes(dialect, file.tensors), *_scales(dialect, rescaled(plain))] if _wholly_named(plain) else []


def kind_of(base: Base) -> str:
    """The family whose converter diffusers takes: FLUX.2 and Chroma have one of their own."""
    return next((name for name in ("flux.2", "chroma") if base.name.startswith(name)), base.family)


def takes_alpha(base: Base | None) -> bool:
    """False of a base whose files in ComfyUI's names diffusers loads only where no alpha is stored."""
    return base is None or kind_of(base) not in _WITHOUT_ALPHA


def _failing(base: Base, dialect: str, tensors: Mapping[str, Tensor], downs: Mapping[str, Tensor]) -> str | None:
    """Why diffusers raises an error over this file; None where it does not."""
    kind = kind_of(base)
    if kind == "hunyuan-video" and dialect in _KOHYA:
        return f"of {base.name} it does not know kohya's names"
    if kind == "chroma" and any(module.split(".", 1)[-1].removeprefix("lora_unet_").startswith("distilled_") for module in downs):
        return "it has no name for distilled_guidance_layer"
    if dialect == "comfyui" and kind in _WITHOUT_ALPHA and any(f"{module}.alpha" in tensors for module in downs):
        return f"of {base.name} it takes no stored alpha"
    if kind == "hunyuan-video" and any(module.endswith(("self_attn_qkv", "self_attn.qkv")) for module in downs):
        return "it cuts the down of the token refiner's fused projection in three"
    if dialect == "comfyui" and kind == "wan" and any(_OUTSIDE.fullmatch(name) for name in tensors):
        return "it takes no stored alpha of a module outside the blocks"
    needed = _BLOCKS.get((kind, "kohya" if dialect in _KOHYA else dialect))
    if needed is None:
        return None
    if not _whole(downs, *needed):
        return "it takes whole blocks from the first on, every Linear of them, and nothing outside the blocks"
    if kind == "wan" and any(f"{module}.alpha" not in tensors for module in downs):
        return "it wants an alpha of each module"
    return None


def _whole(downs: Collection[str], pattern: Pattern[str], wanted: frozenset[str]) -> bool:
    """Whether the modules are blocks numbered from 0 with all that is wanted, and nothing else."""
    blocks: dict[str, dict[int, set[str]]] = {}
    for module in downs:
        match = pattern.fullmatch(module)
        if match is None:
            return False
        blocks.setdefault(match["kind"], {}).setdefault(int(match["at"]), set()).add(match["part"])
    found = {part for numbered in blocks.values() for parts in numbered.values() for part in parts}
    for kind, numbered in blocks.items():
        parts = wanted - {"adaLN_modulation.1"} if kind == "context_refiner" else wanted | (found & _IMAGE)
        if set(numbered) != set(range(len(numbered))) or any(have != parts for have in numbered.values()):
            return False
    return True


def rescaled(tensors: Mapping[str, Tensor]) -> dict[str, tuple[float, float]]:
    """Module -> (alpha that holds, alpha that diffusers takes) of tensors of SD in kohya's names and the file's order, where the two differ.

    diffusers takes the commonest alpha of a component for all its modules, also for those that store none, and keeps the others under the
    modules' names. Of attention in a UNet, and in text encoders, these names come out wrong; CLIP with a projection alone keeps those of
    its MLPs.
    """
    if not _wholly_named(tensors):
        return {}
    stored: dict[str, dict[str, float]] = {}
    absent: dict[str, dict[str, float]] = {}
    for name, down in tensors.items():
        module = name.removesuffix(_DOWN[0])
        if module == name:
            continue
        component = _SECOND if module.startswith(_SECOND) else "text" if module.startswith(_TEXT) else "unet"
        if (tensor := tensors.get(f"{module}.alpha")) is not None:
            stored.setdefault(component, {})[module] = tensor.scalar()
        else:
            absent.setdefault(component, {})[module] = float(down.shape[0])
    found: dict[str, tuple[float, float]] = {}
    for component, alphas in stored.items():
        taken = Counter(alphas.values()).most_common(1)[0][0]
        for module, alpha in alphas.items():
            lost = _ATTENTION.fullmatch(module) is not None if component == "unet" else component == "text" or "_mlp_" not in module
            if alpha != taken and lost:
                found[module] = (alpha, taken)
        found |= {module: (rank, taken) for module, rank in absent.get(component, {}).items() if rank != taken}
    return found


def _wholly_named(tensors: Mapping[str, Tensor]) -> bool:
    """Whether diffusers' converter of SD goes through: it wants the two factors of each module, perhaps an alpha, and nothing else."""
    downs = [name.removesuffix(_DOWN[0]) for name in tensors if name.startswith(("lora_unet_", *_TEXT)) and name.endswith(_DOWN[0])]
    alphas = sum(f"{module}.alpha" in tensors for module in downs)
    return all(f"{module}.lora_up.weight" in tensors for module in downs) and 2 * len(downs) + alphas == len(tensors)


def _alphas(tensors: Mapping[str, Tensor]) -> list[Finding]:
    """Of files in its own names: no pipeline takes an alpha that lies beside the factors."""
    modules = [name.removesuffix(".alpha") for name in tensors if name.endswith(".alpha")]
    if not modules:
        return []
    message = (
        f"diffusers takes no alpha stored beside factors under its own names, as of {counted(len(modules), 'module')} here: by pipeline it fails to "
        "load the file, changes nothing, or leaves the scale out; for diffusers convert --to peft, and that --to diffusers"
    )
    return [warning("diffusers-differs", modules[0], message, *modules[1:4])]


def _magnitudes(dialect: str, tensors: Mapping[str, Tensor]) -> list[Finding]:
    modules = [name.removesuffix(_MAGNITUDE) for name in tensors if name.endswith(_MAGNITUDE)]
    if not modules:
        return []
    message = f"diffusers leaves out the magnitudes of {counted(len(modules), 'module')} and applies plain LoRA; {_INSTEAD}"
    return [_differs(dialect, modules[0], message, *modules[1:4])]


def _ignored(tensors: Mapping[str, Tensor], downs: Mapping[str, Tensor]) -> dict[str, tuple[float, float]]:
    """Module -> (alpha, rank) where an alpha that is not the rank is stored and nobody asks for it."""
    found: dict[str, tuple[float, float]] = {}
    for module, down in downs.items():
        alpha = tensors.get(f"{module}.alpha")
        if alpha is not None and (value := alpha.scalar()) != down.shape[0]:
            found[module] = (value, float(down.shape[0]))
    return found


def _downs(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Module -> its down factor."""
    return {name.removesuffix(ending): tensor for name, tensor in tensors.items() for ending in _DOWN if name.endswith(ending)}


def _differs(dialect: str, subject: str, message: str, *evidence: str) -> Finding:
    return (info if dialect == "comfyui" else warning)("diffusers-differs", subject, message, *evidence)


def _scales(dialect: str, changed: Mapping[str, tuple[float, float]]) -> Sequence[Finding]:
    if not changed:
        return ()
    shown = [f"{module}: alpha {alpha:g}, taken as {taken:g}" for module, (alpha, taken) in list(changed.items())[:3]]
    message = f"diffusers takes another alpha than the file's for {counted(len(changed), 'module')}, and so another scale; {_INSTEAD}"
    return (_differs(dialect, next(iter(changed)), message, *shown),)
