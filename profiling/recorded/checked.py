"""JSON held against a dataclass: `made(Run, content)` is a Run, or says what is wrong first.

For the few types that traces and results use; a whole number is taken where a float is wanted. Bounds are the
dataclass's own: a ValueError of its __post_init__. Read trace.py next.
"""

from dataclasses import MISSING, fields, is_dataclass
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

Made = TypeVar("Made")
MOST = 1e30  # of anything that is recorded: sums and products of such numbers are finite


class Damaged(ValueError):
    """What is wrong, and where: "step_ns.3: wanted int, found text"."""


def made(cls: type[Made], content: Any) -> Made:
    """The dataclass `cls` from a dictionary; what it has no field for is dropped. Raises Damaged for what is wrong."""
    return _dataclass(cls, content, "")


def _dataclass(cls: Any, content: Any, at: str) -> Any:
    if not isinstance(content, dict):
        raise _unlike(cls, content, at)
    hints, found = get_type_hints(cls), {}
    for field in fields(cls):
        where = f"{at}.{field.name}".lstrip(".")
        if field.name in content:
            found[field.name] = _value(hints[field.name], content[field.name], where)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise Damaged(f"{where}: field required")
    try:
        return cls(**found)
    except ValueError as problem:
        raise Damaged(f"{at}.{problem}".lstrip(".")) from None


def _value(kind: Any, content: Any, at: str) -> Any:
    """content as a `kind`: a class, list[…], dict[str, …], or one of several kinds."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return content
    if origin in (Union, UnionType):
        if content is None and type(None) in inner:
            return None
        return _value(next(one for one in inner if one is not type(None)), content, at)
    if origin is list and isinstance(content, list):
        return [_value(inner[0], value, f"{at}.{i}") for i, value in enumerate(content)]
    if origin is dict and isinstance(content, dict) and all(isinstance(key, str) for key in content):
        return {key: _value(inner[1], value, f"{at}.{key}") for key, value in content.items()}
    if is_dataclass(kind):
        return _dataclass(kind, content, at)
    right = (int, float) if kind is float else kind
    if origin or not isinstance(content, right) or (isinstance(content, bool) and kind is not bool):
        raise _unlike(origin or kind, content, at)
    if isinstance(content, int | float) and not abs(content) < MOST:  # NaN too
        raise Damaged(f"{at}: is {str(content)[:30]}, which cannot be")
    return content


def _unlike(kind: type, content: Any, at: str) -> Damaged:
    names = {"str": "text", "dict": "a dictionary", "list": "a list", "NoneType": "nothing"}
    wanted = "a dictionary" if is_dataclass(kind) else names.get(kind.__name__, kind.__name__)
    found = names.get(type(content).__name__, type(content).__name__)
    return Damaged(f"{at}: wanted {wanted}, found {found}".lstrip(": "))
