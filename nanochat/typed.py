"""Values read from JSON, held against the types that a dataclass declares: text is no number, and neither is True."""

import reprlib
from types import UnionType
from typing import Any, NewType, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
Finite = NewType("Finite", float)  # no NaN, and nothing so large that it could not be printed


def made(kind: type[T], content: dict[str, Any]) -> T:
    """The dataclass of this content. Raises TypeError for a field that is missing, unknown or of another type."""
    hints = get_type_hints(kind)
    for name, value in content.items():
        if name in hints and not fits(value, hints[name]):
            raise TypeError(f"{name} is {reprlib.repr(value)}, wanted {said(hints[name])}")
    return kind(**content)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type: int, float (a whole number too), Finite, str, bool, None, list[…], dict[str, …],
    a | b.
    """
    origin, parts = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(fits(value, part) for part in parts)
    if origin is list:
        return isinstance(value, list) and all(fits(one, parts[0]) for one in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            fits(key, parts[0]) and fits(one, parts[1]) for key, one in value.items()
        )
    if hint is Finite:
        return type(value) in (int, float) and abs(value) < 1e300
    return type(value) in ((int, float) if hint is float else (hint,))


def said(hint: Any) -> str:
    """A type as a reader writes it."""
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
