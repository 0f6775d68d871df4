"""Reads a pickle as plain records. Pure.

Python's own unpicklers import and call what a pickle names. They also take memory for what it only announces, and a key
that is nested deeply enough ends the process. Here a pickle is data. What it would make becomes records, and opcodes
that an index does not need are refused.
"""

from __future__ import annotations

import pickle
from typing import Any, NamedTuple

(
    _MARK, _STOP, _NONE, _TRUE, _FALSE, _INT, _INT1, _INT2, _LONG, _TEXT, _LONG_TEXT, _TUPLE, _TUPLE0, _TUPLE1, _TUPLE2,
    _TUPLE3, _LIST, _APPEND, _APPENDS, _DICT, _ITEM, _ITEMS, _NAME, _NEW, _CALL, _BUILD, _KEEP, _GET, _LONG_GET, _PROTO,
    _FRAME,
) = b"".join((
    pickle.MARK, pickle.STOP, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT, pickle.BININT1,
    pickle.BININT2, pickle.LONG1, pickle.SHORT_BINUNICODE, pickle.BINUNICODE, pickle.TUPLE, pickle.EMPTY_TUPLE,
    pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS, pickle.EMPTY_DICT,
    pickle.SETITEM, pickle.SETITEMS, pickle.STACK_GLOBAL, pickle.NEWOBJ, pickle.REDUCE, pickle.BUILD, pickle.MEMOIZE,
    pickle.BINGET, pickle.LONG_BINGET, pickle.PROTO, pickle.FRAME,
))  # fmt: skip


class Global(NamedTuple):
    """What the pickle would import from a module, such as a class."""

    module: str
    name: str


class Record:
    """An object that the pickle describes: what would make it, from which arguments, and the state that it gets."""

    __slots__ = ("arguments", "maker", "state")

    def __init__(self, maker: Global, arguments: tuple[Any, ...]) -> None:
        self.maker = maker
        self.arguments = arguments
        self.state: Any = None


def read_records(data: bytes) -> Any:  # noqa: C901, PLR0912, PLR0915  # one loop: a call for each byte would take most of the time
    """What a pickle of protocol 4 or 5 describes: records, text, integers, and tuples, lists and dicts of these.

    Raises:
        ValueError, TypeError, LookupError, AttributeError: If it is no such pickle, or has other keys than text and
            records.
    """
    stack: list[Any] = []
    memo: list[Any] = []
    marks: list[int] = []
    place, names = 0, dict[Global, Global]()
    push, pop = stack.append, stack.pop
    while True:
        code = data[place]
        place += 1
        if code == _KEEP:
            memo.append(stack[-1])
        elif code == _GET:
            push(memo[data[place]])
            place += 1
        elif code == _INT1:
            push(data[place])
            place += 1
        elif code in _OBJECTS:
            arguments, maker = pop(), pop()
            if type(maker) is not Global or type(arguments) is not tuple:
                raise TypeError("it makes an object of no class")
            push(Record(maker, arguments))
        elif code == _BUILD:
            state = pop()
            if type(stack[-1]) is not Record or stack[-1].state is not None:
                raise TypeError("it gives a state to what takes none")
            stack[-1].state = state
        elif code == _TUPLE1:
            stack[-1] = (stack[-1],)
        elif code == _TUPLE0:
            push(())
        elif code == _TUPLE2:
            stack[-2:] = (tuple(stack[-2:]),)
        elif code == _TUPLE3:
            stack[-3:] = (tuple(stack[-3:]),)
        elif code == _MARK:
            marks.append(len(stack))
        elif code == _TUPLE:
            mark = marks.pop()
            stack[mark:] = (tuple(stack[mark:]),)
        elif code == _DICT:
            push({})
        elif code == _LIST:
            push([])
        elif code in _SETS:
            mark = marks.pop() if code == _ITEMS else len(stack) - 2
            items = stack[mark:]
            del stack[mark:]
            for at in range(0, len(items), 2):
                # A key of tuples in tuples would be hashed to its depth.
                if type(items[at]) is not str and type(items[at]) is not Record:
                    raise TypeError("it has a key that is neither text nor an object")
                stack[-1][items[at]] = items[at + 1]
        elif code in _EXTENSIONS:
            mark = marks.pop() if code == _APPENDS else len(stack) - 1
            items = stack[mark:]
            del stack[mark:]
            stack[-1].extend(items)
        elif code in _TEXTS:
            start = place + (1 if code == _TEXT else 4)
            place = start + (data[place] if code == _TEXT else int.from_bytes(data[place:start], "little"))
            push(data[start:place].decode("utf-8", "surrogatepass"))
        elif code == _LONG_GET:
            push(memo[data[place] | data[place + 1] << 8 | data[place + 2] << 16 | data[place + 3] << 24])
            place += 4
        elif code == _NAME:
            name, module = pop(), pop()
            if type(name) is not str or type(module) is not str:
                raise TypeError("it names what is no text")
            found = Global(module, name)
            push(names.setdefault(found, found))
        elif code in _INTEGERS:
            size = _INTEGERS[code]
            if code == _LONG:
                size = data[place]
                place += 1
            push(int.from_bytes(data[place : place + size], "little", signed=code != _INT2))
            place += size
        elif code in _CONSTANTS:
            push(_CONSTANTS[code])
        elif code in _SKIPPED:
            place += _SKIPPED[code]
        elif code == _STOP:
            return pop()
        else:
            raise ValueError(f"it has the opcode {code:#x}, which an index has not")


_OBJECTS, _SETS = bytes((_CALL, _NEW)), bytes((_ITEMS, _ITEM))
_EXTENSIONS, _TEXTS = bytes((_APPENDS, _APPEND)), bytes((_TEXT, _LONG_TEXT))
_INTEGERS = {_INT: 4, _INT2: 2, _LONG: 0}
_CONSTANTS = {_NONE: None, _TRUE: True, _FALSE: False}
_SKIPPED = {_PROTO: 1, _FRAME: 8}
