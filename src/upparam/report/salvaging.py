"""What is left of a damaged file, as lines for a terminal."""

from __future__ import annotations

from upparam.containers.symbols import clean
from upparam.operations.salvage import Salvage
from upparam.report.text import one_line


def salvage_text(found: Salvage) -> str:
    """What is wrong, every tensor that is still whole, and the lost ones with the reason."""
    lines = [found.problem.line()] if found.problem else []
    lines.append(f"{len(found.tensors)} tensors are still whole; --salvage OUT writes them:")
    lines += [f"  {clean(name)}  {tensor.dtype} {list(tensor.shape)}" for name, tensor in found.tensors.items()]
    if found.lost:
        lines.append(f"{len(found.lost)} are lost:")
        lines += [f"  {clean(name)}: {reason}" for name, reason in found.lost.items()]
    return "\n".join(map(one_line, lines))
