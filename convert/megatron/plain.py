"""Pickled plain data, read without executing any of it.

A pickle is a program for a small stack machine, which may import and call whatever its writer liked. Here its instructions are
taken apart by the standard library and carried out by hand: containers, numbers and texts are made, and what would be an object is
a `Record` of its class's name and its contents. Nothing is imported and nothing is called.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Name:
    """A class or a value, by its module and its name."""

    text: str


@dataclass(eq=False)
class Record:
    """What an object would have been made of: its class's name, what it is made with, and its state (a dictionary, mostly)."""

    kind: str
    made_with: tuple[Any, ...]
    state: Any = field(default=None)


class Refused(ValueError):
    """A pickle has in it what is not admitted, or is damaged."""


_VALUES = {
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
    *("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": set}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_SILENT = {"PROTO", "FRAME"}


def read(data: bytes, admitted: Callable[[str], bool]) -> Any:
    """The data of a pickle. `admitted` says which names of classes and values there may be. Raises Refused, naming what is not."""
    machine = _Machine(admitted)
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return machine.stack.pop()
            machine.carry_out(opcode.name, argument)
    except Refused:
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise Refused(f"it is damaged: {error or type(error).__name__}") from None
    raise Refused("it has no end")


class _Machine:
    """The stack, those under the marks, and the memo."""

    def __init__(self, admitted: Callable[[str], bool]) -> None:
        self.admitted = admitted
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def carry_out(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("LONG_BINGET", "BINGET"):
            stack.append(self.memo[argument])
        elif name in _VALUES:
            stack.append(argument)
        elif name == "MARK":
            self.below.append(stack)
            self.stack = []
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in _TUPLES:
            count = _TUPLES[name]
            stack[-count:] = [tuple(stack[-count:])]
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name not in _SILENT:
            method = getattr(self, f"do_{name.lower()}", None)
            if method is None:
                raise Refused(f"it has the instruction {name}, which is not admitted")
            method(argument)

    def marked(self) -> list[Any]:
        """What stands above the last mark, which is taken away with it."""
        taken, self.stack = self.stack, self.below.pop()
        return taken

    def do_tuple(self, _: Any) -> None:
        values = self.marked()
        self.stack.append(tuple(values))

    def do_frozenset(self, _: Any) -> None:
        values = self.marked()
        self.stack.append(frozenset(values))

    def do_append(self, _: Any) -> None:
        value = self.stack.pop()
        self.stack[-1].append(value)

    def do_appends(self, _: Any) -> None:
        values = self.marked()
        self.stack[-1].extend(values)

    def do_additems(self, _: Any) -> None:
        values = self.marked()
        self.stack[-1].update(values)

    def do_setitem(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.stack[-1][key] = value

    def do_setitems(self, _: Any) -> None:
        values = self.marked()
        self.stack[-1].update(zip(values[::2], values[1::2], strict=True))

    def do_global(self, argument: str) -> None:
        self.name(argument.replace(" ", "."))

    def do_stack_global(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.name(f"{module}.{name}")

    def name(self, text: str) -> None:
        if not self.admitted(text):
            raise Refused(f"it would import {text}, which is not admitted")
        self.stack.append(Name(text))

    def do_reduce(self, _: Any) -> None:
        made_with, of = self.stack.pop(), self.stack.pop()
        self.stack.append(Record(of.text, tuple(made_with)))

    def do_newobj(self, _: Any) -> None:
        self.do_reduce(None)

    def do_build(self, _: Any) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], Record):
            raise Refused("it is damaged: it gives a state to what has none")
        self.stack[-1].state = state
