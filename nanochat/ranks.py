"""What the ranks of a training run tell each other beside gradients, without making a GPU wait; and how they part."""

import sys
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat.hardware import Hardware
from nanochat.late import Late
from nanochat.processes import end_at_once

T = TypeVar("T")


class Shared:
    """A step's loss, its targets and whether to stop, summed over the ranks: asked for early and read late.

    The host goes on queueing work for the GPU meanwhile; were the loss asked for after the backward, the GPU would have
    nothing to do until the host has read it and queued the optimizer.
    """

    def __init__(self, loss: Tensor, targets: int, stop: bool, world: int):
        """loss: the sum over this rank's `targets`, 0-d."""
        values = torch.stack((loss, torch.full_like(loss, targets), torch.full_like(loss, stop)))
        if world > 1:
            dist.all_reduce(values)
        self._late = Late(values)

    def read(self) -> tuple[float, int, float]:
        """(sum of the losses, number of targets, how many ranks were told to stop)."""
        loss, targets, stopping = self._late.read()
        return loss, round(targets), stopping


def gathered(value: Any, world: int) -> list[Any]:
    """Every rank's value, in order. Collective where there are several."""
    parts = [value] * world
    if world > 1:
        dist.all_gather_object(parts, value)
    return parts


def first_alone(make: Callable[[], T], hardware: Hardware) -> T:
    """What `make` returns on this rank; a machine's first rank runs it before the others, which find its downloads in a
    cache, and wait for them as long as for anything (PATIENCE in nanochat/world.py). Collective.
    """
    if hardware.local_rank == 0:
        made = make()
    hardware.barrier()
    if hardware.local_rank > 0:
        made = make()
    hardware.barrier()
    return made


def any_rank(flag: bool, hardware: Hardware) -> bool:
    """True on every rank when it is true on one, so that all leave the loop at the same step."""
    if hardware.world == 1:
        return flag
    shared = torch.tensor(float(flag), device=hardware.device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return bool(shared.item())


TO_LEAVE = 10.0  # seconds


def leave() -> None:
    """Ends the process group where there is one. Not for longer than TO_LEAVE: another rank may be gone already."""
    if dist.is_available() and dist.is_initialized():
        thread = threading.Thread(target=dist.destroy_process_group, daemon=True)
        thread.start()
        thread.join(TO_LEAVE)
        if thread.is_alive():  # in a library, where it would keep Python from ending, and the launcher from knowing
            end_at_once(sys.exc_info()[1])
