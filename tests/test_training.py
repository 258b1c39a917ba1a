"""Whole stages through their scripts, tiny: exact resume, doing nothing twice, refusing what does not fit."""

import errno
import gc
import json
import math
import os
import shutil
import signal
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from nanochat import chat_stages, checkpoint, interrupt, report, stages, trainer
from nanochat.data.conversations import ConversationFiles
from nanochat.data.packing import Document
from nanochat.errors import EXIT_INTERRUPTED, UserError
from nanochat.log import read_log
from nanochat.run import Run

ROOT = Path(__file__).parent.parent
SIZES = (
    "--depth=2 --aspect-ratio=16 --head-dim=16 --max-seq-len=32 --device-batch-size=4 --total-batch-size=256 "
    "--num-iterations=12 --eval-every=4 --save-every=3 --eval-tokens=512 --compile=no"
).split()
CHAT = "--num-iterations=6 --eval-every=3 --save-every=2 --eval-tokens=256 --compile=no".split()


def at(folder, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(folder / "home"))
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")


def furnish(folder):
    (folder / "text.jsonl").write_text("".join(json.dumps(dict(text=t)) + "\n" for t in tiny.sentences(1500)))
    talks = [
        dict(messages=[dict(role="user", content=q), dict(role="assistant", content=a)])
        for q, a in zip(tiny.sentences(400, 1), tiny.sentences(400, 2))
    ]
    (folder / "chat.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    for name in ("a", "b"):
        tiny.tokenizer().save(Run.open(name).stage("tokenizer"))


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A base directory with text, conversations, and a tokenizer in the runs "a" and "b"; float32."""
    at(tmp_path, monkeypatch)
    furnish(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def all_of_a(tmp_path_factory):
    """A home, and a copy of how it was when base and mid of the run "a" were trained: a checkpoint names its texts."""
    folder = tmp_path_factory.mktemp("all_of_a")
    live, kept = folder / "live", folder / "kept"
    live.mkdir()
    with pytest.MonkeyPatch.context() as patched:
        at(live, patched)
        furnish(live)
        assert train(live, "a") == train(live, "a", "mid") == 0
    shutil.copytree(live, kept)
    return live, kept


@pytest.fixture
def trained(monkeypatch, all_of_a):
    """A home with base and mid of the run "a"."""
    live, kept = all_of_a
    at(live, monkeypatch)
    shutil.rmtree(live)
    return shutil.copytree(kept, live)


@pytest.fixture
def based(trained):
    """A home with base of the run "a"."""
    shutil.rmtree(Run.open("a").stage("mid"))
    return trained


def train(home, name, stage="base", *more):
    script, data, flags = {
        "base": ("base_train", "text.jsonl", SIZES),
        "mid": ("mid_train", "chat.jsonl", CHAT),
        "sft": ("chat_sft", "chat.jsonl", CHAT),
    }[stage]
    return tiny.call(script, f"--run={name}", f"--data={home / data}", *flags, *more)


def losses(name, stage):
    rows = read_log(Run.open(name).stage(stage) / "log.jsonl")
    return [(row["step"], row["loss"]) if "loss" in row else (row["step"], row["val_bpb"]) for row in rows]


def assert_same(stage):
    one, two = (Run.open(name).checkpoint(stage) for name in ("a", "b"))
    for part in ("model", "optimizer", "loader"):
        first, second = one.tensors(part), two.tensors(part)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first), part
    assert losses("a", stage) == losses("b", stage)
    assert one.meta["state"]["val_bpb"] == two.meta["state"]["val_bpb"] is not None


@contextmanager
def interrupted_at(monkeypatch, step):
    """Within it, training gets a SIGINT once it has taken so many steps."""
    plain = trainer._account

    def interrupting(stage, *args):
        plain(stage, *args)
        if stage.state.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(trainer, "_account", interrupting)
        yield


@pytest.mark.parametrize("when", [5, 8, *(pytest.param(when, marks=pytest.mark.slow) for when in (2, 12))])
def test_interrupted_and_called_again_it_takes_the_same_steps(based, monkeypatch, when):
    """SIGINT at a step; 8 and 12 fall on an evaluation."""
    with interrupted_at(monkeypatch, when):
        assert train(based, "b") == EXIT_INTERRUPTED
    assert checkpoint.latest(Run.open("b").stage("base")).step == when
    assert train(based, "b") == 0
    assert_same("base")


def test_interrupted_inside_an_evaluation(based, monkeypatch):
    plain = trainer.bits_per_byte

    def interrupting(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return plain(*args)

    monkeypatch.setattr(trainer, "bits_per_byte", interrupting)
    assert train(based, "b") == EXIT_INTERRUPTED
    monkeypatch.setattr(trainer, "bits_per_byte", plain)
    assert train(based, "b") == 0
    assert_same("base")


@pytest.mark.parametrize("scaling", [pytest.param("current", marks=pytest.mark.slow), "delayed"])
def test_fp8_resumes_exactly_too(home, monkeypatch, capsys, scaling):
    flags = ("--fp8", f"--fp8-scaling={scaling}")
    assert train(home, "a", "base", *flags) == 0
    assert torch.cuda.is_available() or "--fp8 is emulated" in capsys.readouterr().out
    with interrupted_at(monkeypatch, 5):
        assert train(home, "b", "base", *flags) == EXIT_INTERRUPTED
    assert train(home, "b", "base") == 2  # not in the middle into another precision
    assert train(home, "b", "base", *flags) == 0
    assert_same("base")
    assert train(home, "b", "base", "--fresh") == 0
    assert losses("a", "base") != losses("b", "base")  # it did round


def test_fp8_wants_widths_of_16_and_no_float16(home, monkeypatch, capsys):
    assert train(home, "a", "base", "--fp8", "--aspect-ratio=12", "--head-dim=12") == 2
    assert "no multiple of 16" in capsys.readouterr().err
    assert train(home, "a", "base", "--fp8", "--device-batch-size=1", "--max-seq-len=33", "--total-batch-size=33") == 2
    assert "a micro-batch of 1 × 33 tokens is no multiple of 16" in capsys.readouterr().err
    monkeypatch.setenv("NANOCHAT_DTYPE", "float16")
    assert train(home, "a", "base", "--fp8") == 2
    assert "float16 (NANOCHAT_DTYPE)" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["mid", "sft"])
def test_chat_stages_resume_exactly_too(trained, monkeypatch, stage):
    a, b = Run.open("a"), Run.open("b")
    shutil.copytree(a.folder, b.folder, dirs_exist_ok=True)
    if stage == "mid":
        shutil.rmtree(b.stage("mid"))
    else:
        assert train(trained, "a", stage) == 0
    with interrupted_at(monkeypatch, 3):
        assert train(trained, "b", stage) == EXIT_INTERRUPTED
    assert train(trained, "b", stage) == 0
    assert_same(stage)


# ---- checkpoints are written by a thread


@contextmanager
def writing(monkeypatch, act):
    """Within it, `act` is called with the metadata of each checkpoint in the thread that writes it, before that."""
    plain = checkpoint.write

    def wrapped(folder, meta, parts):
        assert threading.current_thread() is not threading.main_thread()
        act(meta)
        return plain(folder, meta, parts)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "write", wrapped)
        yield


def test_a_checkpoint_holds_its_own_step_however_late_it_is_written(based, monkeypatch):
    steps, plain = [0], trainer._account

    def noted(stage, *args):
        plain(stage, *args)
        steps.append(stage.state.step)

    def late(meta):
        """After the next step was taken, where there is one: its weights must not be in this checkpoint."""
        while meta["step"] < 12 and steps[-1] <= meta["step"]:
            time.sleep(0.002)

    monkeypatch.setattr(trainer, "_account", noted)
    with writing(monkeypatch, late):
        assert train(based, "b") == 0
    for step in (9, 12):
        one, two = (Run.open(name).checkpoint("base", step) for name in ("a", "b"))
        for part in ("model", "optimizer", "loader"):
            first, second = one.tensors(part), two.tensors(part)
            assert all(torch.equal(first[key], second[key]) for key in first), (step, part)
        one.meta["state"].pop("seconds"), two.meta["state"].pop("seconds")
        assert one.meta["state"] == two.meta["state"] and one.meta["loader"] == two.meta["loader"]
    assert_same("base")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_what_fails_in_the_thread_is_one_sentence_of_the_training(home, monkeypatch, capsys, code):
    def fail(meta):
        if meta["step"] == 6:
            raise OSError(code, "no", "a disk")

    with writing(monkeypatch, fail):
        assert train(home, "a") == 2
    error = capsys.readouterr().err
    assert error == "error: no space is left on the disk of a disk; free some, then give the same command again\n"
    assert checkpoint.latest(Run.open("a").stage("base")).step == 4


def test_a_last_checkpoint_that_fails_is_no_interruption(home, monkeypatch, capsys):
    def fail(meta):
        if meta["step"] == 5:
            time.sleep(0.3)  # the main thread has nothing to do but to wait
            raise OSError(errno.ENOSPC, "no", "a disk")

    with writing(monkeypatch, fail), interrupted_at(monkeypatch, 5):
        assert train(home, "a") == 2
    assert capsys.readouterr().err.endswith("the disk of a disk; free some, then give the same command again\n")


def test_told_to_stop_while_the_thread_writes_it_waits_for_it_and_saves(home, monkeypatch):
    def noting(meta):
        if meta["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)

    with writing(monkeypatch, noting):
        assert train(home, "b") == EXIT_INTERRUPTED
    found = checkpoint.latest(Run.open("b").stage("base"))
    assert found.step >= 3 and [path.name for path in found.folder.parent.glob(".*")] == []
    assert train(home, "b") == 0 == train(home, "a")
    assert_same("base")


def test_a_signal_that_several_hand_on_is_one(home, monkeypatch):
    """A terminal's Ctrl-C reaches a rank directly, through its launcher and through a scheduler: it still saves."""

    def noting(meta):
        if meta["step"] == 3:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
                os.kill(os.getpid(), number)
                time.sleep(0.05)
        time.sleep(0.2)

    with writing(monkeypatch, noting):
        assert train(home, "b") == EXIT_INTERRUPTED
    assert checkpoint.latest(Run.open("b").stage("base")).step >= 3


def test_told_twice_to_stop_it_does_not_wait_for_the_thread(home, monkeypatch):
    monkeypatch.setattr(interrupt, "ONE_PRESS", 0.1)
    over = threading.Event()

    def noting(meta):
        if meta["step"] == 6:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.2)
            over.wait(60)

    with writing(monkeypatch, noting):
        assert train(home, "b") == EXIT_INTERRUPTED
        assert checkpoint.latest(Run.open("b").stage("base")).step == 4
        over.set()
        for thread in threading.enumerate():
            if thread.name == "save":
                thread.join()


def test_an_evaluation_that_fails_loses_no_checkpoint(home, monkeypatch):
    def failing(*args):
        raise RuntimeError("device lost")

    monkeypatch.setattr(trainer, "bits_per_byte", failing)
    with writing(monkeypatch, lambda meta: time.sleep(0.3)), pytest.raises(RuntimeError, match="device lost"):
        train(home, "a")
    assert checkpoint.latest(Run.open("a").stage("base")).step == 4


def test_a_validation_that_is_made_again_is_logged_once(home, monkeypatch):
    """Killed after an evaluation and before the next save, it resumes from the checkpoint before the evaluation."""
    plain = trainer.step

    def failing(stage, *rest):
        if stage.state.evaluated_step == 4:
            raise RuntimeError("killed")
        return plain(stage, *rest)

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="killed"):
        patched.setattr(trainer, "step", failing)
        train(home, "b")
    assert train(home, "b") == 0 == train(home, "a")
    assert_same("base")


def test_intermediate_validations_may_be_smaller(home, capsys):
    assert train(home, "a", "base", "--eval-tokens-between=256") == 0
    assert "step 4: intermediate validation" in capsys.readouterr().out
    rows = [row for row in read_log(Run.open("a").stage("base") / "log.jsonl") if "val_bpb" in row]
    assert [(row["step"], row["val_tokens"], row["final"]) for row in rows] == [
        (4, 256, False),
        (8, 256, False),
        (12, 512, True),
    ]
    assert Run.open("a").summary("base")["val_tokens"] == 512
    assert train(home, "b", "base", "--eval-tokens-between=0") == 2
    assert "--eval-tokens-between is 0" in capsys.readouterr().err


def test_validation_is_prepared_by_another_thread(home, monkeypatch):
    threads, plain = [], stages.one_pass

    def noted(*args):
        threads.append(threading.current_thread().name)
        yield from plain(*args)

    monkeypatch.setattr(stages, "one_pass", noted)
    assert train(home, "a") == 0
    assert threads == ["data"] * 3
    assert not any(thread.name == "data" for thread in threading.enumerate())


def test_a_finished_stage_does_nothing_twice(based, capsys):
    made = checkpoint.latest(Run.open("a").stage("base"))
    before = {path: path.stat().st_mtime_ns for path in made.folder.iterdir()}
    assert train(based, "a") == 0
    assert "already trained" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in made.folder.iterdir()}


def test_a_finished_checkpoint_without_its_place_finds_it(based, capsys):
    """Killed between the last two calls: of a stage that is finished, nothing is saved again."""
    made = checkpoint.latest(Run.open("a").stage("base")).folder
    made.rename(made.with_name(f".tmp-{made.name}-1"))
    assert train(based, "a") == 0
    assert "already trained" in capsys.readouterr().out and made.is_dir()


def test_ranks_load_in_turn_and_compare(based, capsys, monkeypatch):
    """Before anything is trained: one that the network refuses would have another mixture (see test_ranks)."""
    loaded = []
    monkeypatch.setattr(chat_stages, "first_alone", lambda make, hardware: loaded.append(make()) or loaded[0])

    def differ(setup):
        assert setup.source is loaded[0][0]
        raise UserError("ranks have other data")

    monkeypatch.setattr(stages, "_same_everywhere", differ)
    assert train(based, "a", "mid") == 2 and "ranks have other data" in capsys.readouterr().err


def test_another_plan_other_data_another_tokenizer_are_refused(based, capsys):
    assert train(based, "a", "base", "--matrix-lr=0.01") == 2
    assert "another plan" in capsys.readouterr().err
    assert tiny.call("base_train", "--run=a", f"--data={based / 'chat.jsonl'}", *SIZES) == 2
    assert 'wanted an object with a string "text"' in capsys.readouterr().err
    with open(based / "text.jsonl", "a") as f:
        f.write('{"text": "more"}\n')
    assert train(based, "a") == 2
    assert "another data" in capsys.readouterr().err
    tiny.tokenizer(280).save(Run.open("a").stage("tokenizer"))
    assert train(based, "a", "mid") == 2
    assert "another tokenizer" in capsys.readouterr().err


def test_a_new_base_makes_the_old_mid_stale(trained, capsys):
    run, said = Run.open("a"), "mid was trained from another model than the base there now"
    assert report.outdated(run) == []
    assert train(trained, "a", "base", "--fresh", "--seed=7") == 0
    assert train(trained, "a", "mid") == 2
    assert "--fresh" in capsys.readouterr().err
    assert tiny.call("report", "--run=a") == 0
    assert said in capsys.readouterr().err and said in (run.folder / "report.md").read_text()
    assert train(trained, "a", "mid", "--fresh") == 0 and report.outdated(run) == []


@pytest.mark.parametrize(
    "stage, flags, complaint",
    [
        ("base", ["--depth=0"], "--depth is 0"),
        ("base", ["--total-batch-size=100"], "no multiple of"),
        ("base", ["--device-batch-size=0"], "--device-batch-size is 0, wanted 1 to"),
        ("base", ["--window-pattern=SX"], "letters S and L"),
        ("base", ["--head-dim=15"], "even head dim"),
        ("base", ["--run=../x"], "--run is"),
        ("base", ["--run=none"], "train one first"),
        ("base", ["--data=/none"], "does not exist"),
        ("base", ["--device-type=tpu"], "wanted cuda, cpu or mps"),
        ("mid", [], "train it first"),
        ("sft", ["--source=sfx"], "there is no stage 'sfx'"),
    ],
)
def test_wrong_use_is_one_sentence_and_leaves_nothing(home, capsys, stage, flags, complaint):
    before = sorted(home.rglob("*"))
    assert train(home, "a", stage, *flags) == 2
    error = capsys.readouterr().err
    assert complaint in error and error.count("\n") == 1, error
    assert sorted(home.rglob("*")) == before


def test_a_loss_that_is_not_finite_skips_the_step_and_then_stops(home, monkeypatch, capsys):
    plain, seen = trainer.step, []

    def poisoned(stage, model, *rest):
        bad = stage.state.step in (3, 4) or stage.folder.parent.name == "b"
        before = {name: p.clone() for name, p in stage.model.named_parameters()}
        spoilt = lambda *args, **kwargs: model(*args, **kwargs) * float("nan")
        outcome = plain(stage, spoilt if bad else model, *rest)
        same = all(torch.equal(before[name], p) for name, p in stage.model.named_parameters())
        seen.append((math.isfinite(outcome.loss), same))
        return outcome

    monkeypatch.setattr(trainer, "step", poisoned)
    assert train(home, "a") == 0
    assert seen == [(not bad, bad) for bad in (i in (3, 4) for i in range(12))]
    assert Run.open("a").summary("base")["skipped_steps"] == 2
    assert train(home, "b") == 2
    assert "not finite 5 steps in a row" in capsys.readouterr().err


def test_a_step_is_timed_to_its_end_where_something_else_follows(home, monkeypatch):
    """A GPU is still at work when `step` returns: whoever evaluates or saves next would wait for it, untimed."""
    steps, waited = [], []
    plain = trainer.step

    def noted(stage, *rest):
        steps.append(stage.state.step + 1)
        return plain(stage, *rest)

    monkeypatch.setattr(trainer, "step", noted)
    monkeypatch.setattr(trainer.Hardware, "synchronize", lambda hardware: waited.append(steps[-1]))
    assert train(home, "a") == 0
    assert waited == [3, 4, 6, 8, 9, 12]  # saved after each third step, evaluated after each fourth


def test_float16_trains_with_a_scaler_and_resumes(home, monkeypatch):
    monkeypatch.setenv("NANOCHAT_DTYPE", "float16")
    assert train(home, "a") == 0
    state = Run.open("a").checkpoint("base").meta["state"]
    assert state["scaler"]["scale"] > 1
    first, last = losses("a", "base")[0][1], state["smooth_loss"]
    assert last < first


def test_training_learns(home):
    assert train(home, "a", "base", "--num-iterations=60", "--matrix-lr=0.2", "--embedding-lr=3") == 0
    rows = [loss for _, loss in losses("a", "base")]
    assert rows[0] == pytest.approx(5.70, abs=0.02)  # ln 300
    assert Run.open("a").summary("base")["train_loss"] < 4.5


def test_nothing_stays_frozen_after_training(home):
    """Or Triton's bindings print 25 lines about leaks when the process ends."""
    assert train(home, "a") == 0
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize("count", [1, 127, 128, 129, 1024, 1025, 12_673])
def test_an_epoch_has_every_conversation_once(tmp_path, count):
    """The last unit of a file may have one."""
    talk = json.dumps(dict(messages=[dict(role="user", content="a"), dict(role="assistant", content="b")]))
    for name, many in (("talks.jsonl", count), ("val.jsonl", 1)):
        (tmp_path / name).write_text(f"{talk}\n" * many)
    settings = trainer.Settings(num_iterations=-1, device_batch_size=1, max_seq_len=9, total_batch_size=1)
    encode = lambda items: [Document(np.zeros(5, np.int32)) for _ in items]  # noqa: E731
    assert chat_stages.epoch_steps(ConversationFiles(tmp_path), encode, settings) == 5 * count


def test_an_epoch_may_be_cut_short(trained, monkeypatch):
    monkeypatch.setattr(chat_stages, "epoch_steps", lambda *args: 3)
    for most, steps in ((2, 2), (5, 3)):
        assert train(trained, "a", "mid", "--num-iterations=-1", f"--max-iterations={most}", "--fresh") == 0
        assert Run.open("a").summary("mid")["steps"] == steps


def test_a_validation_split_without_an_answer_is_named_before_training(home, capsys):
    """Or it would be said at the end that the model has nan bits per byte."""
    assert train(home, "a", "base", "--num-iterations=1") == 0
    (home / "talks").mkdir()
    (home / "chat.jsonl").rename(home / "talks" / "chat.jsonl")
    output = [dict(type="python_output", text="5")]
    for question, *answer in ("the dog",), ("the dog", ""), (" x" * 200, "a cat"), ("the dog", output):
        row = [dict(role="user", content=question), *(dict(role="assistant", content=text) for text in answer)]
        (home / "talks" / "val.jsonl").write_text(json.dumps(row) + "\n")
        capsys.readouterr()
        assert train(home, "a", "sft", f"--data={home / 'talks'}") == 2
        assert "has nothing to validate on" in capsys.readouterr().err and not Run.open("a").stage("sft").exists()
    (home / "talks" / "val.jsonl").write_text(json.dumps([*row[:1], dict(role="assistant", content="a cat")]) + "\n")
    assert train(home, "a", "sft", f"--data={home / 'talks'}", "--num-iterations=1") == 0
