"""The tuner with stand-ins for the card: candidates, what it writes, that nothing of a trial stays behind."""

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from kernels import OPS, measured, triton_utils, tuned, tuning

pytestmark = pytest.mark.skipif(not triton_utils.INSTALLED, reason="Triton is not installed, so nothing can be tuned")


@pytest.fixture
def card(tmp_path, monkeypatch):
    """A card named sm_99 on which the time of a kernel is the number of elements that its config names."""
    folder = tmp_path / "tuned"
    folder.mkdir()
    (folder / "default.json").write_text((tuned.FOLDER / "default.json").read_text())
    monkeypatch.setattr(tuned, "FOLDER", folder)
    monkeypatch.setattr(tuned, "architecture", lambda index: "sm_99")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "home"))
    monkeypatch.setattr(measured, "identity", lambda index: dict(card="Card 99", torch="2"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 9))
    op = OPS["rms_norm"]
    inputs = lambda case, dtype, device: op.inputs(case, torch.float32, "cpu")
    monkeypatch.setitem(OPS, "rms_norm", replace(op, cases=dict(d0=dict(N=4, C=32), d1=dict(N=4, C=64)), inputs=inputs))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(measured, "_kept", {})
    tuned.table.cache_clear()
    yield folder / "sm_99.json"
    measured.adopt(None)
    tuned.table.cache_clear()


GPU = torch.device("cuda", 0)


@pytest.fixture
def timed(monkeypatch):
    """Milliseconds: a thousandth of the elements in force, or 3 for what runs no kernel; 8 warps do not run."""

    def times(calls):
        found = []
        for call in calls:
            seen = []
            with monkeypatch.context() as patch:
                patch.setattr(tuning, "use", lambda _, seen=seen: seen.append(tuned.config(*WIDE)) or nullcontext())
                call()
            if seen[0]["num_warps"] == 8:
                raise RuntimeError("out of resource: registers")
            found.append(seen[0]["elements"] / 1000)
        return found

    monkeypatch.setattr(tuning, "timed", times)


WIDE = ("rms_norm", torch.bfloat16, 64, GPU)


def test_it_climbs_to_the_fastest_and_uses_and_keeps_it(card, timed, capsys):
    rows = tuning.tune(tuning.registered_cases(["rms_norm"]), reference=False)
    assert [row["up_to"] for row in rows["rms_norm"]] == [32, 64]
    for row in rows["rms_norm"]:
        assert row["config"]["elements"] == 1 and row["ms"] == 0.001 and row["dtype"] == "bfloat16"
        assert "reference_ms" not in row
    assert "does not run" in capsys.readouterr().out
    assert tuned.config(*WIDE)["elements"] == 1  # in force from now on
    measured.store(0, blocks=rows)
    measured.adopt(None)
    measured.forget()
    assert tuned.config(*WIDE)["elements"] == 1  # another process finds it
    assert not card.exists()


def test_it_stops_when_the_time_is_over(card, timed, capsys):
    rows = tuning.tune(tuning.registered_cases(["rms_norm"]), seconds=-1.0, reference=False)
    assert rows == {} and capsys.readouterr().out.count("no time was left") == 2


def test_the_reference_decides_only_where_it_was_measured_beside(card, monkeypatch):
    monkeypatch.setattr(tuning, "timed", lambda calls: [2.0, 1.0][: len(calls)])
    rows = tuning.tune(tuning.registered_cases(["rms_norm"]))
    assert [row["reference_ms"] for row in rows["rms_norm"]] == [1.0, 1.0]
    assert "faster when measured" in tuned.slower("rms_norm", torch.bfloat16, 64, GPU)
    measured.adopt({"rms_norm": [{k: v for k, v in row.items() if k != "reference_ms"} for row in rows["rms_norm"]]})
    assert tuned.slower("rms_norm", torch.bfloat16, 64, GPU) == ""


def test_rows_for_the_repository_stand_before_those_that_are_there(card, timed):
    static = dict(
        rms_norm=[dict(dtype="*", config=dict(elements=512, backward_elements=64, num_warps=1))],
        add_rms_norm="rms_norm",
    )
    card.write_text(json.dumps(static))
    tuned.table.cache_clear()
    tuning.into_repository(tuning.tune(tuning.registered_cases(["rms_norm"]), reference=False))
    measured.adopt({})
    found = json.loads(card.read_text())
    assert [row.get("up_to") for row in found["rms_norm"]] == [32, 64, None] and found["add_rms_norm"] == "rms_norm"
    assert tuned.config(*WIDE)["elements"] == 1
    assert tuned.config("rms_norm", torch.bfloat16, 128, GPU)["elements"] == 512


def test_a_wrong_answer_is_no_candidate(card, monkeypatch, capsys):
    monkeypatch.setattr(tuning, "timed", lambda calls: [1.0] * len(calls))
    monkeypatch.setattr(tuning, "right", lambda op, case, dtype: False)
    assert tuning.tune(tuning.registered_cases(["rms_norm"])) == {}
    assert "not tuned: RuntimeError: ['its answer is wrong']" in capsys.readouterr().out


def test_a_damaged_file_of_measurements_is_said_and_measured_again(card):
    measured.store(0, blocks={"rms_norm": []})
    measured.path(0).write_text("{")
    with pytest.warns(UserWarning, match="is not used"):
        assert measured.blocks(0) == {}
    with pytest.warns(UserWarning, match="is not used"):
        measured.store(0, steps={"a": 1})
    assert measured.load(0)["steps"] == {"a": 1}


def test_neighbours_change_one_size_by_a_step():
    found = tuning.neighbours(dict(elements=4096, num_warps=1, num_stages=2, GROUP_M=8))
    assert dict(elements=2048, num_warps=1, num_stages=2, GROUP_M=8) in found
    assert dict(elements=4096, num_warps=1, num_stages=3, GROUP_M=8) in found
    assert len(found) == 5 and all(value >= 1 for config in found for value in config.values())


def test_every_op_has_a_size():
    for name in tuned.ops():
        for case in OPS[name].cases.values():
            assert OPS[name].size(case) >= 1


def test_a_wrong_gradient_is_a_wrong_answer(monkeypatch):
    op = OPS["embedding"]
    assert tuning.right(op, op.cases["odd"], torch.bfloat16, "cpu")
    monkeypatch.setitem(op.fn.__globals__, "_embedding_backward", lambda *rest: None)
    assert not tuning.right(op, op.cases["odd"], torch.bfloat16, "cpu")
