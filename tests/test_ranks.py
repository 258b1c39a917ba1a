"""What ranks tell each other, and when the loop asks."""

import os
import signal
import socket
import subprocess
import sys
import threading
import types
from datetime import timedelta

import pytest
import standins
import test_launch
import tiny
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_training import ROOT, SIZES, home  # noqa: F401 (home is a fixture)

from nanochat import checkpoint, ranks, stages, step, trainer
from nanochat.data.loader import Batch
from nanochat.errors import UserError
from nanochat.flags import run_script
from nanochat.hardware import setup
from nanochat.log import read_log
from nanochat.ranks import Shared, any_rank
from nanochat.recipe import Schedule
from nanochat.run import Run


def rank_of_two(rank, port, folder):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    hardware, found = types.SimpleNamespace(world=2, device="cpu"), []
    for stopped in (False, True):
        shared = Shared(torch.tensor(1.5 + rank), 10 + rank, stopped and rank == 1, 2)
        found.append((shared.read(), any_rank(stopped and rank == 1, hardware)))
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()  # nobody hangs up while another still talks
    os._exit(0)  # gloo's threads sometimes abort a process that ends the ordinary way


@pytest.mark.slow
def test_two_ranks_know_the_same(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(rank_of_two, (port, tmp_path), nprocs=2)
    for rank in (0, 1):
        assert torch.load(tmp_path / f"{rank}.pt") == [((4.0, 21, 0.0), False), ((4.0, 21, 1.0), True)]


@pytest.mark.parametrize("local_rank", [0, 1])
def test_a_machines_first_rank_makes_it_alone(local_rank):
    """What it downloads, the others find in the cache."""
    order = []
    hardware = types.SimpleNamespace(local_rank=local_rank, barrier=lambda: order.append("barrier"))
    assert ranks.first_alone(lambda: order.append("made") or "own", hardware) == "own"
    assert order.index("made") == local_rank and order.count("barrier") == 2 and len(order) == 3


@pytest.mark.parametrize("other", [("abc", 9, "hub"), ("abd", 10, "hub")])
def test_ranks_with_other_data_or_steps_do_not_train(monkeypatch, other):
    """Each would take its share of other rows, and wait for the others at its own end."""
    settings = types.SimpleNamespace(num_iterations=10)
    source, hardware = types.SimpleNamespace(name="/here", fingerprint="abc"), types.SimpleNamespace(world=3)
    setup = types.SimpleNamespace(name="mid", settings=settings, source=source, hardware=hardware)
    monkeypatch.setattr(stages, "gathered", lambda own, world: [own, own, ("abc", 10, "/mounted/elsewhere")])
    stages._same_everywhere(setup)
    monkeypatch.setattr(stages, "gathered", lambda own, world: [own, own, other])
    with pytest.raises(UserError, match=f"mid: rank 2 has hub, {other[1]} steps, and rank 0 /here, 10 steps"):
        stages._same_everywhere(setup)


@pytest.mark.parametrize("stop", [False, True])
def test_the_loss_is_asked_for_before_the_last_backward_and_read_after_it(monkeypatch, stop):
    order = []

    class Noted(Shared):
        def __init__(self, loss, *rest):
            order.append("asked")
            super().__init__(loss, *rest)

        def read(self):
            order.append("read")
            return super().read()

    monkeypatch.setattr(step, "Shared", Noted)
    model = tiny.model()
    ids = torch.randint(300, (3, 2, 9), generator=torch.Generator().manual_seed(0))
    losses = [model(rows[:, :-1], rows[:, 1:]).item() for rows in ids]
    model.lm_head.weight.register_hook(lambda grad: order.append("backward"))
    optimizer = model.setup_optimizer()
    stage = types.SimpleNamespace(
        state=trainer.State(), schedule=Schedule(10, 0, 0.0), optimizer=optimizer, scaler=None,
        hardware=setup("cpu"), model=model, settings=trainer.Settings(10, 2, 8, 48), spike_guard=True,
    )  # fmt: skip
    batches = (Batch(rows[:, :-1], rows[:, 1:], None) for rows in ids)

    def told_to_stop():
        order.append("told")
        return stop

    outcome = trainer.step(stage, model, batches, 3, told_to_stop)
    assert order == ["backward", "backward", "told", "asked", "backward", "read"]
    assert outcome.loss == pytest.approx(sum(losses) / 3, rel=1e-6) and outcome.stop == stop
    assert optimizer.finish_step() is True


SLOW = """
import os, signal, sys, time
from nanochat import checkpoint, trainer
from nanochat.flags import run_script
from scripts import base_train

write, account = checkpoint.write, trainer._account

def slowly(*args):
    time.sleep(2)
    write(*args)

def stopped(stage, *args):
    account(stage, *args)
    if stage.state.step == 5:  # each rank is, as by a launcher that hands on a signal
        os.kill(os.getpid(), signal.SIGTERM)

checkpoint.write, trainer._account = slowly, stopped
run_script(base_train.main)
"""


@pytest.mark.slow
def test_told_to_stop_on_every_rank_they_stop_at_one_step_and_wait_until_it_is_saved(home, tmp_path):  # noqa: F811
    """A rank that ended earlier would have torchrun tell rank 0 once more, while it writes; that kills it."""
    (tmp_path / "slow.py").write_text(SLOW)
    launch = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
    flags = ["--run=b", f"--data={home / 'text.jsonl'}", *SIZES, "--device-type=cpu"]
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    done = subprocess.run(
        [sys.executable, *launch, tmp_path / "slow.py", "--", *flags], cwd=ROOT, env=environment, capture_output=True,
        text=True,
    )  # fmt: skip
    assert "stopped at step 6, saved" in done.stdout + done.stderr
    assert checkpoint.latest(Run.open("b").stage("base")).step == 6


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_torchrun_told_again_and_again_has_saved_every_step(home, tmp_path, number):  # noqa: F811
    """Thrice within a second, to its process group; it hands them on itself."""
    (tmp_path / "slow.py").write_text(test_launch.SLOW)
    launch = "-m torch.distributed.run --standalone --nproc-per-node=2".split()
    flags = ["--run=b", f"--data={home / 'text.jsonl'}", *SIZES, "--device-type=cpu"]
    flags += ["--num-iterations=100000", "--eval-every=-1"]
    process = subprocess.Popen(
        [sys.executable, *launch, tmp_path / "slow.py", "--", *flags], cwd=ROOT, start_new_session=True, text=True,
        env=dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT)), stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    folder = Run.open("b").stage("base")
    _, error = test_launch.told_thrice(process, folder, os.killpg, number)
    assert checkpoint.latest(folder).step == read_log(folder / "log.jsonl")[-1]["step"] >= 5, error


# ---- how they part


@pytest.fixture
def group():
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    end = dist.destroy_process_group
    yield
    if dist.is_initialized():
        end()


@pytest.mark.parametrize("end", [None, UserError("wrong"), KeyboardInterrupt(), SystemExit(3), ValueError("a bug")])
def test_every_end_of_a_script_ends_the_process_group(group, end):
    def main():
        if end:
            raise end

    with pytest.raises(ValueError if isinstance(end, ValueError) else SystemExit):
        run_script(main)
    assert not dist.is_initialized()


def test_a_group_that_cannot_be_ended_is_not_waited_for(group, monkeypatch):
    never = threading.Event()
    monkeypatch.setattr(dist, "destroy_process_group", never.wait)
    monkeypatch.setattr(ranks, "TO_LEAVE", 0.1)
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)  # or the process could not end, and the launcher would not know

    def fail():
        raise UserError("wrong")

    with pytest.raises(SystemExit):
        run_script(fail)
    ranks.leave()
    never.set()
    assert codes == [2, 0]


def test_ranks_wait_long_for_one_that_compiles_or_saves(monkeypatch):
    standins.gpus(monkeypatch, "H100", "H100")
    asked = []
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **more: asked.append((args, more)))
    for name, value in dict(RANK="1", LOCAL_RANK="1", WORLD_SIZE="2", MASTER_ADDR="first", MASTER_PORT="29500").items():
        monkeypatch.setenv(name, value)
    setup()
    own = torch.device("cuda:1")
    assert asked == [(("nccl",), dict(timeout=timedelta(minutes=30), device_id=own))]


@pytest.mark.parametrize("local_rank", [0, 1])
def test_ranks_compile_all_or_none_and_the_first_of_a_machine_looks_first(monkeypatch, local_rank):
    order = []

    def gather(reasons, own):
        reasons[:] = ["", "no C compiler"]

    monkeypatch.setattr(stages, "can_compile", lambda device: (order.append("looked"), (True, ""))[1])
    monkeypatch.setattr(dist, "all_gather_object", gather)
    hardware = types.SimpleNamespace(
        device=torch.device("cuda"), world=2, local_rank=local_rank, barrier=lambda: order.append("barrier")
    )
    setup = types.SimpleNamespace(compile="auto", hardware=hardware)
    assert stages._compile(setup) == (False, "rank 1: no C compiler")
    assert order == [["looked", "barrier", "barrier"], ["barrier", "looked", "barrier"]][local_rank]
