"""What makes a checkpoint complete, and that everybody who reads one asks the same question."""

import errno
import hashlib
import json
import os
import resource
import shutil
import time

import pytest
import tiny
from test_checkpoint import META, save

from nanochat import checkpoint, complete
from nanochat.errors import UserError
from nanochat.run import Run


def rewritten(folder, name, content):
    """Puts a file into a checkpoint with a manifest that agrees: damage that no checksum shows."""
    (folder / name).write_bytes(content)
    digests = json.loads((folder / "manifest.json").read_text())
    digests[name] = hashlib.sha256(content).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(digests))


METAS = {
    "a list": lambda meta: [meta],
    "null": lambda meta: None,
    "a number": lambda meta: 7,
    "empty": lambda meta: {},
    "no step": lambda meta: {key: value for key, value in meta.items() if key != "step"},
    "step a string": lambda meta: dict(meta, step="2"),
    "another step": lambda meta: dict(meta, step=1),
    "another stage": lambda meta: dict(meta, stage="mid"),
    "finished no boolean": lambda meta: dict(meta, finished="yes"),
    "no config": lambda meta: dict(meta, config=None),
    "a config of no model": lambda meta: dict(meta, config=dict(n_layer=0)),
    "a config of another version": lambda meta: dict(meta, config=dict(layers=2)),
    "parts no list": lambda meta: dict(meta, parts="model"),
    "a part outside": lambda meta: dict(meta, parts=["model", "../model"]),
    "no model": lambda meta: dict(meta, parts=["optimizer", "loader"]),
    "a part without file": lambda meta: dict(meta, parts=[*meta["parts"], "fp8"]),
    "a file without part": lambda meta: dict(meta, parts=["model", "optimizer"]),
    "no state": lambda meta: dict(meta, state=None),
    "a state of another step": lambda meta: dict(meta, state=dict(step=1)),
    "a plan of another type": lambda meta: dict(meta, plan=[]),
}


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """The base stage of run "a" with checkpoints 1 and 2."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    folder = Run.open("a").stage("base")
    save(folder, 1)
    save(folder, 2)
    return folder


@pytest.mark.parametrize("how", METAS)
def test_metadata_that_lacks_something_or_belongs_elsewhere_is_passed_over(stage, capsys, how):
    newest = stage / "step_000002"
    meta = json.loads((newest / "meta.json").read_text())
    rewritten(newest, "meta.json", json.dumps(METAS[how](meta)).encode())
    assert checkpoint.latest(stage).step == 1
    assert capsys.readouterr().err.startswith(f"warning: {newest} is not used: ")
    with pytest.raises(UserError, match="cannot be used"):
        Run.open("a").checkpoint("base", 2)


MANIFESTS = {
    "a list": lambda digests: list(digests),
    "empty": lambda digests: {},
    "no model": lambda digests: {key: value for key, value in digests.items() if key != "model.safetensors"},
    "no optimizer": lambda digests: {key: value for key, value in digests.items() if key != "optimizer.safetensors"},
    "no meta": lambda digests: {key: value for key, value in digests.items() if key != "meta.json"},
    "one too many": lambda digests: {**digests, "notes.txt": "0" * 64},
    "one outside": lambda digests: {**digests, "../step_000001/meta.json": "0" * 64},
    "a number": lambda digests: {**digests, "model.safetensors": 3},
    "no digest": lambda digests: {**digests, "model.safetensors": "flipped"},
}


@pytest.mark.parametrize("how", MANIFESTS)
def test_a_manifest_that_is_none_is_passed_over(stage, how):
    path = stage / "step_000002" / "manifest.json"
    path.write_text(json.dumps(MANIFESTS[how](json.loads(path.read_text()))))
    assert checkpoint.latest(stage).step == 1


def test_a_whole_checkpoint_in_the_place_of_another_is_not_taken_for_it(stage, tmp_path):
    shutil.rmtree(stage / "step_000002")
    shutil.copytree(stage / "step_000001", stage / "step_000002")
    assert checkpoint.latest(stage).folder.name == "step_000001"
    shutil.copytree(stage / "step_000001", tmp_path / "runs" / "a" / "sft" / "step_000001")
    assert checkpoint.latest(tmp_path / "runs" / "a" / "sft") is None


def test_older_versions_did_not_write_down_the_parts(stage):
    newest = stage / "step_000002"
    meta = json.loads((newest / "meta.json").read_text())
    del meta["parts"]
    rewritten(newest, "meta.json", json.dumps(meta).encode())
    assert checkpoint.latest(stage).step == 2
    (newest / "loader.safetensors").unlink()
    assert checkpoint.latest(stage).step == 1


def test_a_file_is_hashed_once_and_again_when_it_has_changed(stage, monkeypatch):
    hashed, plain = [], complete.sha256
    monkeypatch.setattr(complete, "sha256", lambda path: hashed.append(path.name) or plain(path))
    monkeypatch.setattr(complete, "SETTLED", -(1 << 62))
    for _ in range(3):
        assert checkpoint.latest(stage).step == 2 and not checkpoint.finished(stage)
    assert sorted(hashed) == ["loader.safetensors", "model.safetensors", "optimizer.safetensors"]
    weights = stage / "step_000002" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert checkpoint.latest(stage).step == 1


def test_a_file_that_may_still_change_unseen_is_hashed_again(stage, monkeypatch):
    """As long as its time is that of the clock, another write may leave the same time."""
    later = time.time_ns() + 10**12
    monkeypatch.setattr(complete, "_status", lambda path: (1, 1, 1, later, later))
    assert checkpoint.latest(stage).step == 2
    weights = stage / "step_000002" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert checkpoint.latest(stage).step == 1


def test_two_complete_ones_are_kept_whatever_is_damaged_beside_them(stage):
    (stage / "step_000002" / "model.safetensors").unlink()
    (stage / "step_000009").write_text("a file")
    save(stage, 3)
    assert sorted(path.name for path in stage.iterdir()) == [
        "step_000001",
        "step_000002",
        "step_000003",
        "step_000009",
    ]
    save(stage, 9)  # in the place of the file
    assert sorted(path.name for path in stage.iterdir()) == ["step_000003", "step_000009"]
    assert checkpoint.latest(stage).step == 9


def test_what_cannot_be_read_now_is_not_removed(stage, monkeypatch):
    aside = (stage / "step_000002").rename(stage / ".tmp-step_000002-1")
    plain = os.stat

    def refused(path, *args, **more):
        if str(path).startswith(f"{aside}/"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return plain(path, *args, **more)

    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", refused)
        checkpoint.settle(stage)
    assert aside.is_dir()
    checkpoint.settle(stage)
    assert checkpoint.latest(stage).folder == stage / "step_000002"


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE])
def test_a_process_out_of_files_finds_nothing_damaged(stage, monkeypatch, code):
    def full(path):
        raise OSError(code, "Too many open files", str(path))

    monkeypatch.setattr(complete, "sha256", full)
    with pytest.raises(OSError, match="Too many"):
        checkpoint.latest(stage)


def test_foreign_folders_are_nobodys(stage):
    for name in ("step_backup", "step_000010_keep", "step_notes", "step_٣"):
        shutil.copytree(stage / "step_000001", stage / name)
    run = Run.open("a")
    assert run.checkpoint("base", 1).step == 1
    with pytest.raises(UserError, match="kept are 1, 2$"):
        run.checkpoint("base", 10)
    assert checkpoint.latest(stage).step == 2 and list(checkpoint.steps(stage)) == [1, 2]


def test_a_stage_whose_checkpoints_are_all_damaged_is_not_begun_again(stage):
    for path in stage.iterdir():
        (path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="no checkpoint in .* can be used .*step_000002.*--fresh"):
        checkpoint.to_resume(stage)
    assert checkpoint.to_resume(stage.with_name("mid")) is None


def test_one_that_goes_bad_after_the_check_is_one_sentence(stage):
    found = checkpoint.latest(stage)
    (found.folder / "model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="model.safetensors cannot be read"):
        found.tensors("model")
    shutil.rmtree(found.folder)
    with pytest.raises(UserError, match="cannot be read"):
        found.tensors("model")
    with pytest.raises(UserError, match="any more"):
        _ = found.fingerprint


def test_a_finished_stage_whose_last_checkpoint_is_damaged(stage, capsys):
    """Its successor is told what is the matter, a chat takes the older one, and nobody says that it is finished."""
    run = Run.open("a")
    save(stage, 3, finished=True)
    (stage / "summary.json").write_text("{}")
    assert run.checkpoint("base").step == 3 and checkpoint.finished(stage)
    (stage / "step_000003" / "optimizer.safetensors").write_bytes(b"")
    assert not checkpoint.finished(stage)
    with pytest.raises(UserError, match="step_000003 is not used: optimizer.*base_train.* goes on from step 2"):
        run.checkpoint("base")
    assert run.checkpoint("base", older=True).step == 2 == run.checkpoint(older=True).step
    assert "step 2 is used instead" in capsys.readouterr().err
    shutil.rmtree(stage / "step_000003")
    with pytest.raises(UserError, match="its last checkpoint is gone; .* from step 2"):
        run.checkpoint("base")


def test_a_checkpoint_of_weights_alone_needs_no_more(tmp_path):
    plain = {key: META[key] for key in ("stage", "tokenizer", "finished")}
    checkpoint.save(tmp_path, dict(plain, step=1), tiny.model(), {})
    assert checkpoint.latest(tmp_path).step == 1


@pytest.mark.parametrize("free", [0, 1])
def test_tensors_that_cannot_be_opened_are_one_sentence(stage, free):
    """safetensors opens a file, and torch opens it again: each has an error of its own for too many open files."""
    found = checkpoint.latest(stage)
    there = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + free, there[1]))
    try:
        with pytest.raises(UserError, match="model.safetensors cannot be read .*[Tt]oo many open files"):
            found.tensors("model")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, there)
