"""Which ops pay by the counts of the compiled step: committed rows follow from committed counts, and these by hand."""

import json

import pytest
import tiny
import torch

from kernels import measured, tuned
from nanochat import measure
from profiling.compiled import ablate, null_device
from profiling.compiled.launches import ATTENTION, STREAMING, Launch

COUNTS = json.loads(ablate.FILE.read_text())


def sums(streaming=1000, peak=100, flops=10):
    return dict(streaming=streaming, peak=peak, flops=flops)


def test_the_committed_rows_follow_from_the_committed_counts():
    assert ablate.rows(COUNTS) == json.loads((tuned.FOLDER / "counts.json").read_text()), "python -m profiling ablate"


def test_every_op_of_the_training_step_is_counted():
    wanted = {op for ops in measure.GROUPS.values() for op in ops}
    assert set(COUNTS) == set(ablate.CARDS) and set(ablate.rows(COUNTS)["sm_100"]) == wanted
    assert set(ablate.rows(COUNTS)["sm_80"]) == {op for op in wanted if not op.startswith("fp8")}
    assert not ablate.measured_rows("sm_80") and "sm_90" not in ablate.rows(COUNTS)  # an H100 was measured


@pytest.mark.parametrize("arch", [arch for arch in ablate.rows(COUNTS)])
def test_an_op_is_taken_where_the_step_moves_or_holds_or_multiplies_less_with_it(arch, monkeypatch):
    """Whatever the rows say: by the sums themselves."""
    card = next(card for card in ablate.CARDS if ablate.null_cards.card(card).target == arch)
    monkeypatch.setattr(tuned, "architecture", lambda index: arch)
    monkeypatch.setattr(measured, "_adopted", {})  # nothing of this machine's own
    for program, own in COUNTS[card].items():
        cells = own if len(own) > 1 else ablate.of_like(own[""], program, COUNTS)
        for op in set(cells) - {"", *tuned.UNPROVEN}:
            less = any(cells[""][what] < (1 - 5e-4) * cells[op][what] for what in tuned.COUNTED)
            taken, _ = tuned.verdict(op, torch.bfloat16, 64, torch.device("cuda", 0), True)
            assert taken == (less or op in tuned.KEPT), op


def test_what_is_kept_all_the_same_costs_less_than_a_hundredth():
    found = [row[op] for row in ablate.rows(COUNTS).values() for op in tuned.KEPT if op in row]
    assert found and all(1 <= value < 1.01 for row in found for value in row.values())


def test_rows_by_hand():
    counts = dict(
        h100=dict(step={"": sums(), "rms_norm": sums(2000, 90), "mlp_relu2": sums(800)}),
        a100=dict(step={"": sums(1000 + 1e-2)}),  # as an H100
        b200=dict(step={"": sums(1001), "rms_norm": sums(1001)}),
    )
    found = ablate.rows(counts)
    assert set(found) == {"sm_80", "sm_100"}
    assert found["sm_80"] == dict(
        rms_norm=dict(streaming=0.5, peak=1.111, flops=1.0), mlp_relu2=dict(streaming=0.8, peak=1.0, flops=1.0)
    )  # fmt: skip
    assert found["sm_100"] == dict(rms_norm=dict(streaming=1.0, peak=1.0, flops=1.0))
    assert tuned.pays(found["sm_80"]["rms_norm"]) and not tuned.pays(found["sm_100"]["rms_norm"])


def test_sums_by_hand():
    def launch(phase, bytes, flops=0, category=STREAMING):
        known = dict(phase=phase, bytes=bytes, flops=flops, category=category)
        return Launch(**{field: known.get(field, "") for field in Launch.__dataclass_fields__})

    found = [launch("forward 1", 1), launch("forward 2", 10), launch("backward 2", 100, 3, ATTENTION)]
    found += [launch("optimizer", 1000)]
    phases = {"forward 2": dict(peak=50, after=dict(saved=4)), "backward 2": dict(peak=30, after={})}
    phases["optimizer"] = dict(peak=9, after={})
    assert ablate.sums(ablate.case("step"), found[:3], phases) == dict(
        launches=2, streaming=10, bytes=110, flops=3, peak=50 + 4 * (ablate.DEPTH - ablate.LAYERS) // ablate.LAYERS
    )
    assert ablate.sums(ablate.case("update"), found, phases) == dict(
        launches=1, streaming=1000, bytes=1000, flops=0, peak=9
    )


def test_it_counts_again_only_where_the_code_differs(monkeypatch, tmp_path):
    asked = []

    def ask(module, case, card):
        asked.append((card, case.kernels))
        return sums(2000 if card == "b200" else 1000)

    monkeypatch.setattr(ablate, "ask", ask)
    monkeypatch.setattr(ablate, "FILE", tmp_path / "ablations.json")
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    assert tiny.call_module("profiling.compiled.ablate", "--card=t4") == 2
    tiny.call_module("profiling.compiled.ablate", "--card=h100,a100,b200")
    cells = json.loads(ablate.FILE.read_text())
    assert set(cells) == {"h100", "a100", "b200"} and set(json.loads((tmp_path / "counts.json").read_text())["sm_80"])
    count = lambda card: sum(at == card for at, _ in asked)
    assert count("a100") == len(ablate.PROGRAMS) - 1  # no fp8
    assert count("h100") == count("b200") == sum(1 + len(program.ops) for program in ablate.PROGRAMS.values())


@pytest.mark.slow
@pytest.mark.parametrize("program, op", [("step", "rms_norm"), ("step", "mix_rms_norm"), ("update", "adamw_")])
def test_the_code_as_it_is_now_says_the_same(program, op):
    """Shares within two hundredths, and the same choice: other parts of the step may have changed since then."""
    if reason := null_device.obstacle():
        pytest.skip(reason)
    lowered = lambda which: ablate.ask(
        "profiling.compiled.ablate", ablate.case(program, ablate.settings(program)[which]), "b200"
    )
    found = ablate.rows(dict(b200={program: {"": lowered(""), op: lowered(op)}}))["sm_100"][op]
    row = tuned.table("counts")["sm_100"][op]
    assert tuned.pays(found) == tuned.pays(row) and found == pytest.approx(row, abs=0.02), "python -m profiling ablate"
