"""What was fixed in the compiled step: its committed counts, and that the code still gives them."""

import json

import pytest

from profiling.compiled import fixes, null_device
from profiling.compiled.launches import PRODUCTS, STREAMING, Launch

COUNTS = json.loads(fixes.FILE.read_text())


def test_every_fix_is_counted_and_streams_less_or_wider():
    assert list(COUNTS) == ["", *fixes.FIXES]
    less = lambda name, what: COUNTS[""][what] < COUNTS[name][what]
    assert all(less(name, "streaming") or less(name, "narrow") for name in fixes.FIXES)


def test_narrow_bytes_by_hand():
    def launch(kernel, bytes, phase="backward 2", category=STREAMING):
        known = dict(kernel=kernel, bytes=bytes, phase=phase, category=category)
        return Launch(**{field: known.get(field, "") for field in Launch.__dataclass_fields__})

    found = [launch("wide", 1), launch("narrow", 10), launch("narrow", 100, "forward 2"), launch("", 10**6)]
    found += [launch("narrow", 1000, category=PRODUCTS), launch("narrow", 10**4, "forward 1"), launch("fill", 10**5)]
    kernels = {name: dict(access_bytes=width) for name, width in dict(wide=16, narrow=8, fill=None).items()}
    assert fixes.narrow(found, kernels) == 110


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTS)
def test_the_code_as_it_is_now_says_the_same(name):
    if reason := null_device.obstacle():
        pytest.skip(reason)
    assert fixes.counted(name) == COUNTS[name], "python -m profiling fixes"
