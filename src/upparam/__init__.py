"""upparam: the truth about low-rank adapter files.

    import upparam
    adapter = upparam.open("folder-or-file")
    adapter.save("out", dialect="peft")

Importing this package imports neither numpy nor torch; each name below is loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from upparam._version import __version__

if TYPE_CHECKING:
    from upparam.adapter import Adapter, Target
    from upparam.algorithms.lowrank import RankRule
    from upparam.dialects.base import ReadOptions
    from upparam.errors import UpparamError
    from upparam.operations.combine import combine
    from upparam.operations.compare import compare
    from upparam.operations.convert import convert
    from upparam.operations.edit import edit
    from upparam.operations.extract import extract
    from upparam.operations.fitting import Arithmetic
    from upparam.operations.identify import identify
    from upparam.operations.inspect import inspect_file as inspect
    from upparam.operations.merge import merge
    from upparam.operations.merge.journal import undo
    from upparam.operations.opening import open_adapter as open
    from upparam.operations.resize import resize
    from upparam.operations.scan import scan
    from upparam.operations.unmerge import unmerge
    from upparam.operations.verify import verify

__all__ = [
    "Adapter",
    "Arithmetic",
    "RankRule",
    "ReadOptions",
    "Target",
    "UpparamError",
    "__version__",
    "combine",
    "compare",
    "convert",
    "edit",
    "extract",
    "identify",
    "inspect",
    "merge",
    "open",
    "resize",
    "scan",
    "undo",
    "unmerge",
    "verify",
]

_PLACES = {
    "Adapter": "upparam.adapter:Adapter",
    "Arithmetic": "upparam.operations.fitting:Arithmetic",
    "RankRule": "upparam.algorithms.lowrank:RankRule",
    "ReadOptions": "upparam.dialects.base:ReadOptions",
    "Target": "upparam.adapter:Target",
    "UpparamError": "upparam.errors:UpparamError",
    "combine": "upparam.operations.combine:combine",
    "compare": "upparam.operations.compare:compare",
    "convert": "upparam.operations.convert:convert",
    "edit": "upparam.operations.edit:edit",
    "extract": "upparam.operations.extract:extract",
    "identify": "upparam.operations.identify:identify",
    "inspect": "upparam.operations.inspect:inspect_file",
    "merge": "upparam.operations.merge:merge",
    "open": "upparam.operations.opening:open_adapter",
    "resize": "upparam.operations.resize:resize",
    "scan": "upparam.operations.scan:scan",
    "undo": "upparam.operations.merge.journal:undo",
    "unmerge": "upparam.operations.unmerge:unmerge",
    "verify": "upparam.operations.verify:verify",
}


def __getattr__(name: str) -> Any:
    try:
        place, attribute = _PLACES[name].split(":")
    except KeyError:
        raise AttributeError(f"module 'upparam' has no attribute '{name}'") from None
    return getattr(importlib.import_module(place), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
