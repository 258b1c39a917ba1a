from dataclasses import dataclass
from typing import Any

import pytest

from nanochat import typed


@dataclass
class Numbers:
    n: int
    x: float = 0.0
    maybe: float | None = None
    many: list[float] | None = None
    of: dict[str, int] | None = None
    any: Any = None


@pytest.mark.parametrize(
    "content",
    [dict(n=1), dict(n=1, x=2, maybe=3), dict(n=1, many=[1, 2.5], of={"a": 1}, any="x"), dict(n=1, maybe=None)],
)
def test_what_fits_is_taken(content):
    assert typed.made(Numbers, content) == Numbers(**content)


@pytest.mark.parametrize(
    "content, said",
    [
        (dict(n="1"), "n is '1', wanted int"),
        (dict(n=True), "n is True, wanted int"),
        (dict(n=2.0), "n is 2.0, wanted int"),
        (dict(n=1, x="3e12"), "x is '3e12', wanted float"),
        (dict(n=1, x=None), "x is None, wanted float"),
        (dict(n=1, many=[1, "2"]), r"many is \[1, '2'\], wanted list\[float\] | None"),
        (dict(n=1, of={"a": 1.5}), "of is .*, wanted dict"),
        (dict(), "missing 1 required positional argument: 'n'"),
        (dict(n=1, y=2), "unexpected keyword argument 'y'"),
    ],
)
def test_what_does_not_is_named(content, said):
    with pytest.raises(TypeError, match=said):
        typed.made(Numbers, content)
