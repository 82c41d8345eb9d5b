"""The plan of a merge as plain lines for a terminal."""

from __future__ import annotations

from upparam.operations.merge.planned import Plan, seconds
from upparam.report.text import finding_lines, listed, one_line
from upparam.wording import counted


def plan_text(plan: Plan, size: int) -> str:
    """What would change, what would not, and what it costs to write an output of `size` bytes."""
    lines = [
        f"base: {plan.checkpoint.path} ({counted(len(plan.checkpoint.tensors), 'tensor')} in {counted(len(plan.checkpoint.files), 'file')})"
    ]
    for item in plan.ingredients:
        algorithms = listed(f"{count} {name}" for name, count in item.adapter.algorithms().items())
        lines.append(f"adapter: {item.path} x {item.multiplier:g} ({item.adapter.dialect}: {algorithms or 'no deltas'})")
    for name, work in plan.works.items():
        ways = ["replaced whole"] if work.replacement is not None else []
        ways += [
            f"{piece.delta.algorithm} r={piece.delta.rank} scale {piece.scale:g}" + ("" if piece.share == 1 else f", of what it changes {piece.share:g}")
            + (f" rows {piece.rows[0]}:{piece.rows[1]}" if piece.rows else "") + (" transposed" if piece.transposed else "")
            for piece in work.pieces
        ]  # fmt: skip
        lines.append(f"  {name} {work.dtype} {'x'.join(map(str, work.tensor.shape))}: {listed(ways)}")
    lines += [f"  {name} {plan.out_dtype(tensor)} {'x'.join(map(str, tensor.shape))}: added" for name, tensor in plan.added.items()]
    if plan.skipped:
        lines.append(f"left out: {counted(len(plan.skipped), 'target')} ({listed(plan.skipped)})")
    lines += finding_lines(plan.findings)
    lines.append(
        f"would change {counted(len(plan.works), 'tensor')} ({plan.touched_bytes:,} bytes) and write {size:,} bytes; "
        f"about {plan.memory_bytes() >> 20} MiB of memory and {seconds(size):.1f} s where files copy at 1.5 GB/s"
    )
    return "\n".join(map(one_line, lines))
