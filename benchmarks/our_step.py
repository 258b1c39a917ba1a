"""Our training step, ready to be timed: a model from given weights, on tokens of a language that can be learnt.

Imported by a worker before `nanochat` can be, so nothing of ours is imported at the top.
"""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

WARMUP = 40  # steps, as nanochat's recipe and ours have it


def rows(B: int, T: int, V: int, count: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches (B, T), always the same, `count` of them again and again: a word's usual successor, or a frequent word.

    All are made here, in pinned memory where there is a GPU: drawing one takes as long as a good part of a step there.
    """
    draw = np.random.default_rng(0)
    usual, pinned, made = draw.permutation(V), torch.cuda.is_available(), []
    for _ in range(count):
        ids = np.empty((B, T + 1), dtype=np.int64)
        ids[:, 0] = draw.integers(V, size=B)
        for t in range(1, T + 1):
            frequent = np.minimum(draw.zipf(1.3, B) - 1, V - 1)
            ids[:, t] = np.where(draw.random(B) < 0.5, usual[ids[:, t - 1]], frequent)
        pair = torch.from_numpy(ids[:, :-1].copy()), torch.from_numpy(ids[:, 1:].copy())
        made.append(tuple(part.pin_memory() for part in pair) if pinned else pair)
    return itertools.cycle(made)


def drawn_weights(sizes: dict[str, int], folder: str) -> str:
    """Draws weights for workers to start from, into a file in a folder; returns its path. sizes: of a GPTConfig."""
    from safetensors.torch import save_file

    from nanochat.gpt import GPT, GPTConfig

    model = GPT(GPTConfig(**sizes))
    torch.manual_seed(0)
    model.init_weights()
    path = str(Path(folder) / "weights.safetensors")
    save_file(model.state_dict(), path)
    return path


def our_model(sizes: dict[str, int], weights: dict[str, torch.Tensor], hardware: Any) -> Any:
    """A GPT of given sizes and weights where and in what it is computed."""
    from nanochat.gpt import GPT, GPTConfig

    with torch.device("meta"):
        model = GPT(GPTConfig(**sizes))
    model.to_empty(device=hardware.device)
    model.load_state_dict(weights)
    model.set_dtype(hardware.dtype)
    return model


def our_evaluation(
    sizes: dict[str, int], weights: dict[str, torch.Tensor], hardware: Any,
    data: Iterator[tuple[torch.Tensor, torch.Tensor]],
) -> Callable[[], float]:  # fmt: skip
    """A call is a batch's loss as validation has it on a CPU, eagerly. sizes: of a GPTConfig."""
    model = our_model(sizes, weights, hardware).eval()

    @torch.inference_mode()
    def loss() -> float:
        x, y = (part.to(hardware.device) for part in next(data))
        return model(x, y, loss_reduction="none").mean().item()

    return loss


def our_step(
    sizes: dict[str, int], weights: dict[str, torch.Tensor], hardware: Any,
    data: Iterator[tuple[torch.Tensor, torch.Tensor]], B: int, compiled: bool,
) -> Callable[[], float]:  # fmt: skip
    """A call is one step as scripts.base_train takes it, and returns its loss. sizes: of a GPTConfig."""
    from nanochat.data.loader import Batch
    from nanochat.measure import ready_step

    model = our_model(sizes, weights, hardware)
    batches = (Batch(x, y, None) for x, y in data)  # type: ignore[arg-type]
    return ready_step(model, hardware, batches, B, compiled)
