"""What ComfyUI does with an adapter file, stated independently of our own code: which keys it loads, to which weights, and what it computes.

Source: comfyanonymous/ComfyUI comfy/lora.py (model_lora_keys_unet, model_lora_keys_clip, load_lora, calculate_weight), comfy/utils.py
(flux_to_diffusers), comfy/lora_convert.py (convert_lora_bfl_control, convert_uso_lora), comfy/weight_adapter/{lora,lokr,loha,glora,oft,boft,base}.py.
Told in our own words for the architectures of the tests; nothing here is imported from upparam.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]


class Slot(NamedTuple):
    """A weight of the model, and the rows of it that a key speaks of (None: all)."""

    weight: str
    rows: tuple[int, int] | None = None


def flux_keys(model: Mapping[str, tuple[int, ...]], clip: Mapping[str, tuple[int, ...]]) -> dict[str, Slot]:
    """Key without its last word -> what it changes, for a FLUX model and its text encoders (names with `diffusion_model.`, `clip_l.`)."""
    keys: dict[str, Slot] = {}
    for name in model:
        if name.endswith(".weight"):
            path = name.removesuffix(".weight")
            keys[path] = Slot(name)
            keys["lora_unet_" + path.removeprefix("diffusion_model.").replace(".", "_")] = Slot(name)
            if path.endswith(".linear1"):
                keys[path + "_qkv"] = Slot(name, (0, 3 * model[name][1]))
        else:
            keys[name] = Slot(name)
    for name in clip:
        if name.endswith(".weight"):
            keys["text_encoders." + name.removesuffix(".weight")] = Slot(name)
            # clip_l is the first encoder and T5 the second; T5 is known as the third, too.
            for start, prefix in (
                ("clip_l.transformer.", "lora_te1_"),
                ("t5xxl.transformer.", "lora_te2_"),
                ("t5xxl.transformer.", "lora_te3_"),
            ):
                if name.startswith(start):
                    keys[prefix + name.removeprefix(start).removesuffix(".weight").replace(".", "_")] = Slot(name)
    for block in sorted({name.split(".")[2] for name in model if name.startswith("diffusion_model.double_blocks.")}):
        ours, theirs = f"diffusion_model.double_blocks.{block}.", f"transformer.transformer_blocks.{block}."
        hidden = model[ours + "img_attn.qkv.weight"][1]
        for part in range(3):
            rows = (part * hidden, (part + 1) * hidden)
            keys[f"{theirs}attn.to_{'qkv'[part]}"] = Slot(ours + "img_attn.qkv.weight", rows)
            keys[f"{theirs}attn.add_{'qkv'[part]}_proj"] = Slot(ours + "txt_attn.qkv.weight", rows)
        for diffusers, own in (
            ("attn.to_out.0", "img_attn.proj"), ("attn.to_add_out", "txt_attn.proj"), ("ff.net.0.proj", "img_mlp.0"), ("ff.net.2", "img_mlp.2"),
            ("ff_context.net.0.proj", "txt_mlp.0"), ("ff_context.net.2", "txt_mlp.2"), ("norm1.linear", "img_mod.lin"),
            ("norm1_context.linear", "txt_mod.lin"),
        ):  # fmt: skip
            keys[theirs + diffusers] = Slot(f"{ours}{own}.weight")
    for block in sorted({name.split(".")[2] for name in model if name.startswith("diffusion_model.single_blocks.")}):
        ours, theirs = f"diffusion_model.single_blocks.{block}.", f"transformer.single_transformer_blocks.{block}."
        out, hidden = model[ours + "linear1.weight"]
        for part, name in enumerate(("attn.to_q", "attn.to_k", "attn.to_v")):
            keys[theirs + name] = Slot(ours + "linear1.weight", (part * hidden, (part + 1) * hidden))
        keys[theirs + "proj_mlp"] = Slot(ours + "linear1.weight", (3 * hidden, out))
        keys[theirs + "proj_out"], keys[theirs + "norm.linear"] = Slot(ours + "linear2.weight"), Slot(ours + "modulation.lin.weight")
    for name, own in (("x_embedder", "img_in"), ("context_embedder", "txt_in"), ("proj_out", "final_layer.linear")):
        keys["transformer." + name] = Slot(f"diffusion_model.{own}.weight")
    return keys | {"lora_transformer_" + key.removeprefix("transformer.").replace(".", "_"): slot for key, slot in keys.items() if key.startswith("transformer.")}  # fmt: skip


def converted(file: Mapping[str, Array]) -> dict[str, Array]:
    """What ComfyUI renames before it looks anything up: control adapters of black-forest-labs, and attention processors of USO's form."""
    if "img_in.lora_A.weight" in file and "single_blocks.0.norm.key_norm.scale" in file:
        found = {
            "diffusion_model." + name.replace(".lora_B.bias", ".diff_b").replace("_norm.scale", "_norm.set_weight"): value
            for name, value in file.items()
        }
        return found | {
            "diffusion_model.img_in.reshape_weight": np.array(
                [file["img_in.lora_B.weight"].shape[0], file["img_in.lora_A.weight"].shape[1]]
            )
        }
    # Both of these must be there: other adapters of attention processors are not recognised.
    if "single_blocks.37.processor.qkv_lora.up.weight" in file and "double_blocks.18.processor.qkv_lora2.up.weight" in file:
        words = (
            (".down.weight", ".lora_down.weight"), (".up.weight", ".lora_up.weight"), (".qkv_lora2.", ".txt_attn.qkv."), (".qkv_lora1.", ".img_attn.qkv."),
            (".proj_lora1.", ".img_attn.proj."), (".proj_lora2.", ".txt_attn.proj."), (".qkv_lora.", ".linear1_qkv."), (".proj_lora.", ".linear2."),
            (".processor.", "."),
        )  # fmt: skip
        renamed = {}
        for name, value in file.items():
            for word, its in words:
                name = name.replace(word, its)
            renamed["diffusion_model." + name] = value
        return renamed
    return dict(file)


PAIRS = (
    ("{}.lora_up.weight", "{}.lora_down.weight"), ("{}_lora.up.weight", "{}_lora.down.weight"), ("{}.lora_B.weight", "{}.lora_A.weight"),
    ("{}.lora.up.weight", "{}.lora.down.weight"), ("{}.lora_B", "{}.lora_A"), ("{}.lora_linear_layer.up.weight", "{}.lora_linear_layer.down.weight"),
    ("{}.lora_B.default.weight", "{}.lora_A.default.weight"),
)  # fmt: skip


class Loaded(NamedTuple):
    """Per weight the changes in the order of the keys, and the keys that were not loaded."""

    changes: dict[str, list[tuple[tuple[int, int] | None, str, dict[str, Any]]]]
    left: list[str]


def load(file: Mapping[str, Array], keys: Mapping[str, Slot]) -> Loaded:
    """What ComfyUI makes of a file."""
    file = converted(file)
    used: set[str] = set()
    changes: dict[str, list[tuple[tuple[int, int] | None, str, dict[str, Any]]]] = {}

    def take(name: str) -> Any:
        if name in file:
            used.add(name)
        return file.get(name)

    for key, slot in keys.items():
        common = {"alpha": take(f"{key}.alpha"), "dora_scale": take(f"{key}.dora_scale"), "reshape": take(f"{key}.reshape_weight")}
        put = changes.setdefault(slot.weight, [])
        for up, down in PAIRS:
            if up.format(key) in file:
                put.append((slot.rows, "lora", {"up": take(up.format(key)), "down": take(down.format(key)), **common}))
                break
        lokr = {role: take(f"{key}.lokr_{role}") for role in ("w1", "w2", "w1_a", "w1_b", "w2_a", "w2_b", "t2")}
        if any(factor is not None for factor in lokr.values()):
            put.append((slot.rows, "lokr", lokr | common))
        hada = {role: take(f"{key}.hada_{role}") for role in ("w1_a", "w1_b", "w2_a", "w2_b")}
        if hada["w1_a"] is not None:
            put.append((slot.rows, "loha", hada | common))
        if f"{key}.a1.weight" in file:
            put.append((slot.rows, "glora", {role: take(f"{key}.{role}.weight") for role in ("a1", "a2", "b1", "b2")} | common))
        if (blocks := take(f"{key}.oft_blocks")) is not None:
            put.append((slot.rows, "oft" if blocks.ndim == 3 else "boft", {"blocks": blocks, "rescale": take(f"{key}.rescale"), **common}))
        if (norm := take(f"{key}.w_norm")) is not None:
            put.append((None, "diff", {"diff": norm}))
            if (bias := take(f"{key}.b_norm")) is not None:
                changes.setdefault(slot.weight.removesuffix(".weight") + ".bias", []).append((None, "diff", {"diff": bias}))
        if (diff := take(f"{key}.diff")) is not None:
            put.append((slot.rows, "diff", {"diff": diff}))
        if (bias := take(f"{key}.diff_b")) is not None:
            changes.setdefault(slot.weight.removesuffix(".weight") + ".bias", []).append((None, "diff", {"diff": bias}))
        if (whole := take(f"{key}.set_weight")) is not None:
            put.append((slot.rows, "set", {"weight": whole}))
    return Loaded({weight: put for weight, put in changes.items() if put}, sorted(set(file) - used))


def applied(weights: Mapping[str, Array], loaded: Loaded) -> dict[str, Array]:
    """The changed weights, in float64."""
    found: dict[str, Array] = {}
    for name, changes in loaded.changes.items():
        weight = np.array(weights[name], dtype=np.float64)
        for rows, kind, value in changes:
            start, stop = rows or (0, len(weight))
            if kind == "set":
                weight = np.array(value["weight"], dtype=np.float64)
                continue
            if value.get("reshape") is not None:
                wider = np.zeros(tuple(int(size) for size in value["reshape"]))
                wider[: weight.shape[0], : weight.shape[1]] = weight
                weight = wider
            weight[start:stop] = changed(weight[start:stop], kind, value)
        found[name] = weight
    return found


def changed(weight: Array, kind: str, value: Mapping[str, Any]) -> Array:
    """One change of the rows a key speaks of."""
    wide = {role: np.array(factor, dtype=np.float64) for role, factor in value.items() if factor is not None}
    scale = 1.0
    if kind == "diff":
        return weight + wide["diff"]
    if kind == "lora":
        delta = wide["up"].reshape(len(wide["up"]), -1) @ wide["down"].reshape(len(wide["down"]), -1)
        scale = float(wide["alpha"]) / len(wide["down"]) if "alpha" in wide else 1.0
    elif kind == "glora":
        delta, scale = glora(weight, wide)
    elif kind in ("oft", "boft"):
        return turned(weight, wide)
    elif kind == "lokr":
        ranks = [len(wide[role]) for role in ("w1_b", "w2_b") if role in wide]
        w1 = wide["w1"] if "w1" in wide else wide["w1_a"] @ wide["w1_b"]
        w2 = wide["w2"] if "w2" in wide else wide["w2_a"] @ wide["w2_b"]
        delta = np.kron(w1, w2)
        # Two full factors have no rank, and alpha then plays no part.
        scale = float(wide["alpha"]) / ranks[-1] if "alpha" in wide and ranks else 1.0
    else:
        delta = (wide["w1_a"] @ wide["w1_b"]) * (wide["w2_a"] @ wide["w2_b"])
        scale = float(wide["alpha"]) / len(wide["w1_b"]) if "alpha" in wide else 1.0
    delta = delta.reshape(weight.shape) * scale
    if "dora_scale" not in wide:
        return weight + delta
    # Only norms down the columns; those of rows are taken of the weight before the change, see docs/formats.md.
    assert wide["dora_scale"].shape[0] == 1
    return (weight + delta) * wide["dora_scale"] / np.linalg.norm(weight + delta, axis=0, keepdims=True)


def glora(weight: Array, wide: Mapping[str, Array]) -> tuple[Array, float]:
    """The change and its scale, in the order of factors that their shapes tell."""
    a1, a2, b1, b2 = (wide[role].reshape(wide[role].shape[:2]) for role in ("a1", "a2", "b1", "b2"))
    old = b2.shape[1] == b1.shape[0] == a1.shape[0] == a2.shape[1]
    if b2.shape[0] == b1.shape[1] == a1.shape[1] == a2.shape[0]:
        old = old and len(a2) == len(weight) == weight.shape[1]
    rank = len(a1) if old else len(a2)
    change = b2 @ b1 + weight @ a2 @ a1 if old else weight @ a1 @ a2 + b1 @ b2
    return change, float(wide["alpha"]) / rank if "alpha" in wide else 1.0


def turned(weight: Array, wide: Mapping[str, Array]) -> Array:
    """OFT and BOFT. An OFT's row factors are loaded and not applied; a BOFT without alpha is an error, which is logged and changes nothing."""
    blocks = wide["blocks"]
    if blocks.ndim == 4 and "alpha" not in wide:
        return weight
    skew = blocks - blocks.swapaxes(-1, -2)
    limit, norm = float(wide.get("alpha", 0.0)), np.linalg.norm(skew) + 1e-8
    if 0 < limit < norm:
        skew = skew * limit / norm
    one = np.eye(blocks.shape[-1])
    turns = (one + skew) @ np.linalg.inv(one - skew)
    if blocks.ndim == 3:
        return np.concatenate([turn.T @ rows for turn, rows in zip(turns, np.split(weight, len(turns)), strict=True)])
    size, found = blocks.shape[-1], weight
    for stage, all_turns in enumerate(turns):
        step = 2**stage * (size // 2)
        order = np.arange(len(found)).reshape(-1, 2, step).swapaxes(1, 2).reshape(-1)
        mixed = np.concatenate([turn @ rows for turn, rows in zip(all_turns, np.split(found[order], len(all_turns)), strict=True)])
        found = np.empty_like(mixed)
        found[order] = mixed
    return found * wide["rescale"].reshape(-1, 1) if "rescale" in wide else found
