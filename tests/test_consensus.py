"""What rank 0 finds is what all use, and the first error is the one that is reported."""

import os
import shutil
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch
import torch.distributed as dist
from test_training import ROOT, SIZES, home, losses, train  # noqa: F401 (home is a fixture)

from nanochat import checkpoint, consensus
from nanochat.consensus import from_first_machine, from_rank_0, same_checkpoint
from nanochat.errors import EXIT_AFTER, UserError
from nanochat.run import Run


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


# ---- what rank 0 finds


@pytest.fixture
def rank_1(monkeypatch):
    """rank_1(found): this process is rank 1 of 2, and rank 0 has found that."""
    sent = []
    monkeypatch.setattr(consensus, "_others", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "broadcast_object_list", lambda objects, src: objects.__setitem__(0, sent[0]))
    return sent.append


def never():
    raise AssertionError("only rank 0 looks")


def saved(folder, value=1.0):
    meta = dict(stage="base", step=3, finished=True, config={}, tokenizer="t")
    return checkpoint.write(folder, meta, dict(model=dict(x=torch.tensor(value))))


def test_other_ranks_take_what_rank_0_found(rank_1, tmp_path):
    found = saved(tmp_path)
    rank_1((found, found.fingerprint))
    assert from_rank_0(never) == (found, found.fingerprint)
    assert same_checkpoint(never) == found


def test_where_there_is_none_there_is_none_for_all(rank_1):
    rank_1((None, ""))
    assert same_checkpoint(never) is None


@pytest.mark.parametrize("before", ["nothing", "another"])
def test_a_machine_waits_until_it_sees_what_rank_0_has_written(rank_1, tmp_path, before):
    """Its view of the shared folder is old: there is nothing yet, or what was there before --fresh."""
    written = saved(tmp_path / "there")
    rank_1((checkpoint.Checkpoint(tmp_path / "here" / "step_000003", written.meta), written.fingerprint))
    if before == "another":
        saved(tmp_path / "here", 2.0)

    def appear():
        time.sleep(0.5)
        shutil.rmtree(tmp_path / "here", ignore_errors=True)
        shutil.copytree(tmp_path / "there", tmp_path / "here")

    thread = threading.Thread(target=appear)
    thread.start()
    assert same_checkpoint(never).tensors("model")["x"] == 1.0
    thread.join()


def test_a_machine_that_never_sees_it_says_so(rank_1, tmp_path, monkeypatch):
    monkeypatch.setattr(consensus, "TO_APPEAR", 0.0)
    rank_1((checkpoint.Checkpoint(tmp_path / "step_000003", {}), "a"))
    with pytest.raises(UserError, match="rank 1 on .* does not see .*step_000003 as rank 0 does"):
        same_checkpoint(never)


def test_the_first_machine_plans_for_all():
    head, texts = f"127.0.0.1:{free_port()}", {}

    def machine(node):
        texts[node] = from_first_machine((lambda: "the plan\udce9") if node == 0 else never, 3, node, head)

    threads = [threading.Thread(target=machine, args=(node,)) for node in (2, 1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {node: "the plan\udce9" for node in range(3)}
    assert from_first_machine(lambda: "alone", 1, 0, "") == "alone"
    for head in (
        "",
        "first",
        "first:",
        ":29500",
        "first:x",
        "first:-1",
        "first:99999",
        "first:\u0663",
        "first:" + "9" * 5000,
    ):
        with pytest.raises(UserError, match="--head is .*wanted the first machine's address:port"):
            from_first_machine(lambda: "two", 2, 0, head)


def test_when_the_first_machine_cannot_plan_the_others_end_too(capfd):
    head, said = f"127.0.0.1:{free_port()}", {}

    def fail():
        raise UserError("no disk")

    def machine(node):
        try:
            from_first_machine(fail if node == 0 else never, 2, node, head)
        except UserError as error:
            said[node] = str(error)

    threads = [threading.Thread(target=machine, args=(node,)) for node in (1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == {0: "no disk", 1: "the first machine could not plan, and says why"}
    assert capfd.readouterr().err == ""


# ---- the first error

FAILING = """
import os, signal, sys, time
import torch, torch.distributed as dist
from nanochat.errors import UserError
from nanochat.flags import run_script
from nanochat.hardware import setup

def main():
    rank = setup("cpu").rank
    dist.barrier()
    if rank == 1:
        BODY
    dist.all_reduce(torch.zeros(3))
    dist.all_reduce(torch.zeros(3))

run_script(main)
"""
TORCHRUN = "-m torch.distributed.run --standalone --nproc_per_node=3 -m failing".split()


@pytest.fixture
def fails(tmp_path):
    """fails(body, *launcher): three ranks, of which rank 1 does something while the others wait; (code, stderr)."""

    def run(body, *launcher):
        (tmp_path / "failing.py").write_text(FAILING.replace("BODY", body))
        environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=f"{tmp_path}:{ROOT}")
        ours = ["-m", "scripts.launch", "--gpus=3", "failing"]
        done = subprocess.run(
            [sys.executable, *(launcher or ours)], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        return done.returncode, done.stderr

    return run


@pytest.mark.slow
def test_the_rank_that_fails_first_is_the_one_that_is_heard(fails):
    code, error = fails("raise ValueError('mine')")
    assert code == 1 and error.count("Traceback") == 1 and error.count("\nValueError: mine\n") == 1, error
    for rank in (0, 2):
        assert f"rank {rank} ends, because another has failed; rank 1: ValueError: mine\n" in error
    assert error.endswith("error: rank 1 of 3 ended with code 1; its own words are above\n")


@pytest.mark.slow
def test_wrong_use_that_one_rank_finds_is_one_sentence(fails):
    code, error = fails("raise UserError('do it otherwise')")
    assert code == 2 and error.count("error: ") == 1 and "error: do it otherwise\n" in error, error
    assert "Traceback" not in error and error.count("ends, because another has failed") == 2


@pytest.mark.slow
def test_what_all_ranks_would_say_is_said_once(fails):
    code, error = fails("pass\n    raise UserError('do it otherwise')")
    assert code == 2 and error == "error: do it otherwise\n"


@pytest.mark.slow
def test_a_rank_that_is_killed_is_named_without_the_others_tracebacks(fails):
    code, error = fails("os.kill(os.getpid(), signal.SIGKILL)")
    assert code == 1 and "rank 1 of 3 ended by SIGKILL" in error and "Traceback" not in error, error
    assert error.count("error: rank") == 2 and "a rank is gone, or cannot be reached: " in error


@pytest.mark.slow
def test_torchrun_repeats_the_first_ranks_words(fails):
    code, error = fails("raise ValueError('mine')", *TORCHRUN)
    assert code == 1, error
    summary = error[error.index("Root Cause") :]
    assert "ValueError: mine" in summary and "rank      : 1 " in summary


@pytest.mark.parametrize("world", [1, 2])
def test_without_other_ranks_nothing_changes(monkeypatch, world):
    """In a process group of one; in one of two whose store is gone, the error is reported too."""
    monkeypatch.setattr(consensus, "_others", lambda: world > 1)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)

    def gone():
        raise RuntimeError("connection reset")

    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", gone)
    assert consensus.report_first(UserError("x")) is None
    assert EXIT_AFTER not in (0, 1, 2, 75)


# ---- several machines

SHORT_OF_MEMORY = """
from nanochat import saving
from nanochat.flags import run_script
from scripts import base_train

saving.available = lambda: 0  # moments are gathered while they are written
run_script(base_train.main)
"""


@pytest.mark.slow
def test_two_machines_of_two_ranks_train_as_one_rank(home, tmp_path):  # noqa: F811
    assert train(home, "a", "base", "--device-type=cpu") == 0
    (tmp_path / "short.py").write_text(SHORT_OF_MEMORY)
    port = free_port()
    machines = [
        subprocess.Popen(
            [
                sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={node}",
                "--nproc-per-node=2", "--master-addr=127.0.0.1", f"--master-port={port}", "-m", "short", "--",
                "--run=b", f"--data={home / 'text.jsonl'}", *SIZES, "--device-batch-size=2", "--device-type=cpu",
            ],
            cwd=ROOT,
            env=dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=f"{tmp_path}:{ROOT}"),
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in range(2)
    ]  # fmt: skip
    for machine in machines:
        error = machine.communicate(timeout=300)[1]
        assert machine.returncode == 0, error[-2000:]
    one, four = (Run.open(name).checkpoint("base") for name in ("a", "b"))
    assert [step for step, _ in losses("b", "base")] == [step for step, _ in losses("a", "base")]
    wanted = [loss for _, loss in losses("a", "base")]
    assert [loss for _, loss in losses("b", "base")] == pytest.approx(wanted, rel=1e-5)
    for part in ("model", "optimizer"):
        wanted, found = one.tensors(part), four.tensors(part)
        assert wanted.keys() == found.keys()
        for key, value in wanted.items():  # AdamW turns the rounding of a scalar's gradient, nearly zero, into steps
            assert found[key].shape == value.shape
            assert value.ndim < 2 or (found[key] - value).norm() <= 1e-2 * value.norm(), (part, key)
