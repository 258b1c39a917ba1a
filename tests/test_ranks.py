"""What ranks tell each other, and when the loop asks."""

import os
import socket
import types

import pytest
import tiny
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from nanochat import trainer
from nanochat.data.loader import Batch
from nanochat.hardware import setup
from nanochat.ranks import Shared, any_rank
from nanochat.recipe import Schedule


def rank_of_two(rank, port, folder):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    hardware, found = types.SimpleNamespace(world=2, device="cpu"), []
    for told in (False, True):
        shared = Shared(torch.tensor(1.5 + rank), told and rank == 1, 2)
        found.append((shared.read(), any_rank(told and rank == 1, hardware)))
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
        assert torch.load(tmp_path / f"{rank}.pt") == [((4.0, 0.0), False), ((4.0, 1.0), True)]


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

    monkeypatch.setattr(trainer, "Shared", Noted)
    model = tiny.model()
    ids = torch.randint(300, (3, 2, 9), generator=torch.Generator().manual_seed(0))
    losses = [model(rows[:, :-1], rows[:, 1:]).item() for rows in ids]
    model.lm_head.weight.register_hook(lambda grad: order.append("backward"))
    stage = types.SimpleNamespace(
        state=trainer.State(), schedule=Schedule(10, 0, 0.0), optimizer=model.setup_optimizer(), scaler=None,
        hardware=setup("cpu"), model=model,
    )  # fmt: skip
    batches = (Batch(rows[:, :-1], rows[:, 1:], None) for rows in ids)
    loss, ok, told = trainer.step(stage, model, batches, 3, stop)
    assert order == ["backward", "backward", "asked", "backward", "read"]
    assert loss == pytest.approx(sum(losses) / 3, rel=1e-6) and ok and told == stop
