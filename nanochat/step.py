"""One optimizer step of training: forward and backward of every micro-batch, then the update.

The loss is the sum over all targets of all micro-batches and ranks, divided by their number, and so is the gradient:
how a step is split does not matter, nor does a micro-batch without targets. Until the number is known, the sums are
divided by the number of tokens, which is the same where all of them are learnt.

A step changes nothing (weights, moments, their counters, fp8's histories) where its loss or a reduced gradient is NaN
or infinite, or where its loss is a spike: more than SIGMAS standard deviations above the mean of the last WINDOW. All
ranks decide alike. On a GPU a flag on the device (`found_inf`) decides, and the host learns of it a step later.
"""

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from nanochat.data.loader import Batch
from nanochat.gpt import GPT
from nanochat.optim import MuonAdamW
from nanochat.ranks import Shared

if TYPE_CHECKING:
    from nanochat.trainer import Stage

WINDOW = 128  # losses
SIGMAS = 6.0
CALIBRATION = 3  # passes, each with the scales that the one before found


@dataclass
class Outcome:
    """Of a step: its mean loss in nats, whether that is a spike, whether `stop` of a rank said so; and whether the
    gradient of the step *before* was finite, where that became known only now (else None).

    Of a step that is no batch of a fixed size (nanochat/rl.py): how many tokens it ran, and what else is logged and
    shown about it.
    """

    loss: float
    spike: bool
    stop: bool
    before: bool | None
    tokens: int | None = None
    row: dict[str, Any] = field(default_factory=dict)
    said: str = ""


def step(
    stage: "Stage",
    model: Any,
    data: Iterator[Batch],
    accumulation: int,
    stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Takes one step. `stop` is asked when this rank's last forward is queued.

    A GPU may still be at work on it, up to a whole backward and update; whether the gradient was finite says
    `stage.optimizer.finish_step()`. Its parts carry names for a profiler (profiling/recorded/analysis.py); without one,
    a name costs some ten microseconds.
    """
    state, optimizer, scaler, world = stage.state, stage.optimizer, stage.scaler, stage.hardware.world
    tokens = stage.settings.total_batch_size
    total, learnt = torch.zeros((), device=stage.hardware.device), 0
    for left in reversed(range(accumulation)):
        with record_function("data"):
            batch = next(data)
            inputs, targets = batch.to(stage.hardware.device)
            learnt += int((batch.targets >= 0).sum())
        if state.step == 0 and state.loader is None:
            calibrate(stage.model, optimizer, inputs, targets, world / tokens, world)
        if left == accumulation - 1:
            histories = flat(stage.model)
        with record_function("forward"):
            loss = model(inputs, targets, loss_reduction="sum")
        total += loss.detach()
        if not left:
            shared = Shared(total, learnt, stop(), world)
        with record_function("backward"):
            loss = loss * (world / tokens)  # the optimizer takes the mean over ranks
            (scaler.scale(loss) if scaler else loss).backward()
        del loss  # with its autograd graph, whose nodes a capture must not find (nanochat/replay.py)
        state.loader = batch.state
    if world > 1:
        agree(stage.model)
    set_rates(stage)
    loss_sum, learnt, stopping = shared.read()
    before = optimizer.finish_step()
    mean = loss_sum / max(1, learnt)
    spike = stage.spike_guard and is_spike(state.recent, mean)
    with record_function("optimizer"):
        if not spike:
            update(stage, mean, tokens / max(1, learnt), histories)
        elif histories is not None:
            put(stage.model, histories)
        optimizer.zero_grad(set_to_none=True)
    return Outcome(mean, spike, stopping > 0, before)


def set_rates(stage: "Stage") -> None:
    """Learning rate, momentum and decay of every group, as the schedule has them at this step."""
    schedule, now = stage.schedule, stage.state.step
    for group in stage.optimizer.param_groups:
        group["lr"] = group["initial_lr"] * schedule.lr(now)
        if group["kind"] == "muon":
            group["momentum"] = schedule.momentum(now)
            group["weight_decay"] = group["initial_weight_decay"] * schedule.weight_decay(now)


def is_spike(recent: list[float], loss: float) -> bool:
    """Whether a finite loss is far above the last WINDOW; never while there are fewer."""
    if len(recent) < WINDOW or not math.isfinite(loss):
        return False
    return loss > statistics.fmean(recent) + SIGMAS * statistics.pstdev(recent)


def update(stage: "Stage", loss: float, scale: float = 1.0, histories: Tensor | None = None) -> None:
    """The optimizer's step, with the gradients multiplied by `scale`; none where the loss is not finite."""
    optimizer, scaler, finite = stage.optimizer, stage.scaler, math.isfinite(loss)
    if scaler:
        scaler.unscale_(optimizer)
    found_inf = torch.ones((), dtype=torch.int32, device=stage.hardware.device)
    if finite:
        optimizer.step(scale=scale)
        found_inf = optimizer.found_inf
    if histories is not None and (now := flat(stage.model)) is not None:
        put(stage.model, torch.where(found_inf != 0, histories, now))
    if scaler:  # its own check knows this rank's gradients only; nothing here waits for the GPU
        for found in scaler._found_inf_per_device(optimizer).values():
            found.copy_(found_inf)
        scaler.update()


def calibrate(model: GPT, optimizer: MuonAdamW, inputs: Tensor, targets: Tensor, share: float, world: int) -> None:
    """Fills fresh histories of fp8's delayed scaling from one row of the first batch; nothing without them.

    share: what the step multiplies the sum of losses with.
    """
    histories = model.histories().values()
    for _ in range(CALIBRATION if histories else 0):
        (model(inputs[:1], targets[:1], loss_reduction="sum") * share).backward()
        optimizer.zero_grad(set_to_none=True)
        if world > 1:
            agree(model)
        for history in histories:
            history.copy_(history[:, :1])  # what was guessed before is forgotten


def agree(model: GPT) -> None:
    """The largest of all ranks' maxima becomes everyone's, so that a resumed run does not depend on its rank."""
    values = flat(model)
    if values is not None:
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        put(model, values)


def flat(model: GPT) -> Tensor | None:
    """A copy of fp8's histories, one after another; None without them."""
    histories = list(model.histories().values())
    return torch.cat([history.flatten() for history in histories]) if histories else None


def put(model: GPT, values: Tensor) -> None:
    """The inverse of `flat`."""
    histories = list(model.histories().values())
    parts = values.split([history.numel() for history in histories])
    torch._foreach_copy_(histories, [part.view_as(history) for history, part in zip(histories, parts)])
