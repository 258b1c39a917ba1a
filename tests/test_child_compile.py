"""A compiler that crashes ends a child process; this one reads why in one line, and goes on."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from kernels import OPS, architectures, child_compile, triton_utils
from kernels.child_compile import Task, compiles_in_child, report, rows

pytestmark = pytest.mark.skipif(not triton_utils.INSTALLED, reason="Triton is not installed, so nothing compiles")
ROOT = Path(__file__).parent.parent
QUESTION = ("mix_rms_norm", 256, torch.float32, "gfx1100")
# Stand-ins for a child: they begin to compile a kernel, as a child says it, and do something else.
BEGIN = "import json, os, sys, time; begun = dict(op='adamw_', kernel='_k', target='gfx1100', shape='s')\n"
BEGIN += "print(json.dumps(begun), flush=True); "
CRASH = BEGIN + "os.kill(os.getpid(), 11)"


@pytest.fixture(autouse=True)
def memory(monkeypatch, tmp_path):
    """Nothing is known of earlier questions."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiles_in_child.cache_clear()
    yield tmp_path / "nanochat-compiled"
    compiles_in_child.cache_clear()


def child(monkeypatch, code):
    monkeypatch.setattr(child_compile, "COMMAND", [sys.executable, "-c", code])


def ask(**changed):
    compiles_in_child.cache_clear()
    return compiles_in_child(*QUESTION, **changed)


def test_a_crash_is_one_line_and_is_remembered(monkeypatch, memory):
    child(monkeypatch, CRASH)
    assert ask() == "the compiler crashed (signal 11) on gfx1100, in _k"
    child(monkeypatch, "raise SystemExit('not asked again')")
    assert ask() == "the compiler crashed (signal 11) on gfx1100, in _k"
    assert compiles_in_child("mix_rms_norm", 512, torch.float32, "gfx1100").endswith("not asked again on gfx1100, in ?")
    assert [path.suffix for path in memory.iterdir()] == [""]


@pytest.mark.parametrize(
    "code, said",
    [
        (BEGIN + "time.sleep(60)", "the compiler was not done after 3 s on gfx1100, in _k"),
        (BEGIN + "os.kill(os.getpid(), 9)", "the compiler crashed (signal 9) on gfx1100, in _k"),
        ("import none_such", "exit code 1: ModuleNotFoundError: No module named 'none_such' on gfx1100, in ?"),
        (BEGIN + "print(json.dumps(dict(kernel='_k', error='bad')))", "bad on gfx1100, in _k"),
    ],
)
def test_what_may_pass_is_asked_again(monkeypatch, memory, code, said):
    child(monkeypatch, code)
    assert ask(timeout=3.0).endswith(said)
    assert not memory.exists()


def test_what_tests_do_not_compile_for_or_is_refused_needs_no_child(monkeypatch):
    child(monkeypatch, "raise SystemExit('a child')")
    assert "gfx1030 is none of the AMD architectures" in compiles_in_child(*QUESTION[:3], "gfx1030")
    assert compiles_in_child("flash_attention", 128, torch.bfloat16, "gfx1100").startswith("on gfx1100, at D = 128")
    assert architectures.untried("gfx942") == architectures.untried("sm_61") == ""


WELL = "print(json.dumps(dict(kernel='_k', error='')))"


def test_of_ranks_that_ask_the_same_one_compiles(monkeypatch, tmp_path):
    count = f"open({str(tmp_path / 'children')!r}, 'a').write('x'); time.sleep(0.5); "
    child(monkeypatch, BEGIN + count + WELL)
    with ThreadPoolExecutor(3) as ranks:
        assert list(ranks.map(lambda _: compiles_in_child.__wrapped__(*QUESTION), range(3))) == [""] * 3
    assert (tmp_path / "children").read_text() == "x"


def test_nobody_waits_for_a_rank_longer_than_for_a_compiler(monkeypatch, tmp_path):
    child(monkeypatch, BEGIN + WELL)
    with child_compile._turn(tmp_path, 1.0):
        started = time.monotonic()
        assert ask(timeout=2.0) == "" and time.monotonic() - started >= 2.0


CRASHES_AT_ONE = """
import json, os, sys
tasks, done = json.load(sys.stdin)
for i in range(done, 3):
    row = dict(op=tasks[0]["op"], kernel=f"_k{i}", target=tasks[0]["target"], shape=tasks[0]["shape"])
    print(json.dumps(row), flush=True)
    if i == 1:
        os.kill(os.getpid(), 11)
    print(json.dumps(dict(row, **json.loads(sys.argv[1]))), flush=True)
"""


def test_a_report_goes_on_after_a_crash(monkeypatch):
    fields = dict(registers=40, spill_bytes=0, shared_bytes=0, occupancy=1.0, warps=4, float64_instructions=0,
                   spill_reason="", access_bytes=16, dot_rows=0, tf32=False, error="")  # fmt: skip
    monkeypatch.setattr(child_compile, "COMMAND", [sys.executable, "-c", CRASHES_AT_ONE, json.dumps(fields)])
    made = report(["rms_norm"], ["gfx1100"], ["d24"], torch.float16)
    assert [row["kernel"] for row in made] == ["_k0", "_k1", "_k2"]
    assert [row["faults"] for row in made] == [[], ["the compiler crashed (signal 11)"], []]
    assert {(row["op"], row["target"], row["shape"]) for row in made} == {("rms_norm", "gfx1100", "d24")}


@pytest.mark.slow
def test_the_command_lists_a_crash_and_ends(tmp_path):
    """`python -m kernels compile` in a process whose child crashes at the only kernel there is."""
    once = BEGIN + "os.kill(os.getpid(), 11) if json.load(sys.stdin)[1] == 0 else print('')"
    code = f"import sys\nfrom kernels import __main__, child_compile\nchild_compile.COMMAND[1:] = ['-c', {once!r}]\n"
    code += "sys.argv = ['kernels', 'compile', '--op=adamw_', '--target=gfx1100']\n__main__.main()"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    made = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert made.returncode == 1 and "error: the compiler crashed (signal 11)" in made.stdout, made.stderr[-2000:]


def test_triton_itself_crashes_for_rdna(monkeypatch):
    """Why all this: row sums added up over a loop (tests/faulty_kernels.py)."""
    monkeypatch.setattr(child_compile, "COMMAND", [sys.executable, str(ROOT / "tests" / "faulty_kernels.py"), "crash"])
    made = rows([Task("test", "test", {}, "float32", "gfx1100")])
    if not made:
        pytest.skip(f"Triton {triton_utils.triton.__version__} compiles the kernel that 3.9.0 crashes on")
    assert [row["error"] for row in made] == ["the compiler crashed (signal 11)"]


def test_the_norms_compile_where_they_crashed_it():
    """float32, C = 256: forward and backward, in a real child; a process that interprets may ask too."""
    assert ask(timeout=3600.0) == ""  # however busy the machine


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["gfx1100", "gfx1151", "gfx1201"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_norms_compile_at_all_widths_for_rdna(arch, dtype):
    widths = (16, 64, 100, 130, 200, 256, 257, 384, 500, 512, 513, 640, 768, 1024, 1280, 1536, 2048, 4096, 16384)
    names = ("mix_rms_norm", "rms_norm", "add_rms_norm")
    made = rows([Task(name, f"C{c}", dict(N=2048, C=c), dtype, arch) for c in widths for name in names])
    assert {(row["op"], row["shape"]): row["error"] for row in made if row["error"]} == {}
    assert {row["op"] for row in made} == set(names) <= set(OPS) and len(made) >= 4 * len(widths)
