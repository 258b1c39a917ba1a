"""Forward and backward of a micro-batch on an NVIDIA GPU: captured once as two CUDA graphs, then replayed.

They are a thousand launches and more, each of which costs the host some ten microseconds: for a small model longer than
a fast GPU needs for the work. Replayed, they cost two launches. They are two graphs because the loss is asked for
between them (nanochat/ranks.py).

A graph reads and writes where it did when it was captured. Parameters and fp8's histories stay where they are, and so
do gradients (MuonAdamW.keep_gradients); a batch is copied to where the graph reads it. Its memory, that of a whole
micro-batch, is nobody else's: before something else is done than a step, `drop` gives it back, and the next step
captures anew, which takes about as long as launching it.

Source: torch.cuda.make_graphed_callables, whose gradients are returned and not added where they are kept.
"""

import gc
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanochat.capture import captured, empty_cache
from nanochat.optim import MuonAdamW

PLAIN = 2  # micro-batches run as they are, before a capture: kernels are probed and compiled in them


@dataclass
class Graphs:
    inputs: Tensor  # (B, T), as are targets: where the graph reads them
    targets: Tensor
    grad: Tensor  # 0-d: what backward starts from
    loss: Tensor  # 0-d: there until the next replay
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph


class Replayed:
    """What the training loop calls for a loss, in the model's place; `backward` of that loss replays too.

    wanted: asked at every call, whether to replay. `problem` says why nothing is replayed although it is wanted.
    """

    def __init__(self, model: Callable[..., Tensor], optimizer: MuonAdamW, device: torch.device, wanted: Callable):
        self.model, self.optimizer, self.device, self.wanted = model, optimizer, device, wanted
        self.problem = ""
        self._calls = 0
        self._graphs: Graphs | None = None
        self._anchor = torch.zeros((), device=device, requires_grad=True)  # or autograd would see nothing to do

    def __call__(self, inputs: Tensor, targets: Tensor, loss_reduction: str) -> Tensor:
        """The loss, 0-d, of inputs and targets (B, T); shapes and reduction are those of all calls."""
        self._calls += 1
        if self.wanted() and not self.problem and self._calls > PLAIN:
            if self._graphs is None:
                self._graphs = self._captured(inputs.clone(), targets.clone(), loss_reduction)
            if self._graphs is None:
                empty_cache()  # only now: the exception held what was captured
            else:
                return _Replay.apply(self._anchor, self._graphs, inputs, targets)
        return self.model(inputs, targets, loss_reduction=loss_reduction)

    def drop(self) -> None:
        """Gives the memory back, as long as no step is taken."""
        if self._graphs is not None:
            self._graphs = None
            torch.cuda.empty_cache()

    def _captured(self, inputs: Tensor, targets: Tensor, loss_reduction: str) -> Graphs | None:
        """None, said aloud once, where it cannot be done."""
        grad = torch.ones((), device=self.device)
        pool = torch.cuda.graph_pool_handle()
        gc.collect()  # a node left of an earlier backward would be used again, on the stream that was current then
        run = lambda: self.model(inputs, targets, loss_reduction=loss_reduction)
        try:
            forward, loss = captured(lambda: run, pool, warm=0)
            backward, _ = captured(lambda: lambda: loss.backward(grad), pool, warm=0)
        except RuntimeError as problem:
            self.problem = str(problem).splitlines()[0]
            warnings.warn(f"training on {self.device} without CUDA graphs: {self.problem}", stacklevel=3)
            self.optimizer.forget_shadows()
            torch.cuda.synchronize()
            return None
        return Graphs(inputs, targets, grad, loss.detach(), forward, backward)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, graphs: Graphs, inputs: Tensor, targets: Tensor) -> Tensor:
        torch._foreach_copy_([graphs.inputs, graphs.targets], [inputs, targets])
        graphs.forward.replay()
        ctx.graphs = graphs
        return graphs.loss.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None, None]:  # type: ignore[override]
        """Gradients are added to where they are kept: none is returned."""
        ctx.graphs.grad.copy_(grad)
        ctx.graphs.backward.replay()
        return None, None, None, None
