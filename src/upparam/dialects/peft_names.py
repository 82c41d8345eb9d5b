"""PEFT's tensor names taken apart: which module, which factor, which adapter, and what is a base weight that was saved along.

Sources: huggingface/peft src/peft/utils/save_and_load.py (what a save strips), src/peft/tuners/*/layer.py (names of the factors).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from upparam.errors import AmbiguousError, SeveralAdaptersError, UsageError
from upparam.patterns import regex
from upparam.tensors import Tensor

WRAPPER = "base_model.model."
"""What PeftModel puts before every module path of the base."""

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "prior")
"""Components of a pipeline. PEFT saves each in a folder of its own (huggingface/peft examples/lora_dreambooth/train_dreambooth.py)."""

LANGUAGE = regex(
    r"transformer\.(h|wte|wpe|ln_f|word_embeddings\w*|layer|encoder\.layers|embedding|output_layer|"
    r"blocks\.\d+\.(attn|norm_attn_norm|ffn\.(up|down|gate)_proj|ffn\.experts))(\..*)?"
)
"""Modules of language models whose body is called `transformer` as well: GPT-2, GPT-J, BLOOM, Falcon, ChatGLM, XLNet, MPT, DBRX."""

_WRAPPED = regex(r"^(?:[^/.]+/)?(?:(?:module|model|_orig_mod|_fsdp_wrapped_module)\.)*base_model\.model\.")
"""The wrapper, in a training checkpoint inside those of DDP, FSDP, torch.compile or a trainer's own module, in a nested dict (`state_dict/`)."""

_INNER = regex(r"(?:^|(?<=[./]))(?:_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)\.")
"""Wrappers that FSDP, torch.compile and activation checkpointing put around single blocks, so inside a path; no module of a base has such a name."""

FACTORS = {
    "lora_A": "lora_A", "lora_B": "lora_B", "lora_embedding_A": "lora_embedding_A", "lora_embedding_B": "lora_embedding_B",
    "lora_magnitude_vector": "magnitude", "lora_E": "lora_E", "ranknum": "ranknum",
    "hada_w1_a": "hada_w1_a", "hada_w1_b": "hada_w1_b", "hada_w2_a": "hada_w2_a", "hada_w2_b": "hada_w2_b", "hada_t1": "hada_t1", "hada_t2": "hada_t2",
    "lokr_w1": "lokr_w1", "lokr_w1_a": "lokr_w1_a", "lokr_w1_b": "lokr_w1_b", "lokr_w2": "lokr_w2", "lokr_w2_a": "lokr_w2_a",
    "lokr_w2_b": "lokr_w2_b", "lokr_t2": "lokr_t2", "ia3_l": "ia3_l", "vera_lambda_b": "vera_lambda_b", "vera_lambda_d": "vera_lambda_d",
    "oft_R": "oft_R", "oft_embedding_R": "oft_embedding_R", "oft_r": "oft_r", "oft_s": "oft_s", "boft_R": "boft_R", "boft_s": "boft_s",
}  # fmt: skip
"""Words that name a factor, and the role it plays here."""

_FACTOR = regex(rf"^(?P<module>.+)\.(?P<word>{'|'.join(sorted(FACTORS, key=len, reverse=True))})(?P<rest>(\.[^.]+)*)$")
_SHARED = regex(r"^(base_model\.)?(vera_[AB])(\.[^.]+)?$")


class Part(NamedTuple):
    """One factor's name: `module` without PEFT's wrapper, role, adapter name ('' where a save has stripped it), and what it is of."""

    module: str
    role: str
    adapter: str
    bias: bool
    wrapped: bool


def unwrapped(name: str) -> str:
    """A name without PEFT's wrapper in front, and without those of training inside."""
    return _WRAPPED.sub("", _plain(name))


def _plain(name: str) -> str:
    """A name without the wrappers of training that have names of their own."""
    return _INNER.sub("", name) if "_wrapped_module." in name or "_orig_mod." in name else name


def is_adalora(names: Iterable[str]) -> bool:
    """True when singular values are among the factors: then lora_A and lora_B are bare parameters, as loralib's are, not layers with a weight."""
    return any(".lora_E" in name for name in names)


def part_of(name: str, bare: bool = False) -> Part | None:
    """The parts of a tensor name, or None when it names no factor; `bare` when a lora_A without `.weight` is one (see `is_adalora`)."""
    found = _FACTOR.match(name)
    if found is None:
        return None
    rest = [word for word in found["rest"].split(".") if word]
    bias = bool(rest) and rest[-1] == "bias"
    if rest and rest[-1] in ("weight", "bias"):
        rest.pop()
    elif found["word"] in ("lora_A", "lora_B") and not bare:
        return None  # loralib's: PEFT's are layers with a weight
    if len(rest) > 1:
        return None
    plain = _plain(found["module"])
    module = _WRAPPED.sub("", plain)
    return Part(module, FACTORS[found["word"]], rest[0] if rest else "", bias, module != plain)


@dataclass
class Sorted:
    """A file's tensors by what they are.

    `factors`: module -> role -> tensor; `biases`: module -> the bias of its lora_B; `shared`: projections that all modules use (VeRA);
    `saved` and `biases_saved`: tensors that replace the base's, by base parameter path; `tokens`: rows that replace rows of an embedding;
    `aids`: what only training uses;
    `unknown`: tensors that no rule explains, by their own names; `base`: names of the base's own weights that a training checkpoint
    holds beside the adapter; `others`: names of the adapters that were not chosen.
    """

    factors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    shared: dict[str, Tensor] = field(default_factory=dict)
    saved: dict[str, Tensor] = field(default_factory=dict)
    biases_saved: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, Tensor] = field(default_factory=dict)
    aids: dict[str, Tensor] = field(default_factory=dict)
    unknown: dict[str, Tensor] = field(default_factory=dict)
    base: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    adapter: str = ""
    wrapped: bool = True


TOKENS = ".token_adapter.trainable_tokens_delta"
"""Ends the name of the embedding rows that `trainable_token_indices` trained; `_original` beside it is the untrained table's rows."""
_AID = regex(r"\.lora_(velora_embed(\.[^.]+)?|monteclora_sampler(\.[^.]+){1,2})$")
"""What VeLoRA and MonteCLoRA train with. Without gradients PEFT computes and merges a plain LoRA (tuners/lora/variants.py)."""
_FOREIGN = regex(r"(^|\.)(lora|vera|hada|lokr|oft|boft|ia3|token_adapter|trainable_tokens|prompt)_?[^.]*(\.|$)")
"""Words of adapters: a tensor with such a name is never a parameter of the base."""


_NAMED = regex(r"\.(?:modules_to_save|trainable_tokens_(?:delta|original)|vera_[AB])\.(?P<adapter>[^.]+)")
"""What bears an adapter's name beside factors."""


def sort(tensors: Mapping[str, Tensor], listed: Sequence[str] = (), biases: bool | None = None, adapter: str | None = None) -> Sorted:
    """Sort a file's tensors. `listed` are the config's modules_to_save, `biases` whether it says that biases were trained (None: no config).

    `adapter` names one of several in the file. Raises SeveralAdaptersError where there are several and none is named, UsageError where none
    of this name is there, AmbiguousError where two names mean the same.
    """
    bare = is_adalora(tensors)
    parts = {name: part for name in tensors if (part := part_of(name, bare)) is not None}
    adapters = sorted({part.adapter for part in parts.values()} - {""})
    if len(adapters) > 1:
        parts, tensors = _chosen(parts, tensors, adapters, adapter)
    own = adapter if adapter is not None and len(adapters) > 1 else next(iter(adapters), "")
    result = Sorted(adapter=own, others=[name for name in adapters if name != own], wrapped=all(part.wrapped for part in parts.values()))
    place = _Places()
    for name, part in parts.items():
        if part.bias:
            place(result.biases, part.module, tensors, name)
        else:
            place(result.factors.setdefault(part.module, {}), part.role, tensors, name)
    rest = [name for name in tensors if name not in parts]
    checkpoint = is_checkpoint(rest, parts.values(), listed)
    weights = {unwrapped(name) for name in rest}
    for name in rest:
        path = unwrapped(name)
        shared = _SHARED.match(name)
        original = ".original_module." in path
        parameter = path.replace(".base_layer.", ".")
        module, _, leaf = parameter.rpartition(".")
        known = leaf in ("weight", "bias") or _listed(module, listed)
        if shared is not None:
            place(result.shared, shared[2], tensors, name)
        elif saved := _saved(path, result.adapter):
            place(result.saved, saved, tensors, name)
        elif path.removesuffix(f".{result.adapter}").endswith(TOKENS):
            place(result.tokens, path.removesuffix(f".{result.adapter}"), tensors, name)
        elif is_aid(path):
            place(result.aids, path.removesuffix(f".{result.adapter}").replace(f"_sampler.{result.adapter}.", "_sampler."), tensors, name)
        elif leaf == "bias" and not original and (biases if checkpoint else biases is not False and f"{module}.weight" not in weights):
            place(result.biases_saved, parameter, tensors, name)
        elif checkpoint or original:
            result.base.append(name)
        elif known and not _FOREIGN.search(path):
            place(result.saved, parameter, tensors, name)
        else:
            result.unknown[name] = tensors[name]
    return result


def is_aid(path: str) -> bool:
    """True for the name of a tensor that only training uses."""
    return _AID.search(path) is not None


def _chosen(
    parts: Mapping[str, Part], tensors: Mapping[str, Tensor], adapters: Sequence[str], adapter: str | None
) -> tuple[dict[str, Part], dict[str, Tensor]]:
    """(the factors of one of several adapters, all tensors but those of the others)."""
    if adapter is None:
        raise SeveralAdaptersError(adapters)
    if adapter not in adapters:
        raise UsageError("no adapter of this name is in the file", expected=adapter, found=", ".join(adapters))
    own = {name: part for name, part in parts.items() if part.adapter in (adapter, "")}
    others = {*adapters} - {adapter}
    kept = {
        name: tensor for name, tensor in tensors.items()
        if name in own or (name not in parts and not ((found := _NAMED.search(name)) is not None and found["adapter"] in others))
    }  # fmt: skip
    return own, kept


class _Places:
    """Puts tensors under what their names mean, each once."""

    def __init__(self) -> None:
        self.names: dict[tuple[int, str], str] = {}

    def __call__(self, place: dict[str, Tensor], key: str, tensors: Mapping[str, Tensor], name: str) -> None:
        """Raises AmbiguousError where another name has meant the same."""
        other = self.names.setdefault((id(place), key), name)
        if other != name:
            raise AmbiguousError(
                "two names mean the same tensor: they differ only in the wrappers of training or an adapter's name", tensor=name, found=other,
                remedy="take out or rename the one that is not meant",
            )  # fmt: skip
        place[key] = tensors[name]


def is_checkpoint(rest: Iterable[str], parts: Iterable[Part], listed: Sequence[str] = ()) -> bool:
    """True when the tensors that are no factors are the base's own weights: a training checkpoint, not a saved adapter.

    A saved adapter, too, may hold biases, the modules `listed` in modules_to_save, and where an embedding is adapted its weight and the head's.
    """
    paths = {unwrapped(name) for name in rest}
    if any(path.endswith(".original_module.weight") for path in paths):
        return True
    modules = {part.module for part in parts}
    held = {word for module in modules for word in (f"{module}.weight", f"{module}.base_layer.weight") if word in paths}
    if 2 * len(held) < max(len(modules), 1):
        return False
    from upparam.bases.header import VOCABULARY

    others = {path.removesuffix(".weight") for path in paths - held if path.endswith(".weight") and ".modules_to_save." not in path}
    return any(VOCABULARY.search(module) is None and not _listed(module, listed) for module in others)


def _listed(module: str, words: Sequence[str]) -> bool:
    """PEFT's rule for modules_to_save: the end of the path, also of a word in it (peft src/peft/utils/other.py _set_trainable), with all that lies in it."""
    ends = tuple(words)
    while module:
        if module.endswith(ends):
            return True
        module = module.rpartition(".")[0]
    return False


def _saved(path: str, adapter: str) -> str | None:
    """The base parameter that `<module>.modules_to_save.<adapter>.weight` replaces; None for other names."""
    head, mark, tail = path.partition(".modules_to_save.")
    if not mark:
        return None
    return f"{head}.{tail.removeprefix(adapter + '.') if adapter else tail.removeprefix('default.')}"
