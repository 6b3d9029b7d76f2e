"""Pickle streams walked opcode by opcode into inert values: nothing is imported, nothing runs."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from loratools.errors import LoratoolsError, error, shown

LIMIT = 64 << 20  # bytes of pickle; 138,850 per-expert tensors take 23 MB
STEPS = 7_000_000  # opcodes, 200,000 tensors; each adds one thing to stack, memo or container
_LINE = 512  # bytes of a module's or a global's name
_KEY = 1 << 60  # beyond it distinct whole numbers can share a hash, and a dict becomes quadratic


class Ordered(dict[Any, Any]):
    """The pickle's OrderedDict: the only object whose attributes (BUILD) may be set."""


@dataclass(frozen=True, slots=True)
class Call:
    """A global that the pickle may call.

    `make` gets the tuple of arguments and builds an inert record; ValueError refuses them.
    """

    make: Callable[[tuple[Any, ...]], Any]


def walk(
    raw: bytes,
    start: int,
    what: str,
    *,
    names: Mapping[str, Any],
    persistent: Callable[[Any], Any] | None = None,
) -> tuple[Any, int]:
    """The value of the pickle that begins at `start`, and where its STOP ends.

    `names` are the globals that it may ask for ("module.name") and what stands for each;
    `persistent` builds the record of a persistent id, ValueError refuses it; `what` is how
    messages call the stream. Obeys the opcodes that picklers of protocol 2 to 5 write for plain
    values, calls and persistent ids (python/cpython:Lib/pickletools.py) and refuses all others.
    Raises hostile (a global outside `names`, too many opcodes), truncated, duplicate, malformed.
    """
    size = len(raw)
    at = here = start
    steps = 0
    stack: list[Any] = []
    below: list[list[Any]] = []  # the stack under each MARK
    memo: dict[int, Any] = {}

    def fault(message: str, code: str = "malformed") -> LoratoolsError:
        return error(code, f"{shown(what)}: {message} (byte {here} of the pickle)")

    def take(length: int) -> bytes:
        nonlocal at
        if length > size - at:
            raise fault(
                f"ends {length - (size - at)} bytes early; fetch the file again", "truncated"
            )
        at += length
        return raw[at - length : at]

    def number(length: int) -> int:
        return int.from_bytes(take(length), "little")

    def line() -> str:
        nonlocal at
        end = raw.find(b"\n", at, at + _LINE)
        if end < 0:
            raise fault("the name of a global has no end")
        text = raw[at:end].decode()
        at = end + 1
        return text

    def named(module: Any, name: Any) -> Any:
        if type(module) is not str or type(name) is not str:
            raise fault("the name of a global is no text")
        if f"{module}.{name}" not in names:
            raise fault(
                f"pickle asks for {shown(f'{module}.{name}')}, which no tensors need; load this "
                "file with nothing, take the safetensors version or a plain state dict",
                "hostile",
            )
        return names[f"{module}.{name}"]

    def pop_mark() -> list[Any]:
        nonlocal stack
        items, stack = stack, below.pop()
        return items

    def put(target: Any, items: list[Any]) -> None:
        if not isinstance(target, dict) or len(items) % 2:
            raise fault(f"sets keys of {_article(target)}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str and not (type(key) is int and abs(key) < _KEY):
                raise fault(f"{_article(key)} is a key; text and whole numbers may be")
            if key in target:
                raise fault(f"the key {shown(key)} stands twice in one dict", "duplicate")
            target[key] = value

    def extend(target: Any, items: list[Any]) -> None:
        if type(target) is not list:
            raise fault(f"appends to {_article(target)}")
        target.extend(items)

    def call(function: Any, arguments: Any) -> Any:
        nonlocal steps
        if type(function) is not Call or type(arguments) is not tuple:
            raise fault(f"calls {_article(function)}", "hostile")
        # An argument may be copied, and one from the memo costs the pickle two bytes.
        steps += sum(len(a) for a in arguments if isinstance(a, list | dict | str))
        return function.make(arguments)

    def build(target: Any, state: Any) -> None:
        # nn.Module.state_dict() leaves `_metadata` (versions of modules) on its OrderedDict.
        if not (
            isinstance(target, Ordered)
            and isinstance(state, dict)
            and state.keys() <= {"_metadata"}
        ):
            raise fault(f"sets attributes of {_article(target)}", "hostile")

    try:
        while True:
            here = at
            op = raw[at]
            at += 1
            steps += 1
            if steps > STEPS:
                raise fault(f"takes more than {STEPS} steps", "hostile")
            match op:
                case 0x71:  # BINPUT
                    memo[raw[at]] = stack[-1]
                    at += 1
                case 0x68:  # BINGET
                    stack.append(memo[raw[at]])
                    at += 1
                case 0x72:  # LONG_BINPUT
                    memo[number(4)] = stack[-1]
                case 0x6A:  # LONG_BINGET
                    stack.append(memo[number(4)])
                case 0x94:  # MEMOIZE
                    memo[len(memo)] = stack[-1]
                case 0x4B:  # BININT1
                    stack.append(raw[at])
                    at += 1
                case 0x4D:  # BININT2
                    stack.append(number(2))
                case 0x4A:  # BININT
                    stack.append(int.from_bytes(take(4), "little", signed=True))
                case 0x8A:  # LONG1
                    stack.append(int.from_bytes(take(number(1)), "little", signed=True))
                case 0x58:  # BINUNICODE
                    stack.append(take(number(4)).decode())
                case 0x8C:  # SHORT_BINUNICODE
                    stack.append(take(number(1)).decode())
                case 0x8D:  # BINUNICODE8
                    stack.append(take(number(8)).decode())
                case 0x55:  # SHORT_BINSTRING, text of Python 2
                    stack.append(take(number(1)).decode())
                case 0x43:  # SHORT_BINBYTES
                    stack.append(take(number(1)))
                case 0x42:  # BINBYTES
                    stack.append(take(number(4)))
                case 0x8E:  # BINBYTES8
                    stack.append(take(number(8)))
                case 0x47:  # BINFLOAT
                    stack.append(struct.unpack(">d", take(8))[0])
                case 0x4E:  # NONE
                    stack.append(None)
                case 0x88:  # NEWTRUE
                    stack.append(True)
                case 0x89:  # NEWFALSE
                    stack.append(False)
                case 0x28:  # MARK
                    below.append(stack)
                    stack = []
                case 0x74:  # TUPLE
                    items = pop_mark()
                    stack.append(tuple(items))
                case 0x29:  # EMPTY_TUPLE
                    stack.append(())
                case 0x85:  # TUPLE1
                    stack.append((stack.pop(),))
                case 0x86:  # TUPLE2
                    second = stack.pop()
                    stack.append((stack.pop(), second))
                case 0x87:  # TUPLE3
                    third, second = stack.pop(), stack.pop()
                    stack.append((stack.pop(), second, third))
                case 0x63:  # GLOBAL
                    stack.append(named(line(), line()))
                case 0x93:  # STACK_GLOBAL
                    name = stack.pop()
                    stack.append(named(stack.pop(), name))
                case 0x52:  # REDUCE
                    arguments = stack.pop()
                    stack.append(call(stack.pop(), arguments))
                case 0x51 if persistent is not None:  # BINPERSID
                    stack.append(persistent(stack.pop()))
                case 0x5D:  # EMPTY_LIST
                    stack.append([])
                case 0x61:  # APPEND
                    item = stack.pop()
                    extend(stack[-1], [item])
                case 0x65:  # APPENDS
                    items = pop_mark()
                    extend(stack[-1], items)
                case 0x7D:  # EMPTY_DICT
                    stack.append({})
                case 0x73:  # SETITEM
                    value, key = stack.pop(), stack.pop()
                    put(stack[-1], [key, value])
                case 0x75:  # SETITEMS
                    items = pop_mark()
                    put(stack[-1], items)
                case 0x62:  # BUILD
                    state = stack.pop()
                    build(stack[-1], state)
                case 0x80:  # PROTO
                    if here != start or not 2 <= number(1) <= 5:
                        raise fault("the mark of its protocol is misplaced or unknown")
                case 0x95:  # FRAME
                    if number(8) > size - at:
                        raise fault("a frame is longer than the rest", "truncated")
                case 0x2E:  # STOP
                    if len(stack) != 1 or below:
                        raise fault("ends with values left over")
                    return stack[0], at
                case 0x69:  # INST: module and name, called at once
                    named(line(), line())
                    raise fault("INST calls a class", "hostile")
                case _:
                    opcode = _OTHERS.get(op, f"0x{op:02x}")
                    raise fault(f"uses the opcode {opcode}, which torch.save does not write")
    except IndexError:
        if at >= size:
            raise fault("ends without STOP; fetch the file again", "truncated") from None
        raise fault("takes a value from an empty stack") from None
    except KeyError:
        raise fault("takes a value that the memo does not hold") from None
    except UnicodeDecodeError:
        raise fault("a text is no UTF-8") from None
    except ValueError as cause:
        raise fault(str(cause)) from None


def _article(value: Any) -> str:
    """What a value is, for messages, without looking inside."""
    return f"a value of type {type(value).__name__}"


# The other opcodes of protocols 0 to 5, so that messages can name them.
_OTHERS = {
    0x30: "POP", 0x31: "POP_MARK", 0x32: "DUP", 0x46: "FLOAT", 0x49: "INT", 0x4C: "LONG",
    0x50: "PERSID", 0x51: "BINPERSID", 0x53: "STRING", 0x54: "BINSTRING", 0x56: "UNICODE",
    0x64: "DICT", 0x67: "GET", 0x6C: "LIST", 0x6F: "OBJ", 0x70: "PUT", 0x81: "NEWOBJ",
    0x82: "EXT1", 0x83: "EXT2", 0x84: "EXT4", 0x8B: "LONG4", 0x8F: "EMPTY_SET", 0x90: "ADDITEMS",
    0x91: "FROZENSET", 0x92: "NEWOBJ_EX", 0x96: "BYTEARRAY8", 0x97: "NEXT_BUFFER",
    0x98: "READONLY_BUFFER",
}  # fmt: skip
