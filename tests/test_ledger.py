"""profiling/LEDGER.md is what its module writes, from predictions and result files."""

import json

import pytest

from nanochat.errors import UserError
from profiling.predicted import ledger


def test_the_ledger_is_what_is_written_now():
    assert (ledger.ROOT / "profiling" / "LEDGER.md").read_text() == ledger.written()


def test_a_measured_step_stands_beside_its_prediction():
    step = json.loads((ledger.ROOT / ledger.STEP).read_text())
    found = step["training_step"]
    found["parts_ms"] = {"products + relu²": 20.0, "attention": 5.0, "unknown": 1.0}
    found["step_ms"] = 30.0
    table = [line for line in ledger.on_gpu(step).splitlines() if line.startswith("| ")]
    names = ["part", "products + relu²", "attention", "the rest, gaps", "step"]
    assert [line.split(" | ")[0][2:] for line in table] == names
    assert [line.rsplit("| ", 1)[1] for line in table[1:]] == ["20.0 ms |", "5.0 ms |", "5.0 ms |", "30.0 ms |"]


def test_a_change_is_shown_without_and_with_it():
    cells = lambda n: dict(streaming=n * 10**9, launches=n, flops=n * 10**12, peak=n * 2**30)
    ablations = dict(h100=dict(step={"": cells(1), "rms_norm": cells(2), "mlp_relu2": cells(3)}))
    text = ledger.switched(ablations, {"": cells(4), "a fix": cells(5)})
    rows = [line for line in text.splitlines() if line.startswith("| bf16")]
    ends = {"a fix": "5.00 → 4.00", "our `rms_norm`": "2.00 → 1.00", "our `mlp_relu2`": "1.00 → 3.00"}  # off in ""
    assert [line.split(" | ")[1:3] for line in rows] == [[name, f"{end} GB"] for name, end in ends.items()]


def test_a_missing_result_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(ledger, "ROOT", tmp_path)
    with pytest.raises(UserError, match="h100-second-run.json is missing; take it from the repository again"):
        ledger.read(ledger.STEP)
