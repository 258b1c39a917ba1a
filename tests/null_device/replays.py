"""Run on the computing null device: a replayed micro-batch gives the losses and gradients of one that is launched."""

import sys
import warnings
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent.parent)]

import tiny  # noqa: E402

from nanochat import capture, replay  # noqa: E402

warnings.filterwarnings("error", "training on .* without CUDA graphs")
BATCHES = torch.randint(300, (6, 4, 33), generator=torch.Generator().manual_seed(0)).cuda()


STREAMS = []  # of captures


def stream_of(card):
    STREAMS.append(capture_stream(card))
    return STREAMS[-1]


capture_stream, capture.stream_of = capture.stream_of, stream_of


def train(dtype: torch.dtype, fp8: str, replayed: bool, waiting: str = "") -> list[torch.Tensor]:
    """Losses, gradients, weights and histories of three steps of two micro-batches."""
    model = tiny.model().cuda()
    model.set_dtype(dtype)
    if fp8:
        model.set_fp8(fp8)
    optimizer = model.setup_optimizer()
    model.keep_gradients(optimizer)
    if not fp8 and dtype != torch.float32:
        model.keep_shadows(optimizer)
    call = lambda *args, **how: Waiting.apply(model(*args, **how), waiting)
    run = replay.Replayed(call if waiting else model, optimizer, BATCHES.device, lambda: replayed)
    found = []
    for step in BATCHES.view(3, 2, 4, 33):
        for ids in step:
            loss = run(ids[:, :-1], ids[:, 1:], "sum")
            found.append(loss.detach().clone())
            (loss * 0.125).backward()
            del loss
        found += [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        optimizer.zero_grad()
        run.drop()
    return [*found, *model.state_dict().values(), *model.histories().values()]


class Waiting(torch.autograd.Function):
    """In forward or in backward it waits for the GPU, which no capture allows."""

    @staticmethod
    def forward(ctx, loss, where):
        ctx.where = where
        if where == "forward":
            loss.item()
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        if ctx.where == "backward":
            grad.item()
        return grad, None


for dtype, fp8 in [(torch.float32, ""), (torch.bfloat16, ""), (torch.bfloat16, "current"), (torch.bfloat16, "delayed")]:
    plain, replayed = (train(dtype, fp8, replayed) for replayed in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(plain, replayed, strict=True)), (dtype, fp8)
    assert len(STREAMS) == 4 and len({id(stream) for stream in STREAMS}) == 1  # two micro-batches were captured
    STREAMS.clear()

# Where it cannot be captured, that is said once, and steps are taken as they are.
plain = train(torch.bfloat16, "", replayed=False)
for where in ("forward", "backward"):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert all(torch.equal(a, b) for a, b in zip(plain, train(torch.bfloat16, "", True, where), strict=True)), where
    assert len([w for w in said if "without CUDA graphs: CUDA error: operation not permitted" in str(w.message)]) == 1
print("replays: as wanted")
