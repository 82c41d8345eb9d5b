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
    from upparam.errors import UpparamError
    from upparam.operations.combine import combine
    from upparam.operations.compare import compare
    from upparam.operations.edit import edit
    from upparam.operations.extract import extract
    from upparam.operations.identify import identify
    from upparam.operations.merge import merge
    from upparam.operations.opening import open_adapter as open
    from upparam.operations.resize import resize

__all__ = [
    "Adapter",
    "Target",
    "UpparamError",
    "__version__",
    "combine",
    "compare",
    "edit",
    "extract",
    "identify",
    "merge",
    "open",
    "resize",
]

_PLACES = {
    "Adapter": "upparam.adapter:Adapter",
    "Target": "upparam.adapter:Target",
    "UpparamError": "upparam.errors:UpparamError",
    "combine": "upparam.operations.combine:combine",
    "compare": "upparam.operations.compare:compare",
    "edit": "upparam.operations.edit:edit",
    "extract": "upparam.operations.extract:extract",
    "identify": "upparam.operations.identify:identify",
    "merge": "upparam.operations.merge:merge",
    "open": "upparam.operations.opening:open_adapter",
    "resize": "upparam.operations.resize:resize",
}


def __getattr__(name: str) -> Any:
    try:
        place, attribute = _PLACES[name].split(":")
    except KeyError:
        raise AttributeError(f"module 'upparam' has no attribute '{name}'") from None
    return getattr(importlib.import_module(place), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
