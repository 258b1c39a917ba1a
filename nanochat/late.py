"""A few numbers that a device makes, read by the host later, when they are there anyway."""

import torch
from torch import Tensor


class Late:
    """Starts copying a small tensor to the host; `read` waits only until that copy is done."""

    def __init__(self, values: Tensor):
        self._values = values
        self._arrived = None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> list[float]:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values.flatten().tolist()
