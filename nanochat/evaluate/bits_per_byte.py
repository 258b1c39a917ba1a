"""Bits per byte: how well a model predicts text, in a unit that does not depend on the tokenizer.

    Σ loss in nats over the counted tokens / (ln 2 · Σ bytes those tokens stand for)

Special tokens stand for no text and ignored targets are not predicted: neither counts.
"""

import math
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat.data.loader import Batch
from nanochat.gpt import GPT

Score = Callable[[GPT, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def score(model: GPT, inputs: Tensor, targets: Tensor, token_bytes: Tensor) -> tuple[Tensor, Tensor]:
    """(nats, bytes) of a batch, 0-d float32 and int64. inputs, targets: (B, T) int64; token_bytes: (V,) int64.

    May be compiled. Dynamo guards on the model's mode and on whether gradients are wanted, so that this graph, made in
    eval mode and without gradients, and the one of training do not replace each other.
    """
    losses = model(inputs, targets, loss_reduction="none")  # (B, T)
    size = torch.where(targets >= 0, token_bytes[targets.clamp_min(0)], 0)  # (B, T) bytes
    return (losses * (size > 0)).sum(), size.sum()


@torch.no_grad()
def bits_per_byte(
    model: GPT,
    batches: Iterable[Batch],
    token_bytes: Tensor,
    stop: Callable[[], bool] = lambda: False,
    score: Score = score,
) -> float:
    """Over all batches (of all ranks); NaN when nothing counts. token_bytes: (V,), 0 for special tokens.

    `stop` is asked before each batch; True ends the evaluation early. score: the one above, or compiled.
    """
    device = model.lm_head.weight.device
    token_bytes = token_bytes.to(device)
    nats = torch.zeros((), dtype=torch.float32, device=device)
    count = torch.zeros((), dtype=torch.int64, device=device)
    for batch in batches:
        if stop():
            break
        inputs, targets = batch.to(device)
        more, size = score(model, inputs, targets, token_bytes)
        nats += more
        count += size
    if dist.is_initialized():
        dist.all_reduce(nats)
        dist.all_reduce(count)
    return nats.item() / (math.log(2) * count.item()) if count.item() else math.nan
