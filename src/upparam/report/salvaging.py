"""What is left of a damaged file, as lines for a terminal."""

from __future__ import annotations

from upparam.containers.symbols import clean
from upparam.operations.salvage import Salvage
from upparam.report.text import one_line
from upparam.wording import counted


def salvage_text(found: Salvage) -> str:
    """What is wrong, every tensor that is still whole, and the lost ones with the reason."""
    lines = [found.problem.line()] if found.problem else []
    be, them = ("is", "it") if len(found.tensors) == 1 else ("are", "them")
    lines.append(f"{counted(len(found.tensors), 'tensor')} {be} still whole; --salvage OUT writes {them}:")
    lines += [f"  {clean(name)}  {tensor.dtype} {list(tensor.shape)}" for name, tensor in found.tensors.items()]
    if found.lost:
        lines.append(f"{len(found.lost):,} {'is' if len(found.lost) == 1 else 'are'} lost:")
        lines += [f"  {clean(name)}: {reason}" for name, reason in found.lost.items()]
    return "\n".join(map(one_line, lines))
