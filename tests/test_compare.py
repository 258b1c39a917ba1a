"""benchmarks.compare: what is noise and what is not, and files that it refuses."""

import json

import pytest
import tiny

from benchmarks import compare

KEY = dict(op="rotary", setting="", case="d24", way="both", dtype="bfloat16", contender="triton")


def row(median, spread=0.01, **more):
    times = dict(q1_ms=median * (1 - spread), median_ms=median, q3_ms=median * (1 + spread))
    return {**KEY, "status": "timed", "why": "", **times, **more}


@pytest.fixture
def write(tmp_path):
    def writer(name, rows, machine="a card", **more):
        content = dict(format=compare.FORMAT, environment=dict(machine=machine, torch="2"), rows=rows, **more)
        path = tmp_path / name
        path.write_text(json.dumps(content))
        return str(path)

    return writer


@pytest.mark.parametrize(
    "before, after, change",
    [
        (row(1.0), row(2.0), "slower"),
        (row(2.0), row(1.0), "faster"),
        (row(1.0), row(1.0), ""),
        (row(1.0, 0.3), row(1.2, 0.3), ""),  # the middle halves overlap
        (row(1.0, 0.001), row(1.02, 0.001), ""),  # they do not, but two runs differ by as much
        (row(1.0, 0.001), row(1.05, 0.001), "slower"),
    ],
)
def test_what_is_a_change(write, before, after, change):
    (found,) = compare.compared(dict(rows=[before]), dict(rows=[after]))
    assert found["change"] == change
    assert found["ratio"] == pytest.approx(after["median_ms"] / before["median_ms"])


def test_the_command(write, capsys):
    failed = {**KEY, "way": "forward", "status": "failed", "why": "result 0 is off by 1"}
    a = write("a.json", [row(1.0), row(3.0, way="forward"), row(1.0, case="d12")])
    b = write("b.json", [row(2.0), failed, row(1.0, contender="liger")])
    assert tiny.call_module("benchmarks.__main__", "compare", a, b) == 0
    text = capsys.readouterr().out
    assert "| rotary | d24 | both | triton | 1 | 2 | 2.000 | slower |" in text and "warning:" not in text
    assert "failed now: rotary d24 forward, triton: result 0 is off by 1" in text
    said = json.loads(text.strip().split("\n")[-1])
    assert said["slower"] == 1 and said["faster"] == 0 and len(said["rows"]) == 1


def test_another_machine_is_a_warning(write, capsys):
    a, b = write("a.json", [row(1.0)]), write("b.json", [row(1.0)], machine="another card")
    assert tiny.call_module("benchmarks.__main__", "compare", a, b) == 0
    assert "warning: these are different machines (a card; another card)" in capsys.readouterr().out
    smoke = write("smoke.json", [row(1.0)], profile="smoke")
    assert tiny.call_module("benchmarks.__main__", "compare", a, smoke) == 0
    assert "warning: the smoke profile" in capsys.readouterr().out


BROKEN = {
    "no JSON": ('{"format": 1, "rows": [', "is damaged: it is no JSON"),
    "a list": ("[]", "has no format number"),
    "another format": ('{"format": 99}', "has format 99, wanted 1"),
    "no rows": ('{"format": 1}', "is damaged: it lacks its rows"),
    "no machine": ('{"format": 1, "rows": []}', "is damaged: it lacks its rows, or the machine"),
    "no reason": (
        json.dumps(dict(format=1, environment=dict(machine="m"), rows=[{**row(1.0), "why": 1}])), "is damaged: a row",
    ),
    "half a row": (json.dumps(dict(format=1, environment=dict(machine="m"), rows=[KEY])), "is damaged: a row of it"),
    "a time that is none": (
        json.dumps(dict(format=1, environment=dict(machine="m"), rows=[row(float("nan"))])), "is damaged: a row of it",
    ),
    "rows of text": ('{"format": 1, "environment": {"machine": "m"}, "rows": ["x"]}', "is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("content, words", BROKEN.values(), ids=BROKEN)
def test_what_is_refused(write, tmp_path, capsys, content, words):
    good, bad = write("good.json", [row(1.0)]), tmp_path / "bad.json"
    bad.write_text(content)
    for pair in ((good, str(bad)), (str(bad), good)):
        assert tiny.call_module("benchmarks.__main__", "compare", *pair) == 2
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1


def test_nothing_in_common_and_no_file(write, tmp_path, capsys):
    a, b = write("a.json", [row(1.0)]), write("b.json", [row(1.0, case="d12")])
    assert tiny.call_module("benchmarks.__main__", "compare", a, b) == 2
    assert tiny.call_module("benchmarks.__main__", "compare", a, str(tmp_path / "missing.json")) == 2
    said = capsys.readouterr().err
    assert "nothing in common" in said and "cannot be read: No such file" in said
