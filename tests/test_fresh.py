"""--fresh: nothing is forgotten before all checks are done and what replaces it is there."""

import re
import shutil
import sys
from pathlib import Path

import pytest
import tiny
from test_kills import META, every_gap, names, parts
from test_training import all_of_a, based, home, train, trained  # noqa: F401 (all but train are fixtures)

from nanochat import checkpoint, fresh, trainer
from nanochat.run import Run


def weights(folder):
    return checkpoint.latest(folder).fingerprint


@pytest.mark.parametrize(
    "stage, flags",
    [
        ("base", ["--fp8"]),
        ("base", ["--wandb"]),
        ("base", ["--profile=99"]),
        ("base", ["--profile=-1"]),
        ("base", ["--eval-tokens-between=0"]),
        ("base", ["--data=/none"]),
        ("base", ["--total-batch-size=100"]),
        ("mid", ["--fp8"]),
        ("mid", ["--wandb"]),
        ("mid", ["--profile=99"]),
        ("mid", ["--source=sft"]),
        ("mid", ["--max-seq-len=64"]),
    ],
)
def test_what_is_refused_changes_nothing(trained, monkeypatch, capsys, stage, flags):  # noqa: F811
    there = {path: path.stat().st_mtime_ns for path in Run.open("a").folder.rglob("*")}
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it fails
    if "--fp8" in flags:
        monkeypatch.setenv("NANOCHAT_DTYPE", "float16")
    assert train(trained, "a", stage, "--fresh", *flags) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in Run.open("a").folder.rglob("*")} == there


def test_the_old_stage_goes_when_the_new_one_has_a_checkpoint(based, monkeypatch, capsys):  # noqa: F811
    folder, seen, write = Run.open("a").stage("base"), [], checkpoint.write
    old, was = fresh.old(folder), weights(folder)

    def noted(*args):
        seen.append(old.is_dir() and weights(old) == was)
        return write(*args)

    monkeypatch.setattr(checkpoint, "write", noted)
    assert train(based, "a", "base", "--fresh", "--seed=7") == 0
    assert seen[0] and not any(seen[1:]) and not old.exists() and weights(folder) != was
    assert f"is in {old} until the first new checkpoint" in capsys.readouterr().out


@pytest.mark.parametrize("again", [True, False])
def test_stopped_before_that_the_old_one_is_put_back_or_stays_aside(based, monkeypatch, capsys, again):  # noqa: F811
    folder = Run.open("a").stage("base")
    was, old = weights(folder), fresh.old(folder)

    def killed(*args):
        raise RuntimeError("killed")

    for _ in range(2):
        with monkeypatch.context() as patched, pytest.raises(RuntimeError):
            patched.setattr(trainer, "step", killed)
            train(based, "a", "base", "--fresh", "--seed=7")
        assert weights(old) == was and checkpoint.latest(folder) is None
    capsys.readouterr()
    if again:
        assert train(based, "a", "base", "--fresh", "--seed=7") == 0
        assert weights(folder) != was
    else:
        assert train(based, "a") == 0
        said = capsys.readouterr().out
        assert "what was trained before is back" in said and "already trained" in said and weights(folder) == was
    assert not old.exists()


def test_a_stage_on_another_disk_stays_there(based, monkeypatch, capsys):  # noqa: F811
    """As a link to a folder; that of a tokenizer and of a run likewise."""
    folder, disk = Run.open("a").stage("base"), based / "disk"
    shutil.move(folder, disk)
    folder.symlink_to(disk)
    was = weights(folder)
    for seed in (7, 8):
        assert train(based, "a", "base", "--fresh", f"--seed={seed}") == 0
        assert folder.is_symlink() and weights(disk) != was and not list(based.glob("*~old"))
        was = weights(disk)
    for _ in range(2):
        with monkeypatch.context() as patched, pytest.raises(RuntimeError):
            patched.setattr(trainer, "step", lambda *args: (_ for _ in ()).throw(RuntimeError("killed")))
            train(based, "a", "base", "--fresh", "--seed=9")
        assert weights(based / "disk~old") == was and checkpoint.latest(folder) is None
    assert train(based, "a", "base", "--seed=8") == 0
    assert "what was trained before is back" in capsys.readouterr().out
    assert folder.is_symlink() and weights(disk) == was and not list(based.glob("*~old"))


def test_what_cannot_be_read_just_now_is_not_removed_for_what_is_aside(based, capsys):  # noqa: F811
    folder = Run.open("a").stage("base")
    shutil.copytree(folder, fresh.old(folder))
    for path in folder.glob("*/model.safetensors"):
        path.rename(path.with_name("away"))
    assert train(based, "a") == 2 and "can be used" in capsys.readouterr().err
    assert len(list(folder.glob("*/away"))) == checkpoint.KEEP and fresh.old(folder).is_dir()
    assert train(based, "a", "base", "--fresh") == 0
    assert not fresh.old(folder).exists()


def test_a_mid_that_is_aside_is_not_passed_over(trained, capsys):  # noqa: F811
    mid = Run.open("a").stage("mid")
    mid.rename(fresh.old(mid))
    assert train(trained, "a", "sft") == 2  # not from base
    assert "no finished mid" in capsys.readouterr().err
    assert train(trained, "a", "mid") == 0 and train(trained, "a", "sft") == 0


def test_what_somebody_has_put_there_is_not_removed(tmp_path):
    """Beside checkpoints, in a stage and in a run, whether what is made anew comes to a checkpoint or not."""
    run, there = tmp_path / "run", lambda place: checkpoint.latest(place) is not None
    of_run = lambda place: there(place / "base")
    checkpoint.write(run / "base", dict(META, step=9), parts(0))
    mine = [
        run / "notes.txt",
        run / "base" / "step_000009_keep" / "x",
        run / "base" / "step_notes",
        run / "sft" / "idea",
        run / "eval" / "mine.txt",
        run / "eval" / "profile" / "mine.txt",
        run / "base" / "profile" / "mine.json",
        run / "report_mine.md",
        run / "profile",
        run / ".mine.tmp",
    ]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text(path.name)
    for name in ("summary.json", "base_failures.jsonl", "hf_gpt2_core.csv", "profile/profile.html"):
        (run / "eval" / name).touch()
    (run / "base" / "log.jsonl").write_text("old")
    for folder, complete in ((run / "base", there), (run, of_run)):
        for _ in range(2):
            assert fresh.set_aside(folder, complete)
            (run / "base").mkdir(parents=True, exist_ok=True)
            (run / "base" / "new.txt").write_text("put there meanwhile")
        assert fresh.put_back(folder, complete) and (run / "base" / "new.txt").exists()
        assert all(path.read_text() == path.name for path in mine)
    for step, (folder, complete) in enumerate(((run / "base", there), (run, of_run)), 1):
        fresh.set_aside(folder, complete)
        checkpoint.write(run / "base", dict(META, step=step), parts(1))
        assert not fresh.old(folder).exists() and all(path.read_text() == path.name for path in mine)
        assert list(checkpoint.steps(run / "base")) == [step] and not (run / "base" / "log.jsonl").exists()
    assert names(run / "eval") == ["mine.txt", "profile"] and names(run / "eval" / "profile") == ["mine.txt"]


def test_every_figure_of_a_report_is_known_as_ours():
    folder = Path(fresh.__file__).parent
    named = [name for path in folder.glob("*.py") for name in re.findall(r'"(report_\w+\.svg)"', path.read_text())]
    assert named and all(fresh.OURS.fullmatch(name) for name in named)


@pytest.mark.slow
def test_at_any_file_operation_one_of_the_two_is_whole(tmp_path):
    checkpoint.write(tmp_path / "run" / "base", dict(META, step=9, finished=True), parts(0))
    was, new = weights(tmp_path / "run" / "base"), parts(1)
    there = lambda place: checkpoint.latest(place) is not None

    def act(run):
        fresh.set_aside(run / "base", there)
        checkpoint.write(run / "base", dict(META, step=1), new)

    for number, run, _ in every_gap(tmp_path, tmp_path / "run", act):
        folder = run / "base"
        second = shutil.copytree(run, tmp_path / "again" / str(number))
        fresh.put_back(folder, there)
        assert names(run) == ["base"] and checkpoint.latest(folder).step in (1, 9), number
        assert (weights(folder) == was) == (checkpoint.latest(folder).step == 9), number
        act(second)  # --fresh again
        assert names(second) == ["base"] and checkpoint.latest(second / "base").step == 1, number
    assert checkpoint.latest(folder).step == 1  # the last trial came to its end


def test_a_new_tokenizer_takes_the_place_of_the_old_one_as_a_whole(home, monkeypatch, capsys):  # noqa: F811
    flags = ["--run=t", f"--data={home / 'text.jsonl'}"]
    assert tiny.call("tok_train", *flags, "--vocab-size=300") == 0
    run = Run.open("t")
    was = run.tokenizer().fingerprint
    with monkeypatch.context() as patched, pytest.raises(RuntimeError):
        patched.setattr(Run, "write_summary", lambda *args: (_ for _ in ()).throw(RuntimeError("killed")))
        tiny.call("tok_train", *flags, "--vocab-size=310", "--fresh")
    assert tiny.call("tok_train", *flags, "--vocab-size=300") == 0
    assert run.tokenizer().fingerprint == was and "the one before is back" in capsys.readouterr().out
    assert tiny.call("tok_train", *flags, "--vocab-size=310", "--fresh") == 0
    assert run.tokenizer().vocab_size == 310 and names(run.folder) == ["tokenizer"]


def test_a_whole_run_that_is_started_over(home, monkeypatch, capsys):  # noqa: F811
    """As speedrun.sh --fresh does it: plan, tokenizer, base."""
    monkeypatch.setattr("nanochat.plan.throughput.speed", lambda *args: (10_000.0, True))
    assert train(home, "a") == 0
    run = Run.open("a")
    was = weights(run.stage("base"))
    assert tiny.call("plan", "--run=a", "--device=cpu", "--fresh", "--data=/none") == 2  # all checks first
    assert weights(run.stage("base")) == was
    assert tiny.call("plan", "--run=a", "--device=cpu", "--fresh") == 0
    assert names(run.folder) == ["plan.json"] and weights(fresh.old(run.folder) / "base") == was
    assert tiny.call("plan", "--run=a", "--device=cpu", "--fresh") == 0  # stopped, and the same again
    assert weights(fresh.old(run.folder) / "base") == was
    assert tiny.call("plan", "--run=a", "--device=cpu", "--dry-run") == 0
    assert fresh.old(run.folder).exists()
    assert tiny.call("plan", "--run=a", "--device=cpu") == 0
    assert weights(run.stage("base")) == was and not fresh.old(run.folder).exists()
    assert "what it had before is back" in capsys.readouterr().out
    assert tiny.call("plan", "--run=a", "--device=cpu", "--fresh") == 0
    tiny.tokenizer().save(run.stage("tokenizer"))
    assert train(home, "a", "base", "--seed=7") == 0
    assert not fresh.old(run.folder).exists() and weights(run.stage("base")) != was


def test_a_run_whose_base_was_removed_is_trained_all_the_same(home, monkeypatch):  # noqa: F811
    monkeypatch.setattr("nanochat.plan.throughput.speed", lambda *args: (10_000.0, True))
    run = Run.open("a")
    checkpoint.write(run.stage("sft"), dict(META, stage="sft", step=9, finished=True), parts(0))
    fresh.old(run.folder).mkdir()  # what could not be removed at the time
    assert tiny.call("plan", "--run=a", "--device=cpu") == 0
    assert checkpoint.latest(run.stage("sft")) and not fresh.old(run.folder).exists()
