"""The static report: rows compiled once and remembered, a page whatever failed, one sentence for wrong use."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from kernels import targets, triton_utils, tuned
from kernels.architectures import ALL_TARGETS
from nanochat.render import page
from profiling.predicted import cards
from profiling.predicted.cards import card
from profiling.static import launches, report, sections

ROOT = Path(__file__).parent.parent
CARDS = {"sm_90": "H100", "gfx942": "MI300X"}


@pytest.fixture(autouse=True)
def no_calibration(monkeypatch, tmp_path):
    monkeypatch.setattr(cards, "FOLDER", tmp_path)


def made_row(op, target, **changed):
    row = dict(op=op, kernel=f"_{op}_kernel", target=target, shape="d24", whose="ours", way="forward", times=1,
               programs=1000, registers=40, stack_bytes=0, spill_bytes=0, shared_bytes=1024, occupancy=0.5, warps=4,
               access_bytes=16, load_bytes=64, float64_instructions=0, tensor_core="", tf32=False, spill_reason="",
               mix={"LDG.128": 4, "integer": 60}, looped=False, dot_rows=0, error="", faults=[])  # fmt: skip
    return {**row, **changed}


def made_page(rows):
    chips = {target: card(name) for target, name in CARDS.items()}
    ops = list(dict.fromkeys(row["op"] for row in rows))
    calls = [dict(op=op, shape="d24", bytes=2e8, flops=2e8, asked=1.03) for op in ops]
    found = report.predictions(rows, calls, chips)
    made = dict(triton="0", dtype="bfloat16", shapes=["d12", "d24"], rows=rows, calls=calls)
    return page("test", sections.sections(made, chips, found)), found


def test_a_kernel_that_does_not_compile_is_a_row_and_the_rest_of_the_page_comes():
    bad = made_row("rotary", "sm_90", error="CompilationError: nonsense", faults=["CompilationError: nonsense"])
    bad.update(targets.UNREAD)
    html, found = made_page([made_row("rms_norm", "sm_90"), made_row("rms_norm", "gfx942"), bad])
    assert html.count("CompilationError: nonsense") == 2 and html.count("_rms_norm_kernel") >= 2
    assert set(found) == {("rms_norm", "d24", "sm_90"), ("rms_norm", "d24", "gfx942")}
    for chip in CARDS.values():
        assert f"{chip}: predicted speed of each op" in html
    assert "<script" not in html and 'href="http' not in html and "src=" not in html


def test_every_time_on_the_page_is_said_to_be_predicted():
    html, _ = made_page([made_row("rms_norm", "sm_90"), made_row("cross_entropy", "sm_90", looped=True)])
    times = [
        cell for cell in html.split("<td>") if "µs" in cell.split("</td>")[0] or "\u00a0ms" in cell.split("</td>")[0]
    ]
    assert len(times) == 2 and all(cell.startswith("predicted\u00a0") for cell in times)
    assert "predicted\u00a0at\u00a0least" in html and "nothing on this page was measured" in html


def test_peers_stand_beside_ours():
    html, _ = made_page([made_row("rms_norm", "sm_90"), made_row("rms_norm", "sm_90", whose="liger", kernel="_theirs")])
    assert "Beside Liger-Kernel" in html and html.count("_theirs") == 1
    assert "Beside Liger-Kernel" not in made_page([made_row("rms_norm", "sm_90")])[0]


def test_cases_that_became_the_same_code_share_a_row():
    section = sections.kernels("sm_90", [made_row("rms_norm", "sm_90", shape=shape) for shape in ("d12", "d24")])
    assert [row[3] for row in section.blocks[0].rows] == ["d12, d24"]
    other = made_row("rms_norm", "sm_90", shape="d12", registers=41)
    assert len(sections.kernels("sm_90", [made_row("rms_norm", "sm_90"), other]).blocks[0].rows) == 2


def test_only_the_forward_is_predicted_from():
    rows = [made_row("rms_norm", "sm_90"), made_row("rms_norm", "sm_90", way="backward", programs=10**9)]
    _, found = made_page(rows)
    assert found["rms_norm", "d24", "sm_90"].bound == "memory"


def test_what_kernels_ask_for_is_known_of_every_op():
    asked = report.asked_bytes()
    assert set(asked) == set(tuned.ops()) - {"embedding"}  # its forward is PyTorch's own
    assert all(ratio >= 1 for ratio in asked.values())


def test_a_default_card_for_every_cards_target_and_no_look_alike():
    assert {cards.target_of(name) for name in cards.names()} == set(report.PREDICTED)
    for name in cards.names():
        assert card(name).target in ALL_TARGETS and card(name).sms > 0 and 1e9 < card(name).clock < 3e9


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--op=softmax"], "--op names 'softmax'; there are rms_norm"),
        (["--target=sm_70"], "--target names 'sm_70'; there are sm_80"),
        (["--card=H300"], "--card 'H300' is not known"),
        (["--jobs=-1"], "--jobs is -1"),
    ],
)
def test_wrong_use_is_one_sentence(capsys, flags, words):
    assert tiny.call_module("profiling.static.report", *flags) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


@pytest.mark.skipif(not triton_utils.INTERPRETED, reason="Triton does not interpret here, so it would compile")
def test_it_cannot_compile_where_triton_interprets(capsys):
    assert tiny.call_module("profiling.static.report", "--op=rms_norm") == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


needs_triton = pytest.mark.skipif(not triton_utils.INSTALLED, reason="Triton is not installed, so nothing compiles")


def run(folder, *words, **variables):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment |= dict(PYTHONPATH=paths, NANOCHAT_BASE_DIR=str(folder), **variables)
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=ROOT, env=environment)


@pytest.mark.slow
@needs_triton
def test_the_command_and_what_it_remembers(tmp_path):
    """Compiled once; read the second time; a damaged file is made again, and nothing else."""
    call = ["-m", "profiling", "static", "--op=muon_update_,rms_norm", "--target=sm_90", "--jobs=1"]
    first = run(tmp_path, *call)
    assert first.returncode == 0, first.stderr[-2000:]
    said = json.loads(first.stdout.strip().split("\n")[-1])
    first_report = json.loads((tmp_path / "static" / "static.json").read_text())
    assert said["compiled_now"] == said["launches"] == len(first_report["rows"]) == 6
    assert said["faults"] == said["errors"] == said["float64"] == 0 and said["predictions"] == 3
    assert all(one["predicted"] for one in first_report["predictions"]) and first.stdout.count(" predicted ") == 2
    for path, text in zip(sorted((tmp_path / "static-cache").glob("*.json")), ("{", "[]", '{"registers": 1}')):
        path.write_text(text)
    second = run(tmp_path, *call, "--out", str(tmp_path / "elsewhere"))
    assert json.loads(second.stdout.strip().split("\n")[-1])["compiled_now"] == 3
    assert json.loads((tmp_path / "elsewhere" / "static.json").read_text())["rows"] == first_report["rows"]
    assert (tmp_path / "elsewhere" / "static.html").read_text().startswith("<!doctype html>")


KEYS = """
import json, torch
from kernels import OPS, targets
from profiling.static import launches
launch = lambda dtype, op="rms_norm": targets.launches(OPS[op], OPS[op].cases["d24"], dtype, "sm_90")[0]
bf16, f32 = launch(torch.bfloat16), launch(torch.float32)
key = launches.key
keys = [key(bf16, "sm_90"), key(launch(torch.bfloat16), "sm_90"), key(bf16, "sm_80"), key(f32, "sm_90"),
        key(launch(torch.bfloat16, "mix_rms_norm"), "sm_90")]
bf16.constants["num_warps"] = 16
keys.append(key(bf16, "sm_90"))
found = {op: [(way, times) for _, way, times in launches.launches("ours", op, shape, "sm_90")]
         for op, shape in (("polar_express", "d24_mlp"), ("rms_norm", "d24"))}
print(json.dumps(dict(keys=keys, launches=found)))
"""


@needs_triton
def test_the_key_changes_with_all_that_a_row_follows_from_and_launches_are_counted(tmp_path):
    said = json.loads(run(tmp_path, "-c", KEYS).stdout)
    keys, found = said["keys"], said["launches"]
    assert keys[0] == keys[1] and len(set(keys)) == 5
    assert found["polar_express"] == [["forward", 5], ["forward", 5]]  # X·Xᵀ and A·A in each of five steps
    assert found["rms_norm"] == [["forward", 1], ["backward", 1]]


def fragile(task):
    """Stands in for `compile_task`, in a process of the pool."""
    if task.index == 0:
        os.kill(os.getpid(), 11)
    return made_row(task.op, task.target)


@pytest.mark.slow
def test_a_crash_costs_its_own_row_only(monkeypatch, tmp_path):
    """A pool that lost a process is lost as a whole: the others are compiled again, alone."""
    monkeypatch.setattr(launches, "compile_task", fragile)
    tasks = {f"{index}": launches.Task("ours", "rms_norm", "d24", "gfx1100", index) for index in range(2)}
    made = launches.compile_all(tasks, tmp_path, 1)
    assert "process died" in made["0"]["error"] and made["1"]["error"] == ""
    assert [path.name for path in tmp_path.iterdir()] == ["1.json"]


def test_a_process_that_died_leaves_a_row_that_says_so():
    row = launches.broken(launches.Task("ours", "rms_norm", "d24", "sm_90", 0))
    html, found = made_page(
        [made_row("rotary", "sm_90"), made_row("rms_norm", "sm_90") | row | dict(faults=[row["error"]])]
    )
    assert "process died" in html and ("rms_norm", "d24", "sm_90") not in found
