"""The one tree of errors. Each carries what, where, and what to do; the CLI prints it as one line and exits with its code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

EXIT_OK = 0
EXIT_FINDINGS = 1
EXIT_USAGE = 2
EXIT_UNREADABLE = 3
EXIT_REFUSED = 4


class Problem(NamedTuple):
    """One thing that cannot be written as it is, and what would help.

    `subject` is the target, module or extra, `why` the reason; `targets` the deltas concerned, where `subject` does not name them. `cure` is
    the option that helps, `scale` the multiplier that `--bake-scale` is to leave (the rest goes into the factors), `rank` the one that
    `--lowrank` is to fill up with zeros.
    """

    subject: str
    why: str = ""
    targets: tuple[Any, ...] = ()
    cure: str | None = None
    scale: float = 1.0
    rank: int | None = None

    def __str__(self) -> str:
        return f"{self.subject}: {self.why}" if self.why else self.subject

    def facts(self) -> dict[str, object]:
        """JSON-ready facts."""
        facts: dict[str, object] = {"subject": self.subject, "why": self.why}
        return facts | ({"cure": self.cure} if self.cure else {})


class UpparamError(Exception):
    """Something upparam will not or cannot do, told so that a person can act on it.

    `message` says what is wrong; `file`, `tensor`, `expected`, `found` and `remedy` say where and what to do. All are optional but
    should be given whenever they are known: the single line shown to people is built from them, and `--json` carries them as fields.
    """

    exit_code = EXIT_UNREADABLE

    def __init__(
        self,
        message: str,
        *,
        file: object = None,
        tensor: str | None = None,
        expected: object = None,
        found: object = None,
        remedy: str | None = None,
    ) -> None:
        self.message = message
        self.file = None if file is None else str(file)
        self.tensor = tensor
        self.expected = None if expected is None else str(expected)
        self.found = None if found is None else str(found)
        self.remedy = remedy
        super().__init__(self.line())

    def line(self) -> str:
        """The whole error as one line: file, tensor, message, expected and found, remedy."""
        parts = []
        if self.file:
            parts.append(f"{self.file}: ")
        if self.tensor is not None:
            parts.append(f"tensor '{self.tensor}': ")
        parts.append(self.message)
        if self.expected is not None or self.found is not None:
            seen = [f"{word} {value}" for word, value in (("expected", self.expected), ("found", self.found)) if value is not None]
            parts.append(f" ({', '.join(seen)})")
        if self.remedy:
            parts.append(f"; {self.remedy}")
        return " ".join("".join(parts).split())

    def locate(self, *, file: object = None, tensor: str | None = None) -> None:
        """Say this file and tensor where the error names none: for those who know better where they are than what found it."""
        self.file = self.file or (None if file is None else str(file))
        self.tensor = tensor if self.tensor is None else self.tensor
        self.args = (self.line(),)

    def facts(self) -> dict[str, object]:
        """The same facts as a flat mapping, for `--json`."""
        names = ("message", "file", "tensor", "expected", "found", "remedy")
        return {"error": type(self).__name__, "exit_code": self.exit_code} | {
            name: getattr(self, name) for name in names if getattr(self, name) is not None
        }


class UsageError(UpparamError):
    """The command or call is not of the right form, or needs a fact that only the user has."""

    exit_code = EXIT_USAGE


class AmbiguousError(UsageError):
    """Several answers fit and upparam will not choose in silence; the message lists the candidates."""


class SeveralAdaptersError(AmbiguousError):
    """One file holds several adapters, told apart by their names: `names`."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        super().__init__(
            "several adapters are in one file", found=", ".join(self.names),
            remedy="choose one with --adapter NAME (where a command has no --adapter, take it out first with 'upparam convert --adapter NAME')",
        )  # fmt: skip


class OutputExistsError(UsageError):
    """The output path already holds something and `--force` was not given."""


class UnreadableError(UpparamError):
    """The path cannot be read: missing, a device or FIFO, no permission, or not a file of any kind upparam knows."""


class MalformedError(UnreadableError):
    """The bytes claim to be of a format and break its rules."""


class LimitError(MalformedError):
    """A documented limit (see `upparam.limits`) would be passed; hostile or damaged files end here instead of eating memory."""


class NotAnAdapterError(UnreadableError):
    """The file is readable and is something else than a low-rank adapter."""


class DeadAdapterError(UnreadableError):
    """An adapter that cannot be applied because a part is missing (a factor without its partner, for example)."""


class RefusedError(UpparamError):
    """Doing as asked would lose or invent something; the message lists what, the remedy says how to allow it by name.

    `problems` are all of them, where the message shows only some.
    """

    exit_code = EXIT_REFUSED

    def __init__(
        self,
        message: str,
        *,
        file: object = None,
        tensor: str | None = None,
        expected: object = None,
        found: object = None,
        remedy: str | None = None,
        problems: Sequence[Problem] = (),
    ) -> None:
        super().__init__(message, file=file, tensor=tensor, expected=expected, found=found, remedy=remedy)
        self.problems = tuple(problems)

    def facts(self) -> dict[str, object]:
        """The same facts as a flat mapping, and each problem with what would help."""
        return super().facts() | ({"problems": [problem.facts() for problem in self.problems]} if self.problems else {})


class MismatchError(RefusedError):
    """Adapter and base (or adapter and adapter) do not fit: missing targets, wrong shapes."""


class VerificationError(UpparamError):
    """What was written does not read back as what was meant. The output has been removed."""

    exit_code = EXIT_UNREADABLE
