"""Two recordings side by side: what got slower."""

import json

import pytest
import tiny
from test_trace import GEMM, NORM, event, kernel, step

from nanochat.errors import UserError
from profiling.recorded import diff
from profiling.recorded.analysis import analyse
from profiling.recorded.trace import parse


def test_diff_says_what_got_slower(tmp_path, capsys):
    for name, took in (("a", 100), ("b", 250)):
        made = [*kernel(GEMM, 0, took), *kernel(NORM, 500, 600), step(0, 1000)]
        (tmp_path / name).write_text(json.dumps(analyse(parse(made)).json()))
    assert tiny.call_module("profiling.__main__", "diff", str(tmp_path / "a"), str(tmp_path / "b")) == 0
    out = capsys.readouterr().out
    assert f"| {GEMM} | 0.100 | 0.250 | +0.150 |" in out and NORM not in out.split("\n{")[0]
    changes = {row["name"]: row["change_ms"] for row in json.loads(out.strip().split("\n")[-1])["categories"]}
    assert changes == pytest.approx({"matrix products": 0.15, "idle": -0.15, "norms, pointwise": 0, "step": 0})


def test_diff_refuses_what_cannot_be_compared(tmp_path, capsys):
    good = analyse(parse([*kernel(GEMM, 0, 10), step(0, 100)]))
    on_cpu = analyse(parse([event("aten::mm", "cpu_op", 0, 10), step(0, 100)]))
    with pytest.raises(UserError, match="one of the two was recorded on a GPU"):
        diff.compare(good, on_cpu)
    files = dict(good=json.dumps(good.json()), old=json.dumps(dict(good.json(), version=0)), no="{", other="{}",
                 part='{"version": 1, "category_ns": {}, "ops": []}')  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    wanted = dict(old="is of version 0", no="is no JSON", other="no profile.json", gone="be read", part="is damaged")
    for name, words in wanted.items():
        code = tiny.call_module("profiling.__main__", "diff", str(tmp_path / "good"), str(tmp_path / name))
        assert code == 2 and words in capsys.readouterr().err


def test_the_other_commands_are_handed_on(capsys):
    flags = ("simulate", "--depth=4", "--card=RTX 4090", "--gpus=1")
    assert tiny.call_module("profiling.__main__", *flags) == 0
    assert capsys.readouterr().out.startswith("PREDICTED")
