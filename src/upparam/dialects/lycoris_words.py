"""The words of LyCORIS' files for the factors of each algorithm, and the deltas they spell; ComfyUI and OneTrainer read most of them too.

Source: KohakuBlueleaf/LyCORIS lycoris/modules/*.py (`weight_list` and `custom_state_dict` of each module, and their history).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from upparam.algorithms import called
from upparam.algorithms.base import Delta, ScaleRule, Scaling
from upparam.algorithms.boft import ButterflyOFT
from upparam.algorithms.dora import DoHa, DoKr, DoRA
from upparam.algorithms.full import Full, Norm
from upparam.algorithms.glora import GLoRA
from upparam.algorithms.ia3 import IA3
from upparam.algorithms.loha import LoHa
from upparam.algorithms.lokr import LoKr
from upparam.algorithms.lora import LoRA
from upparam.algorithms.oft import DiagOFT
from upparam.algorithms.sparse import SparseLoRA
from upparam.algorithms.tlora import TLoRA
from upparam.dialects.refusing import other_scale
from upparam.dialects.words import LORA, Form, Words, alpha_for, scaling_of
from upparam.errors import MalformedError, RefusedError
from upparam.tensors import Tensor

_LOHA = {role: f"hada_{role}" for role in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")}
_LOKR = {role: f"lokr_{role}" for role in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")}
_GLORA = {role: f"{role}.weight" for role in ("a1", "a2", "b1", "b2", "bm")}
_SPARSE = {"indices": "bias_indices", "values": "bias_values", "size": "bias_size"}
_TLORA = {"up": "p_layer.weight", "values": "lambda_layer", "down": "q_layer.weight"}


def _kept(words: Words) -> Scaling:
    """An alpha that takes no part in the scale, as stored."""
    return Scaling(ScaleRule.BAKED, scaling_of(words).alpha)


def _taken(words: Words, names: Mapping[str, str]) -> dict[str, Tensor]:
    """The factors of these names by role."""
    return {role: words[name] for role, name in names.items() if name in words}


def _lora(words: Words) -> dict[str, Delta]:
    factors = (words[LORA[0]], words[LORA[1]])
    magnitude, mid, scaling = words.get("dora_scale"), words.get(LORA[2]), scaling_of(words)
    return {"weight": LoRA(*factors, scaling, mid) if magnitude is None else DoRA(*factors, magnitude, scaling, mid)}


def _loha(words: Words) -> dict[str, Delta]:
    factors, magnitude, scaling = _taken(words, _LOHA), words.get("dora_scale"), scaling_of(words)
    return {"weight": LoHa(scaling=scaling, **factors) if magnitude is None else DoHa(magnitude=magnitude, scaling=scaling, **factors)}


def _lokr(words: Words) -> dict[str, Delta]:
    factors, magnitude, scaling = _taken(words, _LOKR), words.get("dora_scale"), scaling_of(words)
    return {"weight": LoKr(scaling=scaling, **factors) if magnitude is None else DoKr(magnitude, scaling=scaling, **factors)}


def _glora(words: Words) -> dict[str, Delta]:
    factors = _taken(words, _GLORA)
    if is_old_glora(words):
        factors |= {one: factors[other] for one, other in (("a1", "a2"), ("a2", "a1"), ("b1", "b2"), ("b2", "b1"))}
    return {"weight": GLoRA(scaling=scaling_of(words), **factors)}


def is_old_glora(words: Words) -> bool:
    """True where a1 and a2, b1 and b2 hold each other's place, as LyCORIS before 3.0 wrote them: W @ a2 @ a1 + b2 @ b1.

    Only the shapes tell: the inner size is the same in all four. Where both readings fit, the smaller one is the rank.
    """
    a1, a2, b1, b2 = (words[_GLORA[role]].shape for role in ("a1", "a2", "b1", "b2"))
    if any(len(shape) < 2 for shape in (a1, a2, b1, b2)):
        return False
    new = a1[1] == a2[0] == b1[1] == b2[0]
    old = a1[0] == a2[1] == b1[0] == b2[1]
    return old and (not new or a1[0] < a1[1])


def _ia3(words: Words) -> dict[str, Delta]:
    return {"weight": IA3(words["weight"], on_input=bool(words["on_input"].scalar()), from_one=True, scaling=_kept(words))}


def turned(words: Words, whole: bool = False) -> dict[str, Delta]:
    """Blocks of three axes are Diag-OFT's, of four BOFT's. `whole` when alpha is the largest norm itself and not that over the outputs."""
    blocks, rescale, scaling = words["oft_blocks"], words.get("rescale"), _kept(words)
    kind = {3: DiagOFT, 4: ButterflyOFT}.get(len(blocks.shape))
    if kind is None:
        raise MalformedError(
            "not the blocks of an OFT", expected="(blocks, size, size), or (stages, blocks, size, size)", found=blocks.shape
        )
    delta: DiagOFT | ButterflyOFT = kind(blocks, rescale, scaling=scaling)
    limit = max(scaling.alpha or 0.0, 0.0) / (delta.shape[0] or 1 if whole else 1)
    return {"weight": kind(blocks, rescale, limit, scaling=scaling)}


def _made(words: Words) -> dict[str, Delta]:
    return {"weight": DiagOFT(words["oft_diag"], made=True, scaling=_kept(words))}


def _full(words: Words) -> dict[str, Delta]:
    found: dict[str, Delta] = {"weight": Full(words["diff"], _kept(words))}
    return found | ({"bias": Full(words["diff_b"])} if "diff_b" in words else {})


def _norm(words: Words) -> dict[str, Delta]:
    found: dict[str, Delta] = {"weight": Norm(words["w_norm"], _kept(words))}
    return found | ({"bias": Norm(words["b_norm"])} if "b_norm" in words else {})


def _bias(words: Words) -> dict[str, Delta]:
    return {"bias": Full(words["diff_b"])}


def _sparse(words: Words) -> dict[str, Delta]:
    return {"weight": SparseLoRA(words[LORA[0]], words[LORA[1]], scaling=scaling_of(words), **_taken(words, _SPARSE))}


def _tlora(words: Words) -> dict[str, Delta]:
    return {"weight": TLoRA(scaling=scaling_of(words), **_taken(words, _TLORA))}


_DECOMPOSED = ("alpha", "dora_scale")
LORA_FORM = Form(LORA[:2], (LORA[2], *_DECOMPOSED), _lora)
LOHA_FORM = Form(tuple(_LOHA.values())[:4], ("hada_t1", "hada_t2", *_DECOMPOSED), _loha)
LOKR_FORMS = tuple(
    Form((*first, *second), ("lokr_t2", *_DECOMPOSED), _lokr)
    for first in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
    for second in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))
)
GLORA_FORM = Form(tuple(_GLORA.values())[:4], ("bm.weight", "alpha"), _glora)
FULL_FORM = Form(("diff",), ("diff_b", "alpha"), _full)
NORM_FORM = Form(("w_norm",), ("b_norm", "alpha"), _norm)
BIAS_FORM = Form(("diff_b",), (), _bias)

SPARSE_FORM = Form((*LORA[:2], *_SPARSE.values()), ("alpha",), _sparse, unless=(LORA[2], "dora_scale"))
"""With a Tucker core the script takes the remainder of another difference than dW: then nothing explains it."""

FORMS = (
    SPARSE_FORM, LORA_FORM, LOHA_FORM, *LOKR_FORMS, GLORA_FORM, FULL_FORM, NORM_FORM, BIAS_FORM,
    Form(("oft_blocks",), ("rescale", "alpha"), turned), Form(("oft_diag",), ("alpha",), _made),
    Form(("on_input", "weight"), ("alpha",), _ia3), Form(tuple(_TLORA.values()), ("alpha",), _tlora),
)  # fmt: skip
"""Every form LyCORIS writes or has written."""
COMFYUI_FORMS = (
    LORA_FORM, LOHA_FORM, *LOKR_FORMS, GLORA_FORM, FULL_FORM, NORM_FORM, BIAS_FORM,
    Form(("oft_blocks",), ("rescale", "alpha"), partial(turned, whole=True)),
)  # fmt: skip
"""Those ComfyUI reads (comfy/weight_adapter/*.py), where the alpha of an OFT is the norm itself."""


def words_in(forms: tuple[Form, ...]) -> tuple[str, ...]:
    """Every word of these forms, each once."""
    return tuple(dict.fromkeys(word for form in forms for word in (*form.needs, *form.may)))


WORDS = words_in(FORMS)
"""Every word LyCORIS has, without the dot before it."""
OWN = frozenset(WORDS) - {*LORA, "alpha", "weight"}
"""Words that no file of sd-scripts has."""


def _spell_lora(delta: LoRA | DoRA) -> dict[str, Tensor]:
    if delta.embedding:
        raise RefusedError(f"{called(delta.algorithm)} delta of an embedding has no form in this dialect")
    return {"lora_up.weight": delta.up, "lora_down.weight": delta.down} | ({} if delta.mid is None else {"lora_mid.weight": delta.mid})


def _spell_lokr(delta: LoKr | DoKr) -> dict[str, Tensor]:
    if delta.rank is None and delta.known_scale() != 1.0:
        why = "two full Kronecker factors are read with a scale of 1"
        raise RefusedError(why, found=f"{delta.scale:g}", problems=[other_scale("scale", delta, why=why)])
    return _named(delta, _LOKR)


def _spell_ia3(delta: IA3) -> dict[str, Tensor]:
    import numpy as np

    if delta.bias or not delta.from_one:
        raise RefusedError("an IA3 of factors; here what is added to 1 is stored, which takes arithmetic")
    return {"weight": delta.vector, "on_input": Tensor.of(np.array(int(delta.on_input), np.int64))}


def _spell_turn(delta: DiagOFT | ButterflyOFT) -> dict[str, Tensor]:
    rescale = {} if delta.rescale is None else {"rescale": delta.rescale}
    return {"oft_diag" if getattr(delta, "made", False) else "oft_blocks": delta.blocks} | rescale


def _spell_full(delta: Full, words: tuple[str, str] = ("diff", "diff_b"), parameter: str = "weight") -> dict[str, Tensor]:
    if delta.known_scale() != 1.0:
        why = "a whole difference takes no scale in this dialect"
        raise RefusedError(why, found=f"{delta.known_scale():g}", problems=[other_scale("scale", delta, why=why)])
    return {words[parameter == "bias"]: delta.diff}


def _named(delta: Delta, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Factors by their words; a magnitude is none of them."""
    return {names[role]: factor for role, factor in delta.factors().items() if role in names}


def _magnitude(delta: DoRA | DoHa | DoKr) -> dict[str, Tensor]:
    return {"dora_scale": delta.magnitude}


_SPELLINGS: dict[type[Delta], Callable[..., dict[str, Tensor]]] = {
    LoRA: _spell_lora,
    DoRA: lambda delta: _spell_lora(delta) | _magnitude(delta),
    LoHa: lambda delta: _named(delta, _LOHA),
    DoHa: lambda delta: _named(delta, _LOHA) | _magnitude(delta),
    LoKr: _spell_lokr,
    DoKr: lambda delta: _spell_lokr(delta) | _magnitude(delta),
    GLoRA: lambda delta: _named(delta, _GLORA),
    SparseLoRA: lambda delta: {LORA[0]: delta.up, LORA[1]: delta.down} | _named(delta, _SPARSE),
    TLoRA: lambda delta: _named(delta, _TLORA),
    IA3: _spell_ia3,
    DiagOFT: _spell_turn,
    ButterflyOFT: _spell_turn,
    Full: _spell_full,
    Norm: partial(_spell_full, words=("w_norm", "b_norm")),
}
ALGORITHMS = tuple(kind.algorithm for kind in _SPELLINGS)
"""The algorithms LyCORIS has words for."""


def spell(delta: Delta, parameter: str = "weight") -> dict[str, Tensor]:
    """The words of a delta of a module's weight or bias, without alpha. Raises RefusedError where there are none."""
    spelling = _SPELLINGS.get(type(delta))
    if isinstance(delta, Full) and parameter == "bias" and spelling is not None:
        return spelling(delta, parameter=parameter)
    if spelling is None or parameter != "weight":
        what = f"{called(delta.algorithm)} delta" + ("" if parameter == "weight" else f" of the {parameter}")
        raise RefusedError(f"{what} has no form in this dialect")
    return spelling(delta)


def stored_alpha(delta: Delta) -> float | None:
    """The alpha LyCORIS stores beside a delta: that of the scale, or the constraint of an OFT; None for none."""
    if isinstance(delta, (DiagOFT, ButterflyOFT)):
        return delta.constraint if delta.alpha is not None or delta.constraint else None
    if isinstance(delta, (Full, IA3)):
        return delta.alpha if delta.scaling.rule is ScaleRule.BAKED else None
    return alpha_for(delta)
