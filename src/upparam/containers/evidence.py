"""From what a pickle machine saw to a TensorFile: findings about the globals, and every tensor named and checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from upparam.containers.base import Opaque, TensorFile, flatten, leaves
from upparam.containers.machine import Examination, Use
from upparam.containers.symbols import Broken, Trust, clean
from upparam.errors import LimitError, UpparamError
from upparam.findings import Finding, error, info, warning
from upparam.limits import MAX_TENSORS
from upparam.wording import counted

MAX_FINDINGS = 64
"""Findings about globals in one file; further ones are counted in the last."""


def about_uses(uses: Mapping[str, Use], subject: str, where: str = "") -> list[Finding]:
    """Findings for what a pickle would import or call: errors for code, one note for all classes of plain fields."""
    found = []
    code = [use for use in uses.values() if use.trust is Trust.CODE]
    place = f" of {where}" if where else ""
    for use in code[:MAX_FINDINGS]:
        said = {"called": "calls", "made": "makes an object of", "changed": "changes", "named": "imports"}.get(use.how, f"({use.how})")
        evidence = [f"byte {use.offset}{place}"]
        if use.arguments:
            evidence.append(f"arguments {use.arguments}")
        if use.count > 1:
            evidence.append(f"{use.count} times")
        found.append(
            error(
                "pickle-code", subject, f"loading it {said} {clean(use.qualname, 80)}; no tensor needs that, and nothing was run", *evidence
            )
        )
    if len(code) > MAX_FINDINGS:
        found.append(
            error("pickle-code", subject, f"{counted(len(code) - MAX_FINDINGS, 'further global', 'is', 'are')} imported or called")
        )
    inert = [clean(use.qualname, 80) for use in uses.values() if use.trust is Trust.INERT]
    if inert:
        found.append(info("pickle-objects", subject, "holds objects of known classes, kept by name and not built", ", ".join(inert[:12])))
    return found


def about_unread(structure: Any, subject: str) -> list[Finding]:
    """A warning for tensors of forms upparam does not read (quantised, sparse, nested, on the meta device)."""
    unread = [(path, leaf) for path, leaf in leaves(structure, Opaque) if leaf.qualname.startswith("torch.Tensor")]
    if not unread:
        return []
    path, leaf = unread[0]
    reason = leaf.qualname.removeprefix("torch.Tensor").strip(" ()") or ", ".join(str(arg) for arg in leaf.args)
    return [
        warning(
            "unread-tensors",
            subject,
            f"{counted(len(unread), 'tensor')} of a form upparam does not read: {reason}",
            f"such as {clean(path)}",
        )
    ]


def tensor_file(path: Path, container: str, seen: Examination, findings: Iterable[Finding] = (), *, where: str = "") -> TensorFile:
    """The TensorFile of an examined pickle. Raises its problem, or that of the first tensor its storage cannot back, with the tensor's name."""
    if seen.problem is not None:
        raise with_file(seen.problem, path)
    try:
        for name, broken in leaves(seen.value, Broken):
            raise with_file(broken.problem, path, name)
        tensors = flatten(seen.value)
    except LimitError as problem:
        raise with_file(problem, path) from None
    if len(tensors) > MAX_TENSORS:
        raise LimitError("more tensors than any real file", file=path, expected=f"<= {MAX_TENSORS}", found=len(tensors))
    for name, tensor in tensors.items():
        tensor.check(name)
    found = [*findings, *about_uses(seen.uses, path.name, where), *about_unread(seen.value, path.name)]
    return TensorFile(path, container, tensors, structure=seen.value, findings=found)


def with_file(problem: UpparamError, path: Path, tensor: str | None = None) -> UpparamError:
    """The same error naming the file and the tensor."""
    return type(problem)(
        problem.message, file=path, tensor=tensor or problem.tensor, expected=problem.expected, found=problem.found, remedy=problem.remedy
    )
