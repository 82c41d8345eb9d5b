"""A symbolic pickle machine: it reads a pickle program (protocols 0 to 5) as a description and never calls or imports what it names.

Data opcodes build plain Python values. A global becomes two strings; a call of one goes to `reconstructors`, an allowlist that turns
tensor-building calls into tensor descriptions. Every other call leaves a `Record` in its place and a `Use`: which global, at which byte,
with what arguments. What each opcode does is in `opcodes`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from operator import length_hint
from typing import Any

from upparam.containers import reconstructors
from upparam.containers.base import Opaque
from upparam.containers.opcodes import TABLE, arguments
from upparam.containers.symbols import (
    Array,
    Blob,
    Budget,
    Global,
    Record,
    StorageType,
    Trust,
    clean,
    settle,
    summary,
)
from upparam.dtypes import DType
from upparam.errors import LimitError, MalformedError, UpparamError
from upparam.limits import (
    MAX_CLAIMED,
    MAX_PICKLE_BYTES,
    MAX_PICKLE_INTEGER,
    MAX_PICKLE_MEMO,
    MAX_PICKLE_OBJECTS,
    MAX_PICKLE_OPCODES,
)
from upparam.sources import MemorySource, Source
from upparam.tensors import Tensor

KEPT_BYTES = 256
"""Byte strings longer than this stay in the file as a Blob."""
MAX_USES = 512
"""Distinct globals a machine reports."""
_MAX_TUPLE_KEYS = 1000
_MAX_KEY_ITEMS = 10_000
_MAX_NESTED = 3
_WHOLE = (Tensor, Array, dict, list)
_NESTED_READ = 1 << 20


@dataclass
class Use:
    """A global a pickle names: how it is trusted, how it is used ('called', 'built', 'named', ...), where first, with what, how often."""

    qualname: str
    trust: Trust
    offset: int
    how: str = "named"
    arguments: str = ""
    count: int = 1

    def facts(self) -> dict[str, object]:
        """JSON-ready facts."""
        return {
            "global": self.qualname, "trust": self.trust.value, "offset": self.offset, "how": self.how, "arguments": self.arguments, "count": self.count,
        }  # fmt: skip


@dataclass
class Examination:
    """What reading one pickle gave: its value (None when `problem` stopped it), the globals it uses, the offset after its STOP."""

    value: Any
    uses: dict[str, Use] = field(default_factory=dict)
    stop: int = 0
    problem: UpparamError | None = None
    protocol: int = 0
    pieces: list[tuple[str, Any]] = field(default_factory=list)
    """What lay finished on the stack when a problem stopped the reading, each under the last text before it."""
    ended: bool = False
    """True when the problem is that the bytes ran out."""

    @property
    def code(self) -> list[Use]:
        """The uses a loader would execute."""
        return [use for use in self.uses.values() if use.trust is Trust.CODE]


def new_budget(size: int) -> Budget:
    """A fresh budget for a file of `size` bytes."""
    return Budget(MAX_PICKLE_OPCODES, MAX_PICKLE_OBJECTS, MAX_PICKLE_MEMO, MAX_CLAIMED + 64 * size, (1 << 20) + 4 * size)


def program(source: Source) -> bytes:
    """The whole of a source as pickle bytes. Raises LimitError past MAX_PICKLE_BYTES."""
    if source.size > MAX_PICKLE_BYTES:
        raise LimitError("a pickle longer than any real one", file=source.name, expected=f"<= {MAX_PICKLE_BYTES}", found=source.size)
    return source.read(0, source.size)


def examine(
    data: bytes,
    *,
    source: Source | None = None,
    base: int = 0,
    start: int = 0,
    persistent: Callable[[Any], Any] | None = None,
    budget: Budget | None = None,
    keep: bool = False,
) -> Examination:
    """Read one pickle from `data[start:]`; never raises an UpparamError, it is in `problem` (with what was understood before it).

    `source` and `base` say where `data` lies, so that long byte strings become byte ranges instead of copies. `persistent` turns a
    persistent id into its stand-in. `keep` leaves the value symbolic (not settled) for a caller that goes on with it.
    """
    machine = Machine(data, source or MemorySource(data, "pickle"), base, start, persistent, budget or new_budget(len(data)))
    found = Examination(None, machine.uses)
    try:
        value = machine.run()
        found.value = value if keep else settle(value)
    except UpparamError as problem:
        found.problem = problem
        found.pieces = machine.pieces()
    found.stop, found.protocol, found.ended = machine.at, machine.protocol, machine.ended
    return found


class Machine:
    """The stack, the memo and the place in the program. Use `examine`."""

    def __init__(self, data: bytes, source: Source, base: int, start: int, persistent: Callable[[Any], Any] | None, budget: Budget) -> None:
        self.data, self.source, self.base, self.at = data, source, base, start
        self.persistent, self.budget = persistent, budget
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.uses: dict[str, Use] = {}
        self.protocol = 0
        self.opcode = start
        self.tuple_keys = 0
        self.ended = False
        self.depth = 0
        self.known: dict[bytes, Any] = {}
        self.lost: UpparamError | None = None
        """What makes the value useless although reading can go on: what is called behind it must still be seen."""

    def run(self) -> Any:
        """Interpret up to STOP and return the (symbolic) value. Raises MalformedError or LimitError with the offset."""
        data, table = self.data, TABLE
        size = len(data)
        allowed = iter(range(self.budget.opcodes))
        try:
            for _ in allowed:
                if self.at >= size:
                    break
                self.opcode = self.at
                action = table[data[self.at]]
                self.at += 1
                if action is None:
                    if data[self.opcode] == 0x2E:
                        if self.lost is not None:
                            raise self.lost
                        return self.pop()
                    raise self.bad("an unknown opcode", found=hex(data[self.opcode]))
                action(self)
                if self.at > size:
                    raise self.cut("the pickle ends inside an opcode")
            else:
                raise LimitError("a longer program than any real pickle", expected=f"<= {MAX_PICKLE_OPCODES} opcodes")
        except (IndexError, struct.error):
            self.ended = self.opcode + 9 > size
            raise self.bad("the pickle breaks its own stack or ends inside an opcode") from None
        except UpparamError as problem:
            raise self.placed(problem) from None
        finally:
            self.budget.opcodes = length_hint(allowed)
        raise self.cut("the pickle ends without STOP", remedy="the file is truncated; fetch it again")

    def pieces(self) -> list[tuple[str, Any]]:
        """The objects on the stack, settled; at most one entry for each item of a frame, named by the text before it."""
        found: list[tuple[str, Any]] = []
        for frame in [*self.marks, self.stack]:
            name = ""
            for item in frame:
                if type(item) is str:
                    name = item
                elif type(item) in _WHOLE:
                    with suppress(UpparamError):
                        found.append((name, settle(item)))
        return found

    def placed(self, problem: UpparamError) -> UpparamError:
        """`problem` with the opcode's offset in its text."""
        if "byte " in (problem.found or ""):
            return problem
        found = f"{problem.found}, at byte {self.base + self.opcode}" if problem.found else f"byte {self.base + self.opcode}"
        return type(problem)(
            problem.message, file=problem.file, tensor=problem.tensor, expected=problem.expected, found=found, remedy=problem.remedy
        )

    def bad(self, message: str, **facts: Any) -> MalformedError:
        """A MalformedError at the current opcode."""
        found = facts.pop("found", None)
        place = f"byte {self.base + self.opcode}"
        return MalformedError(message, found=f"{found}, at {place}" if found is not None else place, **facts)

    def cut(self, message: str, **facts: Any) -> MalformedError:
        """The error for a program that ends too early; `ended` tells a caller that reads in windows to come back with more."""
        self.ended = True
        return self.bad(message, **facts)

    def pop(self) -> Any:
        """Take the top; a mark in its place is an error (IndexError becomes one in `run`)."""
        return self.stack.pop()

    def since_mark(self) -> list[Any]:
        """The items above the last mark, which is removed."""
        items = self.stack
        self.stack = self.marks.pop()
        return items

    def push(self, value: Any) -> None:
        """Put a value on the stack."""
        self.stack.append(value)

    def take(self, count: int) -> bytes:
        """The next `count` bytes of the program."""
        start = self.at
        self.at = start + count
        if count < 0 or self.at > len(self.data):
            raise self.cut("the pickle ends inside a value", expected=f"{count} bytes", found=len(self.data) - start)
        return self.data[start : self.at]

    def blob(self, count: int) -> Any:
        """The next `count` bytes, left in the file when long."""
        if count <= KEPT_BYTES:
            return self.take(count)
        start = self.at
        self.at = start + count
        if self.at > len(self.data):
            raise self.cut("the pickle ends inside a byte string", expected=f"{count} bytes", found=len(self.data) - start)
        return Blob(self.source, self.base + start, count)

    def line(self, limit: int | None = None) -> bytes:
        """The next line of a text opcode, without its end; numbers and names have a limit, text has none."""
        stop = self.data.find(b"\n", self.at, len(self.data) if limit is None else self.at + limit)
        if stop < 0 and limit is not None and self.at + limit < len(self.data):
            self.at += limit
            raise LimitError("a number or name longer than any real one", expected=f"<= {limit} characters")
        if stop < 0:
            raise self.cut("the pickle ends inside a line")
        found = self.data[self.at : stop]
        self.at = stop + 1
        return found

    def text(self, raw: bytes) -> str:
        """UTF-8 text as pickles hold it."""
        try:
            return raw.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError as problem:
            raise self.bad("text that is not UTF-8") from problem

    def integer(self, raw: bytes) -> int:
        """A little-endian two's complement integer."""
        if len(raw) > MAX_PICKLE_INTEGER:
            raise LimitError("an integer longer than any real one", expected=f"<= {MAX_PICKLE_INTEGER} bytes", found=f"{len(raw)} bytes")
        return int.from_bytes(raw, "little", signed=True)

    def decimal(self, raw: bytes, base: int = 10) -> int:
        """An integer in text; INT and LONG read it in base 0, where '0x10' is sixteen."""
        try:
            if len(raw) > 4000:
                raise ValueError
            return int(raw, base)
        except ValueError:
            raise self.bad("text that is no integer", found=repr(raw[:40])) from None

    def remember(self, index: int) -> None:
        """Store the top of the stack in the memo."""
        if not 0 <= index < 1 << 32:
            raise self.bad("a memo index out of range", found=index if abs(index) < 1 << 64 else "huge")
        self.memo[index] = self.stack[-1]
        if len(self.memo) > self.budget.memo:
            raise LimitError("a memo larger than any real pickle's", expected=f"<= {self.budget.memo}")

    def recall(self, index: int) -> None:
        """Push what the memo holds."""
        try:
            self.stack.append(self.memo[index])
        except KeyError:
            raise self.bad("a memo entry that was never stored", found=index if abs(index) < 1 << 64 else "huge") from None

    def key(self, value: Any) -> Any:
        """A dict key or set element that hashes in constant time: scalars as they are, tuples of few scalars, else a name."""
        kind = type(value)
        if kind is str or kind is bytes or kind is bool or value is None:
            return value
        if kind is int:
            return value if value.bit_length() <= 60 else f"<integer {summary(value)}>"
        if kind is float:
            return value if value == value and abs(value) < 1e18 else f"<float {value}>"
        if kind is tuple and len(value) <= 8 and self.tuple_keys < _MAX_TUPLE_KEYS and all(map(_short_scalar, value)):
            self.tuple_keys += 1
            return value
        if kind is tuple:
            self.budget.take(_weight(value))
        if kind is Global:
            return f"<{value.qualname}>"
        if kind is DType:
            return f"<{value.name}>"
        return f"<{summary(value)} at {self.opcode}>"

    def use(self, name: Global, how: str, arguments: Any = None) -> Use:
        """Note a use of a global; the first call of each is kept with its arguments."""
        qualname = name.qualname
        known = self.uses.get(qualname)
        if known is None:
            if len(self.uses) >= MAX_USES:
                qualname = "(more)"
                known = self.uses.get(qualname)
            if known is None:
                known = self.uses[qualname] = Use(qualname, reconstructors.trust(name.module, name.name), self.base + name.offset, count=0)
        elif known.qualname == "(more)" and known.trust is not Trust.CODE:
            known.trust = reconstructors.trust(name.module, name.name)
        known.count += 1
        if how != "named" and known.how == "named":
            known.how, known.offset = how, self.base + self.opcode
            if arguments is not None:
                known.arguments = summary(arguments) + (self.nested(arguments) if known.trust is Trust.CODE else "")
        return known

    def nested(self, arguments: Any) -> str:
        """What a pickle among the arguments of a call would call in its turn."""
        if self.depth >= _MAX_NESTED or type(arguments) is not tuple:
            return ""
        for item in arguments[:4]:
            raw = item.source.read(item.start, min(item.size, _NESTED_READ)) if type(item) is Blob else item
            if type(raw) is bytes and raw[:1] == b"\x80" and len(raw) <= _NESTED_READ:
                self.budget.copy(len(raw))
                inner = Machine(raw, MemorySource(raw, "nested"), 0, 0, None, self.budget)
                inner.depth = self.depth + 1
                with suppress(UpparamError):
                    inner.run()
                calls = [use.qualname for use in inner.uses.values() if use.trust is Trust.CODE]
                if calls:
                    return f"; a pickle inside calls {', '.join(clean(name, 60) for name in calls[:4])}"
        return ""

    def accuse(self, name: Global, how: str, arguments: Any = None) -> None:
        """Note a use that no data needs, whatever the global is."""
        known = self.use(name, how, arguments)
        known.trust = Trust.CODE
        known.how = how

    def call(self, callee: Any, args: Any, how: str, new: bool = False) -> Any:
        """What a call leaves on the stack: the allowlist's meaning of it, or a Record."""
        self.budget.take(1)
        if type(callee) is not Global:
            if type(callee) is StorageType:
                return Record("torch.Storage", arguments(args))
            self.accuse(Global("(an object)", _kind(callee), self.opcode), how, args)
            return Record(f"call of {_kind(callee)}", arguments(args))
        return reconstructors.reconstruct(self, callee, args, how, new)

    def build(self, target: Any, state: Any) -> None:
        """What BUILD does to the object on the stack."""
        reconstructors.build(self, target, state)

    def append(self, target: Any, items: list[Any]) -> None:
        """What APPEND and APPENDS do."""
        if type(target) is list:
            target.extend(items)
        elif type(target) is Record:
            target.items.extend(items)
        else:
            self.unfit(target, "appended to", items)

    def set_items(self, target: Any, items: list[Any]) -> None:
        """What SETITEM and SETITEMS do with alternating keys and values."""
        if len(items) % 2:
            raise self.bad("a key without its value")
        if type(target) is dict:
            entries = target
        elif type(target) is Record:
            entries = target.entries
        else:
            self.unfit(target, "assigned into", items)
            return
        for at in range(0, len(items), 2):
            entries[self.key(items[at])] = items[at + 1]

    def unfit(self, target: Any, how: str, items: Any) -> None:
        """An operation on something that has no such operation: a trick on a global, else simply broken."""
        if type(target) is Global:
            self.accuse(target, how, items)
            return
        raise self.bad(f"a {_kind(target)} cannot be {how}")


def _weight(value: tuple[Any, ...]) -> int:
    """How many items a hash of nested tuples visits. Raises LimitError where shared parts make it run without end."""
    count, left = 0, [value]
    while left:
        items = left.pop()
        count += len(items)
        if count > _MAX_KEY_ITEMS:
            raise LimitError("a key of more parts than any real one: hashing it would never end", expected=f"<= {_MAX_KEY_ITEMS}")
        left.extend(item for item in items if type(item) is tuple)
    return count


def _short_scalar(value: Any) -> bool:
    return type(value) in (str, bool, type(None)) or (type(value) is int and value.bit_length() <= 60)


def _kind(value: Any) -> str:
    return value.qualname if isinstance(value, (Record, Opaque, Global)) else type(value).__name__.lower()
