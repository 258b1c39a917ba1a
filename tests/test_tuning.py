"""The tuner with stand-ins for the card: candidates, what it writes, that nothing of a trial stays behind."""

import json
from dataclasses import replace

import pytest
import torch

from kernels import OPS, triton_utils, tuned, tuning

pytestmark = pytest.mark.skipif(not triton_utils.INSTALLED, reason="Triton is not installed, so nothing can be tuned")


@pytest.fixture
def card(tmp_path, monkeypatch):
    """A card named sm_99 on which the time of a kernel is the number of elements that its config names."""
    (tmp_path / "default.json").write_text((tuned.FOLDER / "default.json").read_text())
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    monkeypatch.setattr(tuned, "architecture", lambda index: "sm_99")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    op = OPS["rms_norm"]
    inputs = lambda case, dtype, device: op.inputs(case, torch.float32, "cpu")
    monkeypatch.setitem(OPS, "rms_norm", replace(op, cases=dict(d0=dict(N=4, C=32), d1=dict(N=4, C=64)), inputs=inputs))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    tuned.table.cache_clear()
    yield tmp_path / "sm_99.json"
    tuned.table.cache_clear()


def test_the_fastest_candidate_is_written(card, monkeypatch, capsys):
    def timed(calls):
        for call in calls:
            call()
        config = tuned.table("sm_99")["rms_norm"][0]["config"]
        if config["num_warps"] == 8:
            raise RuntimeError("out of resource: registers")
        return [config["elements"] / 1000, 3.0]

    monkeypatch.setattr(tuning, "timed", timed)
    tuning.tune(["rms_norm"])
    rows = json.loads(card.read_text())["rms_norm"]
    assert [row["up_to"] for row in rows] == [32, 64]
    for row in rows:
        assert row["config"]["elements"] == 2048 and row["ms"] == 2.048 and row["reference_ms"] == 3.0
        assert row["dtype"] == "bfloat16" and row["config"]["num_warps"] != 8
    assert "does not run" in capsys.readouterr().out
    assert tuned.table("sm_99")["rms_norm"] == rows  # what runs from now on


def test_a_wrong_answer_is_no_candidate(card, monkeypatch):
    monkeypatch.setattr(tuning, "timed", lambda calls: [1.0, 2.0])
    monkeypatch.setattr(tuning, "right", lambda op, case, dtype: False)
    with pytest.raises(ValueError, match="rms_norm: no candidate ran"):
        tuning.tune(["rms_norm"])
    assert not card.exists()


def test_candidates_are_neighbours_of_the_static_row():
    found = tuning.candidates(dict(elements=4096, num_warps=1))
    assert dict(elements=2048, num_warps=1) in found and dict(elements=8192, num_warps=2) in found
    assert all(value >= 1 for config in found for value in config.values())


def test_every_op_has_a_size():
    for name in tuned.ops():
        for case in OPS[name].cases.values():
            assert OPS[name].size(case) >= 1


def test_a_wrong_gradient_is_a_wrong_answer(monkeypatch):
    op = OPS["embedding"]
    assert tuning.right(op, op.cases["odd"], torch.bfloat16, "cpu")
    monkeypatch.setitem(op.fn.__globals__, "_embedding_backward", lambda *rest: None)
    assert not tuning.right(op, op.cases["odd"], torch.bfloat16, "cpu")
