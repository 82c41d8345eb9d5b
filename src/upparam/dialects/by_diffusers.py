"""Where diffusers' loader makes something else of a file that the programs it is written for read as it is meant.

Sources: huggingface/diffusers 0.42 src/diffusers/loaders/lora_conversion_utils.py (_get_alpha_name and the converters of each base),
src/diffusers/utils/peft_utils.py (get_peft_kwargs), src/diffusers/loaders/lora_base.py (_load_lora_into_text_encoder).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from upparam.bases.base import Base
from upparam.containers.safetensors import layout_order
from upparam.findings import Finding, warning
from upparam.patterns import regex
from upparam.tensors import Tensor
from upparam.wording import counted

_KOHYA = ("kohya", "lycoris")
JUDGED = (*_KOHYA, "comfyui")
"""The dialects of whose files there is something to say."""
_DOWN = (".lora_down.weight", ".lora_A.weight", ".lora.down.weight")
_ATTENTION = regex(r".+_attn[12]_to_(q|k|v|out_0)")
_TEXT = ("lora_te_", "lora_te1_", "lora_te2_")
_SECOND = "lora_te2_"
_UNREAD = {
    "flux": (regex(r"(lora_unet_|diffusion_model\.)((time|vector|guidance|img|txt)_in|final_layer).*"), JUDGED),
    "flux.2": (regex(r"lora_unet_(guidance_in|(double|single)_stream_modulation|final_layer_adaLN).*"), _KOHYA),
    "z-image": (regex(r"(lora_unet_|diffusion_model\.)(final_layer|x_embedder).*"), JUDGED),
    "ltx": (regex(r"diffusion_model\.(patchify_proj|adaln_single).*"), ("comfyui",)),
}
"""Kind of base -> modules whose names diffusers' converter leaves as no module of its own is called, and the dialects that name them so."""
_INSTEAD = "for diffusers convert --to diffusers"


def remarks(dialect: str, base: Base | None, tensors: Mapping[str, Tensor]) -> list[Finding]:
    """What diffusers would make otherwise of these tensors, as they are named in a file of `dialect`; [] where no base is known.

    Only what it does without an error counts: a file it refuses tells its user so itself.
    """
    if base is None:
        return []
    found: list[Finding] = []
    if base.family == "sd" and dialect in _KOHYA:
        found += _scales(rescaled(tensors))
    if base.family == "ltx" and dialect == "comfyui":
        found += _scales(_ignored(tensors))
    kind = "flux.2" if base.name.startswith("flux.2") else base.family
    pattern, dialects = _UNREAD.get(kind, (None, ()))
    # Of FLUX.1 it reads one spelling, and of a file in another nothing at all, which it says.
    known = {name: tensor for name, tensor in tensors.items() if kind != "flux" or name.endswith(_DOWN[0])}
    unread = [module for module in _downs(known) if pattern is not None and dialect in dialects and pattern.fullmatch(module)]
    if unread:
        message = (
            f"diffusers passes over {counted(len(unread), 'module')} outside the blocks, whose names it does not translate; {_INSTEAD}"
        )
        found.append(warning("diffusers-differs", unread[0], message, *unread[1:4]))
    return found


def rescaled(tensors: Mapping[str, Tensor]) -> dict[str, tuple[float, float]]:
    """Module -> (alpha in the file, alpha that diffusers takes) of a file of SD in kohya's names, where the two differ.

    diffusers takes the commonest alpha of a component for all its modules and keeps the others under the modules' names. Of attention in a
    UNet, and in text encoders, these names come out wrong; CLIP with a projection alone keeps those of its MLPs.
    """
    alphas: dict[str, dict[str, float]] = {}
    for name in layout_order(tensors):
        module = name.removesuffix(".lora_down.weight")
        if module != name and (tensor := tensors.get(f"{module}.alpha")) is not None:
            component = _SECOND if module.startswith(_SECOND) else "text" if module.startswith(_TEXT) else "unet"
            alphas.setdefault(component, {})[module] = tensor.scalar()
    found: dict[str, tuple[float, float]] = {}
    for component, stored in alphas.items():
        taken = Counter(stored.values()).most_common(1)[0][0]
        for module, alpha in stored.items():
            lost = _ATTENTION.fullmatch(module) is not None if component == "unet" else component == "text" or "_mlp_" not in module
            if alpha != taken and lost:
                found[module] = (alpha, taken)
    return found


def _ignored(tensors: Mapping[str, Tensor]) -> dict[str, tuple[float, float]]:
    """Module -> (alpha, rank) where an alpha that is not the rank is stored and nobody asks for it."""
    found: dict[str, tuple[float, float]] = {}
    for module, down in _downs(tensors).items():
        alpha = tensors.get(f"{module}.alpha")
        if alpha is not None and (value := alpha.scalar()) != down.shape[0]:
            found[module] = (value, float(down.shape[0]))
    return found


def _downs(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Module -> its down factor."""
    return {name.removesuffix(ending): tensor for name, tensor in tensors.items() for ending in _DOWN if name.endswith(ending)}


def _scales(changed: Mapping[str, tuple[float, float]]) -> Sequence[Finding]:
    if not changed:
        return ()
    shown = [f"{module}: alpha {alpha:g}, taken as {taken:g}" for module, (alpha, taken) in list(changed.items())[:3]]
    message = f"diffusers takes another alpha than the file's for {counted(len(changed), 'module')}, and so another scale; {_INSTEAD}"
    return (warning("diffusers-differs", next(iter(changed)), message, *shown),)
