"""The thread that writes checkpoints, and the memory it writes them from."""

import threading
import types
import weakref

import pytest
import torch
from safetensors.torch import load_file

from nanochat import checkpoint, saving
from nanochat.optim import Moment
from nanochat.saving import Saver

META = dict(stage="base", step=1, finished=False, config={}, tokenizer="t")


def tensors():
    torch.manual_seed(0)
    return dict(a=torch.randn(70, 3), b=torch.randn(5).bfloat16(), n=torch.tensor(3), none=torch.zeros(0, 2))


def save(saver, live, step=1, **fixed):
    size = sum(tensor.nbytes for tensor in live.values())
    saver.save(dict(META, step=step), dict(model=live), fixed, size)


@pytest.fixture
def gate(monkeypatch):
    """Checkpoints are written only once it is set."""
    gate, write = threading.Event(), checkpoint.write
    monkeypatch.setattr(checkpoint, "write", lambda *args: (gate.wait(30), write(*args)))
    yield gate
    gate.set()


def test_what_changes_after_save_is_not_in_the_file(tmp_path, gate):
    saver, live, before = Saver(tmp_path, pinned=False), tensors(), tensors()
    save(saver, live, loader=dict(x=torch.arange(3)))
    for tensor in live.values():
        tensor.zero_()
    assert checkpoint.latest(tmp_path) is None  # it did not wait
    gate.set()
    saver.wait()
    found = checkpoint.latest(tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in found.tensors("model").items())
    assert found.tensors("model").keys() == before.keys()
    assert found.tensors("loader")["x"].tolist() == [0, 1, 2]


def test_where_no_thread_can_be_started_it_is_written_at_once(tmp_path, monkeypatch, capsys):
    def start(thread):
        raise RuntimeError("can't start new thread")

    saver = Saver(tmp_path, pinned=False)
    monkeypatch.setattr(threading.Thread, "start", start)
    save(saver, tensors())
    assert checkpoint.latest(tmp_path).step == 1 and not saver.busy
    assert "no thread can be started" in capsys.readouterr().out
    saver.wait()


def test_a_second_save_waits_for_the_first_and_uses_its_memory(tmp_path, gate):
    saver, live = Saver(tmp_path, pinned=False), tensors()
    save(saver, live)
    kept = {name: tensor.data_ptr() for name, tensor in saver._kept.items()}
    changed = {name: tensor + 1 for name, tensor in live.items()}
    second = threading.Thread(target=save, args=(saver, changed, 2))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    gate.set()
    second.join()
    saver.wait()
    assert kept == {name: tensor.data_ptr() for name, tensor in saver._kept.items()}
    for step, wanted in ((1, live), (2, changed)):
        found = checkpoint.at(tmp_path / f"step_{step:06d}").tensors("model")
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_tensors_larger_than_a_chunk_and_many_small_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "CHUNK", 1000)
    saver = Saver(tmp_path, pinned=False)
    live = {f"{size}": torch.full((size,), size, dtype=torch.float32) for size in (1, 300, 2, 249, 3, 100, 100, 40)}
    save(saver, live)
    saver.wait()
    found = checkpoint.latest(tmp_path).tensors("model")
    assert all(torch.equal(found[name], live[name]) for name in live)
    assert all(tensor.data_ptr() % saving.ALIGNED == 0 for tensor in saver._kept.values())


@pytest.mark.parametrize("how", ["check", "wait", "save"])
def test_what_fails_in_the_thread_is_raised_once_where_somebody_listens(tmp_path, monkeypatch, how, capsys):
    write, failing = checkpoint.write, [True]

    def sometimes(*args):
        if failing.pop():
            raise OSError(5, "Input/output error", "x")
        return write(*args)

    monkeypatch.setattr(checkpoint, "write", sometimes)
    saver, live = Saver(tmp_path, pinned=False), tensors()
    save(saver, live)
    saver._idle.wait()
    with pytest.raises(OSError, match="Input/output"):
        save(saver, live) if how == "save" else getattr(saver, how)()
    failing.append(False)
    save(saver, live)
    saver.wait()
    saver.close()
    assert checkpoint.latest(tmp_path).step == 1 and capsys.readouterr().err == ""
    failing.append(True)
    save(saver, live, step=2)
    saver.close()
    assert capsys.readouterr().err.startswith("warning: the last checkpoint was not written: ")


@pytest.mark.parametrize("spare", [1, -1])
def test_where_memory_is_short_it_saves_at_once_and_says_so_once(tmp_path, monkeypatch, capsys, spare):
    live = tensors()
    size = sum(tensor.nbytes for tensor in live.values())
    monkeypatch.setattr(saving, "available", lambda: int(saving.SPARE * size) + spare)
    saver = Saver(tmp_path, pinned=False)
    threads, write = [], checkpoint.write

    def noted(*args):
        threads.append(threading.current_thread() is threading.main_thread())
        return write(*args)

    monkeypatch.setattr(checkpoint, "write", noted)
    for step in (1, 2):
        save(saver, live, step)
    saver.wait()
    assert threads == [spare < 0] * 2 and bool(saver._kept) == (spare > 0)
    assert capsys.readouterr().out.count("written while training waits") == (spare < 0)
    assert torch.equal(checkpoint.latest(tmp_path).tensors("model")["a"], live["a"])


@pytest.mark.parametrize("room", [True, False])
def test_of_the_moments_of_several_ranks_one_is_gathered_at_a_time(tmp_path, monkeypatch, room):
    """In the order in which the other ranks hand over their shares, whether or not a thread writes them."""
    monkeypatch.setattr(saving, "available", lambda: 1 << 40 if room else 0)
    order, alive = [], []

    def whole(moment):
        assert not [one for one in alive if one() is not None]
        gathered = torch.cat([moment.mine, moment.mine + 1])[: moment.rows]
        order.append(names[id(moment.mine)])
        alive.append(weakref.ref(gathered))
        return gathered

    monkeypatch.setattr(Moment, "whole", whole)
    moments = {f"{i}.0.exp_avg": Moment(torch.full((2, 3), float(i)), 2, 4 - i % 2) for i in range(5)}
    names = {id(moment.mine): name for name, moment in moments.items()}
    saver = Saver(tmp_path, pinned=False)
    saver.save(META, dict(optimizer=moments), {}, 1)
    saver.wait()
    assert order == checkpoint.in_order(moments) == list(moments)
    found = load_file(tmp_path / "step_000001" / "optimizer.safetensors")
    assert {name: tuple(value.shape) for name, value in found.items()} == {n: m.shape for n, m in moments.items()}
    assert all(value.flatten()[:6].eq(int(name[0])).all() for name, value in found.items())


def test_available_memory_is_that_of_the_machine_or_of_the_container():
    assert 1 << 20 < saving.available() < 1 << 50


def test_from_a_gpu_copies_are_queued_and_the_thread_waits_for_them(tmp_path, monkeypatch):
    """With stand-ins for pinned memory and events: nothing waits in `save`, nothing is written before the event."""
    order, plain, write = [], torch.empty, checkpoint.write
    arrived = threading.Event()

    class Event:
        def record(self):
            order.append("recorded")

        def synchronize(self):
            arrived.wait(30)
            order.append("arrived")

    def copy(kept, tensor, non_blocking=False):
        order.append(("copy", non_blocking))
        return kept

    def empty(*size, pin_memory=False, **kwargs):
        order.append(("room", pin_memory))
        return plain(*size, **kwargs)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(saving, "torch", types.SimpleNamespace(empty=empty, uint8=torch.uint8, cuda=torch.cuda))
    monkeypatch.setattr(torch.Tensor, "copy_", copy)
    monkeypatch.setattr(checkpoint, "write", lambda *args: (order.append("written"), write(*args)))
    saver = Saver(tmp_path, pinned=True)
    order.clear()
    save(saver, dict(a=torch.zeros(3), b=torch.zeros(4)))
    assert order == [("room", True), ("copy", True), ("copy", True), "recorded"]
    arrived.set()
    saver.wait()
    assert order[4:] == ["arrived", "written"]


def test_where_memory_cannot_be_pinned_it_goes_on_without_and_says_so_once(tmp_path, monkeypatch, capsys):
    """An exception would leave the other ranks in a gather."""
    plain, events = torch.empty, []

    def empty(*size, pin_memory=False, **kwargs):
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory\nmore lines")
        return plain(*size, **kwargs)

    class Event:
        def record(self):
            events.append("recorded")

        def synchronize(self):
            pass

    monkeypatch.setattr(saving, "CHUNK", 10)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(saving, "torch", types.SimpleNamespace(empty=empty, uint8=torch.uint8, cuda=torch.cuda))
    saver, live = Saver(tmp_path, pinned=True), tensors()
    save(saver, live)
    saver.wait()
    assert capsys.readouterr().out.count("no pinned memory for checkpoints (CUDA error: out of memory)") == 1
    assert events == ["recorded"]  # copies are queued all the same
    assert torch.equal(checkpoint.latest(tmp_path).tensors("model")["a"], live["a"])
