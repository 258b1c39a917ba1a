"""A function in one process called from another, with plain values only. Its text becomes part of both programs.

What leaves the function's process is turned into JSON with a tag for each container, and what arrives is built anew
from None, bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset, range and iterators. No object, and
so no comparison of its own, gets across, whatever the sender does.
"""

import json
import os
from collections.abc import Callable
from itertools import islice
from typing import Any

LONGEST = 1 << 22  # bytes of a message
CONTAINERS: dict[str, Callable] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "iterator": iter}


def encode(value):
    """A value as JSON knows it. An object of a subclass goes as its base type. Raises TypeError for any other."""
    for plain in (bool, int, float, str):
        if isinstance(value, plain):
            return value if type(value) is plain else getattr(plain, f"__{plain.__name__}__")(value)
    if value is None:
        return None
    if isinstance(value, complex):
        return ["complex", value.real, value.imag]
    if isinstance(value, range):
        return ["range", value.start, value.stop, value.step]
    if isinstance(value, (bytes, bytearray)):
        return ["bytes", bytes(value).hex()]
    if isinstance(value, dict):
        return ["dict", *([encode(key), encode(inner)] for key, inner in dict.items(value))]
    for name in ("list", "tuple", "set", "frozenset"):
        kind: Any = CONTAINERS[name]
        if isinstance(value, kind):
            return [name, *map(encode, kind.__iter__(value))]
    if hasattr(type(value), "__next__"):
        return ["iterator", *map(encode, islice(value, 100_000))]
    raise TypeError(f"{type(value).__name__} is no plain value")


def decode(tree):
    """The value of such a tree. Raises ValueError or TypeError when it is none."""
    if not isinstance(tree, (list, dict)):
        return tree
    match tree:
        case ["complex", float() as real, float() as imaginary]:
            return complex(real, imaginary)
        case ["range", int() as start, int() as stop, int() as step]:
            return range(start, stop, step)
        case ["bytes", str() as digits]:
            return bytes.fromhex(digits)
        case ["dict", *pairs]:
            return {decode(key): decode(inner) for key, inner in pairs}
        case [str() as name, *items] if name in CONTAINERS:
            return CONTAINERS[name](map(decode, items))
    raise ValueError("no plain value")


def send(write: int, value) -> None:
    data = json.dumps(value).encode() + b"\n"
    while data:
        data = data[os.write(write, data) :]


def lines(read: int):
    """The messages that come on a descriptor, until it is closed. Raises ValueError when one is too long."""
    held = b""
    while found := os.read(read, 1 << 16):
        *whole, held = (held + found).split(b"\n")
        yield from map(json.loads, whole)
        if len(held) > LONGEST:
            raise ValueError("too long a message")


def serve(function, read: int, write: int) -> None:
    """Answers calls: [positional, named] -> ["gave", value] or ["raised", what]."""
    for positional, named in lines(read):
        try:
            answer = ["gave", encode(function(*decode(positional), **decode(named)))]
        except Exception as problem:
            answer = ["raised", f"{type(problem).__name__}: {problem}"]
        send(write, answer)


class Failed(BaseException):
    """The function raised, ended, or gave no plain value. No test's `except Exception` hides it."""


class Remote:
    """Calls the function that the other process serves; `last` is the last call, in words."""

    def __init__(self, name: str, read: int, write: int):
        self.name, self.write, self.replies, self.last = name, write, lines(read), ""

    def __call__(self, *positional, **named):
        shown = [*map(repr, positional), *(f"{key}={value!r}" for key, value in named.items())]
        self.last = f"{self.name}({', '.join(shown)})"
        try:
            send(self.write, [encode(positional), encode(named)])
            kind, tree = next(self.replies)
            if kind == "gave":
                value = decode(tree)
                self.last += f" gave {value!r}"
                return value
        except (OSError, StopIteration):
            raise Failed("ended") from None
        except Exception as problem:  # whatever nonsense came
            raise Failed(f"{self.last} gave no plain value ({type(problem).__name__})") from None
        raise Failed(f"{self.last} raised {str(tree)[:200]}")
