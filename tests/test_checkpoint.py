import errno
import hashlib
import json
import os
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

from nanochat import checkpoint, trainer
from nanochat.data.loader import LoaderState
from nanochat.data.packing import Document
from nanochat.data.source import Position
from nanochat.errors import UserError
from nanochat.files import sha256

RESUMED = dict(data="d", plan={}, dtype="torch.float32", rates={}, settings={}, state={}, loader={})
META = dict(stage="base", tokenizer="t", finished=False, **RESUMED)


def save(folder, step, seed=0, **meta):
    model = tiny.model(seed=seed)
    loader = dict(lengths=torch.zeros(0))
    return checkpoint.save(folder, {**META, "step": step, **meta}, model, dict(optimizer={}, loader=loader)), model


def test_what_is_saved_comes_back(tmp_path):
    _, model = save(tmp_path, 3)
    found = checkpoint.latest(tmp_path)
    assert found.step == 3 and not found.finished and found.config == model.config
    again = found.model("cpu", torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    ids = torch.arange(20)[None]
    assert torch.equal(model(ids), again(ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_are_read_into_another_dtype_as_they_are_cast_to_it(tmp_path, dtype):
    model = tiny.model()
    saved = checkpoint.save(tmp_path, dict(META, step=1), model, {})
    found, wanted = saved.model("cpu", dtype, dtype), saved.model("cpu", dtype).to(dtype)
    assert next(iter(wanted.parameters())).dtype == found.dtype == dtype
    for mine, own in zip([*found.parameters(), *found.buffers()], [*wanted.parameters(), *wanted.buffers()]):
        assert torch.equal(mine.to(dtype), own)  # float16 has its tables in float32
    assert all(linear.weight.dtype == dtype for linear in found.modules() if isinstance(linear, torch.nn.Linear))


def test_only_the_newest_are_kept(tmp_path):
    for step in range(5):
        save(tmp_path, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000003", "step_000004"]


def test_steps_are_numbers_and_other_folders_nobodys(tmp_path):
    for name in ("step_backup", "step_000010_keep", "step_000010-5"):
        (tmp_path / name).mkdir()
    for step in (999_999, 1_000_000, 1_000_001):
        save(tmp_path, step)
    assert checkpoint.latest(tmp_path).step == 1_000_001
    ours = ["step_1000000", "step_1000001"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [*ours, "step_000010-5", "step_000010_keep", "step_backup"]
    )


def test_the_manifest_has_the_digest_of_every_other_file(tmp_path):
    made, _ = save(tmp_path, 1)
    digests = json.loads((made.folder / "manifest.json").read_text())
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in made.folder.iterdir()}
    files.pop("manifest.json")
    assert digests == files and len(files) == 4


def test_the_library_reads_what_was_written(tmp_path):
    torch.manual_seed(0)
    tensors = {
        str(dtype): (torch.randn(3, 5) * 100).to(dtype)
        for dtype in (torch.uint8, torch.bool, torch.bfloat16, torch.float16, torch.int32, torch.float32, torch.int64)
    }
    tensors.update(
        scalar=torch.tensor(7),
        empty=torch.zeros(0, 4),
        turned=torch.arange(6.0).view(2, 3).T,
        part=torch.arange(9)[2:5],
    )
    tensors.update(LoaderState(Position(), []).tensors(), one=torch.ones(1).as_strided((1,), (0,)))
    tensors["ünïcode"] = torch.nn.Parameter(torch.randn(1000, 33))
    for size in (1 << 24, 1000):  # in one chunk, in many
        checkpoint.CHUNK, before = size, checkpoint.CHUNK
        try:
            digest = checkpoint.write_tensors(tmp_path / "x.safetensors", tensors)
        finally:
            checkpoint.CHUNK = before
        assert digest == sha256(tmp_path / "x.safetensors")
        found = load_file(tmp_path / "x.safetensors")
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
            assert torch.equal(found[name], tensor), name
    checkpoint.write_tensors(tmp_path / "none.safetensors", {})
    assert load_file(tmp_path / "none.safetensors") == {}


def damages(path: Path):
    content = path.read_bytes()
    middle = len(content) // 2
    yield "bit flip", lambda: path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    yield "truncation", lambda: path.write_bytes(content[:-1])
    yield "deletion", path.unlink


def test_any_damage_to_any_file_is_named_and_the_older_checkpoint_used(tmp_path, capsys):
    tried = 0
    for name in ("model.safetensors", "optimizer.safetensors", "loader.safetensors", "meta.json", "manifest.json"):
        for kind in range(3):
            save(tmp_path, 1)
            made, _ = save(tmp_path, 2)
            label, damage = list(damages(made.folder / name))[kind]
            damage()
            assert checkpoint.latest(tmp_path).step == 1, (name, label)
            assert "step_000002 is not used" in capsys.readouterr().err
            tried += 1
    assert tried == 15


def test_a_full_disk_leaves_the_older_checkpoint_and_no_trace(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device", "x")

    monkeypatch.setattr(checkpoint, "write_atomically", full)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step_000001"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 100 KB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_disk_that_is_really_full(small_disk):
    checkpoint.save(small_disk, dict(META, step=1), tiny.model(n_embd=8, n_head=2), {})
    with pytest.raises(OSError) as caught:
        save(small_disk, 2)
    assert caught.value.errno == errno.ENOSPC
    assert [p.name for p in small_disk.iterdir()] == ["step_000001"]


def test_another_tokenizer_is_refused(tmp_path):
    made, _ = save(tmp_path, 1)
    with pytest.raises(UserError, match="another tokenizer"):
        made.check_tokenizer(tiny.tokenizer())


def test_nothing_complete_is_removed_before_what_replaces_it_is_there_for_good(tmp_path, monkeypatch):
    for step in (1, 2):
        save(tmp_path, step)
    order = []

    def noted(owner, name):
        plain = getattr(owner, name)
        what = lambda args: [Path(arg).name.split(f"-{os.getpid()}")[0] for arg in args if isinstance(arg, Path)]
        monkeypatch.setattr(
            owner, name, lambda *args, **more: (order.append((name, *what(args))), plain(*args, **more))
        )

    for owner, name in ((os, "rename"), (shutil, "rmtree"), (checkpoint, "sync_folder")):
        noted(owner, name)
    save(tmp_path, 2, finished=True)
    assert order == [
        ("rename", "step_000002", ".old-step_000002"),
        ("rename", ".tmp-step_000002", "step_000002"),
        ("sync_folder", tmp_path.name),
        ("rmtree", ".old-step_000002"),
    ]
    order.clear()
    save(tmp_path, 3)
    assert order == [
        ("rename", ".tmp-step_000003", "step_000003"),
        ("sync_folder", tmp_path.name),
        ("rmtree", "step_000001"),
    ]


@pytest.mark.parametrize("place", ["free", "taken", "damaged"])
@pytest.mark.parametrize("state", [".tmp-", ".old-"])
def test_a_complete_one_under_another_name_is_used_and_put_in_its_place(tmp_path, place, state):
    """Its process was killed before it could do that. A temporary one is the newer, one moved aside the older."""
    made, _ = save(tmp_path, 2, note="under another name")
    aside = made.folder.rename(tmp_path / f"{state}step_000002-{os.getpid()}")
    if place != "free":
        shutil.copytree(aside, made.folder)
        meta = (made.folder / "meta.json").read_text().replace("under another name", "in its place")
        (made.folder / "meta.json").write_text(meta)
        digests = json.loads((made.folder / "manifest.json").read_text())
        if place == "taken":
            digests["meta.json"] = hashlib.sha256(meta.encode()).hexdigest()
        (made.folder / "manifest.json").write_text(json.dumps(digests))
    wanted = "in its place" if place == "taken" and state == ".old-" else "under another name"
    assert checkpoint.latest(tmp_path).meta["note"] == wanted
    save(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000002", "step_000003"]
    assert checkpoint.at(made.folder).meta["note"] == wanted


def test_leftovers_of_a_killed_save_are_cleared(tmp_path):
    (tmp_path / f".tmp-step_000001-{os.getpid()}9").mkdir(parents=True)
    save(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step_000002"]


# ---- whole, but not as this code writes it


def test_the_weights_of_another_model_are_refused_in_a_sentence(tmp_path):
    model = tiny.model()
    weights, sound = dict(model.state_dict()), asdict(model.config)
    cases = [
        (weights, dict(sound, smear=False), "smear_.* is too many"),
        (weights, dict(sound, n_layer=3), "is missing"),
        (weights, dict(sound, n_embd=64), r"is torch.float32 \(.*\) and not torch.float32 \("),
        ({name: one for name, one in weights.items() if name != "lm_head.weight"}, sound, "lm_head.weight is missing"),
        (dict(weights, new=torch.zeros(1)), sound, "new is too many"),
        ({**weights, "lm_head.weight": weights["lm_head.weight"].int()}, sound, "lm_head.weight is torch.int32"),
    ]
    for step, (tensors, config, said) in enumerate(cases):
        made = checkpoint.write(tmp_path, dict(META, step=step, config=config), dict(model=tensors))
        with pytest.raises(UserError, match=rf"step_.* was saved by another version of this code \(.*{said}.*--fresh"):
            made.model("cpu", torch.float32)


@pytest.mark.parametrize("change", [dict(softcap="x"), dict(n_layer=2.0), dict(smear=1), dict(rope_base=None)])
def test_a_config_of_other_types_is_no_models(tmp_path, change):
    config = dict(asdict(tiny.model().config), **change)
    made = checkpoint.write(tmp_path, dict(META, step=1, config=config), dict(model={}))
    with pytest.raises(UserError, match=f"cannot be used: the config in meta.json is no model's .{list(change)[0]} is"):
        checkpoint.at(made.folder)


def without(content, *keys):
    return {key: value for key, value in content.items() if key not in keys}


WAITING = LoaderState(Position(0, 1), [Document(np.array([1, 2, 3], np.int32))], 5)
OTHERS = {  # what a checkpoint to go on from may have otherwise: (part, what is in its place, what is said)
    "no torch_rng": ("loader", lambda found: without(found, "torch_rng"), "it has no 'torch_rng'"),
    "tokens beyond": ("loader", lambda found: dict(found, tokens=found["tokens"] + 400), "vocabulary of 300"),
    "other lengths": ("loader", lambda found: dict(found, lengths=found["lengths"] + 1), "lengths of its waiting"),
    "another generator": ("loader", lambda found: dict(found, torch_rng=torch.zeros(3)), "RNG state|ByteTensor"),
    "a moment less": ("optimizer", lambda found: without(found, "0.0.exp_avg"), "0.0.exp_avg is missing"),
    "another shape": ("optimizer", lambda found: {**found, "0.0.exp_avg": torch.zeros(3)}, r"0.0.exp_avg is .* \(3,\)"),
    "a moment more": ("optimizer", lambda found: dict(found, new=torch.zeros(3)), "new belongs to no parameter"),
    "no seen": ("meta", lambda found: dict(found, loader=without(found["loader"], "seen")), "argument: 'seen'"),
    "recent": ("meta", lambda found: dict(found, state=dict(found["state"], recent=None)), "recent is None"),
    "seconds": ("meta", lambda found: dict(found, state=dict(found["state"], seconds="x")), "seconds is 'x'"),
    "epoch": (
        "meta",
        lambda found: dict(found, loader=dict(found["loader"], position=dict(epoch="1"))),
        "epoch is '1'",
    ),
}


@pytest.mark.parametrize("name", [*OTHERS, "as it is"])
def test_a_stage_does_not_go_on_from_what_another_version_has_saved(tmp_path, name):
    model = tiny.model()
    optimizer = model.setup_optimizer(weight_decay=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = trainer.State(step=1, seconds=2.0, recent=[1.0], loader=WAITING)
    saved = dict(
        meta=dict(META, step=1, state=state.numbers(), loader=WAITING.metadata(), config=asdict(model.config)),
        optimizer=optimizer.full_state(),
        loader=dict(WAITING.tensors(), torch_rng=torch.get_rng_state()),
        model=dict(model.state_dict()),
    )
    if name in OTHERS:
        part, change, said = OTHERS[name]
        saved[part] = change(saved[part])
    checkpoint.write(tmp_path, saved.pop("meta"), saved)
    stage = SimpleNamespace(folder=tmp_path, model=model, optimizer=optimizer, scaler=None, meta=dict(META))
    stage.hardware = SimpleNamespace(is_main=True)
    if name not in OTHERS:
        assert trainer.resume(stage).step == stage.state.step == 1 and stage.state.loader.seen == 5
        return
    with pytest.raises(
        UserError, match=rf"step_000001 was saved by another version of this code \(.*({said}).*--fresh"
    ):
        trainer.resume(stage)


def test_a_full_memory_is_no_version():
    with pytest.raises(RuntimeError, match="CUDA out of memory"), checkpoint.same_version(Path("there")):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
