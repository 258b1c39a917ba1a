"""Choosing the next token. Every request has its own generator: its text does not depend on who shares the batch."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """temperature 0 takes the likeliest token; top_k keeps that many candidates; seed fixes the draw."""

    temperature: float = 0.6
    top_k: int | None = 50
    seed: int = 42


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token id from logits (V,) float32 on the CPU."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.numel():
        kept = logits.topk(sampling.top_k).values[-1]
        logits = logits.masked_fill(logits < kept, -math.inf)
    return int(torch.multinomial(torch.softmax(logits, -1), 1, generator=generator))
