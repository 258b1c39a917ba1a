"""Data that children make is the data that `load` makes: in order, resumed, and when a child is gone."""

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from nanochat.data import ahead, loader, microworld
from nanochat.data.loader import LoaderState, Rows
from nanochat.data.source import Position, read
from nanochat.processes import descendants

TOKENIZER = tiny.tokenizer()
UNITS = [5, 0, 99, 5, 17]


@pytest.mark.parametrize(
    "source",
    [microworld.Documents(draw=7), microworld.Conversations("mid", world=3), microworld.Conversations("sft")],
    ids=["documents", "mid", "sft"],
)
def test_children_make_what_load_makes_and_end_with_their_reader(source):
    wanted = [source.load("train", unit) for unit in UNITS]
    before = descendants(os.getpid())
    assert list(ahead.loaded(source, "train", UNITS, 2)) == wanted
    stream = ahead.loaded(source, "train", itertools.count(), 2)
    next(stream)
    assert len(descendants(os.getpid()) - before) == 2
    stream.close()
    assert not descendants(os.getpid()) - before  # what others left may have ended meanwhile


def test_the_units_of_a_dead_child_are_made_here():
    source = microworld.Documents()
    before = descendants(os.getpid())
    stream = ahead.loaded(source, "train", range(9), 2)
    found = [next(stream)]
    for pid in descendants(os.getpid()) - before:
        os.kill(pid, signal.SIGKILL)
    assert [*found, *stream] == [source.load("train", unit) for unit in range(9)]


def test_a_gpus_batches_and_where_they_resume_are_the_same(monkeypatch):
    """Rows that are to be pinned are a GPU's: asked for children, they get them, and nothing else changes."""
    source, encode, asked = microworld.Documents(), loader.document_encoder(TOKENIZER), []
    plain = loader._batch
    monkeypatch.setattr(loader, "_batch", lambda own, rows, state: plain(own, Rows(rows.B, rows.T), state))  # unpinned
    monkeypatch.setattr(ahead, "children", lambda world: asked.append(world) or 2)

    def first_batches(count, rows, state=None):
        return list(itertools.islice(loader.batches(source, "train", encode, rows, state), count))

    usual, gpu = first_batches(40, Rows(4, 64)), first_batches(40, Rows(4, 64, pin=True))
    assert asked == [1]
    state = LoaderState.restore(gpu[19].state.metadata(), gpu[19].state.tensors(), 1 << 16)
    again = gpu[:20] + first_batches(20, Rows(4, 64, pin=True), state)
    for found in (gpu, again):
        assert all((a.inputs == b.inputs).all() for a, b in zip(usual, found, strict=True))
        assert [batch.state.position for batch in found] == [batch.state.position for batch in usual]
    assert next(read(source, "train", Position(0, 3), 2))[1] == Position(0, 4)


@pytest.mark.parametrize("cores, world, count", [(2, 1, 0), (3, 1, 1), (16, 1, 4), (16, 8, 0), (64, 8, 4)])
def test_few_cores_are_left_to_training(monkeypatch, cores, world, count):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(cores), raising=False)
    assert ahead.children(world) == count


def test_a_child_needs_no_torch():
    """It starts in a tenth of a second, and takes little memory."""
    code = "import sys, nanochat.data.ahead; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent).returncode == 0


def test_a_child_finds_what_the_user_has_put_on_the_path(monkeypatch, tmp_path):
    """A cluster's modules put numpy there."""
    (tmp_path / "sitecustomize.py").write_text("import os; open(os.environ['SEEN'], 'w').close()")
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    list(ahead.loaded(microworld.Documents(), "train", [0], 1))
    assert (tmp_path / "seen").exists()
