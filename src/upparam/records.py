"""Dataclasses that cost nothing before they are used: the words of the standard `dataclasses`, and what they mean.

The standard decorator writes and compiles half a dozen methods for every class when it is defined, used or not, which was a third of the start of
every command. Here all classes share the same few methods. Type checkers are shown the standard ones, and programs that ask need not know the
difference: `dataclasses.fields`, `replace` and `asdict` take these objects, and a standard dataclass may inherit from these classes. `frozen` and `eq`
are the only options of a class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import TYPE_CHECKING, Any

_MISSING: Any = object()


class _Field:
    """What is said about a field, with the standard meanings."""

    __slots__ = ("compare", "default", "default_factory", "init", "name", "repr")
    name: str

    def __init__(
        self, *, default: Any = _MISSING, default_factory: Any = _MISSING, init: bool = True, repr: bool = True, compare: bool = True
    ) -> None:
        self.default, self.default_factory, self.init, self.repr, self.compare = default, default_factory, init, repr, compare


def _dataclass(cls: Any = None, /, *, frozen: bool = False, eq: bool = True) -> Any:
    return _made(cls, frozen, eq) if cls is not None else lambda cls: _made(cls, frozen, eq)


def _replace(obj: Any, /, **changes: Any) -> Any:
    cls: Any = type(obj)
    if "__record__" not in cls.__dict__:
        import dataclasses

        return dataclasses.replace(obj, **changes)
    return cls(**{name: getattr(obj, name) for name, field in cls.__record__.items() if field.init and name not in changes}, **changes)


def _fields(obj: Any) -> Any:
    cls: Any = obj if isinstance(obj, type) else type(obj)
    if "__record__" not in cls.__dict__:
        import dataclasses

        return dataclasses.fields(obj)
    return tuple(cls.__record__.values())


def _asdict(obj: Any) -> dict[str, Any]:
    return {field.name: _plain(getattr(obj, field.name)) for field in _fields(obj)}


def _plain(value: Any) -> Any:
    """Dataclasses inside of what is plain already as dicts too; other values as they are, not copies."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(_plain, value))
    if isinstance(value, dict):
        return {key: _plain(held) for key, held in value.items()}
    return _asdict(value) if "__dataclass_fields__" in vars(type(value)) else value


if TYPE_CHECKING:
    from dataclasses import asdict, dataclass, field, fields, replace
else:
    asdict, dataclass, field, fields, replace = _asdict, _dataclass, _Field, _fields, _replace

__all__ = ["asdict", "dataclass", "field", "fields", "replace"]


def _made(cls: Any, frozen: bool, eq: bool) -> Any:
    fields: dict[str, _Field] = {}
    for base in cls.__mro__[:0:-1]:
        fields |= base.__dict__.get("__record__", {})
    for name, kind in cls.__annotations__.items():
        if kind.startswith("ClassVar"):
            continue
        said = cls.__dict__.get(name, _MISSING)
        fields[name] = said if isinstance(said, _Field) else _Field(default=said)
        fields[name].name = name
        if said is not fields[name]:
            continue
        if said.default is _MISSING:
            delattr(cls, name)
        else:
            setattr(cls, name, said.default)
    methods: dict[str, Any] = {"__init__": _init(cls, fields), "__repr__": _repr}
    if frozen:
        methods |= {"__setattr__": _refuse, "__delattr__": _refuse}
    if eq:
        compared = [name for name, field in fields.items() if field.compare]
        cls.__compared__ = staticmethod(attrgetter(*compared) if compared else _nothing)
        methods |= {"__eq__": _equal, "__hash__": _hash if frozen else None}
    for name, method in methods.items():
        if name not in cls.__dict__:
            setattr(cls, name, method)
    cls.__record__ = fields
    for name in ("__dataclass_fields__", "__dataclass_params__", "__signature__"):
        setattr(cls, name, _Standard(name, frozen, eq))
    return cls


def _init(cls: Any, fields: Mapping[str, _Field]) -> Callable[..., None]:
    names = tuple(name for name, field in fields.items() if field.init)
    defaults = {name: fields[name].default for name in names if fields[name].default is not _MISSING}
    makers = [(name, field.default_factory) for name, field in fields.items() if field.default_factory is not _MISSING]
    count = len(names) + sum(not fields[name].init for name, _ in makers)
    allowed = [frozenset(names[given:]) for given in range(len(names) + 1)]
    finish = hasattr(cls, "__post_init__")

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807 - it is one
        held = self.__dict__
        held.update(defaults)
        held.update(zip(names, args))  # noqa: B905 - too many are told below
        if kwargs:
            held.update(kwargs)
        if len(held) != count:
            for name, make in makers:
                if name not in held:
                    held[name] = make()
        if len(held) != count or len(args) > len(names) or (kwargs and not allowed[len(args)].issuperset(kwargs)):
            raise TypeError(_misfit(type(self), names, len(args), kwargs, held))
        if finish:
            self.__post_init__()

    return __init__


def _misfit(cls: type[Any], names: tuple[str, ...], given: int, kwargs: Mapping[str, Any], held: Mapping[str, Any]) -> str:
    """What is wrong with the arguments of an object."""
    if given > len(names):
        return f"{cls.__qualname__}() takes {len(names)} arguments, but {given} were given"
    for name in kwargs:
        if name in names[:given]:
            return f"{cls.__qualname__}() got multiple values for argument {name!r}"
        if name not in names:
            return f"{cls.__qualname__}() got an unexpected keyword argument {name!r}"
    return f"{cls.__qualname__}() lacks {', '.join(repr(name) for name in names if name not in held)}"


def _repr(self: Any) -> str:
    shown = ", ".join(f"{name}={getattr(self, name)!r}" for name, field in self.__record__.items() if field.repr)
    return f"{type(self).__qualname__}({shown})"


def _nothing(_: Any) -> None:
    return None


def _equal(self: Any, other: Any) -> Any:
    return self.__compared__(self) == other.__compared__(other) if other.__class__ is self.__class__ else NotImplemented


def _hash(self: Any) -> int:
    return hash(self.__compared__(self))


def _refuse(self: Any, name: str, *_: Any) -> None:
    raise AttributeError(f"cannot change field {name!r}: {type(self).__qualname__} objects stay as they are")


class _Standard:
    """An attribute that the standard decorator would have left on the class, made when somebody asks for it."""

    def __init__(self, name: str, frozen: bool, eq: bool) -> None:
        self.name, self.frozen, self.eq = name, frozen, eq

    def __get__(self, _: Any, cls: Any) -> Any:
        import dataclasses
        import inspect

        fields = []
        for name, said in cls.__record__.items():
            told = {"default": said.default, "default_factory": said.default_factory}
            told = {word: value for word, value in told.items() if value is not _MISSING}
            fields.append((name, Any, dataclasses.field(init=said.init, repr=said.repr, compare=said.compare, **told)))
        made = dataclasses.make_dataclass(cls.__name__, fields, frozen=self.frozen, eq=self.eq)
        found = inspect.signature(made) if self.name == "__signature__" else getattr(made, self.name)
        setattr(cls, self.name, found)
        return found
