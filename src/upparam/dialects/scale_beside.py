"""The scale of an adapter whose alpha only a side file states, one for all modules."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from upparam.adapter import Adapter
from upparam.algorithms.base import UNKNOWN, ScaleRule, Scaling
from upparam.containers.base import TensorFile
from upparam.dialects.base import ReadOptions
from upparam.errors import UsageError
from upparam.findings import warning


def scale_beside(
    adapter: Adapter, file: TensorFile, beside: str, alpha: Any, rank: Any, ranks: Collection[int], options: ReadOptions
) -> Scaling:
    """alpha / rank; UNKNOWN, with a finding, where nothing says it.

    `alpha` and `rank` are what the file named `beside` states (None: nothing), `ranks` those of the factors: a file that states
    another rank is another adapter's. Raises UsageError where the user's alpha contradicts the file's.
    """
    if isinstance(alpha, (int, float)) and not isinstance(alpha, bool) and (rank is None or {rank} == set(ranks)):
        if options.alpha not in (None, alpha):
            raise UsageError(
                "the alpha given contradicts the adapter's own", file=file.path, expected=f"{alpha:g} ({beside})", found=options.alpha
            )
        return Scaling(alpha=float(alpha))
    if options.scale is not None:
        return Scaling(ScaleRule.EXPLICIT, multiplier=options.scale)
    if options.alpha is not None:
        return Scaling(alpha=options.alpha)
    why = f"no {beside} with lora_alpha beside it"
    if alpha is not None and rank is not None:
        why = f"the {beside} beside it is of rank {rank} and the factors of {', '.join(map(str, sorted(ranks)))}: it is another adapter's"
    adapter.findings.append(warning("scale-missing", file.name, f"alpha is not known: {why}", "give it with --alpha"))
    return UNKNOWN
