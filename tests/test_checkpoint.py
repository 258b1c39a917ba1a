import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch

from nanochat import checkpoint
from nanochat.errors import UserError

META = dict(stage="base", tokenizer="t", finished=False)


def save(folder, step, seed=0, **meta):
    model = tiny.model(seed=seed)
    loader = dict(lengths=torch.zeros(0))
    return checkpoint.save(folder, dict(META, step=step, **meta), model, dict(optimizer={}, loader=loader)), model


def test_what_is_saved_comes_back(tmp_path):
    _, model = save(tmp_path, 3)
    found = checkpoint.latest(tmp_path)
    assert found.step == 3 and not found.finished and found.config == model.config
    again = found.model("cpu", torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    ids = torch.arange(20)[None]
    assert torch.equal(model(ids), again(ids))


def test_only_the_newest_are_kept(tmp_path):
    for step in range(5):
        save(tmp_path, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000003", "step_000004"]


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


SAVER = """
import sys; sys.path[:0] = [{root!r}, {tests!r}]
import test_checkpoint as t, pathlib, torch
torch.set_num_threads(1)
for step in range(1, 10**6):
    t.save(pathlib.Path(sys.argv[1]), step, seed=0)
    print(step, flush=True)
"""


def kill_while_saving(tmp_path, trials):
    """Kills a process that saves again and again, at different moments; what is left must always be complete."""
    tests = Path(__file__).parent
    code = SAVER.format(root=str(tests.parent), tests=str(tests))
    done = 0
    process = None
    for trial in range(trials):
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
        process.stdout.readline()  # it saves now
        time.sleep(0.002 * (trial % 10))
        process.send_signal(signal.SIGKILL)
        process.wait()
        found = checkpoint.latest(tmp_path)
        assert found is not None and checkpoint.damage(found.folder) is None
        json.loads((found.folder / "meta.json").read_text())
        done += 1
    assert done == trials


def test_killed_while_saving(tmp_path):
    kill_while_saving(tmp_path, 3)


@pytest.mark.slow
def test_killed_while_saving_fifty_times(tmp_path):
    kill_while_saving(tmp_path, 50)


def test_leftovers_of_a_killed_save_are_cleared(tmp_path):
    (tmp_path / f".tmp-step_000001-{os.getpid()}9").mkdir(parents=True)
    save(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step_000002"]
