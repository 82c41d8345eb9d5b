"""The config upparam writes gives each module its own rank and scale by PEFT's own rules, and means no module too many."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tests.dialects.files import read, same, tensor_file, written

from upparam.adapter import Adapter, Target
from upparam.algorithms.base import ScaleRule, Scaling
from upparam.algorithms.lora import LoRA
from upparam.bases import inventory
from upparam.bases.base import Base, Module
from upparam.dialects import get
from upparam.dialects.base import Bundle, ReadOptions
from upparam.dialects.peft_config import FILE, patterned, scaling_of, targeted
from upparam.dialects.peft_make import target_modules
from upparam.errors import LimitError, MalformedError, RefusedError, UpparamError
from upparam.operations.convert import write_adapter
from upparam.operations.opening import open_adapter
from upparam.tensors import Tensor

peft = pytest.importorskip("peft")
AB = {
    "base_model.model.a.b.lora_A.weight": Tensor.of(np.ones((2, 4), np.float32)),
    "base_model.model.a.b.lora_B.weight": Tensor.of(np.ones((3, 2), np.float32)),
}
SEGMENTS = st.sampled_from(["q_proj", "v_proj", "layers", "0", "1", "10", "attn", "mlp", "a.b", "q+"])
PATHS = st.lists(SEGMENTS, min_size=1, max_size=4).map(".".join)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(PATHS | st.sampled_from([r"layers\.1", ".*proj", "[01]", "^0", "("]), st.integers(1, 64), max_size=4), PATHS)
def test_patterns_match_as_in_the_library(patterns: dict[str, int], path: str) -> None:
    from peft.utils.other import get_pattern_key

    assume(all(key.count("+") < 3 for key in patterns))  # upparam refuses a more elaborate pattern
    usable = {key: value for key, value in patterns.items() if key != "("}  # where the library fails, upparam passes over
    expected = usable.get(get_pattern_key(usable.keys(), path), 7)
    assert patterned(patterns, path, 7) == expected


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(PATHS, max_size=4) | PATHS | st.sampled_from([r".*\.(q|v)_proj", "layers.1"]), PATHS)
def test_targets_match_as_in_the_library(targets: Any, path: str) -> None:
    from peft.tuners.tuners_utils import check_target_module_exists

    if isinstance(targets, list) and not targets:
        return
    assume(isinstance(targets, list) or targets.count("+") < 3)  # upparam refuses a more elaborate pattern
    config = peft.LoraConfig(target_modules=set(targets) if isinstance(targets, list) else targets)
    assert targeted(targets, path) == bool(check_target_module_exists(config, path))


def lora(rank: int, scaling: Scaling, seed: int) -> LoRA:
    rng = np.random.default_rng(seed)
    return LoRA(
        Tensor.of(rng.standard_normal((6, rank)).astype(np.float32)), Tensor.of(rng.standard_normal((rank, 5)).astype(np.float32)), scaling
    )


SCALINGS = st.one_of(
    st.builds(Scaling, st.just(ScaleRule.ALPHA_OVER_RANK), st.sampled_from([1.0, 8.0, 16.0, 0.5, 3.7])),
    st.builds(Scaling, st.just(ScaleRule.ALPHA_OVER_SQRT_RANK), st.sampled_from([4.0, 16.0])),
    st.builds(Scaling, st.just(ScaleRule.EXPLICIT), multiplier=st.sampled_from([20.0, 0.3])),
    st.builds(Scaling, st.just(ScaleRule.ALPHA_OVER_RANK), st.just(8.0), divisor=st.sampled_from([3.0, 64.0])),
    st.just(Scaling(ScaleRule.BAKED)), st.just(Scaling()),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(PATHS, st.tuples(st.integers(1, 5), SCALINGS), min_size=1, max_size=6))
def test_every_module_gets_its_rank_and_scale_back(modules: dict[str, tuple[int, Scaling]]) -> None:
    deltas = {Target(path): lora(rank, scaling, seed) for seed, (path, (rank, scaling)) in enumerate(modules.items())}
    package = get("peft").write(Adapter(dict(deltas), "specimen", layout="peft"), {})
    config = json.loads(package.files[FILE])
    library = peft.LoraConfig(**config)
    again = {
        path: scaling_of(config, path, delta.rank, ReadOptions()).value(delta.rank) for (path, _, _), delta in deltas.items()
    }  # fmt: skip
    from peft.utils.other import get_pattern_key

    for (path, _, _), delta in deltas.items():
        assert again[path] == pytest.approx(delta.scale, rel=1e-12)
        r = library.rank_pattern.get(get_pattern_key(library.rank_pattern.keys(), path), library.r)
        assert r == delta.rank
        alpha = library.alpha_pattern.get(get_pattern_key(library.alpha_pattern.keys(), path), library.lora_alpha)
        assert alpha / (r**0.5 if library.use_rslora else r) == pytest.approx(delta.scale, rel=1e-12)
        assert targeted(config["target_modules"], path)


@pytest.mark.parametrize("base", ["llama-3-8b", "gpt2", "sd1.5", "bert-base-uncased"])
def test_target_modules_mean_exactly_the_modules(base: str) -> None:
    known = inventory.load(base)
    paths = [module.path for module in known.modules if module.kind in ("Linear", "Conv1D", "Conv2d", "Embedding")]
    for chosen in (paths[:1], paths[3:40:7], [path for path in paths if path.endswith(paths[-1].rsplit(".", 1)[-1])], paths):
        found = target_modules(chosen, known)
        assert {path for path in paths if targeted(found, path)} == set(chosen)


def test_a_path_that_ends_another_is_told_by_a_regular_expression() -> None:
    base = Base("two", tuple(Module(path, "Linear", (4, 4)) for path in ("encoder.q", "other.encoder.q", "encoder.k")))
    found = target_modules(["encoder.q"], base)
    assert isinstance(found, str)
    assert [module.path for module in base.modules if targeted(found, module.path)] == ["encoder.q"]


def test_endings_are_preferred_where_they_mean_the_same() -> None:
    known = inventory.load("llama-3-8b")
    chosen = [module.path for module in known.modules if module.path.endswith(("q_proj", "v_proj"))]
    assert target_modules(chosen, known) == ["q_proj", "v_proj"]


def test_what_is_no_number_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('{"r": 2, "lora_alpha": "16"}')
    with pytest.raises(MalformedError, match="lora_alpha is not a number"):
        get("peft").read(Bundle([tensor_file(AB)], tmp_path), ReadOptions())


def test_an_unknown_scale_is_asked_for_and_never_invented(tmp_path: Path) -> None:
    adapter = read("peft", AB)
    assert next(iter(adapter.deltas.values())).scale is None
    with pytest.raises(RefusedError, match="--alpha"):
        write_adapter(adapter, tmp_path / "out", "peft")
    known = read("peft", AB, alpha=4.0)
    same(written("peft", known).tensors, AB)
    write_adapter(known, tmp_path / "out", "peft", read=ReadOptions(alpha=4.0))
    assert next(iter(open_adapter(tmp_path / "out").deltas.values())).scale == 2.0


@pytest.mark.parametrize("layout", ["kohya", "cloneofsimo", "unnamed"])
def test_names_that_are_no_module_paths_are_refused(layout: str) -> None:
    adapter = Adapter({Target("lora_unet_down_blocks_0"): lora(2, Scaling(), 0)}, layout, layout=layout)
    with pytest.raises(RefusedError, match="--base"):
        get("peft").write(adapter, {})


CONFIGS = st.fixed_dictionaries(
    {},
    optional={
        key: st.one_of(st.none(), st.integers(-2, 70), st.floats(), st.text(max_size=5), st.lists(st.integers() | st.text(max_size=3), max_size=2), st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=2), max_size=2))
        for key in (
            "r", "lora_alpha", "bias", "modules_to_save", "target_modules", "rank_pattern", "alpha_pattern", "peft_type", "use_rslora", "enable_lora",
            "target_parameters", "base_model_name_or_path", "fan_in_fan_out", "init_lora_weights", "layer_replication", "task_type",
        )
    },
)  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(CONFIGS)
def test_any_config_gives_an_adapter_or_an_error_of_ours(tmp_path: Path, config: dict[str, Any]) -> None:
    (tmp_path / FILE).write_text(json.dumps(config))
    file = tensor_file(AB | {"base_model.model.a.head.weight": Tensor.of(np.ones((2, 2), np.float32))})
    try:
        adapter = get("peft").read(Bundle([file], tmp_path), ReadOptions())
        for delta in adapter.deltas.values():
            assert delta.scale is None or isinstance(delta.scale, float)
        get("peft").write(adapter, {})
    except UpparamError:
        pass


@pytest.mark.parametrize("pattern", ["(a+)+", "(a|a)*b", ".*.*.*q", "a{2,}b*c+"])
def test_no_pattern_can_take_forever(pattern: str) -> None:
    with pytest.raises(LimitError, match="elaborate"):
        patterned({pattern: 4}, "a" * 40, 8)
    assert patterned({".*layers.(0|1)..*": 4}, "a" * 100_000, 8) == 8
