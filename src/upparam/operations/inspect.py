"""Inspect: what is inside an adapter, module by module, with norms computed through the factors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upparam.adapter import Adapter, Target
from upparam.algorithms.base import Delta
from upparam.algorithms.gram import gram
from upparam.arrays import doubles, floats, unsigned
from upparam.containers import head_of, member_source
from upparam.dialects.base import ReadOptions
from upparam.errors import UnreadableError, UpparamError, UsageError
from upparam.findings import Finding, info, warning
from upparam.operations.opening import open_adapter
from upparam.operations.threads import in_threads
from upparam.progress import Progress, silent
from upparam.tensors import Tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class ModuleStats:
    """One delta in numbers. Norms are of scale * dW; with an unknown scale they are of dW and `scale` is None.

    An algorithm whose change depends on the base's weight (`dependent`) has no dW and no norm without it.

    `spectral` and `stable_rank` (||dW||_F^2 / ||dW||_2^2) are None where dW has no low-rank form to compute them through.
    `zeros` is the share of factor elements that are exactly zero, `dead` names factors that are all zero, `nonfinite` counts NaN and Inf.
    `idle` says that for this reason nothing changes.
    """

    target: str
    algorithm: str
    rank: int | None
    alpha: float | None
    scale: float | None
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    dependent: bool
    frobenius: float | None
    spectral: float | None
    stable_rank: float | None
    zeros: float
    dead: tuple[str, ...]
    idle: bool
    nonfinite: int

    def facts(self) -> dict[str, Any]:
        """JSON-ready facts."""
        return asdict(self)


def inspect_modules(adapter: Adapter, glob: str | None = None, progress: Progress = silent) -> Iterator[ModuleStats]:
    """Statistics of every delta whose target matches `glob` (shell pattern over the target's name), a module a thread in memory at a time."""
    chosen = [(target, delta) for target, delta in adapter.deltas.items() if glob is None or fnmatchcase(str(target), glob)]
    sizes = [sum(factor.nbytes for factor in delta.factors().values()) for _, delta in chosen]
    yield from in_threads(lambda one: module_stats(*one), chosen, sizes, None, progress)


def module_stats(target: Target, delta: Delta) -> ModuleStats:
    """Statistics of one delta."""
    factors = delta.factors()
    zeros = nonfinite = 0
    dead = []
    for role, factor in factors.items():
        values = factor.read()
        if not factor.dtype.is_float:
            continue
        blank, spoilt = _blank_and_spoilt(values, factor.dtype.name)
        zeros += blank
        nonfinite += spoilt
        if factor.numel and blank == factor.numel:
            dead.append(role)
    elements = sum(factor.numel for factor in factors.values())
    frobenius, spectral = (None, None) if nonfinite else _norms(delta)
    stable = None
    if frobenius is not None and spectral:
        stable = (frobenius / spectral) ** 2
    return ModuleStats(
        str(target),
        delta.algorithm,
        delta.rank,
        delta.alpha,
        delta.scale,
        {role: factor.shape for role, factor in factors.items()},
        {role: factor.dtype.name for role, factor in factors.items()},
        not delta.additive,
        frobenius,
        spectral,
        stable,
        zeros / elements if elements else 0.0,
        tuple(dead),
        delta.idle(dead),
        nonfinite,
    )


_INFINITE = {"bfloat16": 0x7F80, "float16": 0x7C00}
"""The code of infinity; those of NaN are larger."""


def _blank_and_spoilt(values: NDArray[Any], dtype: str) -> tuple[int, int]:
    """How many values are zero, and how many NaN or infinite."""
    import numpy as np

    codes = unsigned(values)
    if codes is not None:
        infinite = np.uint16(_INFINITE[dtype] << 1)
        spoilt = int(np.count_nonzero(codes >= infinite)) if codes.max(initial=0) >= infinite else 0
        return codes.size - int(np.count_nonzero(codes)), spoilt
    wide = floats(values)
    return int(np.count_nonzero(wide == 0)), int(np.count_nonzero(~np.isfinite(wide)))


def _norms(delta: Delta) -> tuple[float | None, float | None]:
    scale = delta.scale
    if 0 in delta.shape:
        return None, None
    matrices = getattr(delta, "stored", None) or getattr(delta, "matrices", None)
    if matrices is not None and delta.additive:
        frobenius, spectral = norms(*matrices())
        factor = 1.0 if scale is None else abs(scale)
        return factor * frobenius, factor * spectral
    if scale is None or not delta.additive:
        return None, None
    return delta.frobenius(), None


_CANCELLED = 1e-6
"""||up @ down||^2 over ||up||^2 ||down||^2 (of independent columns: 1 / r) from which on Gram matrices, whose rounding is relative to the latter, still
give nine digits of it."""
_TINY = 1e-200
"""Squares above this have all their digits."""


def norms(up: NDArray[Any], down: NDArray[Any]) -> tuple[float, float]:
    """||up @ down||_F and ||up @ down||_2 of up (out, r) and down (r, in), in float64.

    With Gu = up'up and Gd = down down' the first is sqrt(sum(Gu * Gd)), the second the root of the largest eigenvalue of L'Gd L where L L' = Gu. A
    product that nearly cancels, or a Gu that is singular, is left to the singular values themselves.
    """
    import numpy as np

    left, right = gram(up.T), gram(down)
    with np.errstate(over="ignore", invalid="ignore"):
        square, one, other = float((left * right).sum()), float(left.trace()), float(right.trace())
    if min(one, other) > _TINY and isfinite(one * other) and square > _CANCELLED * one * other:
        with suppress(np.linalg.LinAlgError):
            lower = np.linalg.cholesky(left)
            return square**0.5, float(np.linalg.eigvalsh(lower.T @ right @ lower)[-1]) ** 0.5
    values = singular_values(doubles(up), doubles(down))
    top = float(values[0]) if len(values) else 0.0
    return (top * float(((values / top) ** 2).sum()) ** 0.5 if top else 0.0), top


def singular_values(up: NDArray[np.float64], down: NDArray[np.float64]) -> NDArray[np.float64]:
    """Singular values of up @ down, largest first, through r x r matrices: those of Ru Rv' of the two QR factorisations."""
    import numpy as np

    left: NDArray[np.float64] = np.asarray(np.linalg.qr(up, mode="r"))
    right: NDArray[np.float64] = np.asarray(np.linalg.qr(down.T, mode="r"))
    values: NDArray[np.float64] = np.linalg.svd(left @ right.T, compute_uv=False)
    return values


@dataclass(frozen=True)
class FileHashes:
    """Hashes people look adapters up by.

    `sha256` over the whole file (CivitAI, Hugging Face); `autov3` over the bytes after the safetensors header, sha256, which kohya
    stores as `sshs_model_hash` (its first 12 digits are CivitAI's AutoV3 and the hash AUTOMATIC1111 shows for a LoRA); `legacy` is the
    WebUI's old hash: sha256 over 64 KiB at 1 MiB, first 8 digits (of a shorter file the hash of nothing). `autov3` is None for other
    containers. kohya's `sshs_legacy_hash` is that of the file before its last metadata was added.

    Sources: kohya-ss/sd-scripts library/train_util.py (addnet_hash_safetensors, addnet_hash_legacy, precalculate_safetensors_hashes);
    AUTOMATIC1111/stable-diffusion-webui modules/hashes.py, extensions-builtin/Lora/network.py.
    """

    path: str
    sha256: str
    autov3: str | None
    legacy: str

    def facts(self) -> dict[str, Any]:
        """JSON-ready facts."""
        return asdict(self)


LEGACY_START = 0x100000
"""Where the old hash begins to read; of a shorter file it is the hash of nothing."""


def file_hashes(path: Path, data_start: int | None, progress: Progress = silent) -> FileHashes:
    """Hash a file, or a member of an archive, in one pass. `data_start` is where safetensors data begins, None for other containers."""
    source = member_source(path)
    if source is None:
        raise UnreadableError("no such file", file=path)
    whole, after = hashlib.sha256(), hashlib.sha256()
    block = 4 << 20
    for at in range(0, source.size, block):
        data = source.read(at, min(block, source.size - at))
        whole.update(data)
        if data_start is not None and at + len(data) > data_start:
            after.update(data[max(0, data_start - at) :])
        progress(at + len(data), source.size, path.name)
    start = min(LEGACY_START, source.size)
    legacy = hashlib.sha256(source.read(start, min(0x10000, source.size - start))).hexdigest()[:8]
    return FileHashes(str(path), whole.hexdigest(), after.hexdigest() if data_start is not None else None, legacy)


@dataclass
class Inspection:
    """Everything inspect shows: per-module statistics, extras, leftovers, totals, metadata verbatim, hashes when asked for."""

    path: Path
    adapter: Adapter
    modules: list[ModuleStats]
    hashes: list[FileHashes]

    def facts(self) -> dict[str, Any]:
        """JSON-ready facts."""
        adapter = self.adapter
        known = [module.frobenius for module in self.modules if module.frobenius is not None]
        names = {module.target for module in self.modules}
        shown = replace(adapter, deltas={target: delta for target, delta in adapter.deltas.items() if str(target) in names})
        return {
            "path": str(self.path),
            "dialect": adapter.dialect,
            "files": list(adapter.files),
            "modules": [module.facts() for module in self.modules],
            "extras": [_tensor_facts(extra.name, extra.tensor) | {"kind": extra.kind.value} for extra in adapter.extras],
            "leftovers": [_tensor_facts(name, tensor) for name, tensor in adapter.leftovers.items()],
            "totals": {
                "targets": len(self.modules),
                "algorithms": shown.algorithms(),
                "ranks": [{"rank": rank, "count": count} for rank, count in shown.ranks().items()],
                "dtypes": shown.dtypes(),
                "parameters": shown.parameters(),
                "frobenius": sum(norm**2 for norm in known) ** 0.5 if known else None,
                "frobenius_of": len(known),
                "nonfinite": sum(module.nonfinite for module in self.modules),
            },
            "metadata": adapter.metadata,
            "config": adapter.config,
            "hashes": [hashes.facts() for hashes in self.hashes],
            "findings": [finding.facts() for finding in adapter.findings],
        }


def _tensor_facts(name: str, tensor: Tensor) -> dict[str, Any]:
    return {"name": name, "shape": list(tensor.shape), "dtype": tensor.dtype.name}


def inspect_file(
    path: Path | str, module: str | None = None, *, hashes: bool = False, options: ReadOptions | None = None, progress: Progress = silent
) -> Inspection:
    """Inspect the adapter at `path`: modules matching the glob `module`, and hashes of its files when asked for.

    Raises what `open_adapter` raises, UsageError when the glob matches no target.
    """
    adapter = open_adapter(path, options=options, whole=False, readers=True)
    stats = list(inspect_modules(adapter, module, progress))
    if module is not None and not stats:
        shown = ", ".join(str(target) for target in list(adapter.deltas)[:3])
        raise UsageError("no target matches", file=path, expected=f"a pattern over names such as {shown}", found=module)
    found = []
    if hashes:
        for file in map(Path, adapter.files):
            found.append(file_hashes(file, _data_start(file), progress))
        adapter.findings += _stored_hash(adapter, found)
    return Inspection(Path(path), adapter, stats, found)


def choices(path: Path | str, names: Sequence[str], options: ReadOptions) -> dict[str, Any]:
    """The adapters of a file that holds several under these names, as JSON-ready facts. No factor is read."""
    found: list[dict[str, Any]] = []
    for name in names:
        try:
            adapter = open_adapter(path, options=replace(options, adapter=name), whole=False)
        except UpparamError as problem:
            found.append({"name": name, "problem": problem.line()})
            continue
        scales = sorted({delta.scale for delta in adapter.deltas.values() if delta.scale is not None})
        found.append(
            {
                "name": name, "dialect": adapter.dialect, "targets": len(adapter.deltas), "algorithms": adapter.algorithms(),
                "ranks": [{"rank": rank, "count": count} for rank, count in adapter.ranks().items()], "scales": scales,
                "parameters": adapter.parameters(), "extras": len(adapter.extras),
            }
        )  # fmt: skip
    return {"path": str(path), "adapters": found}


def _data_start(path: Path) -> int | None:
    from upparam.containers import safetensors

    source = member_source(path)
    if source is None or not safetensors.sniff(head_of(source, path)):
        return None
    return 8 + int.from_bytes(source.read(0, 8), "little")


def _stored_hash(adapter: Adapter, found: list[FileHashes]) -> list[Finding]:
    """Whether the hash that the trainer stored is still that of the weights."""
    stored = adapter.metadata.get("sshs_model_hash")
    if not stored or len(found) != 1 or found[0].autov3 is None:
        return []
    subject = Path(found[0].path).name
    if stored == found[0].autov3:
        return [
            info("hash-agrees", subject, "the weights are those that the trainer hashed", "sshs_model_hash in the metadata is this AutoV3")
        ]
    return [
        warning(
            "hash-differs",
            subject,
            "the data is not what sshs_model_hash was made of: weights were changed, left out or put in another order since",
            f"sshs_model_hash {stored}",
        )
    ]
