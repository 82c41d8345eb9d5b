"""What each opcode of a pickle (protocols 0 to 5) does to the symbolic machine.

Source: CPython Lib/pickle.py and Lib/pickletools.py.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from upparam.containers import reconstructors
from upparam.containers.base import Opaque
from upparam.containers.symbols import Global, Record, summary
from upparam.errors import LimitError, MalformedError

if TYPE_CHECKING:
    from upparam.containers.machine import Machine

_MAX_KNOWN = 10_000
_LONGEST = 4096
"""Characters of a number or a name in a text opcode."""


def arguments(args: Any) -> tuple[Any, ...]:
    """What a call is given: the items of a tuple, anything else as the only one."""
    return args if type(args) is tuple else (args,)


Action = Callable[["Machine"], None]
TABLE: list[Action | None] = [None] * 256
"""What each opcode does; STOP is handled by `Machine.run`."""


def _op(code: str | int) -> Callable[[Action], Action]:
    def enter(action: Action) -> Action:
        TABLE[code if isinstance(code, int) else ord(code)] = action
        return action

    return enter


def _constant(code: str | int, value: Any) -> None:
    TABLE[code if isinstance(code, int) else ord(code)] = lambda machine: machine.stack.append(value)


for _code, _value in (("N", None), (0x88, True), (0x89, False), (")", ())):
    _constant(_code, _value)


@_op("(")
def _mark(machine: Machine) -> None:
    machine.marks.append(machine.stack)
    machine.stack = []


@_op("0")
def _pop(machine: Machine) -> None:
    if machine.stack:
        machine.stack.pop()
    else:
        machine.since_mark()


@_op("1")
def _pop_mark(machine: Machine) -> None:
    machine.since_mark()


@_op("2")
def _dup(machine: Machine) -> None:
    machine.push(machine.stack[-1])


@_op(0x80)
def _proto(machine: Machine) -> None:
    machine.protocol = machine.take(1)[0]
    if machine.protocol > 5:
        raise machine.bad("a pickle protocol that does not exist", expected="0 to 5", found=machine.protocol)


@_op(0x95)
def _frame(machine: Machine) -> None:
    machine.take(8)


@_op("I")
def _int(machine: Machine) -> None:
    raw = machine.line(_LONGEST)
    machine.push(raw == b"01" if raw in (b"00", b"01") else machine.decimal(raw, 0))


@_op("L")
def _long(machine: Machine) -> None:
    machine.push(machine.decimal(machine.line(_LONGEST).removesuffix(b"L"), 0))


@_op("F")
def _float(machine: Machine) -> None:
    raw = machine.line(_LONGEST)
    try:
        machine.push(float(raw[:400]))
    except ValueError:
        raise machine.bad("text that is no number", found=repr(raw[:40])) from None


@_op("J")
def _binint(machine: Machine) -> None:
    at = machine.at
    machine.at = at + 4
    machine.stack.append(struct.unpack_from("<i", machine.data, at)[0])


@_op("K")
def _binint1(machine: Machine) -> None:
    machine.stack.append(machine.data[machine.at])
    machine.at += 1


@_op("M")
def _binint2(machine: Machine) -> None:
    at = machine.at
    machine.at = at + 2
    machine.stack.append(struct.unpack_from("<H", machine.data, at)[0])


@_op(0x8A)
def _long1(machine: Machine) -> None:
    machine.push(machine.integer(machine.take(machine.take(1)[0])))


@_op(0x8B)
def _long4(machine: Machine) -> None:
    machine.push(machine.integer(machine.take(struct.unpack("<i", machine.take(4))[0])))


@_op("G")
def _binfloat(machine: Machine) -> None:
    machine.push(struct.unpack(">d", machine.take(8))[0])


@_op("S")
def _string(machine: Machine) -> None:
    raw = machine.line().strip()
    if len(raw) < 2 or raw[:1] != raw[-1:] or raw[:1] not in (b"'", b'"'):
        raise machine.bad("a string without its quotes", found=repr(raw[:40]))
    machine.push(_old_text(_unescaped(raw[1:-1])))


@_op("V")
def _unicode(machine: Machine) -> None:
    raw = machine.line()
    try:
        machine.push(raw.decode("raw-unicode-escape"))
    except UnicodeDecodeError:
        raise machine.bad("text with a broken escape", found=repr(raw[:40])) from None


def _binary_text(size: str) -> Action:
    layout = struct.Struct(size)

    def action(machine: Machine) -> None:
        at = machine.at
        count = layout.unpack_from(machine.data, at)[0]
        machine.at = at + layout.size
        machine.stack.append(machine.text(machine.take(count)))

    return action


def _binary_bytes(size: str) -> Action:
    layout = struct.Struct(size)

    def action(machine: Machine) -> None:
        machine.push(machine.blob(layout.unpack(machine.take(layout.size))[0]))

    return action


def _old_text(raw: bytes) -> str | bytes:
    """A Python 2 string: text when ASCII, else bytes (it may be an array's data, which no text decoding may touch)."""
    return raw.decode("ascii") if raw.isascii() else raw


def _old_string(size: str) -> Action:
    layout = struct.Struct(size)

    def action(machine: Machine) -> None:
        count = layout.unpack(machine.take(layout.size))[0]
        if count < 0:
            raise machine.bad("a string of negative length", found=count)
        machine.push(_old_text(machine.take(count)))

    return action


for _code, _layout in (("X", "<I"), (0x8C, "<B"), (0x8D, "<Q")):
    _op(_code)(_binary_text(_layout))
for _code, _layout in (("B", "<I"), ("C", "<B"), (0x8E, "<Q"), (0x96, "<Q")):
    _op(_code)(_binary_bytes(_layout))
for _code, _layout in (("T", "<i"), ("U", "<B")):
    _op(_code)(_old_string(_layout))


@_op(0x97)
def _next_buffer(machine: Machine) -> None:
    machine.lost = machine.lost or machine.bad("the pickle's buffers were stored elsewhere (out of band)")
    machine.push(Opaque("a buffer stored outside the pickle"))


@_op(0x98)
def _readonly_buffer(machine: Machine) -> None:
    if not machine.stack:
        raise IndexError


@_op("]")
def _empty_list(machine: Machine) -> None:
    machine.budget.take(1)
    machine.stack.append([])


@_op("}")
def _empty_dict(machine: Machine) -> None:
    machine.budget.take(1)
    machine.stack.append({})


@_op(0x8F)
def _empty_set(machine: Machine) -> None:
    machine.budget.take(1)
    machine.stack.append(set())


@_op("l")
def _list(machine: Machine) -> None:
    items = machine.since_mark()
    machine.push(items)


@_op("d")
def _dict(machine: Machine) -> None:
    items = machine.since_mark()
    found: dict[Any, Any] = {}
    machine.push(found)
    machine.set_items(found, items)


@_op("t")
def _tuple(machine: Machine) -> None:
    items = machine.since_mark()
    machine.stack.append(tuple(items))


def _small_tuple(count: int) -> Action:
    def action(machine: Machine) -> None:
        stack = machine.stack
        if len(stack) < count:
            raise IndexError
        items = tuple(stack[-count:])
        del stack[-count:]
        stack.append(items)

    return action


for _number in (1, 2, 3):
    _op(0x84 + _number)(_small_tuple(_number))


@_op(0x90)
def _add_items(machine: Machine) -> None:
    items = machine.since_mark()
    target = machine.stack[-1]
    if type(target) is set:
        target.update([machine.key(item) for item in items])
    elif type(target) is Record:
        target.items.extend(items)
    else:
        machine.unfit(target, "added to", items)


@_op(0x91)
def _frozenset(machine: Machine) -> None:
    items = machine.since_mark()
    machine.push(frozenset([machine.key(item) for item in items]))


@_op("a")
def _append(machine: Machine) -> None:
    item = machine.pop()
    machine.append(machine.stack[-1], [item])


@_op("e")
def _appends(machine: Machine) -> None:
    items = machine.since_mark()
    machine.append(machine.stack[-1], items)


@_op("s")
def _setitem(machine: Machine) -> None:
    value, key = machine.pop(), machine.pop()
    machine.set_items(machine.stack[-1], [key, value])


@_op("u")
def _setitems(machine: Machine) -> None:
    items = machine.since_mark()
    machine.set_items(machine.stack[-1], items)


@_op("p")
def _put(machine: Machine) -> None:
    machine.remember(machine.decimal(machine.line(_LONGEST)))


@_op("q")
def _binput(machine: Machine) -> None:
    memo = machine.memo
    memo[machine.data[machine.at]] = machine.stack[-1]
    machine.at += 1


@_op("r")
def _long_binput(machine: Machine) -> None:
    machine.remember(struct.unpack("<I", machine.take(4))[0])


@_op(0x94)
def _memoize(machine: Machine) -> None:
    machine.remember(len(machine.memo))


@_op("g")
def _get(machine: Machine) -> None:
    machine.recall(machine.decimal(machine.line(_LONGEST)))


@_op("h")
def _binget(machine: Machine) -> None:
    machine.recall(machine.data[machine.at])
    machine.at += 1


@_op("j")
def _long_binget(machine: Machine) -> None:
    machine.recall(struct.unpack("<I", machine.take(4))[0])


def _named(machine: Machine, module: str, name: str) -> Global:
    if len(module) > 1000 or len(name) > 1000:
        raise LimitError("the name of a global is longer than any real one", found=f"{len(module)} and {len(name)} characters")
    found = Global(reconstructors.RENAMED.get(module, module), name, machine.opcode)
    machine.use(found, "named")
    return found


@_op("c")
def _global(machine: Machine) -> None:
    data, start = machine.data, machine.at
    middle = data.find(b"\n", start, start + _LONGEST)
    stop = data.find(b"\n", middle + 1, start + _LONGEST) if middle >= 0 else -1
    if stop < 0:
        machine.line(_LONGEST)
        machine.line(_LONGEST)
        raise LimitError("the name of a global is longer than any real one", expected=f"<= {_LONGEST} characters")
    machine.at = stop + 1
    raw = data[start:stop]
    known = machine.known.get(raw)
    if known is None:
        module, name = machine.text(data[start:middle]), machine.text(data[middle + 1 : stop])
        known = reconstructors.constant(_named(machine, module, name))
        if len(machine.known) < _MAX_KNOWN:
            machine.known[raw] = known
    machine.stack.append(known)


@_op(0x93)
def _stack_global(machine: Machine) -> None:
    name, module = machine.pop(), machine.pop()
    if type(name) is not str or type(module) is not str:
        machine.accuse(Global("(computed)", summary(module, 60), machine.opcode), "named", (module, name))
        machine.push(Record("(computed)", (module, name)))
        return
    machine.push(reconstructors.constant(_named(machine, module, name)))


def _extension(size: int) -> Action:
    def action(machine: Machine) -> None:
        code = int.from_bytes(machine.take(size), "little")
        name = Global("copyreg", f"extension {code}", machine.opcode)
        machine.accuse(name, "named")
        machine.push(name)

    return action


for _code, _size in ((0x82, 1), (0x83, 2), (0x84, 4)):
    _op(_code)(_extension(_size))


@_op("R")
def _reduce(machine: Machine) -> None:
    args, callee = machine.pop(), machine.pop()
    machine.push(machine.call(callee, args, "called"))


@_op("i")
def _inst(machine: Machine) -> None:
    module, name = machine.text(machine.line(_LONGEST)), machine.text(machine.line(_LONGEST))
    args = tuple(machine.since_mark())
    machine.push(machine.call(_named(machine, module, name), args, "called"))


@_op("o")
def _obj(machine: Machine) -> None:
    items = machine.since_mark()
    machine.push(machine.call(items[0], tuple(items[1:]), "called"))


@_op(0x81)
def _newobj(machine: Machine) -> None:
    args, callee = machine.pop(), machine.pop()
    machine.push(machine.call(callee, args, "made", new=True))


@_op(0x92)
def _newobj_ex(machine: Machine) -> None:
    keywords, args, callee = machine.pop(), machine.pop(), machine.pop()
    machine.push(machine.call(callee, (*arguments(args), keywords) if keywords else args, "made", new=True))


@_op("b")
def _build(machine: Machine) -> None:
    state = machine.pop()
    machine.build(machine.stack[-1], state)


@_op("P")
def _persid(machine: Machine) -> None:
    if machine.persistent is None:
        raise machine.bad("a reference to data stored outside the pickle, where there is none")
    machine.push(_persistent(machine, machine.text(machine.line())))


@_op("Q")
def _binpersid(machine: Machine) -> None:
    machine.push(_persistent(machine, machine.pop()))


def _persistent(machine: Machine, name: Any) -> Any:
    if machine.persistent is None:
        raise machine.bad("a reference to data stored outside the pickle, where there is none", found=summary(name))
    machine.budget.take(1)
    return machine.persistent(name)


_ESCAPES = {ord("n"): 10, ord("t"): 9, ord("r"): 13, ord("\\"): 92, ord("'"): 39, ord('"'): 34, ord("a"): 7, ord("b"): 8, ord("f"): 12, ord("v"): 11}  # fmt: skip


def _unescaped(raw: bytes) -> bytes:
    """The bytes of a protocol 0 string: Python's own escapes, which repr() wrote."""
    if b"\\" not in raw:
        return raw
    found = bytearray()
    at = 0
    while at < len(raw):
        byte = raw[at]
        if byte != 92 or at + 1 >= len(raw):
            found.append(byte)
            at += 1
        elif raw[at + 1] == ord("x"):
            digits = raw[at + 2 : at + 4]
            try:
                found.append(int(digits, 16))
            except ValueError:
                raise MalformedError("a string with a broken escape", found=repr(digits)) from None
            at += 4
        else:
            known = _ESCAPES.get(raw[at + 1])
            found += bytes([known]) if known is not None else raw[at : at + 2]
            at += 2
    return bytes(found)
