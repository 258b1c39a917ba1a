"""Every file of a finished run, damaged in every way, under every command that reads it.

A command may go on where that is right (from an older checkpoint, without what can be made again) and must say so, or
refuse in one sentence that names what is damaged. It never ends in a traceback and never takes what is wrong.
"""

import builtins
import io
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny
from test_training import CHAT, SIZES

from nanochat import plan
from nanochat.calculator import calculate
from nanochat.flags import parse
from nanochat.plan import throughput
from nanochat.run import Run
from scripts import chat_web

PARTS = ("manifest.json", "meta.json", "model.safetensors", "optimizer.safetensors", "loader.safetensors")
NEWEST = dict(base="step_000012", mid="step_000006", sft="step_000006")
OLDER = dict(base="step_000009", mid="step_000004", sft="step_000004")
TOKENIZER, PLAN, EVAL = "tokenizer/tokenizer.json", "plan.json", "eval/summary.json"


def checkpoint_of(stage):
    """The newest checkpoint's files, and its folder."""
    folder = f"{stage}/{NEWEST[stage]}"
    return [folder, *(f"{folder}/{part}" for part in PARTS)]


# By command: the files it reads, in groups by what must come of damage to them. "again": training goes on from the
# older checkpoint, to the same end; "older": the older checkpoint's model is used; "made": a missing one is made again;
# "refused": one sentence; "left out": a missing one is said; "anew": a missing one was never there.
READS = {
    "base_train": [(checkpoint_of("base"), "again"), ([TOKENIZER], "refused"), (["base/summary.json"], "made")],
    "mid_train": [
        (checkpoint_of("mid"), "again"),
        ([*checkpoint_of("base"), TOKENIZER], "refused"),
        (["mid/summary.json"], "made"),
    ],
    "chat_sft": [
        (checkpoint_of("sft"), "again"),
        ([*checkpoint_of("mid"), TOKENIZER], "refused"),
        (["sft/summary.json"], "made"),
    ],
    "base_eval": [([*checkpoint_of("base"), TOKENIZER], "refused"), ([EVAL], "anew")],
    "chat_eval": [([*checkpoint_of("sft"), TOKENIZER], "refused"), ([EVAL], "anew")],
    "chat_cli": [(checkpoint_of("sft"), "older"), ([TOKENIZER], "refused")],
    "chat_web": [(checkpoint_of("sft"), "older"), ([TOKENIZER], "refused")],
    "report": [([f"{stage}/summary.json" for stage in ("tokenizer", "base", "mid", "sft", "eval")], "left out")],
    "compare": [([f"{stage}/summary.json" for stage in ("base", "mid", "sft", "eval")], "anew")],
    "tok_train": [([TOKENIZER, "tokenizer/summary.json"], "made")],
    "tok_eval": [([TOKENIZER], "refused"), (["tokenizer/summary.json"], "left out")],
    "plan": [([PLAN], "anew")],
}
KINDS = ("missing", "empty", "truncated", "one bit", "another stage's", "another step's", "unreadable", "wrong type")


def trials():
    """(command, file, kind, outcome) of all that can be."""
    for command, groups in READS.items():
        for files, outcome in groups:
            for file in files:
                for kind in KINDS:
                    folder = file.split("/")[-1] in NEWEST.values()
                    if folder and kind in ("empty", "truncated", "one bit"):
                        continue
                    if kind == "another step's" and "/step_" not in file:
                        continue
                    yield command, file, kind, outcome


ALL = list(trials())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of data and of a finished run "a"."""
    root = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("NANOCHAT_BASE_DIR", str(root / "home"))
        patched.setenv("NANOCHAT_DTYPE", "float32")
        patched.setattr(throughput, "speed", lambda *args: (10_000.0, True))
        (root / "text.jsonl").write_text("".join(json.dumps(dict(text=t)) + "\n" for t in tiny.sentences(1500)))
        talks = [
            dict(messages=[dict(role="user", content=q), dict(role="assistant", content=a)])
            for q, a in zip(tiny.sentences(400, 1), tiny.sentences(400, 2))
        ]
        (root / "chat.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
        run = Run.open("a")
        plan.store(plan.make(run, dict(device="cpu")), run)
        plan.store(plan.make(Run.open("b"), dict(device="cpu")), Run.open("b"))
        tiny.tokenizer(280).save(Run.open("b").stage("tokenizer"))
        for command in ("tok_train", "tok_eval", "base_train", "mid_train", "chat_sft", "base_eval", "chat_eval"):
            assert call(command, root) == 0
    return root


def call(command, root):
    """Runs a script on the run "a"; returns its exit code."""
    text, talks = f"--data={root / 'text.jsonl'}", f"--data={root / 'chat.jsonl'}"
    if command == "chat_web":
        served = parse(chat_web.Flags, "", ["--run=a", "--slots=1"])
        return tiny.called(lambda: chat_web.load(served, calculate).pool.close())
    flags = dict(
        tok_train=[text, "--vocab-size=300", "--max-chars=20000"],
        tok_eval=[text],
        base_train=[text, *SIZES],
        mid_train=[talks, *CHAT],
        chat_sft=[talks, *CHAT],
        base_eval=[text, "--eval=bpb", "--split-tokens=256", "--device-batch-size=4"],
        chat_eval=["-a", "facts_taught", "-x", "2", "-b", "2", "-m", "2"],
        chat_cli=["-p", "the dog", "-m", "2"],
        plan=["--dry-run"],
        compare=["--runs=a"],
    ).get(command, [])
    return tiny.call(command, *([] if command == "compare" else ["--run=a"]), *flags)


def damage(run, path, kind, spare):
    """Does that to a file or folder of the run. spare: a copy of the run that is whole, with another run beside it."""
    file = path.relative_to(run)
    if kind in ("missing", "wrong type"):
        was_file = path.is_file()
        shutil.rmtree(path) if not was_file else path.unlink()
        if kind == "wrong type":
            path.mkdir() if was_file else path.write_text("x")
    elif kind.startswith("another"):
        stage, *rest = file.parts
        other = {"base": "mid", "mid": "base", "sft": "mid"}.get(stage, "base")
        if file.name == "tokenizer.json" or str(file) == PLAN:
            source = spare.parent / "b" / file
        elif file.name == "summary.json":
            source = spare / other / "summary.json"
        else:
            step = OLDER[stage] if "step" in kind else NEWEST[other]
            source = spare / (stage if "step" in kind else other) / step / Path(*rest[1:])
        assert source.is_dir() or source.read_bytes() != path.read_bytes()
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copytree(source, path) if source.is_dir() else shutil.copy(source, path)
    elif kind != "unreadable":
        content = path.read_bytes()
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        path.write_bytes({"empty": b"", "truncated": content[:middle], "one bit": flipped}[kind])


@contextmanager
def forbidden(monkeypatch, path):
    """Within it, the operating system lets nobody open a file, or anything in a folder: tests run as root."""
    within = path.is_dir()

    def refuse(owner, name):
        plain = getattr(owner, name)

        def wrapped(file, *args, **more):
            if not isinstance(file, int) and (
                Path(file) == path and not within or within and path in Path(file).parents
            ):
                raise PermissionError(13, "Permission denied", os.fspath(file))
            return plain(file, *args, **more)

        patched.setattr(owner, name, wrapped)

    with monkeypatch.context() as patched:
        for owner, name in ((builtins, "open"), (io, "open"), (os, "open"), (os, "stat")):
            if name != "stat" or within:
                refuse(owner, name)
        yield


def tried(finished, folder, monkeypatch, capsys, command, file, kind, outcome):
    """What is wrong with how a command takes the damage; "" when it does as it should."""
    spare = finished / "home" / "runs" / "a"
    run = folder / "runs" / "a"
    shutil.copytree(spare, run)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(folder))
    damage(run, run / file, kind, spare)
    capsys.readouterr()
    if kind == "unreadable":
        with forbidden(monkeypatch, run / file):
            code = call(command, finished)
    else:
        code = call(command, finished)
    out, err = capsys.readouterr()
    name = next((part for part in Path(file).parts if part.startswith("step_")), Path(file).name)
    loud = name.removesuffix(".json") in err + out
    one = err.count("error: ") == 1 and "Traceback" not in err
    whole = lambda: (run / file).is_dir() or (run / file).read_bytes() == (spare / file).read_bytes()
    if outcome == "again":
        weights = Path(file.split("/")[0]) / NEWEST[file.split("/")[0]] / "model.safetensors"
        right = code == 0 and "warning: " in err and (run / weights).read_bytes() == (spare / weights).read_bytes()
        if kind == "missing" and Path(file).name in NEWEST.values():
            loud = "from step" in out
            right = code == 0 and (run / weights).read_bytes() == (spare / weights).read_bytes()
    elif outcome == "older":
        right = code == 0 and "is used instead" in err
        loud = loud or (kind == "missing" and "its last checkpoint is gone" in err)
    elif outcome != "refused" and kind == "missing":
        right = code == 0 and (outcome not in ("made",) or "tokenizer.json" not in file or whole())
        right = right and (outcome != "made" or (run / file).exists())
        loud = loud or outcome == "anew" or (outcome == "made" and command == "tok_train")
    else:
        right = code == 2 and one
        loud = loud or (kind == "missing" and "its last checkpoint is gone" in err)
    return "" if right and loud else f"{command}, {file} {kind} ({outcome}): exit {code}, {err.strip() or out[-300:]!r}"


@pytest.mark.parametrize("share", [61, pytest.param(1, marks=pytest.mark.slow)])
def test_any_damage_is_said_and_nothing_wrong_is_taken(finished, tmp_path, monkeypatch, capsys, share):
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    monkeypatch.setattr(throughput, "speed", lambda *args: (10_000.0, True))
    monkeypatch.setattr(chat_web.background, "compile_decoding", lambda engine: None)
    wrong, chosen = [], ALL[::share]
    for number, trial in enumerate(chosen):
        folder = tmp_path / str(number)
        if said := tried(finished, folder, monkeypatch, capsys, *trial):
            wrong.append(said)
        shutil.rmtree(folder)
    assert not wrong, f"{len(wrong)} of {len(chosen)}:\n" + "\n".join(wrong)
