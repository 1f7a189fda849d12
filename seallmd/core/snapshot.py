"""A node as bytes and back: where a recording that does not begin at the start begins.

Owns the encoding of an object graph of this package's classes. Must not know what the objects mean, so that
new state needs no code here. It is data and nothing more: only classes, enums and functions that
`seallmd.core` itself defines are ever looked up, by name, and no code of theirs is run but the constructors
of structs and tuples.

The format: a list of entries; an entry is [kind, name, parts]. A part that is a plain value stands for
itself, a reference is an extension type with the entry's number. Entries are numbered before their parts, so
that cycles are no matter.
"""

from __future__ import annotations

import importlib
from array import array
from collections import deque
from collections.abc import Iterable
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import msgspec

_PACKAGE = "seallmd.core."
_PLAIN = frozenset((int, float, str, bool, bytes, type(None)))
_REFERENCE = 1
_BUILTIN: dict[str, type] = {"list": list, "dict": dict, "set": set, "deque": deque, "bytearray": bytearray}
_FROZEN: dict[str, type] = {"tuple": tuple, "frozenset": frozenset}


def freeze(root: object) -> bytes:
    """The graph that an object is the root of. Raises TypeError for what is not of this package."""
    return _Freezer().freeze(root)


def thaw(data: bytes) -> Any:
    """The object again. Raises ValueError for what `freeze` did not write."""
    try:
        entries = msgspec.msgpack.decode(data, ext_hook=lambda _, number: _Reference(int.from_bytes(number)))
        return _Thawer(entries).get(0)
    except (
        msgspec.DecodeError,
        LookupError,
        TypeError,
        AttributeError,
        ImportError,
        RecursionError,
    ) as error:
        raise ValueError(f"not a snapshot: {error}") from error


class _Reference(int):
    """The number of an entry."""


class _Freezer:
    def __init__(self) -> None:
        self._entries: list[Any] = []
        self._numbers: dict[int, int] = {}
        self._alive: list[
            object
        ] = []  # bound methods are made anew at each look: their ids must not be reused

    def freeze(self, root: object) -> bytes:
        self._number(root)
        return msgspec.msgpack.encode(self._entries)

    def _part(self, value: object) -> object:
        if type(value) in _PLAIN:
            return value
        return msgspec.msgpack.Ext(_REFERENCE, self._number(value).to_bytes(5))

    def _parts(self, of: Iterable[object]) -> list[object]:
        values = list(of)
        if _PLAIN.issuperset(map(type, values)):
            return values
        return [self._part(value) for value in values]

    def _number(self, value: object) -> int:
        known = self._numbers.get(id(value))
        if known is not None:
            return known
        number = self._numbers[id(value)] = len(self._entries)
        self._alive.append(value)
        self._entries.append(None)
        self._entries[number] = self._entry(value)
        return number

    def _entry(self, value: Any) -> list[object]:
        kind = type(value)
        if kind is dict:
            return ["dict", "", [*self._parts(value), *self._parts(value.values())]]
        if kind is bytearray:
            return ["bytearray", "", [bytes(value)]]
        if kind is array:
            return ["array", value.typecode, [value.tobytes()]]
        if kind in (list, set, deque, tuple, frozenset):
            return [kind.__name__, "", self._parts(value)]
        if isinstance(value, Enum):
            return ["enum", _name(kind), [value.name]]
        if isinstance(value, MethodType):
            return ["method", value.__name__, self._parts([value.__self__])]
        if isinstance(value, FunctionType | BuiltinFunctionType | type):
            return ["named", _name(value), []]
        if isinstance(value, tuple):  # a NamedTuple
            return ["call", _name(kind), self._parts(value)]
        if isinstance(value, msgspec.Struct):
            fields = self._parts(getattr(value, field) for field in kind.__struct_fields__)
            return ["struct", _name(kind), fields]
        state = _state(value)
        return ["object", _name(kind), [*state, *self._parts(state.values())]]


class _Thawer:
    def __init__(self, entries: list[Any]) -> None:
        self._entries = entries
        self._made: dict[int, Any] = {}

    def get(self, part: Any) -> Any:
        """A part's value; the root is entry 0."""
        number = int(part)
        if number not in self._made:
            self._made[number] = None
            self._make(number, *self._entries[number])
        return self._made[number]

    def _value(self, part: Any) -> Any:
        return self.get(part) if type(part) is _Reference else part

    def _make(self, number: int, kind: str, name: str, parts: list[Any]) -> None:
        if kind in _BUILTIN:
            self._fill(number, kind, parts)
        elif kind == "object":
            self._made[number] = made = object.__new__(_find(name))
            half = len(parts) // 2
            for field, part in zip(parts[:half], parts[half:], strict=True):
                object.__setattr__(made, field, self._value(part))
        else:
            self._made[number] = self._immutable(kind, name, [self._value(part) for part in parts])

    def _fill(self, number: int, kind: str, parts: list[Any]) -> None:
        made = self._made[number] = _BUILTIN[kind]()
        if kind == "bytearray":
            made += parts[0]
        elif kind == "dict":
            half = len(parts) // 2
            keys = [self._value(part) for part in parts[:half]]
            made.update(zip(keys, (self._value(part) for part in parts[half:]), strict=True))
        elif kind == "set":
            made.update(self._value(part) for part in parts)
        else:
            made.extend(self._value(part) for part in parts)

    def _immutable(self, kind: str, name: str, values: list[Any]) -> Any:
        match kind:
            case "array":
                made = array(name)
                made.frombytes(values[0])
                return made
            case "enum":
                return _find(name)[values[0]]
            case "method":
                return getattr(values[0], name)
            case "named":
                return _find(name)
            case "call":
                return _class(name, tuple)(*values)
            case "struct":
                cls = _class(name, msgspec.Struct)
                return cls(**dict(zip(cls.__struct_fields__, values, strict=True)))
        return _FROZEN[kind](values)


def _state(value: object) -> dict[str, object]:
    """An object's attributes: its slots, in the order of its classes, and its dictionary."""
    slots = (slot for cls in type(value).__mro__ for slot in getattr(cls, "__slots__", ()))
    state = {slot: getattr(value, slot) for slot in slots if hasattr(value, slot)}
    return state | getattr(value, "__dict__", {})


def _name(what: Any) -> str:
    module, name = what.__module__, what.__qualname__
    if not module.startswith(_PACKAGE):
        raise TypeError(f"{module}.{name} is not of {_PACKAGE[:-1]}")
    return f"{module}:{name}"


def _class(name: str, base: type) -> Any:
    found = _find(name)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(f"{name} is no class of this kind")
    return found


def _find(name: str) -> Any:
    module, _, path = name.partition(":")
    if not module.startswith(_PACKAGE):
        raise ValueError(f"{module} is not of {_PACKAGE[:-1]}")
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    if getattr(found, "__module__", "") != module:  # something that the module only imports
        raise ValueError(f"{name} is not of {_PACKAGE[:-1]}")
    return found
