"""What the ranks of a training run tell each other beside gradients, without making a GPU wait; and how they part."""

import threading

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat.hardware import Hardware


class Shared:
    """A step's loss and whether to stop, summed over the ranks: asked for early and read late, so that no GPU waits.

    The host goes on queueing work for the GPU meanwhile; were the loss asked for after the backward, the GPU would have
    nothing to do until the host has read it and queued the optimizer. In float16 it has nothing to do all the same:
    torch's GradScaler reads after the backward whether a gradient overflowed.
    """

    def __init__(self, loss: Tensor, stop: bool, world: int):
        self._values = torch.stack((loss, torch.full_like(loss, float(stop))))
        self._arrived = None
        if world > 1:
            dist.all_reduce(self._values)
        if loss.is_cuda:
            device, self._values = self._values, torch.empty(2, pin_memory=True)
            self._values.copy_(device, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> tuple[float, float]:
        """(sum of the ranks' losses, how many of them were told to stop)."""
        if self._arrived is not None:
            self._arrived.synchronize()
        loss, told = self._values.tolist()
        return loss, told


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
