"""The whole program on a CUDA device that needs no GPU: real values, real processes, every line of the host's.

Each test runs in child processes, in which the device is there before torch is imported. What they do is in
tests/null_device/; several are other test files, run again where "cuda" is the best device there is.
"""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import test_bare
import tiny
from test_training import CHAT, ROOT, SIZES, home  # noqa: F401 (home is a fixture)

from kernels import OPS
from nanochat.run import Run
from profiling.compiled import null_device

HERE = Path(__file__).parent / "null_device"
LIMIT = 1200  # seconds that a child may take on a busy machine


@pytest.fixture(scope="session")
def library(request):
    """Builds the library, once for all sessions, into pytest's cache. Skips where it cannot be."""
    if reason := null_device.obstacle():
        pytest.skip(reason)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(request.config.cache.mkdir("nanochat")))
        return str(null_device.library())


@pytest.fixture
def started(library, monkeypatch):
    """started(command, card=…, gpus=…, compute=…, **environment): a process whose Python has the device."""
    monkeypatch.setattr(null_device, "library", lambda: library)

    def start(*command, card="h100", gpus=1, compute=True, **more):
        words = [sys.executable, "-m", *command] if command[0] != "bash" else command
        words = [sys.executable, *command] if str(command[0]).endswith(".py") else words
        where = null_device.environment(card, gpus, compute)
        for name in ("TRITON_INTERPRET", "NANOCHAT_DTYPE", "CUDA_VISIBLE_DEVICES"):  # tests hide cards
            where.pop(name, None)
        where.update(dict(OMP_NUM_THREADS="1", NANOCHAT_KERNELS="torch"), **more)
        return subprocess.Popen(
            [str(word) for word in words],
            cwd=ROOT,
            env=where,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    return start


@pytest.fixture
def run(started):
    """The same, waited for: what it printed. Fails with what it said on stderr when its exit code is not `code`."""

    def wait(*command, code=0, **more):
        process = started(*command, **more)
        out, error = process.communicate(timeout=LIMIT)
        assert process.returncode == code, f"{command} ended with {process.returncode}:\n{out[-2000:]}\n{error[-6000:]}"
        return out if code == 0 else error

    return wait


@pytest.mark.slow
def test_it_behaves_like_a_gpu(run):
    assert "as wanted" in run(HERE / "the_device.py", gpus=2)


# ---- plans and speedrun.sh


CARDS = "h100 h100:8 4090 3090 5090 l4 t4 mi300x unknown".split()


@pytest.mark.slow
def test_every_card_gets_a_plan(run, tmp_path):
    plans = json.loads(run(HERE / "plans.py", *CARDS, NANOCHAT_BASE_DIR=str(tmp_path)).splitlines()[-1])
    assert list(plans) == CARDS
    for name, text in plans.items():
        share = re.search(r"memory +[\d.]+ GiB per GPU, (\d+)% of its [\d.]+ \(predicted\)", text)
        assert "Traceback" not in text and share and int(share[1]) < 90, f"{name}: {text}"
        assert re.search(r"base +[\d,]+ steps", text) and "saved activations" in text, f"{name}: {text}"
    assert "1 x NVIDIA GeForce RTX 5090" in plans["5090"] and "8 x NVIDIA H100 80GB HBM3" in plans["h100:8"]


def test_speedrun_itself_plans_eight_cards(run, tmp_path):
    """The real script, with nothing but the disk's size made up."""
    out = run("bash", "speedrun.sh", "--dry-run", "--data=hub", **planning(tmp_path), gpus=8)
    assert "8 x NVIDIA H100 80GB HBM3" in out and "GiB per GPU" in out


def planning(folder: Path) -> dict[str, str]:
    """An environment with a large disk, and the hub's files where they are beside the repository."""
    paths = [str(HERE / "large_disk"), str(Path(null_device.__file__).parent / "site"), str(ROOT)]
    mirror = ROOT.parent / "shared" / "data" / "hub"
    more = dict(NANOCHAT_HUB_ROOT=str(mirror)) if mirror.is_dir() else {}
    return dict(NANOCHAT_BASE_DIR=str(folder), PYTHONPATH=os.pathsep.join(paths), **more)


# ---- training


def test_what_is_replayed_is_what_would_have_been_launched(run):
    """Losses, gradients, weights to the bit, in all precisions; a capture that fails leaves nothing behind."""
    assert "as wanted" in run(HERE / "replays.py")


@pytest.mark.slow
def test_stages_train_in_every_precision_and_resume(run, home):  # noqa: F811
    """bfloat16, float16 with the scaler, fp8 with both scalings, compiled and not: the CPU's losses."""
    assert "as wanted" in run(HERE / "stages.py", home, NANOCHAT_BASE_DIR=str(home / "home"))


FILES = "training scripts engine web pool record ranks measure bad_steps ops triton probing".split()


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_what_holds_on_a_cpu_holds_on_the_device(run, name):
    """But for two tests: one stops Python while the device is being put in, one knows a CPU's way of decoding."""
    others = "not ctrl_c_while_starting_up and not an_evaluation_is_recorded"
    run("pytest", f"tests/test_{name}.py", "-q", "-p", "no:cacheprovider", "-k", others, gpus=2)


@pytest.mark.slow
def test_kernels_that_a_card_has_not_are_skipped_and_said(run):
    """As on a 3090: its tests of fp8 ops would only fail to compile. Some of the others are run."""
    files = ("tests/test_triton.py", "tests/test_probing.py")
    some = "test_empty_inputs or (test_the_probe_passes and not in_every and (fp8 or adamw_))"
    out = run("pytest", *files, "-rs", "-p", "no:cacheprovider", "-k", some, card="3090")
    assert re.search(r"SKIPPED .*fp8_linear: sm_86 has no fp8 instructions", out) and " passed" in out, out


@pytest.mark.slow
def test_long_offsets_are_interpreted_where_a_card_has_no_room(run):
    """On a device that computes nothing, Triton does not interpret: the test does it in a process without the card."""
    test = "tests/test_triton.py::test_offsets_past_two_to_the_31"
    assert "[100%]" in run(HERE / "no_room.py", test, compute=False)


@pytest.mark.slow
def test_two_ranks_train_on_two_cards(run, home):  # noqa: F811
    """Our launcher, gloo in NCCL's place, each rank on its own card: the losses of one rank, within rounding."""
    flags = [f"--data={home / 'text.jsonl'}", *SIZES, "--num-iterations=4"]
    where = dict(NANOCHAT_BASE_DIR=str(home / "home"), NANOCHAT_DTYPE="float32")
    run("scripts.launch", "--gpus=2", "scripts.base_train", "--", "--run=a", *flags, gpus=2, **where)
    run("scripts.base_train", "--run=b", *flags, **where)
    one, two = (losses_of(name) for name in "ab")
    assert len(one) == 4 and one == pytest.approx(two, abs=1e-3)


def losses_of(name: str) -> list[float]:
    rows = [json.loads(line) for line in (Run.open(name).stage("base") / "log.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.slow
def test_our_kernels_train_the_model(run, home):  # noqa: F811
    """`auto` on an H100: every kernel is probed, interpreted, and used; the loss is the references'."""
    flags = [f"--data={home / 'text.jsonl'}", *SIZES, "--num-iterations=2", "--total-batch-size=128"]
    where = dict(NANOCHAT_BASE_DIR=str(home / "home"), NANOCHAT_DTYPE="bfloat16")
    run("scripts.base_train", "--run=a", *flags, NANOCHAT_KERNELS="auto", **where)
    run("scripts.base_train", "--run=b", *flags, **where)
    assert losses_of("a") == pytest.approx(losses_of("b"), abs=2e-2)


@pytest.mark.slow
def test_recording_a_training_run(run, home):  # noqa: F811
    flags = [f"--data={home / 'text.jsonl'}", *SIZES, "--num-iterations=8", "--eval-every=-1", "--profile=2"]
    out = run("scripts.base_train", "--run=a", *flags, NANOCHAT_BASE_DIR=str(home / "home"))
    assert "2 steps recorded" in out
    assert (Run.open("a").stage("base") / "profile" / "profile.html").stat().st_size > 10_000


# ---- answering


@pytest.mark.parametrize("gpus", [1, 2])
def test_engines_with_graphs_answer_as_the_cpu_does(run, gpus):
    assert "as wanted" in run(HERE / "engines.py", gpus=gpus)


@pytest.mark.slow
def test_an_engine_with_our_kernels_answers_as_the_cpu_does(run):
    assert "as wanted" in run(HERE / "engines.py", NANOCHAT_KERNELS="auto")


def ask(port: int, path: str, body: dict | None = None) -> dict:
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", data=data, headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


def test_a_server_answers_the_same_on_both_replicas(started, home):  # noqa: F811
    """Eight conversations at once, more than one replica has slots for; each is in two copies."""
    for script, data, flags in (("base_train", "text", SIZES), ("chat_sft", "chat", CHAT)):
        assert tiny.call(script, "--run=a", f"--data={home / data}.jsonl", *flags, "--num-iterations=2") == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = started(
        "scripts.chat_web", "--run=a", "--num-gpus=2", f"--port={port}", "--slots=2", "--device-type=cuda",
        gpus=2, NANOCHAT_BASE_DIR=str(home / "home"), NANOCHAT_DTYPE="float32",
    )  # fmt: skip
    try:
        ends = time.monotonic() + LIMIT
        while time.monotonic() < ends and process.poll() is None and not healthy(port):
            time.sleep(0.2)
        assert process.poll() is None, process.communicate()[1][-3000:]
        alike = dict(max_tokens=12, temperature=0, top_k=0)
        words = ["the dog", "a cat", "red river", "old house"]
        bodies = [dict(alike, messages=[dict(role="user", content=text)]) for text in words for _ in range(2)]
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda body: ask(port, "/v1/chat/completions", body), bodies))
        texts = [answer["choices"][0]["message"]["content"] for answer in answers]
        assert texts[0::2] == texts[1::2] and all(texts), texts
    finally:
        process.terminate()
        _out, error = process.communicate(timeout=LIMIT)
    assert "Traceback" not in error and "without CUDA graphs" not in error, error[-3000:]


def healthy(port: int) -> bool:
    try:
        return ask(port, "/health").get("status") == "ok"
    except OSError:  # not listening yet, or 503: still loading
        return False


# ---- kernels and the tools that measure


def test_auto_on_an_h100_ends_with_our_attention(run):
    out = run("kernels", NANOCHAT_KERNELS="torch,flash_attention=auto,qk_norm_rotary=auto")
    for op in ("flash_attention", "qk_norm_rotary"):
        assert re.search(rf"{op} +triton .*the probe launch", out), out


@pytest.mark.slow
def test_auto_takes_sizes_that_change(run):
    assert set(run(HERE / "dynamic.py", NANOCHAT_KERNELS="auto").split()) == set(OPS)


@pytest.mark.slow
def test_tuning_benchmarks_and_sensors(run, tmp_path):
    assert "tools: as wanted" in run(HERE / "tools.py", NANOCHAT_BASE_DIR=str(tmp_path))


@pytest.mark.slow
def test_the_bare_environment_plans_and_decodes(run, tmp_path, monkeypatch):
    """With torch, Triton, numpy, safetensors and tiktoken alone, where CUDA makes a difference."""
    monkeypatch.setenv("PYTHONPATH", test_bare.hidden(tmp_path / "hidden"))
    where = dict(NANOCHAT_BASE_DIR=str(tmp_path))
    out = run(HERE / "plans.py", "h100", "--data=", **where)
    assert "huggingface_hub is not installed" in out and "Traceback" not in out, out
    sizes = "--depth=1 --width=128 --vocab-size=64 --prompt-tokens=3 --new-tokens=8 --batch-sizes=1 --repeats=1"
    out = run("scripts.infer_bench", *sizes.split(), "--profile=1", **where)
    assert "first token" in out and "1 steps recorded" in out, out


@pytest.mark.slow
def test_a_training_step_with_kernels_on_and_off(run):
    sizes = "--depth=1 --vocab-size=256 --sequence-len=32 --batch=2 --steps=3".split()
    result = json.loads(run("benchmarks.training_step", *sizes).splitlines()[-1])
    assert result["status"] == "timed", result
    assert [row["contender"] for row in result["rows"]] == ["kernels off", "kernels on"]
    assert all(row["extra_mb"] > 0 for row in result["rows"])


# ---- the launcher


def test_without_a_compiler_it_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "needs g++" in null_device.obstacle()


def test_a_card_it_does_not_know(library):
    with pytest.raises(ValueError, match="no card 'voodoo'; it has h100"):
        null_device.environment("voodoo")


def test_installing_after_torch_is_an_error():
    with pytest.raises(RuntimeError, match="must come before"):
        null_device.install()
