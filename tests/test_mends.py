"""What was mended in the compiled step: its committed counts, and that taking it back still does."""

import json

import pytest

from profiling.compiled import mends, null_device

COUNTS = json.loads(mends.FILE.read_text())


def test_every_mend_is_counted_and_streams_less():
    assert list(COUNTS) == ["", *mends.MENDS]
    assert all(COUNTS[""]["streaming"] < COUNTS[name]["streaming"] for name in mends.MENDS)


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTS)
def test_the_code_as_it_is_now_says_the_same(name):
    if reason := null_device.obstacle():
        pytest.skip(reason)
    assert mends.counted(name) == COUNTS[name], "python -m profiling mends"
