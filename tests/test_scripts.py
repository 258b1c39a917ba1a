"""The scripts as a user meets them: chat, evaluation, reports, ranks, full disks, missing compilers, Ctrl-C."""

import builtins
import os
import signal
import subprocess
import sys
import time
import types

import pytest
import tiny
import torch
from test_training import CHAT, ROOT, SIZES, home, interrupted_at, train  # noqa: F401 (home is a fixture)

from nanochat.errors import EXIT_INTERRUPTED, UserError
from nanochat.hardware import can_compile
from nanochat.run import Run


@pytest.fixture
def trained(home):  # noqa: F811
    assert train(home, "a") == 0
    assert train(home, "a", "sft") == 0
    return home


# ---- chat_cli


def test_one_prompt_one_answer(trained, capsys):
    capsys.readouterr()
    assert tiny.call("chat_cli", "--run=a", "-p", "the dog", "-t", "0", "-m", "8") == 0
    first = capsys.readouterr().out
    assert tiny.call("chat_cli", "--run=a", "-p", "the dog", "-t", "0", "-m", "8") == 0
    assert capsys.readouterr().out == first and first.strip()


def talk(monkeypatch, capsys, *lines):
    typed = iter(lines)

    def type_in(prompt):
        line = next(typed, None)
        if line is None:
            raise EOFError
        if line is KeyboardInterrupt:
            raise KeyboardInterrupt
        return line

    monkeypatch.setattr(builtins, "input", type_in)
    capsys.readouterr()
    assert tiny.call("chat_cli", "--run=a", "-m", "8") == 0
    return capsys.readouterr().out


def test_a_conversation_with_commands(trained, monkeypatch, capsys):
    said = talk(
        monkeypatch,
        capsys,
        "the dog",
        "a cat",
        "/temperature 0",
        "/topk 5",
        "/topk",
        "/clear",
        "/help",
        KeyboardInterrupt,
    )
    assert said.count("nanochat: ") == 2
    for line in ("temperature 0", "top-k 5", "A new conversation.", "/clear             forget", "Ctrl-D or /quit"):
        assert line in said


def test_commands_that_are_wrong_say_so(trained, monkeypatch, capsys):
    said = talk(monkeypatch, capsys, "/temperature hot", "/temperature 9", "/topk -1", "/dance", "/quit")
    for line in ("wants a number, not 'hot'", "wanted 0 to 2", "wanted 0 (all) or more", "There is no command /dance"):
        assert line in said


def test_any_other_line_that_begins_with_a_slash_is_asked(monkeypatch, capsys):
    from nanochat.chat import Event
    from nanochat.engine import Sampling
    from scripts import chat_cli

    lines = ["/usr/bin/python", "/etc", "/usr/bin/python is where?", "//", "/", "/dance", "/Help", "/quit now"]
    typed, asked = iter([*lines, "/help me", "/topk 3", "/quit"]), []

    def ask(messages, *rest):
        asked.append(messages[-1]["content"])
        yield Event("text", "yes")

    monkeypatch.setattr(builtins, "input", lambda prompt: next(typed))
    chat_cli.converse(ask, types.SimpleNamespace(max_tokens=8), Sampling(0.0, None, 0))
    said = capsys.readouterr().out
    assert asked == lines and said.count("There is no command") == 3  # a path is none, nor has it a note


def test_ctrl_c_stops_the_answer_and_the_chat_goes_on(trained, monkeypatch, capsys):
    from nanochat.engine import Engine

    plain, calls = Engine.step, []

    def interrupted(self):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(self)

    monkeypatch.setattr(Engine, "step", interrupted)
    said = talk(monkeypatch, capsys, "the dog", "a cat")
    assert "[stopped]" in said and said.count("nanochat: ") == 2


@pytest.mark.parametrize(
    "flags, complaint",
    [
        (["--run=none"], "train it first"),
        (["--run=a", "-i", "mid"], "no finished mid"),
        (["--run=a", "-t", "3"], "wanted 0 to 2"),
        (["--run=a", "-m", "0"], "wanted at least 1"),
    ],
)
def test_chat_that_cannot_be(trained, capsys, flags, complaint):
    assert tiny.call("chat_cli", *flags) == 2
    assert complaint in capsys.readouterr().err


# ---- evaluation and report


def test_evaluation_and_report(trained, capsys):
    data = f"--data={trained / 'text.jsonl'}"
    assert tiny.call("base_eval", "--run=a", data, "--eval=bpb", "--split-tokens=1024") == 0
    assert tiny.call("chat_eval", "--run=a", "-a", "facts_taught,add_tool", "-x", "4", "-b", "3", "-m", "4") == 0
    assert tiny.call("report", "--run=a") == 0
    run = Run.open("a")
    text = (run.folder / "report.md").read_text()
    bpb = run.summary("eval")["base"]["val_bpb"]
    for part in (f"{bpb:.4f}", ") | – | – | 0.0% right", "n=4", "| steps | 12 | – | 6 | – |", "## Fixed"):
        assert part in text, part
    assert "[facts_taught: facts whose questions are in SFT](" in text and "](report_chat.svg)" in text
    assert "<svg" in (run.folder / "report_chat.svg").read_text()
    failures = (run.stage("eval") / "sft_failures.jsonl").read_text().splitlines()
    assert len(failures) == 8
    assert tiny.call("chat_eval", "--run=a", "-a", "nonsense") == 2
    assert "the tasks are" in capsys.readouterr().err
    assert tiny.call("report", "--run=zzz") == 2


def test_the_tokenizer_script(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "home"))
    text = tmp_path / "a.txt"
    text.write_text("\n\n".join(tiny.sentences(300)))
    flags = ["--run=t", f"--data={text}"]
    assert tiny.call("tok_train", *flags, "--vocab-size=300") == 0
    assert tiny.call("tok_train", *flags, "--vocab-size=300") == 0
    assert "already trained" in capsys.readouterr().out
    assert tiny.call("tok_train", *flags, "--vocab-size=310") == 2
    assert tiny.call("tok_train", *flags, "--vocab-size=30000", "--fresh") == 2
    assert tiny.call("tok_train", *flags, "--vocab-size=100", "--fresh") == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note: ")]
    assert (
        len(errors) == 3 and "--fresh" in errors[0] and "only, not 30,000" in errors[1] and "at least 265" in errors[2]
    )
    assert Run.open("t").tokenizer().vocab_size == 300


def test_wandb_gets_every_row(home, monkeypatch):  # noqa: F811
    rows, begun = [], []

    def log(row, step):
        assert step == row["step"]
        rows.append(row)

    def init(**given):
        begun.append(given)
        return types.SimpleNamespace(log=log)

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    with interrupted_at(monkeypatch, 5):
        assert train(home, "a", "base", "--wandb") == EXIT_INTERRUPTED
    assert train(home, "a", "base", "--wandb") == 0
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 13))
    assert [row["step"] for row in rows if "val_bpb" in row] == [4, 8, 12]
    assert train(home, "a", "base", "--wandb", "--fresh") == 0
    first, resumed, fresh = begun
    assert first["id"] == resumed["id"] != fresh["id"] and {given["resume"] for given in begun} == {"allow"}


def test_an_extra_that_is_missing_is_one_sentence(home, monkeypatch, capsys):  # noqa: F811
    from nanochat.data import hub
    from nanochat.evaluate import core_hf

    for name in ("wandb", "transformers", "datasets", "huggingface_hub", "liger_kernel", "liger_kernel.ops"):
        monkeypatch.setitem(sys.modules, name, None)
    assert train(home, "a", "base", "--wandb") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "pip install wandb" in said
    monkeypatch.delenv("NANOCHAT_HUB_ROOT", raising=False)
    from benchmarks import static_peers

    for call, wanted in (
        (lambda: core_hf.load("gpt2", torch.device("cpu"), torch.float32), "pip install transformers"),
        (lambda: hub.dataset("a/b", None, "train"), "pip install datasets"),
        (lambda: hub.fetch_shards([0]), "pip install huggingface_hub"),
        (static_peers.liger, r"pip install '\.\[peers\]'"),
    ):
        with pytest.raises(UserError, match=wanted):
            call()


# ---- several processes


@pytest.mark.slow
def test_two_ranks_train_as_one(home):  # noqa: F811
    assert train(home, "a", "base", "--device-type=cpu") == 0  # where one GPU is, there need not be two
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        "scripts.base_train",
    ]
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    done = subprocess.run(
        [*launch, "--", "--run=b", f"--data={home / 'text.jsonl'}", *SIZES, "--device-type=cpu"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (Run.open(name).checkpoint("base") for name in ("a", "b"))
    assert two.meta["state"]["val_bpb"] == pytest.approx(one.meta["state"]["val_bpb"], rel=1e-5)
    for key, value in one.tensors("model").items():
        torch.testing.assert_close(two.tensors("model")[key], value, rtol=1e-3, atol=1e-4)


# ---- what machines lack


def test_a_full_disk_is_one_sentence(home, tmp_path, monkeypatch, capsys):  # noqa: F811
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        monkeypatch.setenv("NANOCHAT_BASE_DIR", str(disk))
        tiny.tokenizer().save(Run.open("a").stage("tokenizer"))
        assert train(home, "a") == 2
        error = capsys.readouterr().err
        assert "no space is left on the disk" in error and error.count("\n") == 1
        left = {path.name for path in Run.open("a").stage("base").rglob("*")}
        assert not [name for name in left if name.startswith((".", "step"))]
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.slow
def test_without_a_compiler_training_is_eager_and_says_what_it_costs(home):  # noqa: F811
    flags = [*(flag for flag in SIZES if not flag.startswith("--compile")), "--device-type=cpu"]
    environment = dict(
        os.environ, CXX="no-such-compiler", TORCHINDUCTOR_CACHE_DIR=str(home / "cache"), PYTHONPATH=str(ROOT)
    )
    done = subprocess.run(
        [sys.executable, "-m", "scripts.base_train", "--run=a", f"--data={home / 'text.jsonl'}", *flags],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "eager: no working C++ compiler was found" in done.stdout and "half the speed" in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_compiled_training_gives_eager_trainings_losses(home):  # noqa: F811
    works, why = can_compile(torch.device("cpu"))
    if not works:
        pytest.skip(f"torch.compile does not work here: {why}")
    assert train(home, "a", "base", "--device-type=cpu") == 0
    assert train(home, "b", "base", "--device-type=cpu", "--compile=auto") == 0
    one, two = (Run.open(name).summary("base") for name in ("a", "b"))
    assert two["compiled"] and not one["compiled"]
    assert two["val_bpb"] == pytest.approx(one["val_bpb"], rel=1e-4)


@pytest.mark.parametrize("delay", [0.05, 0.5, 1.5])
def test_ctrl_c_while_starting_up_is_one_sentence(home, delay):  # noqa: F811
    command = [sys.executable, "-m", "scripts.base_train", "--run=a", f"--data={home / 'text.jsonl'}", *SIZES]
    while True:
        process = subprocess.Popen(
            [*command, "--num-iterations=100000"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        try:
            _, error = process.communicate(timeout=20 if delay < 0.1 else 60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            assert delay < 0.1, "the signal was lost"
            delay *= 1.5  # lost by Python's own start
            continue
        if process.returncode == EXIT_INTERRUPTED or "init_import_site" not in error and f"{ROOT / 'scripts'}" in error:
            break
        delay *= 1.5  # nothing of ours had been read yet: Python itself was still starting
        assert delay < 60, error
    assert process.returncode == EXIT_INTERRUPTED, error
    assert "Traceback" not in error and "top" in error


def test_a_tokenizer_of_the_small_world_needs_no_limit(monkeypatch, tmp_path):
    """The world has no end, and two billion characters of it took longer than all training."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    assert tiny.call("tok_train", "--run=a", "--vocab-size=300") == 0
    assert Run.open("a").summary("tokenizer")["characters"] == 2_000_000
