"""JSON held against a dataclass: what is right comes back as it was, what is wrong is named with its place."""

from dataclasses import asdict, dataclass, field
from typing import Any

import pytest

from profiling.recorded import checked


@dataclass(frozen=True)
class Inner:
    rows: list[int]
    share: float = 0.5


@dataclass(frozen=True)
class Outer:
    name: str
    count: int
    warm: bool
    times: dict[str, dict[str, int]]
    more: dict[str, Any] = field(default_factory=dict)
    inner: Inner | None = None
    seconds: float | None = None

    def __post_init__(self):
        if self.seconds is not None and not self.seconds > 0:
            raise ValueError(f"seconds: is {self.seconds}, wanted more than 0")


GOOD = dict(name="a", count=1, warm=True, times={"x": {"y": 2}}, more={"z": None}, inner=dict(rows=[1, 2], share=1))


def test_what_is_right_comes_back_as_it_was():
    made = checked.made(Outer, GOOD)
    assert isinstance(made.inner, Inner) and asdict(made) == dict(GOOD, seconds=None)
    assert checked.made(Outer, dict(GOOD, unknown=1, inner=None, seconds=2)).seconds == 2
    assert checked.made(Outer, {key: GOOD[key] for key in ("name", "count", "warm", "times")}).more == {}


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(name=None), "name: wanted text, found nothing"),
        (dict(count="1"), "count: wanted int, found text"),
        (dict(count=True), "count: wanted int, found bool"),
        (dict(count=1.5), "count: wanted int, found float"),
        (dict(warm=1), "warm: wanted bool, found int"),
        (dict(times={"x": {"y": "z"}}), "times.x.y: wanted int, found text"),
        (dict(times=[1]), "times: wanted a dictionary, found a list"),
        (dict(times={1: {}}), "times: wanted a dictionary"),
        (dict(inner=dict(rows=[1, None])), "inner.rows.1: wanted int, found nothing"),
        (dict(inner={}), "inner.rows: field required"),
        (dict(inner=[1]), "inner: wanted a dictionary, found a list"),
        (dict(seconds=0), "seconds: is 0, wanted more than 0"),
        (dict(seconds=float("nan")), "seconds: is nan"),
        (dict(seconds=float("inf")), "seconds: is inf, which cannot be"),
        (dict(seconds=1e308), "seconds: is 1e[+]308, which cannot be"),
        (dict(count=10**400), "count: is 10{29}, which cannot be"),
        (dict(inner=dict(rows=[1, -(10**31)])), "inner.rows.1: is -10{28}, which cannot be"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(change, words):
    with pytest.raises(checked.Damaged, match=f"^{words}"):
        checked.made(Outer, {**GOOD, **change})


def test_what_is_no_dictionary():
    with pytest.raises(checked.Damaged, match="^wanted a dictionary, found a list"):
        checked.made(Outer, [1])
